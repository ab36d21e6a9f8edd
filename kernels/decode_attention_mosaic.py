"""One token's attention over a cache on a TPU.

A row's blocks of slots are read one after the other; those outside its slots are not
fetched and cost nothing. A chunk's scores are asked for before the last chunk's
softmax.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from r1jax.kernels import base2
from r1jax.kernels.mosaic_blocks import LANES, VMEM_LIMIT, dot, lane_sums, wide


class Blocks(NamedTuple):
  k: int  # slots in VMEM at a time
  chunk: int  # whose scores are one matrix product; divides k


class View(NamedTuple):
  """What a key head is, in a block: rows of q, lanes of its keys and of its values."""

  rows: slice
  keys: slice
  values: slice


def fit(slots: int, width: int, dtype: jnp.dtype) -> Blocks:
  """Blocks that divide the slots.

  Raises:
    NotImplementedError: there are none, or this body cannot serve the dtype.
  """
  base2.check(dtype, slots)
  if slots % LANES:
    raise NotImplementedError(f"slots are a multiple of {LANES} here, not {slots}")
  if width % LANES:
    raise NotImplementedError(f"an entry is a multiple of {LANES} here, not {width}")
  most = 6 * 2**20 // (width * dtype.itemsize)  # two blocks are in VMEM at a time
  block = max(LANES * 2**n for n in range(5) if slots % (LANES * 2**n) == 0)
  while block > most and block > LANES:
    block //= 2
  return Blocks(block, min(block, 512))


def _views(layout, heads: int) -> tuple[tuple[View, ...], int, slice]:
  """(views, lanes of q, the values' place in an output). Keys that are no multiple of
  LANES wide are read with what lies beside them, against queries of zero there."""
  n, aligned = heads // layout.kv_heads, layout.key_width % LANES == 0
  if layout.value_start == 0:  # MLA: the values are the key's first lanes
    values = slice(0, layout.value_width)
    if layout.value_width > LANES and layout.value_width % LANES:
      raise NotImplementedError(
        f"a latent is at most {LANES} wide or a multiple of it here, not"
        f" {layout.value_width}"
      )
    return (
      (View(slice(0, heads), slice(0, layout.width), values),),
      layout.width,
      values,
    )
  if not aligned and layout.stride % LANES:
    raise NotImplementedError(
      f"key and value of a head are a multiple of {LANES} wide together here, not"
      f" {layout.stride}"
    )
  views = []
  for h in range(layout.kv_heads):
    at = h * layout.stride
    rows, both = slice(h * n, (h + 1) * n), slice(at, at + layout.stride)
    keys = slice(at, at + layout.key_width)
    values = slice(at + layout.value_start, at + layout.stride)
    views.append(View(rows, keys, values) if aligned else View(rows, both, both))
  if aligned:
    return tuple(views), layout.key_width, slice(0, layout.value_width)
  return tuple(views), layout.stride, slice(layout.value_start, layout.stride)


def _kernel(
  layer,  # 1
  rows,  # R
  starts,  # R
  stops,  # R
  q_ref,  # 1 H d
  cache_ref,  # 1 1 k L
  out_ref,  # 1 H dv
  lse_ref,  # 1 1 H
  high,  # H LANES f32, the running maximum, equal in all lanes
  total,  # H LANES f32, the running sum, to which the lanes add up
  acc,  # H dv f32
  *,
  views: tuple[View, ...],
  blocks: Blocks,
  scale: float,
  full: bool,
):
  del layer, rows
  r, j = pl.program_id(0), pl.program_id(1)
  start, stop, turn = starts[r], stops[r], scale * base2.LOG2E

  @pl.when(j == 0)
  def _():
    high[...] = jnp.full_like(high, base2.FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def scores(n, view):
    entries = cache_ref[0, 0, pl.ds(n * blocks.chunk, blocks.chunk), view.keys]
    return dot(q_ref[0, view.rows], entries, (1, 1))

  def softmax(s, n, view, masked):
    entries = cache_ref[0, 0, pl.ds(n * blocks.chunk, blocks.chunk), view.values]
    if masked:
      first = j * blocks.k + n * blocks.chunk
      slot = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) + first
      keep = jnp.logical_and(slot >= start, slot < stop)
      s = jnp.where(keep, s, base2.MASKED)
    before = high[view.rows]
    now = jnp.maximum(before, s.max(axis=1, keepdims=True))
    p, decay = (jnp.exp2(x * turn) for x in (s - wide(now, blocks.chunk), before - now))
    high[view.rows] = now
    total[view.rows] = decay * total[view.rows] + lane_sums(p)
    product = dot(p.astype(entries.dtype), entries, (1, 0))
    acc[view.rows] = wide(decay, acc.shape[1]) * acc[view.rows] + product

  def step(masked):
    work = [(n, view) for n in range(blocks.k // blocks.chunk) for view in views]
    s = scores(*work[0])
    for at, (n, view) in enumerate(work):
      after = scores(*work[at + 1]) if at + 1 < len(work) else None
      softmax(s, n, view, masked)
      s = after

  if full:
    step(False)
  else:
    some = jnp.logical_and(j * blocks.k < stop, (j + 1) * blocks.k > start)
    whole = jnp.logical_and(j * blocks.k >= start, (j + 1) * blocks.k <= stop)
    pl.when(whole)(functools.partial(step, False))
    pl.when(some & jnp.logical_not(whole))(functools.partial(step, True))

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    row = total[...].sum(axis=1, keepdims=True)
    lse, divisor = base2.log_sum_exp(high[...], row, scale)
    out_ref[0] = (acc[...] / divisor).astype(out_ref.dtype)
    lse_ref[0] = lse.T[:1]


def decode(
  q: jax.Array,
  cache: jax.Array,
  layer: jax.Array,
  rows: jax.Array,
  starts: jax.Array,
  stops: jax.Array,
  *,
  layout,
  scale: float,
  interpret: bool,
  full: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As decode_attention.part, with layer [1]. full: every row sees all slots, and
  nobody looks; a kernel without branches, to be measured.

  Raises:
    NotImplementedError: this body cannot serve the shape.
  """
  (r, heads, d), (_, _, s, width) = q.shape, cache.shape
  blocks = fit(s, width, cache.dtype)
  # Rows of a key head are filled up to whole registers.
  n = heads // layout.kv_heads
  whole = -(-n // 16) * 16
  views, d_read, values = _views(layout, whole * layout.kv_heads)
  fill = ((0, 0), (0, 0), (0, whole - n), (0, d_read - d))
  q = jnp.pad(q.reshape(r, layout.kv_heads, n, d), fill).reshape(r, -1, d_read)
  dv, all_heads = views[0].values.stop - views[0].values.start, q.shape[1]
  last = s // blocks.k - 1

  def at(i, j, layer, rows, starts, stops):
    if not full:
      low = jnp.clip(starts[i] // blocks.k, 0, last)
      j = jnp.clip(j, low, jnp.clip((stops[i] - 1) // blocks.k, low, last))
    return layer[0], rows[i], j, 0

  out, lse = pl.pallas_call(
    functools.partial(_kernel, views=views, blocks=blocks, scale=scale, full=full),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(r, s // blocks.k),
      in_specs=[
        pl.BlockSpec((1, all_heads, d_read), lambda i, j, *_: (i, 0, 0)),
        pl.BlockSpec((1, 1, blocks.k, width), at),
      ],
      out_specs=[
        pl.BlockSpec((1, all_heads, dv), lambda i, j, *_: (i, 0, 0)),
        pl.BlockSpec((1, 1, all_heads), lambda i, j, *_: (i, 0, 0)),
      ],
      scratch_shapes=[
        pltpu.VMEM((all_heads, LANES), jnp.float32),
        pltpu.VMEM((all_heads, LANES), jnp.float32),
        pltpu.VMEM((all_heads, dv), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((r, all_heads, dv), jnp.float32),
      jax.ShapeDtypeStruct((r, 1, all_heads), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * r * heads * s * (d + dv),
      transcendentals=r * heads * s,
      bytes_accessed=r * s * width * cache.dtype.itemsize,
    ),
    interpret=interpret,
    name="decode_attention",
  )(layer, rows, starts, stops, q, cache)

  def real(x):
    x = x.reshape(r, layout.kv_heads, whole, *x.shape[2:])[:, :, :n]
    return x.reshape(r, heads, *x.shape[3:])

  return real(out)[..., values], real(lse[:, 0])
