"""The S slots that decode, and the queue of outputs that they write.

A slot writes an output token by token. When that ends the slot takes the next of the
queue; a finished row leaves nothing behind that would have to be moved. On a mesh each
data shard does all of this for its own prompts.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r1jax import implementation as impl
from r1jax import sampling, sharding
from r1jax.levels import Level
from r1jax.models.cache import Cache, DecodeStep
from r1jax.models.policy import Policy
from r1jax.sampling import Sampler


@struct.dataclass
class Outputs:
  """What has been written; on each device the outputs of its own prompts."""

  tokens: jax.Array  # B G T int32
  logprobs: jax.Array  # B G T
  entropy: jax.Array  # B G T
  lengths: jax.Array  # B G int32
  ended: jax.Array  # B G bool
  starved: jax.Array  # B G bool
  nonfinite: jax.Array  # B G bool
  norms: jax.Array  # B G N
  limits: jax.Array  # B G int32, tokens that each may have
  keys: jax.Array  # B G 2 uint32
  experts: jax.Array | None  # B G T N A
  support: jax.Array | None  # B G T V/8
  drafted: jax.Array | None  # B G int32
  accepted: jax.Array | None  # B G int32


@struct.dataclass
class Prompts:
  """What a slot takes up with a new output."""

  starts: jax.Array  # B int32, the first slot of each in the cache
  lengths: jax.Array  # B int32
  hidden: jax.Array  # B D, of the last token
  norms: jax.Array  # B N


@struct.dataclass
class Draft:
  """What a slot remembers of its drafts (speculative.py)."""

  token: jax.Array  # S int32, the output's last
  before: jax.Array  # S D, the hidden state of the token before the last
  rejected: jax.Array  # S bool, the last draft was
  probabilities: jax.Array  # S V float32, that it had been drawn with


@struct.dataclass
class Slots:
  """The S rows that decode."""

  # S int32, the output that each writes, counted on its device; B G (there): none
  output: jax.Array
  length: jax.Array  # S int32, tokens of it
  hidden: jax.Array  # S D, of its last token
  norms: jax.Array  # S N
  keys: jax.Array  # S 2 uint32
  matched: jax.Array | None  # S int16, of the stop strings
  seats: tuple[jax.Array | None, ...]  # as in DecodeStep; -1: none
  draft: Draft | None


@struct.dataclass
class Decoding:
  """The carry of the loop."""

  step: jax.Array  # [] int32
  begun: jax.Array  # X int32, outputs that the queue of each data shard has given out
  outputs: Outputs
  prompts: Prompts
  slots: Slots
  cache: Cache
  draft_cache: Cache | None  # of the MTP module
  prompt_experts: jax.Array | None  # N B P A
  levels: tuple[Level, ...] = struct.field(pytree_node=False)
  # Data shards, and the mesh axes that make them.
  shards: int = struct.field(pytree_node=False)
  axes: tuple[str, ...] | None = struct.field(pytree_node=False)

  @property
  def total(self) -> int:
    """Outputs of one data shard."""
    b, g, _ = self.outputs.tokens.shape
    return b * g // self.shards

  @property
  def grouped(self) -> bool:
    """Every output has a slot of its own, in their order."""
    return self.slots.output.shape[0] == self.total * self.shards

  @property
  def running(self) -> jax.Array:
    """[] bool, whether an output is still being written."""
    alive = (self.slots.output < self.total).any()
    return alive & ~self.outputs.nonfinite.any()


def narrow(policy: Policy, experts: jax.Array | None) -> jax.Array | None:
  """Experts [N, B, ...] in a byte where they fit."""
  if experts is None:
    return None
  few = policy.config.experts <= 256
  return sharding.shard_batch(experts.astype(jnp.uint8 if few else jnp.int32), axis=1)


def unwritten(policy, prompts, out, key, s, earlier, limits, drafts) -> Outputs:
  """Nothing is written yet."""
  cut, rows = sharding.shard_batch, (prompts.ids.shape[0], s.group_size)

  def new(fill, *shape, dtype=jnp.float32):
    return cut(jnp.full((*rows, *shape), fill, dtype))

  experts = narrow(policy, out.experts)
  if experts is not None:
    shape = s.max_tokens, experts.shape[0], experts.shape[-1]
    experts = new(0, *shape, dtype=experts.dtype)
  support = None
  if s.truncates:
    bits = -(-policy.config.vocab // 8)
    support = new(0, s.max_tokens, bits, dtype=jnp.uint8)
  samples = earlier[:, None] * s.group_size + jnp.arange(s.group_size)[None]  # B G
  limits = new(s.max_tokens, dtype=jnp.int32) if limits is None else limits
  return Outputs(
    tokens=new(s.pad_id, s.max_tokens, dtype=jnp.int32),
    logprobs=new(0, s.max_tokens),
    entropy=new(0, s.max_tokens),
    lengths=new(0, dtype=jnp.int32),
    ended=new(False, dtype=bool),
    starved=new(False, dtype=bool),
    nonfinite=new(False, dtype=bool),
    norms=new(0, out.norms.shape[0]),
    limits=cut(jnp.clip(limits, 1, s.max_tokens)),
    keys=cut(sampling.row_keys(key, prompts.ids, samples)),
    experts=experts,
    support=support,
    drafted=new(0, dtype=jnp.int32) if drafts else None,
    accepted=new(0, dtype=jnp.int32) if drafts else None,
  )


def idle(policy, out, nothing, made, s) -> Slots:
  """Slots without an output, whose number is `nothing`."""
  width, dtype = out.hidden.shape[-1], out.hidden.dtype

  def new(fill, *shape, dtype=jnp.int32):
    return sharding.shard_batch(jnp.full((made.slots, *shape), fill, dtype))

  draft = None
  if made.drafts:
    draft = Draft(
      token=new(0),
      before=new(0, width, dtype=dtype),
      rejected=new(False, dtype=bool),
      probabilities=new(0, policy.config.vocab, dtype=jnp.float32),
    )
  return Slots(
    output=new(nothing),
    length=new(0),
    hidden=new(0, width, dtype=dtype),
    norms=new(0, out.norms.shape[0], dtype=jnp.float32),
    keys=new(0, 2, dtype=jnp.uint32),
    matched=new(0, dtype=jnp.int16) if s.stop else None,
    seats=tuple(None if lv.seats == made.slots else new(-1) for lv in made.levels),
    draft=draft,
  )


def each(carry: Decoding, function: Callable, *args: Any) -> Any:
  """function(...) of each data shard's own part of the args."""

  def spec(tree):
    return jax.tree.map(lambda _: P(carry.axes), tree)

  shapes = jax.eval_shape(function, *args)
  return impl.on_each_device(function, tuple(map(spec, args)), spec(shapes))(*args)


