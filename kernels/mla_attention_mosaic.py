"""Flash attention on a TPU: the forward pass, and which blocks touch.

A row's running maximum and sum are kept once a lane, so that a block costs one
reduction across lanes. Blocks of keys are read in chunks, and a chunk's scores are
asked for before the last chunk's softmax, so that matrix and vector units work at the
same time.

Blocks that share no segment, or lie above the diagonal, are passed over; blocks within
one segment and below the diagonal need no mask.
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
  """Tokens in VMEM at a time, multiples of LANES."""

  q: int = 1024
  k: int = 1024
  chunk: int = 512  # of keys, whose scores are one matrix product; divides k


def fit(q: tuple, k: tuple, v: tuple, dtype: jnp.dtype) -> Blocks:
  """Blocks for queries [B, T, H, d], keys [B, S, Hk, d] and values [B, S, Hk, dv].

  Raises:
    NotImplementedError: this body cannot serve the shape or the dtype.
  """
  base2.check(dtype, q[1], k[1])
  if q[3] > 256 or v[3] > 256:
    raise NotImplementedError(f"heads are at most 256 wide here, not {q[3]} and {v[3]}")
  if v[3] > LANES and v[3] % LANES:
    raise NotImplementedError(
      f"values are at most {LANES} wide or a multiple of it here, not {v[3]}"
    )
  most = 1024 if dtype == jnp.bfloat16 else 512
  q_block, k_block = (_block(x[1], most) for x in (q, k))
  return Blocks(q_block, k_block, min(512 if most == 1024 else 256, k_block))


def _block(length: int, most: int) -> int:
  """The largest block that fills at most an eighth of the rows up."""
  sizes = [LANES * 2**n for n in range(4) if LANES * 2**n <= most]
  fits = [size for size in sizes if -length % size <= length // 8]
  return max(fits, default=LANES)


def ranges(segments: jax.Array | None, block: int) -> jax.Array:
  """Least and greatest segment of every block of T tokens, int32, as [B (T / block) 2]:
  scalar memory fills other axes up. Without segments nobody looks.
  """
  if segments is None:
    return jnp.ones(2, jnp.int32)
  parts = segments.reshape(segments.shape[0], -1, block)
  return jnp.stack([parts.min(axis=2), parts.max(axis=2)], axis=2).reshape(-1)


def cases(b, i, j, q_ranges, k_ranges, *, grid, causal, segmented, blocks, step):
  """Runs step(diagonal, by_segment), as query block i and key block j need it: with the
  diagonal's mask, with one by segments; or not at all. grid: (query blocks, key
  blocks) of a row."""
  q_blocks, k_blocks = grid
  some, mask, below = True, False, True
  if causal:
    some = j * blocks.k <= i * blocks.q + blocks.q - 1
    below = j * blocks.k + blocks.k - 1 <= i * blocks.q
  if segmented:
    q_at, k_at = 2 * (b * q_blocks + i), 2 * (b * k_blocks + j)
    q_low, q_high = q_ranges[q_at], q_ranges[q_at + 1]
    k_low, k_high = k_ranges[k_at], k_ranges[k_at + 1]
    shared = jnp.logical_and(q_low <= k_high, k_low <= q_high)
    some = jnp.logical_and(some, jnp.logical_and(shared, k_high > 0))
    mask = jnp.logical_not(jnp.logical_and(q_low == q_high, k_low == k_high))
  if causal:  # few blocks: they are masked by segments as well
    on = jnp.logical_and(some, jnp.logical_not(below))
    pl.when(on)(functools.partial(step, True, segmented))
    some = jnp.logical_and(some, below)
  if segmented:
    pl.when(jnp.logical_and(some, mask))(functools.partial(step, False, True))
    some = jnp.logical_and(some, jnp.logical_not(mask))
  pl.when(some)(functools.partial(step, False, False))


def chunks(blocks: Blocks, diagonal: bool) -> list[tuple[int, int]]:
  """(chunk of keys, the first query of the block that sees it)."""
  square = diagonal and blocks.q == blocks.k
  count = blocks.k // blocks.chunk
  return [(c, c * blocks.chunk if square else 0) for c in range(count)]


def last_block(i: jax.Array, blocks: Blocks) -> jax.Array:
  """The last block of keys that query block i sees under a causal mask."""
  return ((i + 1) * blocks.q - 1) // blocks.k


def inside(x: jax.Array) -> jax.Array:
  """[B, T, H, d] -> [B, H, T, d], heads above LANES filled up to a multiple of it: XLA
  would do so with a copy of its own."""
  width = x.shape[3]
  fill = -width % LANES if width > LANES else 0
  return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, fill)))


def outside(x: jax.Array, width: int) -> jax.Array:
  """The way back."""
  return x[..., :width].swapaxes(1, 2)


def compiler_params() -> pltpu.CompilerParams:
  """Of a grid (batch, head, block, block it is summed over)."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=VMEM_LIMIT,
  )


