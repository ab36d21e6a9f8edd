"""Decoding from a cache: where the new tokens of every row stand, and their attention.

A row reads its prompt's entries, which its group shares, and its own, which lie in
levels (levels.py). Two ways to hold them:

  stacked  [layers, seats, slots, L], entries as kernels read them, a layer by number
  split    for each layer keys [seats, Hk, d, slots] and values [seats, Hk, slots, dv]:
           what plain XLA multiplies without a copy
"""

import functools
import math

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r1jax import implementation as impl
from r1jax import ops, sharding
from r1jax.levels import Level


@struct.dataclass
class Cache:
  """The prompts' entries and the rows' own."""

  # stacked: [N, B, P, L]. split: for each layer, keys [B, Hk, d, P] and values
  # [B, Hk, P, dv].
  prompts: jax.Array | tuple
  # stacked: for each level [N, seats, size, L]. split: for each layer and level, keys
  # [seats, Hk, d, size] and values [seats, Hk, size, dv].
  own: tuple

  @property
  def split(self) -> bool:
    return isinstance(self.prompts, tuple)

  @property
  def window(self) -> int:
    """P, the prompts' slots."""
    return self.prompts[0][0].shape[3] if self.split else self.prompts.shape[2]


@struct.dataclass
class DecodeStep:
  """Where the Q new tokens of each of S rows stand."""

  positions: jax.Array  # S Q int32, for RoPE
  lengths: jax.Array  # S int32, the row's own tokens that lie in the cache already
  writes: jax.Array  # S bool; other rows leave nothing and see nothing
  prompts: jax.Array  # S int32, the prompt that each row continues
  prompt_starts: jax.Array  # B int32, the first slot of each prompt; it ends the window
  # For each level the rows' seats [S] int32; None where row s has seat s.
  seats: tuple[jax.Array | None, ...]
  levels: tuple[Level, ...] = struct.field(pytree_node=False)
  # The rows are the prompts' groups, one after the other: rows b G .. b G + G - 1.
  grouped: bool = struct.field(pytree_node=False, default=False)
  turns: jax.Array | None = None  # 2 S Q R/2, layers.rope_turns; the policy fills it in

  def places(self) -> jax.Array:
    """[S, Q] int32, which of its row's tokens each is."""
    return self.lengths[:, None] + jnp.arange(self.positions.shape[1])[None]


def is_split(implementation: str) -> bool:
  """Whether a policy of this implementation decodes from a split cache here."""
  if implementation == "auto":
    return impl.platform() not in impl.PLATFORMS
  return implementation == "xla"


def empty(
  entries: jax.Array, levels: tuple[Level, ...], layout: ops.Layout, split: bool
) -> Cache:
  """A cache that holds the prompts and has room for the rows' own.

  Args:
    entries: [N, B, P, L], of the prompts.
    levels: of the rows' own, seats of all devices counted.
    layout: of an entry.
    split: hold it split.
  """
  n, width, cut = entries.shape[0], entries.shape[-1], sharding.shard_batch
  if not split:
    fill = ops.cache_slots(entries.shape[2], "mosaic") - entries.shape[2]
    prompts = jnp.pad(entries, ((0, 0), (0, 0), (fill, 0), (0, 0)))
    own = tuple(
      cut(jnp.zeros((n, lv.seats, lv.size, width), entries.dtype), axis=1)
      for lv in levels
    )
    return Cache(cut(prompts, axis=1), own)
  keys, values = _keys_and_values(entries, layout)  # N B P Hk d

  def level(lv):
    shape = lv.seats, layout.kv_heads
    return (
      cut(jnp.zeros((*shape, layout.key_width, lv.size), entries.dtype)),
      cut(jnp.zeros((*shape, lv.size, layout.value_width), entries.dtype)),
    )

  prompts = tuple(
    (cut(keys[i].transpose(0, 2, 3, 1)), cut(values[i].transpose(0, 2, 1, 3)))
    for i in range(n)
  )
  return Cache(prompts, tuple(tuple(map(level, levels)) for _ in range(n)))


