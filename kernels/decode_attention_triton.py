"""One token's attention over a cache on a GPU, through Triton.

The slots of a row are split among programs, whose parts are merged by their
log-sum-exp (flash decoding).
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
  heads: int  # query heads of a program
  k: int = 32  # slots read at a time
  splits: int = 1  # programs that share a row's slots
  warps: int = 4
  stages: int = 2


def fit(rows: int, heads: int, slots: int, layout, dtype: jnp.dtype) -> Blocks:
  """Blocks for the query heads of a key head, of so many rows.

  Raises:
    NotImplementedError: this body cannot serve the shape or the dtype.
  """
  base2.check(dtype, slots)
  check_width(layout.key_width)
  check_width(layout.value_width)
  if slots % 16:
    raise NotImplementedError(f"slots are a multiple of 16 here, not {slots}")
  wide = layout.key_width > 256
  k = 16 if slots % 32 or dtype == jnp.float32 else 32 if slots % 64 else 64
  if dtype == jnp.float32:
    blocks = Blocks(16, k, warps=8 if wide else 4)
  elif not wide:
    most = 16 if heads <= 16 else 32 if heads <= 32 else 64
    blocks = Blocks(most, k, stages=3)
  elif heads <= 16:
    blocks = Blocks(16, min(k, 32), stages=3)
  else:
    blocks = Blocks(32, k)
  # So many warps kept an H200 busiest.
  programs = rows * layout.kv_heads * -(-heads // blocks.heads)
  splits = (2048 if wide else 4096) // (programs * blocks.warps)
  return blocks._replace(splits=max(1, min(splits, 16, slots // 256)))


def _kernel(
  layer_ref,  # 1
  rows_ref,  # R
  starts_ref,  # R
  stops_ref,  # R
  q_ref,  # R Hq d
  cache_ref,  # N M S L
  out_ref,  # R splits Hq dv
  lse_ref,  # R splits Hq
  *,
  layout,
  blocks: Blocks,
  scale: float,
  of_key_head: int,
):
  """of_key_head: programs of a key head's query heads."""
  n, split, r = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  layer, row, start, stop = layer_ref[0], rows_ref[r], starts_ref[r], stops_ref[r]
  heads = pl.ds(n * blocks.heads, blocks.heads)
  q = [q_ref[r, heads, part] for part in powers_of_two(layout.key_width)]
  place, turn = (n // of_key_head) * layout.stride, scale * base2.LOG2E

  def read(at, first, width):
    return [
      cache_ref[layer, row, at, pl.ds(first + part.start, part.stop - part.start)]
      for part in powers_of_two(width)
    ]

  def body(j, carry):
    high, total, acc = carry
    at = pl.ds(j * blocks.k, blocks.k)
    keys = read(at, place, layout.key_width)
    scores = sum(dot(a, b.T) for a, b in zip(q, keys, strict=True))
    slots = j * blocks.k + jnp.arange(blocks.k)
    seen = (slots >= start) & (slots < stop)
    scores = jnp.where(seen[None], scores, base2.MASKED)
    now = jnp.maximum(high, scores.max(axis=1))
    p, decay = (jnp.exp2(x * turn) for x in (scores - now[:, None], high - now))
    values = read(at, place + layout.value_start, layout.value_width)
    acc = [
      decay[:, None] * a + dot(p.astype(v.dtype), v)
      for a, v in zip(acc, values, strict=True)
    ]
    return now, decay * total + p.sum(axis=1), acc

  zero = (
    jnp.full((blocks.heads,), base2.FLOOR, jnp.float32),
    jnp.zeros((blocks.heads,), jnp.float32),
    [
      jnp.zeros((blocks.heads, part.stop - part.start), jnp.float32)
      for part in powers_of_two(layout.value_width)
    ],
  )
  # The row's blocks, from the one of `start` to that before `stop`, in equal shares.
  first = jax.lax.div(start, blocks.k)
  count = jnp.maximum(jax.lax.div(stop + blocks.k - 1, blocks.k) - first, 0)
  share = jax.lax.div(count + blocks.splits - 1, blocks.splits)
  low = first + split * share
  end = jnp.minimum(low + share, first + count)
  high, total, acc = jax.lax.fori_loop(low, end, body, zero)
  lse, divisor = base2.log_sum_exp(high, total, scale)
  for part, a in zip(powers_of_two(layout.value_width), acc, strict=True):
    out_ref[r, split, heads, part] = a / divisor[:, None]
  lse_ref[r, split, heads] = lse


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
) -> tuple[jax.Array, jax.Array]:
  """As decode_attention.part, with layer [1].

  Raises:
    NotImplementedError: this body cannot serve the shape.
  """
  r, heads, d = q.shape
  n = heads // layout.kv_heads
  blocks = fit(r, n, cache.shape[2], layout, cache.dtype)
  whole = -(-n // blocks.heads) * blocks.heads
  fill = ((0, 0), (0, 0), (0, whole - n), (0, 0))
  q = jnp.pad(q.reshape(r, layout.kv_heads, n, d), fill).reshape(r, -1, d)
  shape, dv = (r, blocks.splits, layout.kv_heads * whole), layout.value_width
  out, lse = pl.pallas_call(
    functools.partial(
      _kernel,
      layout=layout,
      blocks=blocks,
      scale=scale,
      of_key_head=whole // blocks.heads,
    ),
    grid=(shape[2] // blocks.heads, blocks.splits, r),
    out_shape=[
      jax.ShapeDtypeStruct((*shape, dv), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * r * heads * cache.shape[2] * (d + dv),
      transcendentals=r * heads * cache.shape[2],
      bytes_accessed=r * cache.shape[2] * cache.shape[3] * cache.dtype.itemsize,
    ),
    interpret=interpret,
    name="decode_attention",
  )(layer, rows, starts, stops, q, cache)
  out, lse = base2.merge(
    [(out[:, split], lse[:, split]) for split in range(blocks.splits)]
  )
  out = out.reshape(r, layout.kv_heads, whole, dv)[:, :, :n].reshape(r, heads, dv)
  return out, lse.reshape(r, layout.kv_heads, whole)[:, :, :n].reshape(r, heads)
