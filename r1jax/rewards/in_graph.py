"""The twins of accuracy.py, format.py and length.py that run inside the compiled step.

Differs from the host rules, which read text: a tag counts only as its own token, not
spelled out in characters; white space is what the tokenizer holds as pieces of it; an
answer must have the accepted answer's tokens (`07` is not `7`). An evaluation uses the
host rules.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.rewards.verdict import OUTCOMES


@struct.dataclass
class Rewards:
  """What a reward function says of a rollout: total = sum of weights * parts."""

  total: jax.Array  # B G float32
  parts: dict[str, jax.Array]  # B G float32 each, without their weights
  weights: tuple[tuple[str, float], ...] = struct.field(pytree_node=False)
  outcome: jax.Array | None = None  # B G int32, a place in OUTCOMES; None: all scored

  @property
  def valid(self) -> jax.Array:
    """B G bool: the samples that were scored. The others, lost by a failure of the
    infrastructure, have no share in any statistic of rewards and no policy loss (what
    their tokens did in the experts is still counted)."""
    if self.outcome is None:
      return jnp.ones(self.total.shape, bool)
    return self.outcome != OUTCOMES.index("infrastructure")

  def mean(self, x: jax.Array) -> jax.Array:
    """Of [B, G] values over the samples that were scored; 0 without any."""
    valid = self.valid
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)

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


def format_reward(
  tokens: jax.Array, mask: jax.Array, tags: TagTable, *, prefill_think: bool
) -> jax.Array:
  """1 for one think block and one answer block in order, both with content, and nothing
  but white space (and EOS) around them. Arguments and result as `accuracy`."""
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


def rule_reward(
  tags: TagTable, *, accuracy_weight: float, format_weight: float, prefill_think: bool
) -> Callable[[Any, Any], Rewards]:
  """R_rule = w_acc R_acc + w_format R_format (R1, Eq. 4: both weights 1).

  Returns:
    A function (PromptBatch, Rollout) -> Rewards with the parts accuracy and format.
  """

  def reward(prompts: Any, rollout: Any) -> Rewards:
    acc, outcome = accuracy(
      rollout.tokens, rollout.mask, prompts.answers, tags, prefill_think=prefill_think
    )
    form = format_reward(
      rollout.tokens, rollout.mask, tags, prefill_think=prefill_think
    )
    return Rewards.of(
      outcome, accuracy=(accuracy_weight, acc), format=(format_weight, form)
    )

  return reward
