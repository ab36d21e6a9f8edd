"""Attention, decoding and the experts' product: one door each to the implementations
(implementation.py). The XLA form written here is the definition that any other must
equal, the fallback, and the oracle of the tests.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r1jax import implementation as impl
from r1jax import ops_checks
from r1jax.kernels import base2, mla_attention
from r1jax.kernels import decode_attention as decoding
from r1jax.kernels import grouped_matmul as grouped

Layout = decoding.Layout
merge, MASKED = base2.merge, base2.MASKED


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_segments: jax.Array | None = None,
  k_segments: jax.Array | None = None,
  *,
  scale: float,
  causal: bool = True,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale q k^T) v and its log-sum-exp; the softmax in float32.

  Args:
    q: [B, T, H, d].
    k: [B, S, Hk, d]; each key head serves H / Hk consecutive query heads.
    v: [B, S, Hk, dv].
    q_segments, k_segments: [B, T] and [B, S] int32; a query sees keys of its own number
      alone, and none that is 0. None: everything is one segment.
    scale: of the scores.
    causal: T == S, and a query sees no later key.
    implementation: one of implementation.NAMES.

  Returns:
    ([B, T, H, dv] in v's dtype, [B, H, T] float32): 0 and -inf where a row keeps
    nothing.

  Raises:
    ValueError: the arrays do not belong together, or no query sees any key.
    NotImplementedError: the kernel that was asked for cannot serve the shape.
  """
  ops_checks.scale(scale)
  ops_checks.attention(q, k, v, q_segments, k_segments, causal)
  return _attend(q, k, v, q_segments, k_segments, scale, causal, implementation)


def _attend(q, k, v, q_segments, k_segments, scale, causal, implementation):
  segments = () if q_segments is None else (q_segments, k_segments)

  def kernel(body, interpret):
    def local(q, k, v, *segments):
      return mla_attention.attention(
        q, k, v, *(segments or (None, None)), causal, scale, body, interpret
      )

    rows, heads = impl.axes(q.shape[0], k.shape[2])
    cut = P(rows, None, heads)
    specs = (cut, cut, cut, *[P(rows)] * len(segments))
    return impl.on_each_device(local, specs, (cut, P(rows, heads)))(q, k, v, *segments)

  def definition():
    return _attention(q, k, v, _mask(q, k, q_segments, k_segments, causal), scale)

  return impl.choose("attention", implementation, kernel, definition)


def group_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array,
  prefix_k: jax.Array,
  prefix_v: jax.Array,
  prefix_segments: jax.Array,
  *,
  scale: float,
  implementation: str = "auto",
) -> jax.Array:
  """Causal attention of a group's completions over the prompt they share, whose keys
  and values are there once, and over themselves; merged by log-sum-exp.

  Args:
    q: [B, G, T, H, d].
    k: [B, G, T, Hk, d].
    v: [B, G, T, Hk, dv].
    segments: [B, G, T] int32, 0 is padding, of the completions.
    prefix_k: [B, P, Hk, d].
    prefix_v: [B, P, Hk, dv].
    prefix_segments: [B, P] int32, 0 is padding.
    scale: of the scores.
    implementation: one of implementation.NAMES.

  Returns:
    [B, G, T, H, dv] in v's dtype.

  Raises:
    As `attention`.
  """
  b, g, t, heads, _ = q.shape

  def beside(x):  # the group's rows as more queries of one row
    return x.reshape(b, g * t, *x.shape[3:])

  def apart(x):
    return x.reshape(b * g, *x.shape[2:])

  ops_checks.scale(scale)
  before = beside(q), prefix_k, prefix_v
  before += tuple(
    (x > 0).astype(jnp.int32) for x in (beside(segments), prefix_segments)
  )
  ops_checks.attention(*before, causal=False, something=False)
  before, before_lse = _attend(*before, scale, False, implementation)
  own = apart(q), apart(k), apart(v), apart(segments), apart(segments)
  ops_checks.attention(*own, causal=True)
  own, own_lse = _attend(*own, scale, True, implementation)
  before_lse = before_lse.reshape(b, heads, g, t).transpose(0, 2, 3, 1)
  own_lse = own_lse.reshape(b, g, heads, t).swapaxes(2, 3)
  before, own = (x.reshape(b, g, t, heads, -1) for x in (before, own))
  out, _ = base2.merge([(before, before_lse), (own, own_lse)])
  return out.astype(v.dtype)


