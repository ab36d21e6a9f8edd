"""What the TPU bodies share: how wide a register is, and products of blocks."""

import functools

import jax
import jax.numpy as jnp

from r1jax.kernels import base2

LANES = 128
VMEM_LIMIT = 30 * 2**20  # bytes; XLA keeps small arrays of its own beside a kernel


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Product of two blocks over one axis each, float32."""
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dims, precision=base2.precision(a.dtype), preferred_element_type=jnp.float32
  )


def wide(x: jax.Array, width: int) -> jax.Array:
  """[rows, LANES] whose lanes are equal, as [rows, width]."""
  if width <= LANES:
    return x[:, :width]
  return jnp.concatenate([x] * (width // LANES), axis=1)


def lane_sums(x: jax.Array) -> jax.Array:
  """[rows, n LANES] -> [rows, LANES] whose lanes add up to the row's sum."""
  parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
  return functools.reduce(jnp.add, parts)
