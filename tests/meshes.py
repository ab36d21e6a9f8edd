"""A mesh by its three usual sizes."""

import jax

from r1jax import sharding


def mesh_of(
  shape: tuple[int, int, int], devices: list | None = None
) -> jax.sharding.Mesh:
  """(fsdp, expert, tensor) -> the mesh."""
  return sharding.make_mesh(
    devices, **dict(zip(("fsdp", "expert", "tensor"), shape, strict=True))
  )