def decode_attention(
  q: jax.Array,
  prefix: jax.Array,
  suffix: jax.Array,
  layer: jax.Array,
  starts: jax.Array,
  stops: jax.Array,
  lengths: jax.Array,
  *,
  layout: Layout,
  scale: float,
  implementation: str = "auto",
) -> jax.Array:
  """Attention of one new token a row over the prompt that its group shares and the
  row's own tokens, from the cache. Absorbed MLA: the queries are in latent space.

  Args:
    q: [B, G, H, d], d = layout.key_width.
    prefix: [N, B, P, L], L = layout.width, the prompts' cache.
    suffix: [N, B, G, S, L], the rows' own.
    layer: [] int32, which of the N layers.
    starts, stops: [B] int32; slots starts .. stops - 1 of the prefix are seen.
    lengths: [B, G] int32; slots 0 .. lengths - 1 of a row's own are seen.
    layout: where keys and values lie in an entry.
    scale: of the scores.
    implementation: one of implementation.NAMES.

  Returns:
    [B, G, H, layout.value_width] in the cache's dtype; 0 for rows that see nothing.

  Raises:
    ValueError: the arrays do not belong together, a length is negative or beyond its
      cache, or no row sees any slot.
    NotImplementedError: the kernel that was asked for cannot serve the shape.
  """
  ops_checks.scale(scale)
  args = q, prefix, suffix, jnp.asarray(layer), starts, stops, lengths
  ops_checks.decode_attention(*args, layout)

  def kernel(body, interpret):
    rows, heads = impl.axes(q.shape[0], layout.kv_heads)
    mine, of_keys = layout, heads
    if layout.kv_heads == 1:  # every device has the one key head
      heads, of_keys = impl.axes(q.shape[0], q.shape[2])[1], None
    elif heads is not None:
      mine = layout.cut(impl.parts(heads))

    def local(*args):
      how = dict(layout=mine, scale=scale, body=body, interpret=interpret)
      return decoding.decode(*args, **how)

    specs = (
      P(rows, None, heads),
      P(None, rows, None, of_keys),
      P(None, rows, None, None, of_keys),
      P(),
      P(rows),
      P(rows),
      P(rows),
    )
    return impl.on_each_device(local, specs, P(rows, None, heads))(*args)

  def definition():
    return _decode(*args, layout=layout, scale=scale)

  return impl.choose("decode_attention", implementation, kernel, definition)


