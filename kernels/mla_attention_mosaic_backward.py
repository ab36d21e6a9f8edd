"""Flash attention on a TPU: the backward pass.

With P = exp2(s - lse) and dS = P * (dO V^T - delta): dV = P^T dO, dK = dS^T q, dQ = dS
k. Blocks of P are kept transposed, keys along the sublanes, so that lse and delta are
rows and no block is turned for dV and dK. Two kernels: one sums over keys, one over
queries.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from r1jax.kernels import base2
from r1jax.kernels.mla_attention_mosaic import (
  Blocks,
  cases,
  chunks,
  compiler_params,
  inside,
  last_block,
  outside,
  ranges,
)
from r1jax.kernels.mosaic_blocks import LANES, dot, wide


def _transposed(refs, i, j, chunk, first, diagonal, by_segment, blocks, scale):
  """(P^T, dS^T) of a chunk of keys and the block's queries from `first` on, float32."""
  q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *segments = refs
  at = pl.ds(chunk * blocks.chunk, blocks.chunk)
  s = dot(k_ref[0, 0, at], q_ref[0, 0, first:], (1, 1))
  keep = None
  if diagonal:
    start = j * blocks.k + chunk * blocks.chunk
    keys = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) + start
    queries = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) + first + i * blocks.q
    keep = queries >= keys
  if by_segment:
    theirs = wide(segments[1][0, at], s.shape[1])
    same = jnp.logical_and(theirs == segments[0][0, :1, first:], theirs > 0)
    keep = same if keep is None else jnp.logical_and(keep, same)
  if keep is not None:
    s = jnp.where(keep, s, base2.MASKED)
  p = jnp.exp2(s * (scale * base2.LOG2E) - lse_ref[0, 0, :, first:])
  dp = dot(v_ref[0, 0, at], do_ref[0, 0, first:], (1, 1))
  return p, p * (dp - delta_ref[0, 0, :, first:])


