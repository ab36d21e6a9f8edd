"""Files of safetensors, read as views of the mapped file, written tensor by tensor.

A file is the length of its header (8 bytes), the header, which is JSON and says where
the bytes of each tensor lie, and the bytes (github.com/huggingface/safetensors). The
public readers know no float8 in NumPy.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
import math
import mmap
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from r1jax.errors import UserError

DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn,
  "F8_E5M2": jnp.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000  # as the public readers have it


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies."""

  file: pathlib.Path
  memory: mmap.mmap
  start: int  # its first byte
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def array(self) -> np.ndarray:
    """A view; what is looked at of it is read from the file."""
    count = math.prod(self.shape)
    flat = np.frombuffer(self.memory, self.dtype, count=count, offset=self.start)
    return flat.reshape(self.shape)

  def forget(self) -> None:
    """Gives back the memory of what was looked at; it can be read again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # whole pages, of the neighbours too
      start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
      length = self.start + self.bytes - start
      self.memory.madvise(mmap.MADV_DONTNEED, start, length)


def read_json(path: pathlib.Path) -> dict:
  """Raises UserError where the file is missing or holds no JSON object."""
  try:
    found = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  except ValueError as error:
    raise UserError(f"{path} is no JSON: {error}. Fetch it again.") from error
  if not isinstance(found, dict):
    raise UserError(f"{path} holds no JSON object. Fetch it again.")
  return found


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file.

  Raises:
    UserError: the file is missing, cut short or none of safetensors.
  """
  again = "Fetch the file again."
  try:
    with path.open("rb") as f:
      size = path.stat().st_size
      length = int.from_bytes(f.read(8), "little")
      if size < 8 or length > size - 8:
        raise UserError(
          f"{path} ends early: it has {size} bytes, and its header needs {8 + length}."
          f" {again}"
        )
      if length > LONGEST_HEADER:
        raise UserError(f"{path}: a header of {length} bytes is none. {again}")
      header = json.loads(f.read(length))
      memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, memory, 8 + length, x) for name, x in header.items()}
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}. {again}") from error
  except UserError:
    raise
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(f"{path}: its header is broken ({error!r}). {again}") from error
  end = max((t.start + t.bytes for t in tensors.values()), default=8 + length)
  if end > size:
    raise UserError(
      f"{path} ends early: it has {size} bytes, and its tensors need {end}. {again}"
    )
  return tensors


def _entry(path: pathlib.Path, memory: mmap.mmap, base: int, said: dict) -> Tensor:
  if said["dtype"] not in DTYPES:
    raise UserError(
      f"{path} holds a tensor of {said['dtype']}; these can be read: {list(DTYPES)}."
    )
  start, end = said["data_offsets"]
  shape = tuple(int(n) for n in said["shape"])
  tensor = Tensor(path, memory, base + start, shape, np.dtype(DTYPES[said["dtype"]]))
  if min((start, *shape)) < 0 or end - start != tensor.bytes:
    raise ValueError(f"{said} does not add up")
  return tensor


def read_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of model.safetensors, or of the files that an index names.

  Raises:
    UserError: there are none, one is missing, or as `read_file`.
  """
  if (folder / SINGLE).exists():
    return read_file(folder / SINGLE)
  if not (folder / INDEX).exists():
    raise UserError(
      f"{folder} holds neither {SINGLE} nor {INDEX}. Name the folder of a checkpoint in"
      " the format of safetensors."
    )
  where = read_json(folder / INDEX).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise UserError(f"{folder / INDEX} has no weight_map. Fetch it again.")
  files = sorted(set(where.values()))
  missing = [file for file in files if not (folder / file).exists()]
  if missing:
    raise UserError(
      f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names:"
      f" {', '.join(missing)}. Fetch them."
    )
  found = {file: read_file(folder / file) for file in files}
  for name, file in where.items():
    if name not in found[file]:
      raise UserError(
        f"{folder / file} lacks the tensor {name}, which {INDEX} says is there. Fetch"
        " both again."
      )
  every = {
    name: tensor for tensors in found.values() for name, tensor in tensors.items()
  }
  return every | {name: found[file][name] for name, file in where.items()}


def shards(
  layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_bytes: float
) -> Iterator[list[str]]:
  """The names of each file: as many as fit, in order, and at least one."""
  names, size = [], 0
  for name, (shape, dtype) in layout.items():
    more = math.prod(shape) * np.dtype(dtype).itemsize
    if names and size + more > max_bytes:
      yield names
      names, size = [], 0
    names.append(name)
    size += more
  yield names


def write_folder(
  folder: pathlib.Path,
  layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  values: Iterable[np.ndarray],
  max_bytes: float,
) -> None:
  """Writes a checkpoint: one file, or several and their index, which comes last.

  Args:
    folder: an existing one without a checkpoint.
    layout: {name: (shape, dtype)}.
    values: the tensors in that order; one is held at a time.
    max_bytes: of a file's tensors. A larger tensor has a file of its own.
  """
  parts, values, where = list(shards(layout, max_bytes)), iter(values), {}
  for i, names in enumerate(parts):
    file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
    file = SINGLE if len(parts) == 1 else file
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
      shape, dtype = layout[name]
      start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
      header[name] = dict(
        dtype=NAMES[np.dtype(dtype)], shape=list(shape), data_offsets=[start, end]
      )
      where[name] = file
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Under another name until it is whole.
    partial = folder / f"{file}.partial"
    with partial.open("wb") as f:
      f.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        value = next(values)
        said = value.shape, value.dtype
        assert said == (tuple(layout[name][0]), np.dtype(layout[name][1])), name
        f.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    partial.rename(folder / file)
  if len(parts) > 1:
    sizes = (math.prod(s) * np.dtype(d).itemsize for s, d in layout.values())
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
