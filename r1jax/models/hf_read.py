"""A parameter out of the tensors of files, into the memory of the devices that hold it.

Each device's part is filled box after box. Beside the arrays a process needs a few
boxes, however large a stack of layers and experts is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models.hf_names import SCALES, Leaf
from r1jax.models.safetensors_file import Tensor

BOX = 2**22  # numbers of a parameter that are read at once
PIECE = 2**19  # and turned at once: what a core's cache holds
FLOAT8 = np.dtype(jnp.float8_e4m3fn)
FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def read(
  leaf: Leaf,
  box: tuple[slice, ...],
  files: Mapping[str, Tensor],
  block: tuple[int, int] | None,
) -> np.ndarray:
  """A box of a parameter, float32.

  Args:
    leaf: the parameter.
    box: slices with both ends.
    files: all tensors.
    block: of a float8 tensor, the [rows, columns] that one scale serves.
  """
  out = np.empty([s.stop - s.start for s in box], np.float32)
  lead, share = box[: leaf.stacked], box[leaf.stacked :]
  cut = [share[axis] for axis in leaf.order]
  if leaf.joined:
    cut[1] = slice(leaf.start + cut[1].start, leaf.start + cut[1].stop)
  for at in itertools.product(*(range(s.start, s.stop) for s in lead)):
    tensor = files[leaf.names[at]]
    into = out[tuple(i - s.start for i, s in zip(at, lead, strict=True))]
    into = into.transpose(leaf.order)
    source = tensor.array().reshape(leaf.fold)[tuple(cut)]
    step = max(1, PIECE // max(source[0].size, 1))
    scales = None
    if tensor.dtype == FLOAT8:
      scales = _scales(leaf, cut, files[leaf.names[at] + SCALES], block)
    for i in range(0, len(source), step):
      piece = source[i : i + step]
      if scales is None:
        wide = piece.astype(np.float32)  # in the file's order, and then turned
      else:
        wide = FLOAT8_VALUES[piece.view(np.uint8)]
        wide *= scales(slice(i, i + step))
      into[i : i + step] = wide
    tensor.forget()
  return out


def _scales(
  leaf: Leaf, cut: list[slice], tensor: Tensor, block: tuple[int, int]
) -> Callable[[slice], np.ndarray]:
  """(some of the folded axis 0) -> the scale of every number of a cut tensor. A scale
  serves a block of the tensor's rows and columns; the last blocks may be smaller."""
  n, scales = leaf.rows, tensor.array().astype(np.float32)
  rows, columns = (
    (np.arange(math.prod(fold)) // size).reshape(fold)[tuple(part)]
    for fold, size, part in (
      (leaf.fold[:n], block[0], cut[:n]),
      (leaf.fold[n:], block[1], cut[n:]),
    )
  )
  return lambda some: scales[rows[some]][..., columns]


def file_order(leaf: Leaf) -> list[int]:
  """A parameter's axes, from what lies farthest apart in files to neighbours."""
  return [*range(leaf.stacked), *(leaf.stacked + axis for axis in leaf.order)]


def boxes(
  shape: tuple[int, ...], axes: Sequence[int], largest: int
) -> Iterator[tuple[slice, ...]]:
  """Boxes of at most `largest` numbers that cover an array, cut along `axes` first to
  last."""
  steps, size = list(shape), math.prod(shape)
  for axis in axes:
    if size > largest:
      rest = size // steps[axis]
      steps[axis] = max(1, largest // rest)
      size = rest * steps[axis]
  starts = (range(0, n, max(step, 1)) for n, step in zip(shape, steps, strict=True))
  for at in itertools.product(*starts):
    yield tuple(
      slice(i, min(i + step, n)) for i, step, n in zip(at, steps, shape, strict=True)
    )


def array(
  shape: tuple[int, ...],
  dtype: Any,
  place: jax.sharding.Sharding | None,
  order: Sequence[int],
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """An array whose parts come from `read`, box by box.

  Args:
    shape, dtype: its own.
    place: its NamedSharding; None: one device.
    order: its axes, in which it is cut into boxes.
    read: (box) -> numbers.
  """
  if place is None:
    return _parts([None], [(0, n) for n in shape], dtype, order, read)[0]
  held: dict[tuple, list] = {}
  for device, index in place.addressable_devices_indices_map(shape).items():
    ends = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    held.setdefault(tuple(ends), []).append(device)
  parts = [
    part
    for ends, devices in held.items()
    for part in _parts(devices, ends, dtype, order, read)
  ]
  return jax.make_array_from_single_device_arrays(shape, place, parts)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(part: jax.Array, box: jax.Array, at: tuple) -> jax.Array:
  if part.dtype != jnp.bfloat16:
    return jax.lax.dynamic_update_slice(part, box, at)
  # As bits: XLA for CPUs widens a whole bfloat16 array, box after box.
  bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (part, box))
  filled = jax.lax.dynamic_update_slice(*bits, at)
  return jax.lax.bitcast_convert_type(filled, jnp.bfloat16)


def _parts(
  devices: list,
  ends: Sequence[tuple[int, int]],
  dtype: Any,
  order: Sequence[int],
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> list[jax.Array]:
  """The same part of an array on each of these devices (None: the default one)."""
  shape = tuple(stop - start for start, stop in ends)
  parts: list[jax.Array] = []
  for box in boxes(shape, order, BOX):
    there = [
      slice(start + s.start, start + s.stop)
      for (start, _), s in zip(ends, box, strict=True)
    ]
    value = read(tuple(there))
    if value.shape == shape:
      return [jax.device_put(value, device) for device in devices]
    at = tuple(s.start for s in box)
    for i, device in enumerate(devices):
      with _alone(device):
        if len(parts) == i:
          parts.append(jnp.zeros(shape, dtype, device=device))
        parts[i] = _fill(parts[i], jax.device_put(value, device), at)
    jax.block_until_ready(parts)
  return parts


def _alone(device: Any) -> contextlib.AbstractContextManager:
  """Whatever mesh the caller has set: programs for this device."""
  if device is None:
    return contextlib.nullcontext()
  one = (jax.sharding.AxisType.Auto,)
  return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",), axis_types=one))