def _dq_kernel(q_ranges, k_ranges, *refs, scale, **how):
  """refs: q 1 1 q d, k 1 1 k d, v 1 1 k dv, do 1 1 q dv, lse and delta 1 1 1 q;
  segments 1 8 q and 1 k LANES if there are some; dq 1 1 q d; q d for the sum."""
  *refs, dq_ref, acc = refs
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  blocks, k_ref = how["blocks"], refs[1]

  @pl.when(j == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  def step(diagonal, by_segment):
    for chunk, first in chunks(blocks, diagonal):
      _, ds = _transposed(refs, i, j, chunk, first, diagonal, by_segment, blocks, scale)
      keys = k_ref[0, 0, pl.ds(chunk * blocks.chunk, blocks.chunk)]
      acc[first:] += dot(ds.astype(keys.dtype), keys, (0, 0))

  cases(b, i, j, q_ranges, k_ranges, step=step, **how)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    dq_ref[0, 0] = (acc[...] * scale).astype(dq_ref.dtype)


def _dkv_kernel(q_ranges, k_ranges, *refs, scale, **how):
  """refs: as above, with dk 1 1 k d and dv 1 1 k dv; k d and k dv for the sums. The
  grid's last axis runs over the query heads of a key head, and their blocks."""
  *refs, dk_ref, dv_ref, dk, dv = refs
  b, j, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  blocks, q_ref, do_ref = how["blocks"], refs[0], refs[3]
  i = n % how["grid"][0]

  @pl.when(n == 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def step(diagonal, by_segment):
    for chunk, first in chunks(blocks, diagonal):
      at = pl.ds(chunk * blocks.chunk, blocks.chunk)
      p, ds = _transposed(refs, i, j, chunk, first, diagonal, by_segment, blocks, scale)
      queries, do = q_ref[0, 0, first:], do_ref[0, 0, first:]
      dv[at] += dot(p.astype(do.dtype), do, (1, 0))
      dk[at] += dot(ds.astype(queries.dtype), queries, (1, 0))

  cases(b, i, j, q_ranges, k_ranges, step=step, **how)

  @pl.when(n == pl.num_programs(3) - 1)
  def _():
    dk_ref[0, 0] = (dk[...] * scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)


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
  """(dQ, dK, dV), in the layouts of q, k, v.

  Args:
    q .. k_segments: as the forward pass's.
    lse2: [B, H, T] float32, the log-sum-exp in base 2 (base2.in_base2).
    delta: [B, H, T] float32, rowsum(do * out) - d lse.
    do: [B, T, H, dv].
    causal .. interpret: as the forward pass's.
    scale: of the scores.
  """
  widths = q.shape[3], v.shape[3]
  q, k, v, do = inside(q), inside(k), inside(v), inside(do)
  (b, heads, t, d), (kv_heads, s, dv) = q.shape, v.shape[1:]
  group, segmented = heads // kv_heads, q_segments is not None
  grid = t // blocks.q, s // blocks.k
  how = dict(grid=grid, causal=causal, segmented=segmented, blocks=blocks)
  args = [q, k, v, do, lse2[:, :, None], delta[:, :, None]]
  if segmented:
    args += [
      jnp.broadcast_to(q_segments[:, None], (b, 8, t)),
      jnp.broadcast_to(k_segments[:, :, None], (b, s, LANES)),
    ]

  def call(kernel, grid, at_q, at_k, outs, name, widths):
    """at_q, at_k: program ids -> (head, block). outs: (rows of a block, width, at,
    shape)."""

    def block(rows, width, at):
      return pl.BlockSpec((1, 1, rows, width), lambda *p: (p[0], *at(*p[:4]), 0))

    def row(*p):
      head, i = at_q(*p[:4])
      return p[0], head, 0, i

    specs = [block(blocks.q, d, at_q), block(blocks.k, d, at_k)]
    specs += [block(blocks.k, dv, at_k), block(blocks.q, dv, at_q)]
    specs += [pl.BlockSpec((1, 1, 1, blocks.q), row)] * 2
    if segmented:
      specs += [
        pl.BlockSpec((1, 8, blocks.q), lambda *p: (p[0], 0, at_q(*p[:4])[1])),
        pl.BlockSpec((1, blocks.k, LANES), lambda *p: (p[0], at_k(*p[:4])[1], 0)),
      ]
    pairs = b * heads * t * s // (2 if causal else 1)
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=specs,
        out_specs=[block(rows, width, at) for rows, width, at, _ in outs],
        scratch_shapes=[
          pltpu.VMEM((rows, width), jnp.float32) for rows, width, _, _ in outs
        ],
      ),
      out_shape=[jax.ShapeDtypeStruct(shape, q.dtype) for *_, shape in outs],
      compiler_params=compiler_params(),
      cost_estimate=pl.CostEstimate(
        flops=2 * pairs * widths,
        transcendentals=pairs,
        bytes_accessed=2 * sum(x.size * x.dtype.itemsize for x in (q, k, v)),
      ),
      interpret=interpret,
      name=name,
    )(ranges(q_segments, blocks.q), ranges(k_segments, blocks.k), *args)

  def seen(b, h, i, j):
    return h // group, jnp.minimum(j, last_block(i, blocks)) if causal else j

  (dq,) = call(
    functools.partial(_dq_kernel, scale=scale, **how),
    (b, heads, *grid),
    lambda b, h, i, j: (h, i),
    seen,
    [(blocks.q, d, lambda b, h, i, j: (h, i), q.shape)],
    "mla_attention_dq",
    2 * d + dv,
  )

  def seeing(b, h, j, n):
    i = n % grid[0]
    if causal:
      i = jnp.maximum(i, j * blocks.k // blocks.q)
    return h * group + n // grid[0], i

  def mine(b, h, j, n):
    return h, j

  dk, dv = call(
    functools.partial(_dkv_kernel, scale=scale, **how),
    (b, kv_heads, grid[1], group * grid[0]),
    seeing,
    mine,
    [(blocks.k, d, mine, k.shape), (blocks.k, dv, mine, v.shape)],
    "mla_attention_dkv",
    2 * d + 2 * dv,
  )
  return outside(dq, widths[0]), outside(dk, widths[0]), outside(dv, widths[1])