def flat(x: jax.Array) -> jax.Array:
  """[B, G, ...] -> [B G, ...]."""
  return x.reshape(-1, *x.shape[2:])


def put(x: jax.Array, where: tuple, value: Any) -> jax.Array:
  """x [B, G, ...] with values at output numbers b G + g; beyond the end: nowhere."""
  return flat(x).at[where].set(value, mode="drop").reshape(x.shape)


def place(carry: Decoding, writes: jax.Array) -> DecodeStep:
  """Where the next token of each slot stands. Args: writes [S] bool, of those that have
  one."""

  def local(lengths, slots, prompts):
    prompt = prompt_of(slots.output, lengths)
    return (prompts.lengths[prompt] + slots.length)[:, None], prompt

  args = carry.outputs.lengths, carry.slots, carry.prompts
  positions, prompt = each(carry, local, *args)
  return DecodeStep(
    positions=positions,
    lengths=carry.slots.length,
    writes=writes,
    prompts=prompt,
    prompt_starts=carry.prompts.starts,
    seats=carry.slots.seats,
    levels=carry.levels,
    grouped=carry.grouped,
  )


def prompt_of(output: jax.Array, lengths: jax.Array) -> jax.Array:
  """The prompt of each output number; the last one for none. Args: lengths [B, G]."""
  return jnp.minimum(output, lengths.size - 1) // lengths.shape[1]


@jax.named_scope("slots")
def write(
  carry: Decoding,
  drawn: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None],
  s: Sampler,
  *,
  ahead: int = 0,
  allowed: jax.Array | None = None,
) -> tuple[Decoding, jax.Array, jax.Array, jax.Array]:
  """Notes a token a slot.

  Args:
    carry: before.
    drawn: tokens [S], their log-probabilities [S], entropies [S], packed supports.
    s: the settings.
    ahead: how many tokens of this step were noted before.
    allowed: [S] bool, the slots that have one; None: all that are busy.

  Returns:
    (carry, tokens [S], the slots that took one [S] bool, those whose output is over [S]
    bool).
  """

  def local(outputs: Outputs, slots: Slots, drawn, allowed):
    token, logprob, entropy, packed = drawn
    total, length = outputs.lengths.size, slots.length + ahead
    live = slots.output < total
    if allowed is not None:
      live &= allowed
    bad = live & ~jnp.isfinite(logprob + entropy)
    writes = live & ~bad
    output = jnp.where(writes, slots.output, total)
    where, broken = (output, length), jnp.where(bad, slots.output, total)
    token = jnp.where(writes, token, s.pad_id)
    stops = (token[:, None] == jnp.asarray(s.stop_ids, jnp.int32)[None]).any(axis=1)
    matched = slots.matched
    if s.stop:
      seen = jnp.asarray(s.stop.table)[matched, token]
      matched = jnp.where(writes, seen, matched)
      stops |= matched == s.stop.found
    stops &= writes
    limits = flat(outputs.limits)[jnp.minimum(slots.output, total - 1)]
    support = outputs.support
    if support is not None:
      support = put(support, where, packed)
    outputs = outputs.replace(
      tokens=put(outputs.tokens, where, token),
      logprobs=put(outputs.logprobs, where, logprob),
      entropy=put(outputs.entropy, where, entropy),
      lengths=put(outputs.lengths, (output,), length + 1),
      ended=put(outputs.ended, (jnp.where(stops, slots.output, total),), True),
      nonfinite=put(outputs.nonfinite, (broken,), True),
      norms=put(outputs.norms, (broken,), slots.norms),
      support=support,
    )
    over = bad | stops | (writes & (length + 1 >= limits))
    return outputs, slots.replace(matched=matched), token, writes, over

  args = carry.outputs, carry.slots, drawn, allowed
  outputs, slots, token, writes, over = each(carry, local, *args)
  return carry.replace(outputs=outputs, slots=slots), token, writes, over