def cache_attention(
  q: jax.Array,
  cache: jax.Array,
  layer: jax.Array,
  rows: jax.Array,
  starts: jax.Array,
  stops: jax.Array,
  *,
  layout: Layout,
  scale: float,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Attention of one token each over any row of a cache; parts of one token's context
  are merged by their log-sum-exp (`kernels.base2.merge`). Of one device's arrays.

  Args:
    q: [R, H, d], d = layout.key_width.
    cache: [N, M, S, L].
    layer: [] int32, which of the N.
    rows: [R] int32, which of the M each query reads.
    starts, stops: [R] int32; slots starts .. stops - 1 of that row are seen.
    layout: where keys and values lie in an entry.
    scale: of the scores.
    implementation: one of implementation.NAMES.

  Returns:
    ([R, H, dv] float32, log-sum-exp [R, H] float32): 0 and -inf where nothing is seen.

  Raises:
    NotImplementedError: the kernel that was asked for cannot serve the shape.
  """
  ops_checks.scale(scale)
  args = q, cache, jnp.asarray(layer), rows, starts, stops

  def kernel(body, interpret):
    how = dict(layout=layout, scale=scale, body=body, interpret=interpret)
    return decoding.part(*args, **how)

  def definition():
    return _part(*args, layout=layout, scale=scale)

  return impl.choose("cache_attention", implementation, kernel, definition)


def grouped_matmul(
  x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
  """Rows of x, sorted by group, times their group's matrix.

  Args:
    x: [M, D].
    w: [E, D, F].
    group_sizes: [E] int32; rows after their sum are 0 in the result.
    implementation: one of implementation.NAMES.

  Returns:
    [M, F] in x's dtype.

  Raises:
    ValueError: the arrays do not belong together.
    NotImplementedError: the kernel that was asked for cannot serve the shape, or there
      are several devices.
  """
  ops_checks.grouped_matmul(x, w, group_sizes)

  def kernel(body, interpret):
    if impl.mesh_axes():
      raise NotImplementedError("the experts' product is for one device here")
    return grouped.grouped_matmul(x, w, group_sizes, body, interpret)

  def definition():
    return jax.lax.ragged_dot(x, w, group_sizes)

  return impl.choose("grouped_matmul", implementation, kernel, definition)


# -- the definitions -------------------------------------------------------------------


def _mask(q, k, q_segments, k_segments, causal):
  """[B, T, S] bool, True where a query sees a key."""
  mask = jnp.ones((q.shape[0], q.shape[1], k.shape[1]), bool)
  if causal:
    t = jnp.arange(q.shape[1])
    mask &= t[None, :, None] >= t[None, None, :]
  if q_segments is not None:
    mask &= q_segments[:, :, None] == k_segments[:, None, :]
    mask &= k_segments[:, None, :] > 0
  return mask


def _attention(q, k, v, mask, scale):
  b, t, heads, d = q.shape
  n = heads // k.shape[2]
  if n > 1:  # the n query heads of a key head as n times as many queries
    q = q.reshape(b, t, -1, n, d).transpose(0, 3, 1, 2, 4).reshape(b, n * t, -1, d)
    mask = jnp.broadcast_to(mask[:, None], (b, n, *mask.shape[1:]))
    out, lse = _attention(q, k, v, mask.reshape(b, n * t, -1), scale)
    out = out.reshape(b, n, t, -1, v.shape[-1]).transpose(0, 2, 3, 1, 4)
    lse = lse.reshape(b, -1, n, t).reshape(b, heads, t)
    return out.reshape(b, t, heads, -1), lse
  scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None], scores * scale, base2.MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bhts,bshd->bthd", weights, v)
  some = mask.any(axis=2)
  lse = jnp.where(some[:, None], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  return jnp.where(some[:, :, None, None], out, 0), lse


def _decode(
  q, prefix, suffix, layer, starts, stops, lengths, *, layout: Layout, scale: float
):
  (b, g, heads, d), h = q.shape, layout.kv_heads
  length, slots = prefix.shape[2], suffix.shape[3]
  caches = [
    jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (prefix, suffix)
  ]
  places = jnp.arange(length)
  seen = (places[None] >= starts[:, None]) & (places[None] < stops[:, None])  # B P
  own = jnp.arange(slots)[None, None] < lengths[:, :, None]  # B G S
  mask = jnp.concatenate(
    [jnp.broadcast_to(seen[:, None], (b, g, length)), own], axis=2
  )[:, :, None, None]
  q = q.reshape(b, g, h, heads // h, d)
  f32 = dict(preferred_element_type=jnp.float32)
  if layout.value_start == 0:  # MLA: nothing of an entry is sliced, and copied
    keys = values = [x[..., None, :] for x in caches]
    q = jnp.pad(q, [(0, 0)] * 4 + [(0, layout.width - d)])
  else:
    pairs = [x.reshape(*x.shape[:-1], h, layout.stride) for x in caches]
    keys = [x[..., :d] for x in pairs]
    values = [x[..., layout.value_start :] for x in pairs]
  scores = [
    jnp.einsum("bghnd,bphd->bghnp", q, keys[0], **f32),
    jnp.einsum("bghnd,bgshd->bghns", q, keys[1], **f32),
  ]
  scores = jnp.where(mask, jnp.concatenate(scores, axis=-1) * scale, base2.MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(suffix.dtype)
  out = jnp.einsum("bghnp,bphv->bghnv", weights[..., :length], values[0])
  out += jnp.einsum("bghns,bgshv->bghnv", weights[..., length:], values[1])
  out = jnp.where(mask.any(axis=4, keepdims=True), out, 0)
  return out[..., : layout.value_width].reshape(b, g, heads, -1)


def _part(q, cache, layer, rows, starts, stops, *, layout: Layout, scale: float):
  (r, heads, d), h = q.shape, layout.kv_heads
  held = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)[rows]  # R S L
  held = held.reshape(r, -1, h, layout.stride)
  keys = held[..., :d]
  values = held[..., layout.value_start : layout.value_start + layout.value_width]
  q, f32 = q.reshape(r, h, heads // h, d), dict(preferred_element_type=jnp.float32)
  scores = jnp.einsum("rhnd,rshd->rhns", q, keys, **f32) * scale
  slots = jnp.arange(cache.shape[2])[None]
  seen = (slots >= starts[:, None]) & (slots < stops[:, None])  # R S
  scores = jnp.where(seen[:, None, None], scores, base2.MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  out = jnp.einsum("rhns,rshv->rhnv", weights, values, **f32)
  some = seen.any(axis=1)[:, None, None]
  lse = jnp.where(some, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  out = jnp.where(some[..., None], out, 0.0)
  return out.reshape(r, heads, -1), lse.reshape(r, heads)


def cache_slots(tokens: int, implementation: str = "auto") -> int:
  """Slots to lay out for so many tokens: a kernel reads whole blocks of 128."""
  if implementation == "auto" and impl.platform() not in impl.PLATFORMS:
    implementation = "xla"
  return tokens if implementation == "xla" else -(-tokens // 128) * 128
