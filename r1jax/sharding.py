"""The mesh and the one mapping from logical axes of arrays to mesh axes.

Weights carry logical names (`embed`, `heads`, `experts`, ...); only this file and the
configs know the mesh axes `fsdp`, `expert` and `tensor`.
"""

import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.errors import UserError

AXES = ("fsdp", "expert", "tensor")
BATCH = ("fsdp", "expert")  # the axes that cut rows

# Logical axis -> mesh axis (None: replicated). The batch of prompts is spread over
# every axis that does not split a matrix product.
RULES = (
  ("batch", BATCH),
  ("embed", "fsdp"),
  ("vocab", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("ffn", "tensor"),
  ("experts", "expert"),
  ("latent", None),
  ("head_dim", None),
  ("norm", None),
  ("layers", None),
)


def check_mesh(shape: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
  """The full shape, with one -1 resolved.

  Raises:
    UserError: the product is not the number of devices.
  """
  shape = tuple(shape)
  fixed = math.prod(s for s in shape if s != -1)
  if shape.count(-1) == 1 and fixed > 0 and devices % fixed == 0:
    shape = tuple(devices // fixed if s == -1 else s for s in shape)
  if len(shape) != 3 or min(shape) < 1 or math.prod(shape) != devices:
    raise UserError(
      f"config.mesh={shape} (fsdp, expert, tensor) does not fit the {devices} devices"
      f" that this process sees. Use three sizes whose product is {devices}, such as"
      " (-1, 1, 1), or start where there are enough devices."
    )
  return shape


def make_mesh(shape: tuple[int, int, int], devices: list | None = None) -> Mesh:
  """A mesh (fsdp, expert, tensor) over exactly the devices at hand.

  Args:
    shape: the three axis sizes; one of them may be -1 and takes what is left.
    devices: default `jax.devices()`.

  Raises:
    UserError: the product of `shape` is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = check_mesh(shape, len(devices))
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
  """NamedShardings for a tree of `nn.Partitioned` boxes (the shapes of an init).

  Raises:
    UserError: an axis of a weight does not divide over its mesh axis.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

  def layout(path, spec, shape):
    for size, axis in zip(shape.shape, spec, strict=False):
      parts = math.prod(mesh.shape[a] for a in (axis,) if a is not None)
      if size % parts:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        raise UserError(
          f"config.mesh: an axis of {size} of the weight {name} {shape.shape} does not"
          f" divide over the {parts} devices along {axis!r}. Change the mesh or the"
          " size (config.model; for a vocabulary config.pretrain.vocab)."
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    layout, specs, nn.unbox(boxed), is_leaf=lambda x: isinstance(x, P)
  )


def data_shards(mesh: Mesh) -> int:
  """How many parts a batch is cut into."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of prompts, rollouts and pages: cut along their first axis."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def shard_batch(x: jax.Array, axis: int = 0) -> jax.Array:
  """Keeps an axis of rows cut over the data axes of the current mesh.

  Without a mesh (`jax.set_mesh`) it is the identity.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  cut = *([None] * axis), BATCH
  return jax.lax.with_sharding_constraint(x, P(*cut))
