"""Checkpoints of Hugging Face: import straight into sharded arrays, and export.

Import looks at every name and shape first, then reads box after box of each array that
this process holds: beside the arrays it needs little more than a box.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from r1jax import sharding
from r1jax.errors import UserError
from r1jax.models import hf_config, hf_names, hf_read, safetensors_file
from r1jax.models import policy as policy_lib
from r1jax.models.config import PolicyConfig
from r1jax.models.hf_names import SCALES, Leaf
from r1jax.models.hf_read import FLOAT8
from r1jax.models.safetensors_file import Tensor

LISTED = 100  # lines of the table of what does not fit
FLOATS = tuple(np.dtype(x) for x in (np.float32, np.float16, jnp.bfloat16, FLOAT8))
EXPORTED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


def load(
  folder: str | pathlib.Path,
  mesh: jax.sharding.Mesh | None = None,
  *,
  params_dtype: str = "float32",
  **changes: Any,
) -> tuple[policy_lib.Policy, dict, dict]:
  """A policy from a folder with config.json and safetensors.

  Weights in float8 are multiplied by the scales of their blocks. An MTP module that
  config.json announces and the files lack is left out.

  Args:
    folder: the checkpoint.
    mesh: where the parameters will lie, by their logical axes; None: on one device.
    params_dtype: of the parameters; "bfloat16" for a policy that is not trained.
    changes: of the PolicyConfig, which computes as large models must (moe="ragged",
      remat="nothing"); mtp_depth=0 leaves an MTP module out.

  Returns:
    (policy, params, router biases).

  Raises:
    UserError: a file is missing or broken, the config cannot be expressed, or tensors
      are missing, left over or misshapen (all of them are listed).
  """
  folder = pathlib.Path(folder)
  if params_dtype not in EXPORTED:
    raise UserError(f"params_dtype={params_dtype!r} must be one of {list(EXPORTED)}.")
  config, files, block = _opened(folder, changes)
  policy = policy_lib.Policy(config)
  boxed, leaves = policy_lib.boxes(policy), hf_names.leaves(config, shapes(policy))
  _check(folder, config, leaves, files, block)
  places = {}
  if mesh is not None:
    places = _flat(sharding.tree_shardings(boxed, mesh, config.rules))

  def array(path, x):
    name = _name(path)
    dtype = x.dtype if name.endswith("moe/bias") else jnp.dtype(params_dtype)

    def read(box):
      if name not in leaves:  # biases of a router that has none
        return np.zeros([s.stop - s.start for s in box], dtype)
      return hf_read.read(leaves[name], box, files, block).astype(dtype, copy=False)

    order = hf_read.file_order(leaves[name]) if name in leaves else range(x.ndim)
    return hf_read.array(x.shape, dtype, places.get(name), order, read)

  params, router = (
    jax.tree_util.tree_map_with_path(array, tree) for tree in nn.unbox(boxed)
  )
  return policy, params, router


def policy_config(folder: str | pathlib.Path, **changes: Any) -> PolicyConfig:
  """Of the policy that `load` gives. Args and errors: as there."""
  return _opened(pathlib.Path(folder), changes)[0]


def _opened(folder, changes) -> tuple[PolicyConfig, dict[str, Tensor], tuple | None]:
  """(the policy's config, the tensors that it needs, blocks of float8)."""
  said = safetensors_file.read_json(folder / "config.json")
  config = hf_config.from_hf(said, str(folder / "config.json"))
  block = hf_config.float8_block(said, str(folder / "config.json"))
  files = safetensors_file.read_folder(folder)
  module = f"model.layers.{config.layers}."
  announced = config.mtp_depth
  if announced and not any(name.startswith(module) for name in files):
    changes = {"mtp_depth": 0, **changes}
  config = _changed(config, changes)
  if announced and not config.mtp_depth:
    files = {name: x for name, x in files.items() if not name.startswith(module)}
  return config, files, block


def _changed(config: PolicyConfig, changes: Mapping[str, Any]) -> PolicyConfig:
  known = {field.name for field in dataclasses.fields(config)}
  if unknown := sorted(set(changes) - known):
    raise UserError(f"{unknown} are no keys of a PolicyConfig: {sorted(known)}.")
  return dataclasses.replace(config, **changes)


def _name(path: tuple) -> str:
  return "/".join(key.key for key in path)


def _flat(trees: tuple[dict, dict]) -> dict[str, Any]:
  """{path with slashes: leaf} of parameters and router biases, whose paths differ."""
  pairs = [pair for x in trees for pair in jax.tree_util.tree_leaves_with_path(x)]
  return {_name(path): leaf for path, leaf in pairs}


def shapes(policy: policy_lib.Policy) -> dict[str, tuple[int, ...]]:
  """{path with slashes: shape} of parameters and router biases."""
  return {
    path: x.shape for path, x in _flat(nn.unbox(policy_lib.boxes(policy))).items()
  }


# -- what does not fit -----------------------------------------------------------------


def _check(
  folder: pathlib.Path,
  config: PolicyConfig,
  leaves: Mapping[str, Leaf],
  files: Mapping[str, Tensor],
  block: tuple[int, int] | None,
) -> None:
  """Raises UserError with a table of all tensors that do not fit."""
  wrong: list[tuple[str, str]] = []
  needed = {
    name: leaves[shares[0][0]].tensor_shape
    for name, shares in hf_names.tensors(leaves).items()
  }
  copies = hf_names.copies(config)
  scales = {name + SCALES for name in needed if _float8(files.get(name))}
  for name, shape in needed.items():
    if name not in files:
      why = f"missing, of shape {shape}"
      if name == "lm_head.weight":
        why += " (config.json says tie_word_embeddings=false)"
      wrong.append((name, why))
    elif files[name].shape != shape:
      wrong.append((name, f"is {files[name].shape}, must be {shape}"))
    elif files[name].dtype not in FLOATS:
      kinds = ", ".join(x.name for x in FLOATS)
      wrong.append((name, f"is {files[name].dtype}, must be one of {kinds}"))
    elif _float8(files[name]):
      wrong += _wrong_scales(name, shape, files, block)
  known = needed.keys() | scales
  for name, tensor in files.items():
    if name in copies:
      if not _equal(tensor, files.get(copies[name])):
        wrong.append((name, f"differs from {copies[name]}, which it must repeat"))
    elif name not in known and not name.endswith(hf_names.IGNORED):
      wrong.append((name, f"is not part of this policy {tensor.shape}"))
  if wrong:
    width = max(len(name) for name, _ in wrong[:LISTED])
    lines = [f"  {name:<{width}}  {why}" for name, why in wrong[:LISTED]]
    more = len(wrong) - LISTED
    lines += [f"  and {more} more"] if more > 0 else []
    raise UserError(
      f"{folder}: {len(wrong)} tensors do not fit config.json. Take both from one"
      " place.\n" + "\n".join(lines)
    )


def _float8(tensor: Tensor | None) -> bool:
  return tensor is not None and tensor.dtype == FLOAT8


def _wrong_scales(
  name: str,
  shape: tuple[int, ...],
  files: Mapping[str, Tensor],
  block: tuple[int, int] | None,
) -> list[tuple[str, str]]:
  scales, key = files.get(name + SCALES), "quantization_config"
  if block is None:
    return [(name, f"is float8, and config.json has no {key}.weight_block_size")]
  if scales is None:
    return [(name, f"is float8 and has no scales {name}{SCALES}")]
  need = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
  if len(shape) != 2 or scales.shape != need or scales.dtype not in FLOATS[:3]:
    came = f"is {scales.shape} {scales.dtype}"
    return [(name + SCALES, f"{came}, must be {need} of blocks of {block}")]
  return []


def _equal(a: Tensor, b: Tensor | None) -> bool:
  """Bit by bit."""
  if b is None or a.shape != b.shape or a.dtype != b.dtype:
    return False
  step = 2**24
  same = all(
    a.memory[a.start + i : a.start + min(i + step, a.bytes)]
    == b.memory[b.start + i : b.start + min(i + step, b.bytes)]
    for i in range(0, a.bytes, step)
  )
  a.forget()
  b.forget()
  return same


# -- export ----------------------------------------------------------------------------


def save(
  folder: str | pathlib.Path,
  policy: policy_lib.Policy,
  params: dict,
  router: dict,
  *,
  dtype: str = "bfloat16",
  max_shard_bytes: float = 5e9,
  config: Mapping[str, Any] | None = None,
) -> None:
  """Writes config.json and safetensors that transformers loads. All processes call it;
  the first writes.

  Args:
    folder: a new one, or one without a checkpoint.
    policy, params, router: what is written.
    dtype: of the tensors; a router's of DeepSeek stay float32.
    max_shard_bytes: of a file.
    config: keys of config.json before ours, such as eos_token_id, which a policy does
      not know, or max_position_embeddings.

  Raises:
    UserError: no family of Hugging Face computes what the policy does, or the folder
      holds a checkpoint.
  """
  folder = pathlib.Path(folder)
  if dtype not in EXPORTED:
    raise UserError(f"dtype={dtype!r} of an export must be one of {list(EXPORTED)}.")
  said = hf_config.to_hf(policy.config, dtype) | dict(config or {})
  ours, leaves = _flat((params, router)), hf_names.leaves(policy.config, shapes(policy))
  if {path: x.shape for path, x in ours.items()} != shapes(policy):
    raise UserError("params and router are not of this policy: other names or shapes.")
  for name, x in ours.items():
    if name not in leaves and np.asarray(jnp.any(x != 0)):
      raise UserError(
        f"{name} is not 0 everywhere, and {said['model_type']} has no such biases:"
        " train with router_bias_rate=0."
      )
  shares = hf_names.tensors(leaves)
  for name, original in hf_names.copies(policy.config).items():
    if name != "lm_head.weight":  # the MTP module's, as released
      shares[name] = shares[original]
  layout = {}
  for name, parts in shares.items():
    wide = hf_names.is_wide(policy.config, name)
    kept = EXPORTED["float32" if wide else dtype]
    layout[name] = leaves[parts[0][0]].tensor_shape, kept
  values = (_tensor(parts, leaves, ours, *layout[n]) for n, parts in shares.items())
  if jax.process_index() > 0:
    for _ in values:  # the first process needs our parts
      pass
    return
  folder.mkdir(parents=True, exist_ok=True)
  if there := sorted(path.name for path in folder.glob("*.safetensors*")):
    raise UserError(
      f"{folder} holds a checkpoint already ({there[0]}). Name another folder, or"
      " remove its files."
    )
  safetensors_file.write_folder(folder, layout, values, max_shard_bytes)
  (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")


def _tensor(
  parts: list[tuple[str, tuple[int, ...]]],
  leaves: Mapping[str, Leaf],
  ours: Mapping[str, jax.Array],
  shape: tuple[int, ...],
  dtype: np.dtype,
) -> np.ndarray:
  """A tensor of these shares, on the host."""
  found = []
  for path, at in parts:
    x = ours[path]
    for i in at:  # one axis after the other: layers are cut over no device
      x = x[i]
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      x = multihost_utils.process_allgather(x, tiled=True)
    found.append(np.asarray(x).transpose(leaves[path].order))
  whole = np.concatenate(found, axis=1) if len(found) > 1 else found[0]
  return whole.reshape(shape).astype(dtype)
