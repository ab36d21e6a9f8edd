"""The mesh and the one mapping from logical axes of arrays to mesh axes.

  data     rows, with a copy of the weights each
  fsdp     rows, and weights cut along their width
  expert   rows, weights cut likewise, and each routed expert on one part
  tensor   heads, and width of the FFNs and vocabulary; tokens between the layers
  context  tokens of a row

Weights carry logical names (`embed`, `heads`, `experts`, ...); only this file and the
configs know the axes of the mesh.
"""

from collections.abc import Mapping
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")  # the axes that cut rows
WIDTH = ("fsdp", "expert")  # the axes that cut weights and not their products

# Logical axis of a weight -> mesh axes (None: whole on every device).
_FSDP = {
  "embed": WIDTH,
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "ffn": "tensor",
  "experts": "expert",
  "expert_embed": "fsdp",
  "expert_ffn": "tensor",
  "router": None,
  "latent": WIDTH,  # where `embed` has not taken them
  "head_dim": None,
  "norm": None,
  "layers": None,
}
RULES = {
  "fsdp": _FSDP,  # weights are gathered where a layer uses them
  "replicated": _FSDP
  | {"embed": None, "latent": None},  # those that are not of experts are whole
}


def check_mesh(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """The sizes of all axes, with one -1 resolved; an axis that is not named has size 1.

  Raises:
    UserError: an axis that does not exist, or the product is not the devices' number.
  """
  said = [f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) != 1]
  said = ", ".join(said) or "all axes 1"
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise UserError(f"config.mesh: {unknown} are no axes; these are {list(AXES)}.")
  full = {axis: int(sizes.get(axis, 1)) for axis in AXES}
  open_ = [axis for axis, size in full.items() if size == -1]
  fixed = math.prod(size for size in full.values() if size != -1)
  if len(open_) == 1 and fixed > 0 and devices % fixed == 0:
    full[open_[0]] = devices // fixed
  if min(full.values()) < 1 or math.prod(full.values()) != devices:
    raise UserError(
      f"config.mesh ({said}) is not a mesh of the {devices} devices that are there."
      f" Use sizes whose product is {devices}, such as {near(full, devices)} or fsdp=-1"
      " alone (-1 takes what is left), or start where there are enough devices."
    )
  return full


def near(sizes: Mapping[str, int], devices: int) -> str:
  """The mesh of so many devices with the same sizes along as many axes as divide."""
  left, kept = devices, {}
  for axis in ("tensor", "expert", "context", "data"):
    size = max(sizes[axis], 1)
    kept[axis] = math.gcd(size, left)
    left //= kept[axis]
  kept = {"fsdp": left} | {axis: n for axis, n in kept.items() if n > 1}
  return " ".join(f"{axis}={n}" for axis, n in kept.items())


def make_mesh(devices: list | None = None, /, **sizes: int) -> Mesh:
  """A mesh over exactly the devices at hand.

  Args:
    devices: default `jax.devices()`.
    sizes: of its axes, AXES; one of them may be -1 and takes what is left.

  Raises:
    UserError: as `check_mesh`.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(check_mesh(sizes, len(devices)).values())
  # Axes may be cut across the physical ones of a TPU's torus.
  how = dict(devices=devices, allow_split_physical_axes=True)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, **how)
  else:
    within, across = _over_slices(dict(zip(AXES, shape, strict=True)), slices)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, **how)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_slices(sizes: Mapping[str, int], slices: int) -> tuple[tuple, tuple]:
  """(sizes within a slice, sizes over slices): `data` or `fsdp` goes over them, whose
  traffic is least.

  Raises:
    UserError: neither divides.
  """
  for axis in ("data", "fsdp"):
    if sizes[axis] % slices == 0:
      within = dict(sizes) | {axis: sizes[axis] // slices}
      across = dict.fromkeys(sizes, 1) | {axis: slices}
      return tuple(within.values()), tuple(across.values())
  raise UserError(
    f"config.mesh: the devices are {slices} slices, so data={sizes['data']} or"
    f" fsdp={sizes['fsdp']} must be a multiple of {slices}: set config.mesh.data="
    f"{slices} and lower another axis."
  )


def tree_specs(boxed: Any, rules: str = "fsdp") -> Any:
  """PartitionSpecs for a tree of `nn.Partitioned` boxes (the shapes of an init).

  Raises:
    UserError: there are no such rules.
  """
  if rules not in RULES:
    raise UserError(f"config.model.rules={rules!r} is not one of {sorted(RULES)}.")
  table = tuple(RULES[rules].items())
  return nn.logical_to_mesh(nn.get_partition_spec(boxed), table)


def tree_shardings(boxed: Any, mesh: Mesh, rules: str = "fsdp") -> Any:
  """NamedShardings for a tree of `nn.Partitioned` boxes.

  Args:
    boxed: the tree.
    mesh: where it will lie.
    rules: one of RULES.

  Raises:
    UserError: an axis of a weight does not divide over its mesh axes, or there are no
      such rules.
  """

  def layout(path, spec, shape):
    for size, axes in zip(shape.shape, spec, strict=False):
      parts = parts_of(mesh, axes)
      if size % parts:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        raise UserError(
          f"config.mesh: an axis of {size} of the weight {name} {shape.shape} does not"
          f" divide over the {parts} devices along {axes!r}. Change the mesh or the"
          " size (config.model; for a vocabulary config.pretrain.vocab)."
        )
    return NamedSharding(mesh, spec)

  specs, is_spec = tree_specs(boxed, rules), lambda x: isinstance(x, P)
  return jax.tree_util.tree_map_with_path(
    layout, specs, nn.unbox(boxed), is_leaf=is_spec
  )


def parts_of(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
  """How many parts these axes of a mesh cut an array into."""
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[axis] for axis in axes)


def data_shards(mesh: Mesh) -> int:
  """How many parts a batch is cut into."""
  return parts_of(mesh, BATCH)


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


def token_spec(rows: int, length: int) -> P:
  """Of [rows, length, ...] between the layers on the current mesh: rows over the data
  axes, tokens over `context` and `tensor` as far as they divide."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = [
    axes
    for axes in (("context", "tensor"), ("context",), ("tensor",))
    if length % parts_of(mesh, axes) == 0
  ]
  return P(BATCH, axes[0] if axes else None)


def check_length(mesh: Mesh, length: int, what: str) -> None:
  """Raises UserError where rows of so many tokens do not divide over `context`."""
  context = mesh.shape["context"]
  if length % context:
    raise UserError(
      f"config.mesh.context={context} does not divide {what} of {length} tokens. Make"
      f" it {-(-length // context) * context}, or change the mesh."
    )


def shard_tokens(x: jax.Array) -> jax.Array:
  """Keeps [B, T, ...] cut as `token_spec` says; without a mesh the identity."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, token_spec(*x.shape[:2]))
