"""The experts' product and its backward products on a GPU, through Triton.

A block of rows may hold the end of one group and the start of the next. So the list of
visits names every pair of a block and a group that touch, at most blocks + groups - 1;
a program serves one visit and stores the rows of its group alone.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from r1jax.kernels.triton_blocks import check_width, dot


class Tile(NamedTuple):
  rows: int
  inner: int
  outer: int
  warps: int = 8
  stages: int = 3


def tiles(rows: int, groups: int, dtype: jnp.dtype) -> tuple[Tile, Tile]:
  """Of (a product, the weights' gradient)."""
  if dtype == jnp.float32:
    return Tile(64, 16, 128), Tile(64, 32, 64, 4)
  return Tile(128 if rows >= 128 * groups else 64, 64, 128), Tile(64, 128, 128)


def visits(sizes: jax.Array, rows: int, block: int) -> tuple[jax.Array, jax.Array]:
  """([E + 1] first row of every group and the last's end, [2, V] (block, group) of
  every visit), int32. Visits that are too many have the number of groups for a
  group."""
  groups = sizes.shape[0]
  ends = jnp.cumsum(sizes)
  starts = jnp.concatenate([jnp.zeros(1, sizes.dtype), ends])
  first = starts[:-1] // block
  count = jnp.where(sizes > 0, (ends + block - 1) // block - first, 0)
  before = jnp.cumsum(count)
  number = jnp.arange(rows // block + groups, dtype=jnp.int32)
  group = jnp.searchsorted(before, number, side="right").astype(jnp.int32)
  safe = jnp.minimum(group, groups - 1)
  at = first[safe] + number - (before[safe] - count[safe])
  at = jnp.clip(at, 0, rows // block - 1)
  return starts.astype(jnp.int32), jnp.stack([at, group]).astype(jnp.int32)


def _product_kernel(
  starts_ref, visits_ref, x_ref, w_ref, zero_ref, out_ref, *, groups, transposed, tile
):
  """x M D, w E D F, or E F D if transposed, out M F (aliased with zero)."""
  del zero_ref
  column, visit = pl.program_id(0), pl.program_id(1)
  block, group = visits_ref[0, visit], visits_ref[1, visit]

  @pl.when(group < groups)
  def _():
    rows, columns = (
      pl.ds(block * tile.rows, tile.rows),
      pl.ds(column * tile.outer, tile.outer),
    )

    def body(n, acc):
      inner = pl.ds(n * tile.inner, tile.inner)
      if transposed:
        return acc + dot(x_ref[rows, inner], w_ref[group, columns, inner].T)
      return acc + dot(x_ref[rows, inner], w_ref[group, inner, columns])

    acc = jnp.zeros((tile.rows, tile.outer), jnp.float32)
    acc = jax.lax.fori_loop(0, x_ref.shape[1] // tile.inner, body, acc)
    row = block * tile.rows + jnp.arange(tile.rows)
    mine = (row >= starts_ref[group]) & (row < starts_ref[group + 1])
    mine = jnp.broadcast_to(mine[:, None], acc.shape)
    plgpu.store(out_ref.at[rows, columns], acc.astype(out_ref.dtype), mask=mine)


def _outer_kernel(starts_ref, x_ref, grad_ref, out_ref, *, tile):
  """x M D, grad M F, out E D F."""
  b, a, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  start, stop = starts_ref[group], starts_ref[group + 1]
  inner, outer = pl.ds(a * tile.inner, tile.inner), pl.ds(b * tile.outer, tile.outer)

  def body(n, acc, whole):
    at = pl.ds(n * tile.rows, tile.rows)
    x, grad = x_ref[at, inner], grad_ref[at, outer]
    if not whole:  # a neighbour's may not even be numbers
      row = n * tile.rows + jnp.arange(tile.rows)
      mine = ((row >= start) & (row < stop))[:, None]
      x, grad = (jnp.where(mine, y, 0).astype(y.dtype) for y in (x, grad))
    return acc + dot(x.T, grad)

  acc = jnp.zeros((tile.inner, tile.outer), jnp.float32)
  first = jax.lax.div(start, tile.rows)
  last = jax.lax.div(stop + tile.rows - 1, tile.rows)
  last = jnp.where(stop > start, last, first)
  low = jnp.minimum(jax.lax.div(start + tile.rows - 1, tile.rows), last)
  high = jnp.maximum(jax.lax.div(stop, tile.rows), low)
  for ends, whole in (
    ((first, low), False),
    ((low, high), True),
    ((high, last), False),
  ):
    acc = jax.lax.fori_loop(*ends, functools.partial(body, whole=whole), acc)
  out_ref[group, inner, outer] = acc.astype(out_ref.dtype)


def _filled(x, *sides):
  """The last axes filled up with zeros to multiples of sides."""
  axes = x.ndim - len(sides)
  fill = [(0, -n % side) for n, side in zip(x.shape[axes:], sides, strict=True)]
  return jnp.pad(x, [(0, 0)] * axes + fill)


def _cost(products, *arrays):
  """Every row meets one group."""
  return pl.CostEstimate(
    flops=2 * products,
    transcendentals=0,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
  )


def product(
  x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool, interpret: bool
) -> jax.Array:
  """[M, D], [E, D, F] or its transposes [E, F, D], [E] -> [M, F]; rows of no group
  are 0."""
  (m, d), groups = x.shape, w.shape[0]
  f = w.shape[1] if transposed else w.shape[2]
  check_width(d)
  check_width(f)
  tile, _ = tiles(m, groups, x.dtype)
  x = _filled(x, tile.rows, tile.inner)
  w = (
    _filled(w, tile.outer, tile.inner)
    if transposed
    else _filled(w, tile.inner, tile.outer)
  )
  columns = w.shape[1] if transposed else w.shape[2]
  starts, pairs = visits(sizes, x.shape[0], tile.rows)
  zero = jnp.zeros((x.shape[0], columns), x.dtype)
  out = pl.pallas_call(
    functools.partial(_product_kernel, groups=groups, transposed=transposed, tile=tile),
    grid=(columns // tile.outer, pairs.shape[1]),
    out_shape=jax.ShapeDtypeStruct(zero.shape, zero.dtype),
    input_output_aliases={4: 0},
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=_cost(m * d * f, x, w, zero),
    interpret=interpret,
    name="grouped_matmul",
  )(starts, pairs, x, w, zero)
  return out[:m, :f]


def outer_product(
  x: jax.Array, grad: jax.Array, sizes: jax.Array, *, interpret: bool
) -> jax.Array:
  """[M, D], [M, F], [E] -> [E, D, F]: every group's x^T grad."""
  (_, d), f = x.shape, grad.shape[1]
  _, tile = tiles(x.shape[0], sizes.shape[0], x.dtype)
  x, grad = _filled(x, tile.rows, tile.inner), _filled(grad, tile.rows, tile.outer)
  ends = jnp.cumsum(sizes)
  starts = jnp.concatenate([jnp.zeros(1, sizes.dtype), ends]).astype(jnp.int32)
  groups, inner, outer = sizes.shape[0], x.shape[1], grad.shape[1]
  out = pl.pallas_call(
    functools.partial(_outer_kernel, tile=tile),
    grid=(outer // tile.outer, inner // tile.inner, groups),
    out_shape=jax.ShapeDtypeStruct((groups, inner, outer), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=_cost(x.shape[0] * d * f, x, grad),
    interpret=interpret,
    name="grouped_matmul_dw",
  )(starts, x, grad)
  return out[:, :d, :f]