def attend(
  at: DecodeStep,
  q: jax.Array,
  entry: jax.Array,
  prompts,
  own,
  layer: jax.Array | None,
  *,
  layout: ops.Layout,
  scale: float,
  implementation: str,
) -> tuple[jax.Array, tuple]:
  """Writes the new tokens' entries and attends to all that each may see.

  Args:
    at: where they stand.
    q: [S, Q, H, d].
    entry: [S, Q, L].
    prompts, own: a Cache's, of all layers if it is stacked, else of this layer.
    layer: [] int32, which layer of a stacked cache; None: it is split.
    layout: of an entry.
    scale: of the scores.
    implementation: of a stacked cache's attention.

  Returns:
    ([S, Q, H, dv], own with the entries).
  """
  at = at.replace(turns=None)  # queries and keys are turned already
  seats = [lv.seats for lv in at.levels]
  b = jax.tree.leaves(prompts)[0].shape[0 if layer is None else 1]
  rows, heads = impl.axes(math.gcd(b, q.shape[0], *seats), layout.kv_heads)
  of_keys, cut = heads, layout
  if layout.kv_heads == 1:  # every device has the one key head
    _, heads = impl.axes(q.shape[0], q.shape[2])
    of_keys = None
  elif heads is not None:
    cut = layout.cut(impl.parts(heads))
  how = dict(layout=cut, scale=scale)
  if layer is None:
    layer, local, of_cache = (), _split, P(rows, of_keys)
  else:
    layer, local, of_cache = (layer,), _stacked, P(None, rows, None, of_keys)
    how["implementation"] = implementation

  def one(at, q, entry, prompts, own, *layer):
    return local(at, q, entry, prompts, own, *layer, **how)

  def specs(tree, spec):
    return jax.tree.map(lambda _: spec, tree)

  of_own = specs(own, of_cache)
  in_specs = (
    specs(at, P(rows)),
    P(rows, None, heads),
    P(rows, None, of_keys),
    specs(prompts, of_cache),
    of_own,
    *[P()] * len(layer),
  )
  out_specs = P(rows, None, heads), of_own
  return impl.on_each_device(one, in_specs, out_specs)(
    at, q, entry, prompts, own, *layer
  )


# -- stacked ---------------------------------------------------------------------------


def _stacked(at, q, entry, prompts, own, layer, *, layout, scale, implementation):
  how = dict(layout=layout, scale=scale, implementation=implementation)
  (s, n, heads, _), b, slots = q.shape, prompts.shape[1], prompts.shape[2]
  places = at.places()
  own = tuple(
    cache.at[layer, seat, place].set(entry, mode="drop")
    for cache, (seat, place) in zip(own, _where(at, places), strict=True)
  )
  seen = jnp.where(at.writes[:, None], places + 1, 0)  # S Q, own tokens
  ends = jnp.full((b,), slots, jnp.int32)
  if at.grouped and n == 1 and len(own) == 1:
    suffix = own[0].reshape(own[0].shape[0], b, -1, *own[0].shape[2:])
    grouped = q.reshape(b, -1, heads, q.shape[-1])
    lengths = seen.reshape(b, -1)
    args = grouped, prompts, suffix, layer, at.prompt_starts, ends, lengths
    out = ops.decode_attention(*args, **how)
    return out.reshape(s, 1, heads, -1), own
  queries = q.reshape(s * n, heads, -1)

  def each(x):  # of each of a row's queries
    return jnp.repeat(x, n)

  prompt = each(at.prompts)
  starts = jnp.where(each(at.writes), at.prompt_starts[prompt], slots)
  parts = [
    ops.cache_attention(queries, prompts, layer, prompt, starts, ends[prompt], **how)
  ]
  nothing = jnp.zeros(s * n, jnp.int32)
  for lv, cache, seat in zip(at.levels, own, at.seats, strict=True):
    stops = jnp.clip(seen - lv.start, 0, lv.size).reshape(-1)
    seat = jnp.arange(s) if seat is None else seat
    seat = jnp.clip(each(seat), 0, cache.shape[1] - 1)
    args = queries, cache, layer, seat, nothing, stops
    parts.append(ops.cache_attention(*args, **how))
  out, _ = ops.merge(parts)
  return out.astype(entry.dtype).reshape(s, n, heads, -1), own


def _where(at: DecodeStep, places):
  """For each level (seats, slots) [S, Q] of the new tokens; out of its bounds, both,
  where a token does not lie there."""
  found = []
  for lv, seat in zip(at.levels, at.seats, strict=True):
    here = at.writes[:, None] & (places >= lv.start) & (places < lv.start + lv.size)
    seat = jnp.arange(places.shape[0]) if seat is None else seat
    found.append(
      (
        jnp.where(here, seat[:, None], lv.seats),
        jnp.where(here, places - lv.start, lv.size),
      )
    )
  return found


# -- split -----------------------------------------------------------------------------


def _keys_and_values(entry, layout):
  """[..., L] -> [..., Hk, d], [..., Hk, dv]."""
  pairs = entry.reshape(*entry.shape[:-1], layout.kv_heads, layout.stride)
  first = layout.value_start
  return pairs[..., : layout.key_width], pairs[..., first : first + layout.value_width]