@jax.named_scope("slots")
def record(carry: Decoding, at: DecodeStep, experts, took: jax.Array) -> Decoding:
  """With the experts [N, S, Q, A] of the tokens that were just decoded. Args: took [S,
  Q] bool, which of those are the output's."""
  if carry.outputs.experts is None:
    return carry

  def local(kept, output, places, took, chosen):
    total = kept.shape[0] * kept.shape[1]
    where = jnp.where(took, output[:, None], total), places
    return put(kept, where, chosen.astype(kept.dtype))

  chosen = jnp.moveaxis(experts, 0, 2)  # S Q N A
  outputs = carry.outputs
  args = outputs.experts, carry.slots.output, at.places(), took, chosen
  return carry.replace(outputs=outputs.replace(experts=each(carry, local, *args)))


@jax.named_scope("slots")
def turn(carry: Decoding, over: jax.Array, grown: jax.Array) -> Decoding:
  """After a step: slots whose output is over take the next of the queue, others may
  need a seat further on.

  Args:
    carry: before.
    over: [S] bool.
    grown: [S] bool or int32, tokens that each slot has written in the step.
  """

  def local(outputs: Outputs, slots: Slots, prompts: Prompts, begun, over, grown):
    total = outputs.lengths.size
    live = slots.output < total
    # Also of an output's last token, from which nothing is drawn any more.
    bad = live & ~jnp.isfinite(slots.hidden).all(axis=-1)
    broken = jnp.where(bad, slots.output, total)
    going, length = live & ~over & ~bad, slots.length + grown
    seats, starved = _seats(carry, slots, going, length)
    outputs = outputs.replace(
      starved=put(outputs.starved, (jnp.where(starved, slots.output, total),), True),
      nonfinite=put(outputs.nonfinite, (broken,), True),
      norms=put(outputs.norms, (broken,), slots.norms),
    )
    going &= ~starved
    seats = tuple(None if x is None else jnp.where(going, x, -1) for x in seats)
    rank = begun[0] + jnp.cumsum(~going) - 1
    taken = ~going & (rank < total)
    output = jnp.where(going, slots.output, jnp.where(taken, rank, total))
    output, begun = output.astype(jnp.int32), begun + taken.sum(dtype=jnp.int32)
    prompt = prompt_of(output, outputs.lengths)

    def fresh(old, new):
      return jnp.where(taken.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    matched, draft = slots.matched, slots.draft
    if draft is not None:
      draft = draft.replace(
        before=fresh(draft.before, prompts.hidden[prompt]),
        rejected=draft.rejected & going,
      )
    slots = Slots(
      output=output,
      length=jnp.where(going, length, 0),
      hidden=fresh(slots.hidden, prompts.hidden[prompt]),
      norms=fresh(slots.norms, prompts.norms[prompt]),
      keys=fresh(slots.keys, flat(outputs.keys)[jnp.minimum(output, total - 1)]),
      matched=None if matched is None else jnp.where(going, matched, 0),
      seats=seats,
      draft=draft,
    )
    return outputs, slots, begun

  args = carry.outputs, carry.slots, carry.prompts, carry.begun, over, grown
  outputs, slots, begun = each(carry, local, *args)
  return carry.replace(outputs=outputs, slots=slots, begun=begun)


def _seats(carry, slots, going, length):
  """(the rows' seats for their next token, or the one after it where drafts are made;
  the rows for which there is none)."""
  reach = length + (carry.draft_cache is not None)
  starved = jnp.zeros_like(going)
  found = []
  for lv, seat in zip(carry.levels, slots.seats, strict=True):
    if seat is None:
      found.append(None)
      continue
    count = lv.seats // carry.shards
    seat = jnp.where(going, seat, -1)
    used = jnp.zeros(count, bool)
    used = used.at[jnp.where(seat < 0, count, seat)].set(True, mode="drop")
    need = going & (reach >= lv.start) & (seat < 0)
    rank = jnp.cumsum(need) - 1
    free = jnp.argsort(used, stable=True).astype(jnp.int32)
    got = need & (rank < count - used.sum())
    found.append(jnp.where(got, free[jnp.clip(rank, 0, count - 1)], seat))
    starved |= need & ~got
  return found, starved
