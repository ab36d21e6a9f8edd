"""The experts' product: rows sorted by expert, each times its expert's matrix.

On a TPU this is a door to JAX's megablox kernels, with tiles that fit the shape: with
their default of 128 the memory is slower than the matrix unit. jax.lax.ragged_dot has a
kernel of its own for the product and none for the weights' gradient, where XLA
multiplies every row for every expert. On a GPU: grouped_matmul_triton.
"""

import functools

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
import jax.numpy as jnp

from r1jax.kernels import base2
from r1jax.kernels import grouped_matmul_triton as triton

# Rows, inner and outer width: what fits a TPU's VMEM in bfloat16.
TILE = (512, 1024, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
  x: jax.Array, w: jax.Array, group_sizes: jax.Array, body: str, interpret: bool
) -> jax.Array:
  """Rows of x times their group's matrix.

  Args:
    x: [M, D], sorted by group.
    w: [E, D, F].
    group_sizes: [E] int32; rows after their sum are 0 in the result.
    body: "mosaic" or "triton".
    interpret: run as XLA, on any platform.

  Returns:
    [M, F] in x's dtype, summed in float32.

  Raises:
    NotImplementedError: the body cannot serve the dtype.
  """
  return _forward(x, w, group_sizes, body, interpret)[0]


def tiles(
  rows: int, groups: int, inner: int, outer: int, dtype: jnp.dtype = jnp.bfloat16
) -> tuple[int, int, int]:
  """(rows, inner, outer) of a tile: as TILE, less where a group or a side is
  smaller."""
  mean = max(rows // groups, 1)
  row = max(128, min(TILE[0], 1 << (mean.bit_length() - 1)))

  def side(width, most):
    return min(most, -(-width // 128) * 128)

  half = 1 if dtype == jnp.bfloat16 else 2
  return row, side(inner, TILE[1] // half), side(outer, TILE[2])


def _rows(x, side):
  return jnp.pad(x, ((0, -x.shape[0] % side), (0, 0)))


def _product(x, w, sizes, body, interpret, transposed):
  """x times w, or times w's transposes: [M, D] or [M, F] -> [M, F] or [M, D]."""
  if body == "triton":
    return triton.product(x, w, sizes, transposed=transposed, interpret=interpret)
  inner, outer = w.shape[:0:-1] if transposed else w.shape[1:]
  tile = tiles(x.shape[0], w.shape[0], inner, outer, x.dtype)
  out = gmm(
    _rows(x, tile[0]),
    w,
    sizes,
    x.dtype,
    tile,
    transpose_rhs=transposed,
    interpret=interpret,
  )[: x.shape[0]]
  # Rows of no group are never written.
  return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), out, 0)


def _forward(x, w, group_sizes, body, interpret):
  base2.check(x.dtype, *x.shape, *w.shape)
  out = _product(x, w, group_sizes, body, interpret, transposed=False)
  return out, (x, w, group_sizes)


def _backward(body, interpret, kept, grad):
  x, w, sizes = kept
  dx = _product(grad, w, sizes, body, interpret, transposed=True)
  if body == "triton":
    dw = triton.outer_product(x, grad, sizes, interpret=interpret)
  else:
    tile = tiles(x.shape[0], w.shape[0], *w.shape[1:], x.dtype)
    x, grad = _rows(x, tile[0]), _rows(grad, tile[0])
    dw = tgmm(x.T, grad, sizes, w.dtype, tile, interpret=interpret)
  return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)
