"""The twins of accuracy.py, format.py, language.py and length.py that run inside the
compiled step.

Differs from the host rules, which read text: a tag counts only as its own token, not
spelled out in characters; white space is what the tokenizer holds as pieces of it; an
answer must have the accepted answer's tokens (`07` is not `7`); a word is what stands
in one token. An evaluation uses the host rules.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.rewards.language import plain, scripts_of, words
from r1jax.rewards.verdict import OUTCOMES


@struct.dataclass
class Rewards:
  """What a reward function says of a rollout: total = sum of weights * parts."""

  total: jax.Array  # B G float32
  parts: dict[str, jax.Array]  # B G float32 each, without their weights
  weights: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
  outcome: jax.Array | None = None  # B G int32, a place in OUTCOMES; None: all scored
  # B bool each: the problems that a part is meant for; a part not named: all of them.
  meant: dict[str, jax.Array] = struct.field(default_factory=dict)

  @property
  def valid(self) -> jax.Array:
    """B G bool: the samples that were scored. The others, lost by a failure of the
    infrastructure, have no share in any statistic of rewards and no policy loss (what
    their tokens did in the experts is still counted)."""
    if self.outcome is None:
      return jnp.ones(self.total.shape, bool)
    return self.outcome != OUTCOMES.index("infrastructure")

  def mean(self, x: jax.Array, part: str = "") -> jax.Array:
    """Of [B, G] values over the samples that were scored, and that the part, if one is
    named, is meant for; 0 without any."""
    kept = self.valid
    if part in self.meant:
      kept = kept & self.meant[part][:, None]
    return jnp.where(kept, x, 0.0).sum() / jnp.maximum(kept.sum(), 1)

  @classmethod
  def of(
    cls, outcome: jax.Array | None = None, **weighted: tuple[float, jax.Array]
  ) -> "Rewards":
    """From name=(weight, part [B, G])."""
    return cls(
      outcome=outcome,
      total=sum(w * x for w, x in weighted.values()),
      parts={name: x for name, (_, x) in weighted.items()},
      weights=tuple((name, float(w)) for name, (w, _) in weighted.items()),
    )

  def plus(self, name: str, weight: float, part: jax.Array) -> "Rewards":
    """With one more part."""
    return self.replace(
      total=self.total + weight * part,
      parts={**self.parts, name: part},
      weights=(*self.weights, (name, float(weight))),
    )


@dataclasses.dataclass(frozen=True)
class TagTable:
  """What the rules need to know of a tokenizer."""

  think: int
  end_think: int
  answer: int
  end_answer: int
  silent: np.ndarray  # V bool: white space, EOS and padding

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> "TagTable":
    silent = tokenizer.spaces()
    silent[[tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]] = True
    ids = (tokenizer.id(t) for t in ("<think>", "</think>", "<answer>", "</answer>"))
    return cls(*ids, silent)


def accuracy(
  tokens: jax.Array,
  mask: jax.Array,
  accepted: jax.Array,
  tags: TagTable,
  *,
  prefill_think: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """1 where the tokens between the last `<answer>` and the next `</answer>`, outer
  white space aside, equal an accepted answer. What stands in the thinking, or after one
  that never ends, is no answer.

  Args:
    tokens: [B, G, T] int32 completions.
    mask: [B, G, T] bool.
    accepted: [B, K, L] int32, -1 beyond each answer's end; a row of -1 accepts nothing.
    tags: of the tokenizer.
    prefill_think: the prompt already ended in `<think>`.

  Returns:
    [B, G] float32, and the outcomes [B, G] int32: correct, wrong or unparsable.
  """
  length = tokens.shape[-1]
  at = jnp.arange(length).reshape(1, 1, -1)
  thought = jnp.max(jnp.where(mask & (tokens == tags.end_think), at, -1), axis=-1)
  begun = jnp.max(jnp.where(mask & (tokens == tags.think), at, -1), axis=-1)
  thinks = (begun > thought) | (prefill_think & (thought < 0))
  opened = jnp.max(jnp.where(mask & (tokens == tags.answer), at, -1), axis=-1)
  opened = jnp.where((opened < thought) | thinks, -1, opened)
  closing = mask & (tokens == tags.end_answer) & (at > opened[..., None])
  closed = jnp.min(jnp.where(closing, at, length), axis=-1)
  inside = (at > opened[..., None]) & (at < closed[..., None])
  content = inside & ~jnp.asarray(tags.silent)[tokens]
  first = jnp.min(jnp.where(content, at, length), axis=-1)
  last = jnp.max(jnp.where(content, at, -1), axis=-1)

  width = accepted.shape[-1]
  window = first[..., None] + jnp.arange(width).reshape(1, 1, -1)  # B G L
  said = jnp.take_along_axis(tokens, jnp.clip(window, 0, length - 1), axis=-1)
  said = jnp.where(window <= last[..., None], said, -1)
  same = jnp.all(said[:, :, None] == accepted[:, None], axis=-1)  # B G K
  found = (opened >= 0) & (closed < length) & (first < length)
  right = found & (last - first < width) & same.any(axis=-1)
  correct, wrong, unparsable = map(OUTCOMES.index, ("correct", "wrong", "unparsable"))
  outcome = jnp.where(right, correct, jnp.where(found, wrong, unparsable))
  return right.astype(jnp.float32), outcome.astype(jnp.int32)


def chat_format(
  tokens: jax.Array, mask: jax.Array, tags: TagTable, *, prefill_think: bool
) -> jax.Array:
  """The style `chat` of format.py: one think block with content, first, and content
  after it. Arguments and result as `accuracy`."""
  at = jnp.arange(tokens.shape[-1]).reshape(1, 1, -1)
  opens, closes = mask & (tokens == tags.think), mask & (tokens == tags.end_think)
  content = mask & ~jnp.asarray(tags.silent)[tokens] & ~opens & ~closes
  tag = (tokens == tags.answer) | (tokens == tags.end_answer)
  begun = jnp.argmax(opens, axis=-1)
  once = opens.sum(axis=-1) == 1
  if prefill_think:
    begun, once = jnp.full(tokens.shape[:-1], -1), ~opens.any(axis=-1)
  ended = jnp.argmax(closes, axis=-1)
  once = once & (closes.sum(axis=-1) == 1) & (begun < ended)
  begun, ended = begun[..., None], ended[..., None]
  before = (content & (at < begun)).any(axis=-1)
  inside, after = (at > begun) & (at < ended), at > ended
  thought = (content & ~tag & inside).any(axis=-1) & ~(tag & mask & inside).any(axis=-1)
  told = (content & ~tag & after).any(axis=-1)
  return (once & thought & told & ~before).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LanguageTable:
  """Which tokens hold words, and of which language."""

  languages: tuple[str, ...]
  words: np.ndarray  # L V int32, words of the language in a token
  every: np.ndarray  # V int32, words in a token

  @classmethod
  def of(cls, tokenizer: Tokenizer, languages: Sequence[str]) -> "LanguageTable":
    """Raises UserError: no such language."""
    scripts = [scripts_of(language) for language in languages]
    first = tokenizer.eos_id + 1
    texts = [""] * first + [
      tokenizer.decode([i]) for i in range(first, tokenizer.vocab)
    ]
    found = [[script for _, script in words(plain(t))] for t in texts]
    ours = [[sum(s in kept for s in f) for f in found] for kept in scripts]
    return cls(tuple(languages), np.array(ours), np.array([len(f) for f in found]))


def language_consistency(
  tokens: jax.Array,
  mask: jax.Array,
  target: jax.Array,
  tags: TagTable,
  table: LanguageTable,
  *,
  prefill_think: bool,
) -> jax.Array:
  """The share of the thinking's words that are in the target language: 1 for thinking
  without a word, 0 for none (language.py).

  Args:
    tokens, mask, tags, prefill_think: as in `accuracy`.
    target: [B] int32, a place in the table's languages; -1: any language will do, 1.
    table: of the tokenizer.

  Returns:
    [B, G] float32.
  """
  at = jnp.arange(tokens.shape[-1]).reshape(1, 1, -1)
  opens, closes = mask & (tokens == tags.think), mask & (tokens == tags.end_think)
  nowhere = -1 if prefill_think else -2
  begun = jax.lax.cummax(jnp.where(opens, at, nowhere), axis=2)
  ended = jax.lax.cummax(jnp.where(closes, at, -2), axis=2)
  inside = mask & (begun > ended) & ~opens
  ours = jnp.asarray(table.words)[target[:, None, None], tokens]
  right = jnp.where(inside, ours, 0).sum(axis=-1)
  every = jnp.where(inside, jnp.asarray(table.every)[tokens], 0).sum(axis=-1)
  answer = (tokens == tags.answer) | (tokens == tags.end_answer)
  some = (inside & ~answer & ~jnp.asarray(tags.silent)[tokens]).any(axis=-1)
  share = jnp.where(every > 0, right / jnp.maximum(every, 1), some.astype(float))
  return jnp.where(target[:, None] < 0, 1.0, share)


def format_reward(
  tokens: jax.Array, mask: jax.Array, tags: TagTable, *, prefill_think: bool
) -> jax.Array:
  """The style `tags` of format.py: one think block and one answer block in order, both
  with content, and nothing but white space (and EOS) around them. Arguments and result
  as `accuracy`."""
  length = tokens.shape[-1]
  at = jnp.arange(length).reshape(1, 1, -1)
  content = mask & ~jnp.asarray(tags.silent)[tokens]
  order = (tags.think, tags.end_think, tags.answer, tags.end_answer)
  if prefill_think:
    once = ~jnp.any(mask & (tokens == tags.think), axis=-1)
    places = [jnp.full(tokens.shape[:-1], -1)]
    order = order[1:]
  else:
    once, places = jnp.ones(tokens.shape[:-1], bool), []
  is_tag = tokens == tags.think
  for tag in order:
    here = mask & (tokens == tag)
    is_tag = is_tag | here
    once = once & (here.sum(axis=-1) == 1)
    places.append(jnp.argmax(here, axis=-1))
  think, end_think, answer, end_answer = places
  ordered = (think < end_think) & (end_think < answer) & (answer < end_answer)
  words = content & ~is_tag

  def any_between(a, b):
    return jnp.any(words & (at > a[..., None]) & (at < b[..., None]), axis=-1)

  outside = (
    jnp.any(words & (at < think[..., None]), axis=-1)
    | any_between(end_think, answer)
    | jnp.any(words & (at > end_answer[..., None]), axis=-1)
  )
  filled = any_between(think, end_think) & any_between(answer, end_answer)
  return (once & ordered & filled & ~outside).astype(jnp.float32)


def overlong(lengths: jax.Array, *, window: int, buffer: int) -> jax.Array:
  """The soft penalty of length.py, 0 to -1, in tokens. Args: lengths [B, G] int32."""
  over = lengths.astype(float) - (window - buffer)
  return -jnp.clip(over / buffer, 0.0, 1.0)


FORMATS = {"tags": format_reward, "chat": chat_format}


def rule_reward(
  tags: TagTable,
  *,
  accuracy_weight: float,
  format_weight: float,
  prefill_think: bool,
  format_style: str = "tags",
  language_weight: float = 0.0,
  table: LanguageTable | None = None,
  targets: np.ndarray | None = None,
) -> Callable[[Any, Any], Rewards]:
  """R_rule = w_acc R_acc + w_format R_format (R1, Eq. 4: both weights 1), and with a
  language weight R_rule + w_lang R_language (Eq. 7).

  Args:
    tags: of the tokenizer.
    accuracy_weight, format_weight, language_weight: of the parts.
    prefill_think: the prompts ended in `<think>`.
    format_style: of the format reward.
    table: of the languages, where one is asked for.
    targets: [problems] int32, the place in the table of each problem's language, by the
      problem's id.

  Returns:
    A function (PromptBatch, Rollout) -> Rewards with the parts accuracy, format and,
    with a table, language.
  """

  def reward(prompts: Any, rollout: Any) -> Rewards:
    said, how = (rollout.tokens, rollout.mask), dict(prefill_think=prefill_think)
    acc, outcome = accuracy(*said, prompts.answers, tags, **how)
    parts = {
      "accuracy": (accuracy_weight, acc),
      "format": (format_weight, FORMATS[format_style](*said, tags, **how)),
    }
    if table is not None:
      target = jnp.asarray(targets)[prompts.ids]
      share = language_consistency(*said, target, tags, table, **how)
      parts["language"] = language_weight, share
    return Rewards.of(outcome, **parts)

  return reward
