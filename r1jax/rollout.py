"""G samples a prompt, in the graph.

A prompt is prefilled once and its cache is shared by its group. Then one
`lax.while_loop` writes a token a step into each of S slots. When an output ends, its
slot takes the next one of the queue without leaving the loop: nothing has to be
prefilled, the prompt's cache is there. Every token's log-probability is kept, and the
loop ends when all B G outputs have. On a mesh each data shard has its own queue.

`start`, `advance` and `finish` are the pieces: `sample` joins them inside one program;
long rollouts call `advance` again and again with a rising limit, with the same result.
`generate` is the door for people.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from r1jax import implementation as impl
from r1jax import levels as cache_levels
from r1jax import ops, prefill, sampling, sharding, slots, speculative
from r1jax.data.hf_tokenizer import HFTokenizer
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import NumericalError, UserError
from r1jax.models import cache as caches
from r1jax.models.policy import Policy, gathered, layers_of
from r1jax.prompts import PromptBatch, after_bos, pad_left
from r1jax.sampling import Sampler
from r1jax.slots import Decoding
from r1jax.stopping import StopStrings

FOREVER = 2**31 - 1  # steps


@struct.dataclass
class Rollout:
  tokens: jax.Array  # B G T int32, the completions, padded on the right
  mask: jax.Array  # B G T bool, the sampled tokens, the stop token included
  logprobs: jax.Array  # B G T float32, of the distribution sampled from; 0 in padding
  entropy: jax.Array  # B G T float32, nats, of that distribution; 0 in padding
  ended: jax.Array  # B G bool, by a stop token or string; False means truncated
  # What an update needs to see the tokens as the sampler did; None where there is none.
  prompt_experts: jax.Array | None = None  # B N P A uint8 or int32, of the N MoE layers
  experts: jax.Array | None = None  # B G N T A, likewise
  support: jax.Array | None = None  # B G T V/8 uint8, the truncated support's bits
  # What the sampler counted; None where nobody sampled.
  starved: jax.Array | None = None  # B G bool, truncated: the cache's budget was spent
  nonfinite: jax.Array | None = None  # B G bool, broken off: logits were not finite
  norms: jax.Array | None = None  # B G N float32, of each layer's output there, else 0
  steps: jax.Array | None = None  # B int32, of the loop that the rollout came from
  slots: int = struct.field(pytree_node=False, default=0)  # in that loop
  # Of speculative decoding; None without.
  drafted: jax.Array | None = None  # B G int32, tokens that were drafted
  accepted: jax.Array | None = None  # B G int32, and those of them that were taken

  @property
  def lengths(self) -> jax.Array:  # B G int32
    return self.mask.sum(axis=-1)

  def figures(self) -> dict[str, jax.Array]:
    """What the sampler counted, as means; nothing where nobody sampled."""
    if self.steps is None:
      return {}
    taken = 0 if self.accepted is None else self.accepted.sum()
    found = {
      # Slot-steps that wrote, of all.
      "occupancy": (self.lengths.sum() - taken) / (self.steps.mean() * self.slots),
      "starved": self.starved.mean(dtype=jnp.float32),
      "nonfinite": self.nonfinite.mean(dtype=jnp.float32),
    }
    if self.drafted is not None:
      found["draft_acceptance"] = taken / jnp.maximum(self.drafted.sum(), 1)
    return found

  def spoken(self) -> "Rollout":
    """What was said, without the records for the update."""
    return self.replace(prompt_experts=None, experts=None, support=None)


def repeats(ids: jax.Array) -> jax.Array:
  """How often each problem stood in the batch before. Args: ids [B]. Returns: [B]."""
  return jnp.tril(ids[:, None] == ids[None, :], k=-1).sum(axis=1)


class Plan(NamedTuple):
  """What a rollout is laid out for."""

  slots: int  # S
  levels: tuple[cache_levels.Level, ...]  # seats of all data shards counted
  shards: int
  axes: tuple[str, ...] | None  # of the mesh, that cut the batch
  drafts: bool


def plan(policy: Policy, batch: int, s: Sampler) -> Plan:
  """Slots, cache and drafts for so many prompts on the current mesh.

  Raises:
    UserError: slots or budget do not fit the batch, the mesh or the policy.
  """
  axes, _ = impl.axes(batch, 1)
  shards = impl.parts(axes) if axes else 1
  outputs = batch * s.group_size
  count = s.slots or outputs
  if count > outputs:
    raise UserError(
      f"slots={count} for {batch} prompts x group_size={s.group_size} = {outputs}"
      f" outputs: {count - outputs} would never have one. Take {outputs} or fewer, or 0"
      " for one each."
    )
  if count % shards:
    raise UserError(
      f"slots={count} must divide over the {shards} data shards of the mesh."
    )
  if batch // shards % s.prefill_parts:
    raise UserError(
      f"prefill_parts={s.prefill_parts} must divide the {batch // shards} prompts of a"
      f" data shard ({batch} over {shards})."
    )
  drafts = speculative.wanted(s, policy, count // shards)
  tokens = s.max_tokens + drafts  # a draft may lie behind a row's end
  how = dict(budget=s.cache_tokens, shards=shards)
  if not caches.is_split(policy.config.implementation):
    tokens = ops.cache_slots(tokens, "mosaic")
    # A kernel's work follows the live tokens of itself.
    how["first"] = 4 * 128 if s.cache_tokens else tokens
  levels = cache_levels.plan(count, tokens, **how)
  return Plan(count, levels, shards, axes, drafts)


@jax.named_scope("prefill")
def start(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  key: jax.Array,
  s: Sampler,
  *,
  earlier: jax.Array | None = None,
  limits: jax.Array | None = None,
) -> Decoding:
  """Prefills each prompt once and gives the first outputs their slots.

  Args:
    policy, params, router, prompts, key: as in `sample`.
    s: the settings.
    earlier, limits: as in `sample`.

  Raises:
    UserError: as `plan`.
  """
  batch, cut = prompts.tokens.shape[0], sharding.shard_batch
  earlier = repeats(prompts.ids) if earlier is None else earlier
  made = plan(policy, batch, s)
  how = dict(drafts=made.drafts, record_experts=s.record_experts)
  how |= dict(parts=s.prefill_parts, shards=made.shards)
  out = prefill.read(policy, params, router, prompts, **how)
  split = caches.is_split(policy.config.implementation)
  layout, draft_cache = policy.config.cache, None
  cache = caches.empty(out.cache, made.levels, layout, split)
  if made.drafts:
    draft_cache = caches.empty(out.draft_cache, made.levels, layout, split)
  lengths = prompts.mask.sum(axis=1)
  carry = Decoding(
    step=jnp.zeros((), jnp.int32),
    begun=jnp.zeros(made.shards, jnp.int32),
    outputs=slots.unwritten(policy, prompts, out, key, s, earlier, limits, made.drafts),
    prompts=slots.Prompts(
      starts=cut(cache.window - lengths),
      lengths=cut(lengths),
      hidden=cut(out.hidden),
      norms=cut(out.norms.swapaxes(0, 1)),
    ),
    slots=slots.idle(policy, out, batch * s.group_size // made.shards, made, s),
    cache=cache,
    draft_cache=draft_cache,
    prompt_experts=out.experts,
    levels=made.levels,
    shards=made.shards,
    axes=made.axes,
  )
  everyone = cut(jnp.ones(made.slots, bool))
  return slots.turn(carry, everyone, jnp.zeros_like(everyone))


@jax.named_scope("decode")
def advance(
  policy: Policy,
  params: dict,
  router: dict,
  carry: Decoding,
  limit: int | jax.Array,
  s: Sampler,
) -> Decoding:
  """Decodes until the loop has made `limit` steps or every output has ended.

  Token t of sample g of the problem with id i is drawn with the key
  fold_in(fold_in(fold_in(key, i), g), t) alone: an output depends neither on its slot,
  nor on where the loop was cut, nor on which other problems share its batch. (A problem
  that stands in the batch for the n-th time goes on counting: its samples are n * G +
  g.)
  """
  if s.gather_weights:
    params = gathered(policy, params)
  variables = {"params": params, "router": router}
  layers = layers_of(variables) if carry.cache.split else None
  turn = step if carry.draft_cache is None else speculative.step

  def more(c: Decoding):
    return (c.step < limit) & c.running

  def body(c: Decoding) -> Decoding:
    return turn(policy, variables, layers, c.replace(step=c.step + 1), s)

  return jax.lax.while_loop(more, body, carry)


def step(
  policy: Policy, variables: dict, layers: list | None, c: Decoding, s: Sampler
) -> Decoding:
  """One turn of the loop: every slot writes a token."""
  logits = policy.apply(variables, c.slots.hidden, method="logits")
  with jax.named_scope("sampling"):
    logits, packed = sampling.tempered(logits, s)
    drawn = sampling.pick(logits, sampling.uniforms(c.slots.keys, c.slots.length))
    drawn = drawn, *sampling.statistics(logits, drawn), packed
  c, token, writes, over = slots.write(c, drawn, s)
  at = slots.place(c, writes)
  out = policy.apply(variables, token[:, None], at, c.cache, layers, method="decode")
  c = slots.record(c, at, out.experts, writes[:, None])
  state = c.slots.replace(hidden=out.hidden[:, 0], norms=out.norms.swapaxes(0, 1))
  return slots.turn(c.replace(slots=state, cache=out.cache), over, writes)


def finish(carry: Decoding) -> Rollout:
  o = carry.outputs
  batch, _, length = o.tokens.shape
  written = jnp.arange(length)[None, None]
  experts = None if o.experts is None else jnp.moveaxis(o.experts, 3, 2)
  of_prompts = carry.prompt_experts
  return Rollout(
    tokens=o.tokens,
    mask=written < o.lengths[..., None],
    logprobs=o.logprobs,
    entropy=o.entropy,
    ended=o.ended,
    starved=o.starved,
    nonfinite=o.nonfinite,
    norms=o.norms,
    steps=jnp.broadcast_to(carry.step, (batch,)),
    slots=carry.slots.output.shape[0],
    prompt_experts=None if of_prompts is None else jnp.moveaxis(of_prompts, 0, 1),
    experts=experts,
    support=o.support,
    drafted=o.drafted,
    accepted=o.accepted,
  )


@jax.named_scope("rollout")
def sample(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  earlier: jax.Array | None = None,
  limits: jax.Array | None = None,
  **settings: Any,
) -> Rollout:
  """A whole rollout of G completions a prompt.

  Args:
    policy: the network.
    params: its parameters.
    router: its router biases.
    prompts: B left-padded prompts.
    key: of this rollout.
    earlier: [B] int32, how often each problem stood in the batch before, where this is
      a part of a larger one; None: it is counted here.
    limits: [B, G] int32, tokens that each output may have; None: max_tokens.
    settings: of sampling.Sampler.

  Raises:
    UserError: the settings, or the slots and the budget for this batch and mesh.
  """
  s = Sampler(**settings)
  carry = start(policy, params, router, prompts, key, s, earlier=earlier, limits=limits)
  return finish(advance(policy, params, router, carry, FOREVER, s))


@dataclasses.dataclass(frozen=True)
class Completion:
  """One output, for people."""

  text: str
  tokens: list[int]
  logprobs: list[float]
  ended: bool  # by a stop token or string; False: truncated


@functools.partial(jax.jit, static_argnames=("policy", "s"))
def _sampled(policy, params, router, prompts, key, s):
  return finish(
    advance(
      policy, params, router, start(policy, params, router, prompts, key, s), FOREVER, s
    )
  ).spoken()


_stop_strings = functools.lru_cache(StopStrings.of)  # so that a program is kept too


def generate(
  policy: Policy,
  params: dict,
  router: dict,
  tokenizer: Tokenizer | HFTokenizer,
  prompts: list[str],
  *,
  samples: int = 1,
  max_tokens: int = 256,
  stop: Sequence[str] = (),
  window: int = 0,
  seed: int = 0,
  **settings: Any,
) -> list[list[Completion]]:
  """What the policy says to each prompt.

  Args:
    policy, params, router: the network.
    tokenizer: its own.
    prompts: texts as they are; BOS is put before, where the tokenizer has one and they
      do not begin with it.
    samples: of each.
    max_tokens: of a completion.
    stop: strings that end a completion; EOS does in any case.
    window: tokens of the longest prompt that one program serves; 0: the next power of
      two. Prompts of any lengths in it share the program.
    seed: another one gives other samples.
    settings: temperature, top_k, top_p, min_p, slots, cache_tokens, speculative, as in
      sampling.Sampler.

  Returns:
    For each prompt its samples.

  Raises:
    UserError: no prompt, one longer than the window, a setting that is wrong.
  """
  if not prompts:
    raise UserError("generate: prompts is empty; give at least one text.")
  rows = [after_bos(tokenizer.encode(prompt), tokenizer) for prompt in prompts]
  longest = max(map(len, rows))
  window = window or 1 << (longest - 1).bit_length()
  if longest > window:
    raise UserError(
      f"generate: a prompt of {longest} tokens does not fit window={window}. Raise it,"
      " or give 0 for the next power of two."
    )
  tokens, mask = pad_left(rows, window, tokenizer.pad_id)
  s = Sampler(
    group_size=samples,
    max_tokens=max_tokens,
    pad_id=tokenizer.pad_id,
    stop_ids=tokenizer.stop_ids,
    stop=_stop_strings(tuple(stop), tokenizer),
    **settings,
  )
  batch = PromptBatch(
    tokens=jnp.asarray(tokens),
    mask=jnp.asarray(mask),
    answers=jnp.full((len(rows), 1, 1), -1, jnp.int32),
    ids=jnp.arange(len(rows), dtype=jnp.int32),
  )
  said = jax.device_get(
    _sampled(policy, params, router, batch, jax.random.key(seed), s)
  )
  if said.nonfinite.any():
    row, sample = np.argwhere(said.nonfinite)[0]
    raise NumericalError(
      f"generate: the logits of prompt {row}, sample {sample} at token"
      f" {said.lengths[row, sample]} are not finite; norms of the layers' outputs:"
      f" {said.norms[row, sample]}. Are these weights of a run that diverged?"
    )

  def completion(row, sample):
    n = said.lengths[row, sample]
    ids = said.tokens[row, sample, :n].tolist()
    logprobs = said.logprobs[row, sample, :n].tolist()
    return Completion(
      tokenizer.decode(ids), ids, logprobs, bool(said.ended[row, sample])
    )

  return [[completion(b, g) for g in range(samples)] for b in range(len(rows))]