def _split(at, q, entry, prompts, own, *, layout, scale):
  (s, n, heads, d), hk = q.shape, layout.kv_heads
  places = at.places()
  keys, values = _keys_and_values(entry, layout)  # S Q Hk d
  own = tuple(
    (
      k.at[seat, :, :, place].set(keys, mode="drop"),
      v.at[seat, :, place].set(values, mode="drop"),
    )
    for (k, v), (seat, place) in zip(own, _where(at, places), strict=True)
  )
  # The H / Hk query heads of a key head, of all Q tokens, side by side.
  q = q.reshape(s, n, hk, heads // hk, d).swapaxes(1, 2).reshape(s, hk, -1, d)
  parts = [_over_prompts(at, q, *prompts, scale)]
  seen = jnp.where(at.writes[:, None], places + 1, 0)  # S Q, own tokens
  over = functools.partial(_over_level, scale=scale)
  for lv, (k, v), seat in zip(at.levels, own, at.seats, strict=True):
    count = jnp.clip(seen - lv.start, 0, lv.size)
    args = q, k, v, count, seat
    if lv.start == 0:
      parts.append(over(*args))
    else:  # a level that no row has come to costs nothing
      parts.append(
        jax.lax.cond((count > 0).any(), over, functools.partial(_nothing, over), *args)
      )
  out = _merge(parts)  # S Hk (Q H/Hk) dv
  out = out.reshape(s, hk, n, heads // hk, -1).swapaxes(1, 2)
  return out.reshape(s, n, heads, -1).astype(entry.dtype), own


def _nothing(over, *args):
  out, high, total = jax.eval_shape(over, *args)
  return (
    jnp.zeros(out.shape, out.dtype),
    jnp.full(high.shape, ops.MASKED, high.dtype),
    jnp.zeros(total.shape, total.dtype),
  )


def _over_prompts(at, q, keys, values, scale):
  (s, hk, m, d), (b, slots) = q.shape, keys.shape[::3]
  seen = jnp.arange(slots)[None] >= at.prompt_starts[:, None]  # B P
  if not at.grouped:
    keys, values, seen = (jnp.take(x, at.prompts, axis=0) for x in (keys, values, seen))
    return _softmax_parts(q, keys, values, seen[:, None, None], scale)
  grouped = q.reshape(b, -1, hk, m, d).swapaxes(1, 2).reshape(b, hk, -1, d)
  parts = _softmax_parts(grouped, keys, values, seen[:, None, None], scale)

  def rows(x):
    x = x.reshape(b, hk, s // b, m, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(s, hk, m, *x.shape[4:])

  return tuple(map(rows, parts))


def _over_level(q, keys, values, count, seat, scale):
  """Args: q [S, Hk, Q n, d]; keys, values of the seats; count [S, Q] slots that each
  token sees; seat [S] or None."""
  s, seats, size = q.shape[0], keys.shape[0], keys.shape[3]
  if seat is not None:
    owner = jnp.zeros(seats, jnp.int32)
    owner = owner.at[jnp.where(seat < 0, seats, seat)].set(jnp.arange(s), mode="drop")
    q, count = q[owner], count[owner]
  seen = jnp.arange(size)[None, None] < count[..., None]  # seats Q size
  seen = jnp.repeat(seen, q.shape[2] // count.shape[1], axis=1)[:, None]
  parts = _softmax_parts(q, keys, values, seen, scale)
  if seat is None:
    return parts
  out, high, total = (jnp.take(x, jnp.maximum(seat, 0), axis=0) for x in parts)
  none = (seat < 0)[:, None, None]  # it has nobody's numbers, be they what they may
  return (
    jnp.where(none[..., None], 0.0, out),
    jnp.where(none, ops.MASKED, high),
    jnp.where(none, 0.0, total),
  )


def _softmax_parts(q, keys, values, seen, scale):
  """(sum of exp(score - high) v, high, sum of exp(score - high)), the latter two
  float32. Args: q [R, Hk, M, d], keys [R, Hk, d, S], values [R, Hk, S, dv], seen [R, 1,
  1 or M, S]."""
  f32 = dict(preferred_element_type=jnp.float32)
  scores = jnp.einsum("rhmd,rhds->rhms", q, keys, **f32) * scale
  scores = jnp.where(seen, scores, ops.MASKED)
  high = scores.max(axis=-1)
  weights = jnp.exp(scores - high[..., None])
  out = jnp.einsum("rhms,rhsv->rhmv", weights.astype(values.dtype), values, **f32)
  return out, high, weights.sum(axis=-1)


def _merge(parts):
  high = parts[0][1]
  for _, other, _ in parts[1:]:
    high = jnp.maximum(high, other)
  weights = [jnp.exp(own - high) for _, own, _ in parts]
  out = sum(w[..., None] * o for w, (o, _, _) in zip(weights, parts, strict=True))
  total = sum(w * t for w, (_, _, t) in zip(weights, parts, strict=True))
  return out / jnp.where(total == 0.0, 1.0, total)[..., None]
