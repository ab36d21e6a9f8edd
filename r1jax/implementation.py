"""Which implementation of an operation runs, and on which devices.

  xla     the definition in ops.py, and the fallback
  mosaic  a Pallas kernel for TPUs (kernels/)
  triton  a Pallas kernel for GPUs (kernels/)
  auto    the platform's kernel, or xla where it has none or the shape does not suit it

A kernel on a platform that is not its own is interpreted: right, and slow. XLA does not
cut a kernel over devices, so it runs on each device's own rows and heads.
"""

from collections.abc import Callable
import functools
import logging
import math
from typing import Any

import jax

from r1jax import sharding
from r1jax.errors import UserError

NAMES = ("auto", "xla", "mosaic", "triton")
PLATFORMS = {"tpu": "mosaic", "gpu": "triton", "cuda": "triton"}
log = logging.getLogger("r1jax.ops")


class NotServed(UserError, NotImplementedError):
  """A kernel was asked for by name and cannot serve the shape; another can."""


def platform() -> str:
  """Of the program that is traced: the current mesh's, whose devices may be those of a
  topology that is not at hand, or else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def choose(
  operation: str,
  implementation: str,
  kernel: Callable[[str, bool], object],
  definition: Callable[[], object],
) -> object:
  """The result of the implementation.

  Args:
    operation: its name, for messages.
    implementation: one of NAMES.
    kernel: (body, whether it is interpreted) -> the result.
    definition: the XLA form.

  Raises:
    ValueError: there is no such implementation.
    NotImplementedError: the kernel that was named cannot serve the shape.
  """
  if implementation not in NAMES:
    raise ValueError(
      f"implementation={implementation!r} of {operation} is not one of {NAMES}."
    )
  own = PLATFORMS.get(platform())
  if implementation == "xla" or (implementation == "auto" and own is None):
    return definition()
  if implementation != "auto":
    try:
      return kernel(implementation, implementation != own)
    except NotImplementedError as error:
      raise NotServed(
        f"implementation={implementation!r} cannot serve this {operation}: {error}. Use"
        " 'auto' or 'xla' (config.model.implementation)."
      ) from error
  try:
    return kernel(own, False)
  except NotImplementedError as error:
    _say(f"{operation}: xla instead of {own}: {error}")
    return definition()


@functools.cache
def _say(reason: str) -> None:
  log.warning(reason)


def mesh_axes() -> dict[str, int]:
  """Axes of the current mesh that XLA would cut a program over, with their sizes."""
  mesh = jax.sharding.get_abstract_mesh()
  auto = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == jax.sharding.AxisType.Auto
  ]
  return {name: mesh.shape[name] for name in auto if mesh.shape[name] > 1}


def parts(axes: str | tuple[str, ...]) -> int:
  """How many parts these axes of the mesh cut an array into."""
  axes = (axes,) if isinstance(axes, str) else axes
  return math.prod(mesh_axes().get(axis, 1) for axis in axes)


def axes(rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
  """(mesh axes that cut rows, that cut heads), None where they do not divide."""
  there = mesh_axes()
  batch = tuple(axis for axis in sharding.BATCH if axis in there)
  tensor = sharding.RULES["fsdp"]["heads"]
  return (
    batch if batch and rows % parts(batch) == 0 else None,
    tensor if tensor in there and heads % there[tensor] == 0 else None,
  )


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """The function of each device's own part; itself where there is one device."""
  if not mesh_axes():
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
