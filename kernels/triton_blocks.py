"""What the GPU bodies share. Triton's arrays have powers of two for sides, 16 at least
in a product: a head of 192 is read as 128 and 64."""

import jax
import jax.numpy as jnp

from r1jax.kernels import base2


def check_width(width: int) -> None:
  """Raises NotImplementedError where parts of a width would be too small."""
  if width % 16 or width < 16:
    raise NotImplementedError(f"widths are multiples of 16 here, not {width}")


def powers_of_two(width: int) -> list[slice]:
  """Slices of a width, the widest first."""
  found, at = [], 0
  while at < width:
    size = 1 << ((width - at).bit_length() - 1)
    found.append(slice(at, at + size))
    at += size
  return found


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b in float32."""
  return jax.lax.dot(
    a, b, precision=base2.precision(a.dtype), preferred_element_type=jnp.float32
  )