def _kernel(
  q_ranges,  # B T/q 2, flat
  k_ranges,  # B S/k 2, flat
  q_ref,  # 1 1 q d
  k_ref,  # 1 1 k d
  v_ref,  # 1 1 k dv
  *rest,
  grid: tuple[int, int],
  causal: bool,
  scale: float,
  segmented: bool,
  blocks: Blocks,
):
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  dtype, dv = q_ref.dtype, v_ref.shape[-1]
  # Segments, if there are some: 1 q LANES, and 1 8 k. Then out 1 1 q dv, lse 1 1 1 q;
  # the running maximum, equal in all lanes, the running sum, to which the lanes add up,
  # both q LANES, and what is summed, q dv.
  *segments, out_ref, lse_ref, high, total, acc = rest

  @pl.when(j == 0)
  def _():
    high[...] = jnp.full_like(high, base2.FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def scores(chunk, first):
    keys = k_ref[0, 0, pl.ds(chunk * blocks.chunk, blocks.chunk)]
    return dot(q_ref[0, 0, first:], keys, (1, 1))

  def softmax(s, chunk, first, diagonal, by_segment):
    keep = None
    if diagonal:
      rows = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) + first + i * blocks.q
      start = j * blocks.k + chunk * blocks.chunk
      keep = rows >= jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) + start
    if by_segment:
      mine = wide(segments[0][0, first:], blocks.chunk)
      theirs = segments[1][0, :1, pl.ds(chunk * blocks.chunk, blocks.chunk)]
      same = jnp.logical_and(mine == theirs, theirs > 0)
      keep = same if keep is None else jnp.logical_and(keep, same)
    if keep is not None:
      s = jnp.where(keep, s, base2.MASKED)
    before = high[first:]
    now = jnp.maximum(before, s.max(axis=1, keepdims=True))
    p = jnp.exp2((s - wide(now, blocks.chunk)) * (scale * base2.LOG2E))
    decay = jnp.exp2((before - now) * (scale * base2.LOG2E))
    high[first:] = now
    total[first:] = decay * total[first:] + lane_sums(p)
    values = v_ref[0, 0, pl.ds(chunk * blocks.chunk, blocks.chunk)]
    product = dot(p.astype(dtype), values, (1, 0))
    acc[first:] = wide(decay, dv) * acc[first:] + product

  def step(diagonal, by_segment):
    work = chunks(blocks, diagonal)
    s = scores(*work[0])
    for n, (chunk, first) in enumerate(work):
      after = scores(*work[n + 1]) if n + 1 < len(work) else None
      softmax(s, chunk, first, diagonal, by_segment)
      s = after

  how = dict(grid=grid, causal=causal, segmented=segmented, blocks=blocks)
  cases(b, i, j, q_ranges, k_ranges, step=step, **how)

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    row = total[...].sum(axis=1, keepdims=True)
    lse, divisor = base2.log_sum_exp(high[...], row, scale)
    out_ref[0, 0] = (acc[...] / divisor).astype(out_ref.dtype)
    lse_ref[0, 0] = lse.T[:1]


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
  """([B, T, H, dv] in v's dtype, natural log-sum-exp [B, H, T] float32).

  Args:
    q: [B, T, H, d].
    k: [B, S, Hk, d].
    v: [B, S, Hk, dv].
    q_segments, k_segments: [B, T] and [B, S] int32, 0 is padding; or None.
    causal: T == S and a query sees no later key.
    scale: of the scores.
    blocks: sizes that divide T and S.
    interpret: run as XLA, on any platform.
  """
  width = v.shape[3]
  q, k, v = inside(q), inside(k), inside(v)
  (b, heads, t, d), (s, dv) = q.shape, v.shape[2:]
  group, segmented = heads // k.shape[1], q_segments is not None
  pairs = b * heads * t * s // (2 if causal else 1)
  grid = t // blocks.q, s // blocks.k

  def of_q(b, h, i, j, *_):
    return b, h, i, 0

  def of_k(b, h, i, j, *_):
    return b, h // group, jnp.minimum(j, last_block(i, blocks)) if causal else j, 0

  specs = [
    pl.BlockSpec((1, 1, blocks.q, d), of_q),
    pl.BlockSpec((1, 1, blocks.k, d), of_k),
    pl.BlockSpec((1, 1, blocks.k, dv), of_k),
  ]
  args = [q, k, v]
  if segmented:
    specs += [
      pl.BlockSpec((1, blocks.q, LANES), lambda b, h, i, j, *_: (b, i, 0)),
      pl.BlockSpec((1, 8, blocks.k), lambda *at: (at[0], 0, of_k(*at)[2])),
    ]
    args += [
      jnp.broadcast_to(q_segments[:, :, None], (b, t, LANES)),
      jnp.broadcast_to(k_segments[:, None], (b, 8, s)),
    ]
  out, lse = pl.pallas_call(
    functools.partial(
      _kernel,
      grid=grid,
      causal=causal,
      scale=scale,
      segmented=segmented,
      blocks=blocks,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, heads, *grid),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, 1, blocks.q, dv), of_q),
        pl.BlockSpec((1, 1, 1, blocks.q), lambda b, h, i, j, *_: (b, h, 0, i)),
      ],
      scratch_shapes=[
        pltpu.VMEM((blocks.q, LANES), jnp.float32),
        pltpu.VMEM((blocks.q, LANES), jnp.float32),
        pltpu.VMEM((blocks.q, dv), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((b, heads, t, dv), v.dtype),
      jax.ShapeDtypeStruct((b, heads, 1, t), jnp.float32),
    ],
    compiler_params=compiler_params(),
    cost_estimate=pl.CostEstimate(
      flops=2 * pairs * (d + dv),
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, v)),
    ),
    interpret=interpret,
    name="mla_attention_forward",
  )(ranges(q_segments, blocks.q), ranges(k_segments, blocks.k), *args)
  return outside(out, width), lse[:, :, 0]
