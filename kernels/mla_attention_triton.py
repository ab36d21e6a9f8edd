"""Flash attention on a GPU, through Triton.

A program serves a block of queries (or of keys, for their gradients) and loops over the
blocks of the other side that share a segment with it. Those that it sees whole, below
the diagonal and of one segment, need no mask.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from r1jax.kernels import base2
from r1jax.kernels.triton_blocks import check_width, dot, powers_of_two


class Blocks(NamedTuple):
  """Tokens of a program, powers of two; the larger is a multiple of the smaller."""

  q: int = 128
  k: int = 64
  warps: int = 8
  stages: int = 2


def fit(q: tuple, k: tuple, v: tuple, dtype: jnp.dtype) -> Blocks:
  """Blocks for queries [B, T, H, d], keys [B, S, Hk, d] and values [B, S, Hk, dv].

  Raises:
    NotImplementedError: this body cannot serve the shape or the dtype.
  """
  base2.check(dtype, q[1], k[1])
  check_width(q[3])
  check_width(v[3])
  if max(q[3], v[3]) > 256:
    raise NotImplementedError(f"heads are at most 256 wide here, not {q[3]} and {v[3]}")

  def side(length, most):
    return max(16, min(most, 1 << (length - 1).bit_length()))

  if dtype == jnp.float32:
    return Blocks(side(q[1], 32), side(k[1], 32), 4)
  stages = 3 if q[3] + v[3] <= 320 else 2
  return Blocks(side(q[1], 128), side(k[1], 64), 8, stages)


def backward_blocks(blocks: Blocks, width: int, dtype: jnp.dtype) -> tuple:
  """Of (dq, dk and dv), which hold more than the forward pass; width is d + dv."""
  if dtype == jnp.float32:
    return blocks, blocks
  if width > 320:  # what a Hopper's shared memory holds
    blocks = Blocks(blocks.q, min(blocks.k, 32), 8)
    return blocks, blocks._replace(q=min(blocks.q, 64))
  if width > 256:
    return blocks, blocks._replace(stages=2)
  return blocks, Blocks(min(blocks.q, 64), blocks.k, 4)


def bounds(
  q_segments: jax.Array, k_segments: jax.Array, causal: bool, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
  """(of every block of queries, of every block of keys), [B, 4, blocks] int32: of the
  other side's blocks the first that it touches, the first that it sees whole, the one
  after the last of these, and the one after the last that it touches."""

  def ends(segments, block):
    parts = segments.reshape(segments.shape[0], -1, block)
    return parts.min(axis=2), parts.max(axis=2)

  (q_low, q_high), (k_low, k_high) = (
    ends(q_segments, blocks.q),
    ends(k_segments, blocks.k),
  )
  touch = (q_low[:, :, None] <= k_high[:, None]) & (
    k_low[:, None] <= q_high[:, :, None]
  )
  touch &= k_high[:, None] > 0
  whole = touch & (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None]
  if causal:
    rows = jnp.arange(touch.shape[1])[:, None] * blocks.q
    columns = jnp.arange(touch.shape[2])[None] * blocks.k
    touch &= (rows + blocks.q - 1 >= columns)[None]
    whole &= (rows >= columns + blocks.k - 1)[None]

  def span(blocks):
    n = blocks.shape[2]
    low = jnp.where(blocks, jnp.arange(n)[None, None], n).min(axis=2)
    return low, jnp.where(blocks, jnp.arange(n)[None, None] + 1, 0).max(axis=2)

  def runs(touch, whole, diagonal_last):
    (low, high), (first, last) = span(touch), span(whole)
    # None, or others between, where a segment's number returns: all need masks.
    run = whole.sum(axis=2) == last - first
    first, last = (
      jnp.where(run, x, low if diagonal_last else high) for x in (first, last)
    )
    return jnp.stack([low, first, last, high], axis=1).astype(jnp.int32)

  return (
    runs(touch, whole, diagonal_last=True),
    runs(touch.swapaxes(1, 2), whole.swapaxes(1, 2), diagonal_last=False),
  )


def _load(ref, at, rows):
  """Rows at .. at + rows - 1 of ref [T, d], in parts."""
  return [ref[pl.ds(at, rows), part] for part in powers_of_two(ref.shape[-1])]


def _product(a, b):
  """a b^T over all parts of their widths."""
  return sum(dot(x, y.T) for x, y in zip(a, b, strict=True))


def _masked(scores, i, j, blocks, q_segments, k_segments, causal):
  keep = None
  if causal:
    rows = i * blocks.q + jnp.arange(blocks.q)
    keep = rows[:, None] >= (j * blocks.k + jnp.arange(blocks.k))[None]
  if q_segments is not None:
    same = (q_segments[:, None] == k_segments[None]) & (k_segments[None] > 0)
    keep = same if keep is None else keep & same
  return scores if keep is None else jnp.where(keep, scores, base2.MASKED)


def _over(number, bounds_ref, body, carry, *, causal, segmented, diagonal):
  """body(j, carry, masked=...) over the other side's blocks that this one touches.

  Args:
    diagonal: which of the three runs of blocks it lies in, 0 or 2: without segments
      that one alone needs a mask.
  """
  bounds = [bounds_ref[n, number] for n in range(4)]
  for run in range(3):
    masked = run != 1
    if segmented or not masked or (causal and run == diagonal):
      step = functools.partial(body, masked=masked)
      carry = jax.lax.fori_loop(bounds[run], bounds[run + 1], step, carry)
  return carry


def _zeros(parts):
  return [jnp.zeros(x.shape, jnp.float32) for x in parts]


def _forward_kernel(
  bounds_ref, q_ref, k_ref, v_ref, *rest, causal, segmented, blocks, scale
):
  """bounds 4 T/q, q q d, k S d, v S dv, segments q and S if there are some; out q dv,
  lse q."""
  *segments, out_ref, lse_ref = rest
  i, q, turn = pl.program_id(0), _load(q_ref, 0, blocks.q), scale * base2.LOG2E
  q_segments = segments[0][...] if segmented else None

  def body(j, carry, masked):
    high, total, acc = carry
    at = j * blocks.k
    scores = _product(q, _load(k_ref, at, blocks.k))
    if masked:
      k_segments = segments[1][pl.ds(at, blocks.k)] if segmented else None
      scores = _masked(scores, i, j, blocks, q_segments, k_segments, causal)
    now = jnp.maximum(high, scores.max(axis=1))
    p, decay = (jnp.exp2(x * turn) for x in (scores - now[:, None], high - now))
    acc = [
      decay[:, None] * a + dot(p.astype(v.dtype), v)
      for a, v in zip(acc, _load(v_ref, at, blocks.k), strict=True)
    ]
    return now, decay * total + p.sum(axis=1), acc

  start = (
    jnp.full((blocks.q,), base2.FLOOR, jnp.float32),
    jnp.zeros((blocks.q,), jnp.float32),
    [
      jnp.zeros((blocks.q, part.stop - part.start), jnp.float32)
      for part in powers_of_two(v_ref.shape[-1])
    ],
  )
  how = dict(causal=causal, segmented=segmented, diagonal=2)
  high, total, acc = _over(i, bounds_ref, body, start, **how)
  lse, divisor = base2.log_sum_exp(high, total, scale)
  for part, a in zip(powers_of_two(v_ref.shape[-1]), acc, strict=True):
    out_ref[:, part] = (a / divisor[:, None]).astype(out_ref.dtype)
  lse_ref[...] = lse


def _dq_kernel(
  bounds_ref,
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  lse_ref,
  delta_ref,
  *rest,
  causal,
  segmented,
  blocks,
  scale,
):
  """As above; do q dv, lse (base 2) and delta q; dq q d."""
  *segments, dq_ref = rest
  i, lse, delta = pl.program_id(0), lse_ref[...], delta_ref[...]
  q, do = _load(q_ref, 0, blocks.q), _load(do_ref, 0, blocks.q)
  q_segments = segments[0][...] if segmented else None

  def body(j, dq, masked):
    at = j * blocks.k
    keys = _load(k_ref, at, blocks.k)
    scores = _product(q, keys)
    if masked:
      k_segments = segments[1][pl.ds(at, blocks.k)] if segmented else None
      scores = _masked(scores, i, j, blocks, q_segments, k_segments, causal)
    p = jnp.exp2(scores * (scale * base2.LOG2E) - lse[:, None])
    ds = p * (_product(do, _load(v_ref, at, blocks.k)) - delta[:, None])
    return [x + dot(ds.astype(k.dtype), k) for x, k in zip(dq, keys, strict=True)]

  how = dict(causal=causal, segmented=segmented, diagonal=2)
  dq = _over(i, bounds_ref, body, _zeros(q), **how)
  for part, x in zip(powers_of_two(q_ref.shape[-1]), dq, strict=True):
    dq_ref[:, part] = (x * scale).astype(dq_ref.dtype)


def _dkv_kernel(
  bounds_ref,
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  lse_ref,
  delta_ref,
  *rest,
  causal,
  segmented,
  blocks,
  scale,
):
  """bounds 4 S/k, q T group d: all queries of the heads that this key head serves, k k
  d, v k dv, do T group dv, lse (base 2) and delta group T, segments T and k if there
  are some; dk k d, dv k dv."""
  *segments, dk_ref, dv_ref = rest
  j, group = pl.program_id(0), q_ref.shape[1]
  keys, values = _load(k_ref, 0, blocks.k), _load(v_ref, 0, blocks.k)
  k_segments = segments[1][...] if segmented else None

  def body(i, carry, masked, head):
    dk, dv = carry
    at = pl.ds(i * blocks.q, blocks.q)
    q = [q_ref[at, head, part] for part in powers_of_two(q_ref.shape[-1])]
    do = [do_ref[at, head, part] for part in powers_of_two(do_ref.shape[-1])]
    scores = _product(q, keys)
    if masked:
      q_segments = segments[0][at] if segmented else None
      scores = _masked(scores, i, j, blocks, q_segments, k_segments, causal)
    p = jnp.exp2(scores * (scale * base2.LOG2E) - lse_ref[head, at][:, None])
    ds = p * (_product(do, values) - delta_ref[head, at][:, None])
    p, ds = p.astype(do[0].dtype), ds.astype(q[0].dtype)
    dk = [x + dot(ds.T, y) for x, y in zip(dk, q, strict=True)]
    return dk, [x + dot(p.T, y) for x, y in zip(dv, do, strict=True)]

  how = dict(causal=causal, segmented=segmented, diagonal=0)

  def one(head, carry):
    return _over(j, bounds_ref, functools.partial(body, head=head), carry, **how)

  carry = _zeros(keys), _zeros(values)
  carry = jax.lax.fori_loop(0, group, one, carry) if group > 1 else one(0, carry)
  for ref, parts, factor in (
    (dk_ref, carry[0], scale),
    (dv_ref, carry[1], 1),
  ):
    for part, x in zip(powers_of_two(ref.shape[-1]), parts, strict=True):
      ref[:, part] = (x * factor).astype(ref.dtype)


def _prepared(q, k, q_segments, k_segments, causal, blocks):
  """(segments if there are some, bounds)."""
  if q_segments is None:
    ones = [jnp.ones(x.shape[:2], jnp.int32) for x in (q, k)]
    return [], bounds(*ones, causal, blocks)
  return [q_segments, k_segments], bounds(q_segments, k_segments, causal, blocks)


def _cost(pairs, widths, arrays):
  """Of products of these widths for every pair of a query and a key."""
  return pl.CostEstimate(
    flops=2 * pairs * widths,
    transcendentals=pairs,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
  )


def _call(
  kernel, grid, specs, args, out_specs, out_shape, blocks, interpret, name, cost
):
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=plgpu.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    cost_estimate=cost,
    interpret=interpret,
    name=name,
  )(*args)


# Blocks of [B, T, H, width] and [B, T], for programs (block, batch, head).


def _block(rows, width):
  return pl.BlockSpec((None, rows, None, width), lambda i, b, h: (b, i, h, 0))


def _whole(rows, width, group):
  """All rows of the key head that serves a query head."""
  return pl.BlockSpec((None, rows, None, width), lambda i, b, h: (b, 0, h // group, 0))


def _numbers(block, whole):
  return [
    pl.BlockSpec((None, block), lambda i, b, h: (b, i)),
    pl.BlockSpec((None, whole), lambda i, b, h: (b, 0)),
  ]


def _spans(of):
  return pl.BlockSpec((None, 4, of.shape[2]), lambda i, b, h: (b, 0, 0))


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_segments: jax.Array | None,
  k_segments: jax.Array | None,
  *,
  causal: bool,
  scale: float,
  blocks: Blocks,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """As mla_attention_mosaic.forward."""
  (b, t, heads, d), (s, kv_heads, dv) = q.shape, v.shape[1:]
  group, pairs = heads // kv_heads, b * heads * t * s // (2 if causal else 1)
  segments, (of_q, _) = _prepared(q, k, q_segments, k_segments, causal, blocks)
  how = dict(causal=causal, segmented=bool(segments), blocks=blocks)
  specs = [
    _spans(of_q),
    _block(blocks.q, d),
    _whole(s, d, group),
    _whole(s, dv, group),
  ]
  if segments:
    specs += _numbers(blocks.q, s)
  out, lse = _call(
    functools.partial(_forward_kernel, scale=scale, **how),
    (t // blocks.q, b, heads),
    specs,
    [of_q, q, k, v, *segments],
    [
      _block(blocks.q, dv),
      pl.BlockSpec((None, None, blocks.q), lambda i, b, h: (b, h, i)),
    ],
    [
      jax.ShapeDtypeStruct((b, t, heads, dv), v.dtype),
      jax.ShapeDtypeStruct((b, heads, t), jnp.float32),
    ],
    blocks,
    interpret,
    "mla_attention_forward",
    _cost(pairs, d + dv, (q, k, v, v)),
  )
  return out, lse


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_segments: jax.Array | None,
  k_segments: jax.Array | None,
  lse2: jax.Array,
  delta: jax.Array,
  do: jax.Array,
  *,
  causal: bool,
  scale: float,
  blocks: Blocks,
  interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As mla_attention_mosaic_backward.backward."""
  (b, t, heads, d), (s, kv_heads, dv) = q.shape, v.shape[1:]
  group, pairs = heads // kv_heads, b * heads * t * s // (2 if causal else 1)
  blocks, of_keys = backward_blocks(blocks, d + dv, q.dtype)
  segments, (of_q, _) = _prepared(q, k, q_segments, k_segments, causal, blocks)
  _, (_, of_k) = _prepared(q, k, q_segments, k_segments, causal, of_keys)
  how = dict(causal=causal, segmented=bool(segments), blocks=blocks)
  args = [q, k, v, do, lse2, delta, *segments]
  row = pl.BlockSpec((None, None, blocks.q), lambda i, b, h: (b, h, i))
  specs = [
    _spans(of_q),
    _block(blocks.q, d),
    _whole(s, d, group),
    _whole(s, dv, group),
    _block(blocks.q, dv),
    row,
    row,
  ]
  if segments:
    specs += _numbers(blocks.q, s)
  dq = _call(
    functools.partial(_dq_kernel, scale=scale, **how),
    (t // blocks.q, b, heads),
    specs,
    [of_q, *args],
    _block(blocks.q, d),
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    blocks,
    interpret,
    "mla_attention_dq",
    _cost(pairs, 2 * d + dv, 2 * (q, k, v)),
  )

  blocks = of_keys
  how |= dict(blocks=blocks)

  def of_group(width):
    return pl.BlockSpec((None, t, group, width), lambda j, b, h: (b, 0, h, 0))

  row = pl.BlockSpec((None, group, t), lambda j, b, h: (b, h, 0))
  specs = [
    _spans(of_k),
    of_group(d),
    _block(blocks.k, d),
    _block(blocks.k, dv),
    of_group(dv),
    row,
    row,
  ]
  if segments:
    specs += reversed(_numbers(blocks.k, t))
  cost = _cost(pairs, 2 * d + 2 * dv, 2 * (q, k, v))
  dk, dv = _call(
    functools.partial(_dkv_kernel, scale=scale, **how),
    (s // blocks.k, b, kv_heads),
    specs,
    [of_k, *args],
    [_block(blocks.k, d), _block(blocks.k, dv)],
    [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    blocks,
    interpret,
    "mla_attention_dkv",
    cost,
  )
  return dq, dk, dv
