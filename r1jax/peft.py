"""Adapters in the files of peft (github.com/huggingface/peft), out and in.

A folder holds adapter_config.json and adapter_model.safetensors. In it B A of a tensor
[out, in] is lora_B [out, r] times lora_A [r, in]; how our axes lie there is said by the
one table of hf_names. A tensor that two of our matrices share (MLA's kv_b_proj) has one
adapter of both ranks together, each in columns of its own, which says exactly the same.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from r1jax import lora
from r1jax.errors import UserError
from r1jax.lora import Adapted
from r1jax.models import hf, hf_config, hf_names, safetensors_file
from r1jax.models.hf_names import Leaf
from r1jax.models.policy import Policy

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
LISTED = 20  # lines of what does not fit
# What we cannot compute, and what it must be.
PLAIN = dict(bias="none", use_dora=False, use_rslora=False, fan_in_fan_out=False)
PLAIN |= dict(modules_to_save=None, lora_bias=False)


def save(
  folder: str | pathlib.Path, policy: Policy, params: Any, *, base: str = ""
) -> None:
  """Writes the adapters, float32. All processes call it; the first writes.

  Router biases are no part of an adapter: where they have moved (they do unless
  grpo.freeze_router_bias) export the whole policy by hf.save and lora.merged.

  Args:
    folder: a new one, or one without safetensors.
    policy, params: with adapters.
    base: the base's name or folder, for peft.

  Raises:
    UserError: no adapters, FFNs' in a policy with experts, or the folder holds tensors.
  """
  folder, boxes = pathlib.Path(folder), _boxes(params)
  hf_config.to_hf(policy.config, "float32")  # is there such a family?
  leaves = hf_names.leaves(policy.config, hf.shapes(policy))
  if not boxes:
    raise UserError("these params have no adapters: hf.save writes whole weights.")
  others = sorted(path for path in boxes if lora.chosen_by(path)[0] != "attention")
  if others and policy.config.moe_layers:
    # It maps every gate_proj, up_proj and down_proj to them (0.21, transformers 5).
    raise UserError(
      f"{', '.join(others)}: of a model with routed experts peft takes all FFNs'"
      " adapters for the experts', which are one tensor there. Train"
      " lora.targets=('attention',), or export the whole policy by hf.save and"
      " lora.merged."
    )
  pairs, scales, ranks = {}, {}, {}
  for name, shares in hf_names.tensors(leaves).items():
    some = [(path, at) for path, at in shares if path in boxes]
    if some:
      module = name.removesuffix(".weight")
      down, up = _tensors(some, leaves, boxes)
      pairs[f"{PREFIX}{module}{DOWN}"] = down
      pairs[f"{PREFIX}{module}{UP}"] = up
      short = ".".join(module.split(".")[3:])  # without model.layers.N
      ranks[short], scales[short] = len(down), boxes[some[0][0]].scale
  if jax.process_index() > 0:
    return
  rank = min(ranks.values())
  alphas = {name: scales[name] * r for name, r in ranks.items()}
  alpha = next(alphas[name] for name, r in ranks.items() if r == rank)
  said = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": alpha,
    "target_modules": sorted(ranks),
    "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
    "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
    "lora_dropout": 0.0,
    "inference_mode": True,
    **PLAIN,
  }
  folder.mkdir(parents=True, exist_ok=True)
  if there := sorted(path.name for path in folder.glob("*.safetensors*")):
    raise UserError(
      f"{folder} holds {there[0]} already. Name another folder, or remove its files."
    )
  layout = {name: (x.shape, x.dtype) for name, x in pairs.items()}
  safetensors_file.write_folder(folder, layout, pairs.values(), float("inf"))
  (folder / safetensors_file.SINGLE).rename(folder / TENSORS)
  (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")


def _boxes(params: Any) -> dict[str, Adapted]:
  """{path with slashes: the weight}, of those with adapters."""
  pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=lora.is_adapted)
  return {
    "/".join(key.key for key in path): x for path, x in pairs if lora.is_adapted(x)
  }


def _host(x: jax.Array) -> np.ndarray:
  if not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x, np.float32)


def _columns(leaf: Leaf, width: int) -> tuple[slice, ...]:
  """Where a share's part of a tensor's folded outputs lies; all of them if it is
  alone. Args: width: of the share's own axis there."""
  return (slice(None), slice(leaf.start, leaf.start + width)) if leaf.joined else ()


def _tensors(
  shares: list[tuple[str, tuple[int, ...]]],
  leaves: Mapping[str, Leaf],
  boxes: Mapping[str, Adapted],
) -> tuple[np.ndarray, np.ndarray]:
  """(lora_A [R, in], lora_B [out, R]) of a tensor whose shares have adapters."""
  downs, ups = [], []
  for path, at in shares:
    leaf = leaves[path]
    outs, ins = leaf.order[: leaf.rows], leaf.order[leaf.rows :]
    a, b = (_host(x)[at] for x in (boxes[path].a, boxes[path].b))
    downs.append(a.transpose(len(ins), *ins).reshape(a.shape[-1], -1))
    b = b.transpose(*(1 + axis - len(ins) for axis in outs), 0)
    up = np.zeros((*leaf.fold[: leaf.rows], b.shape[-1]), np.float32)
    up[_columns(leaf, b.shape[1])] = b
    ups.append(up.reshape(-1, b.shape[-1]))
  rank = sum(map(len, downs))
  up, start = np.zeros((len(ups[0]), rank), np.float32), 0
  for x in ups:
    up[:, start : start + x.shape[1]] = x
    start += x.shape[1]
  return np.concatenate(downs), up


# -- in --------------------------------------------------------------------------------


def load(folder: str | pathlib.Path, policy: Policy, params: Any) -> Any:
  """The parameters with a folder's adapters, which can be trained on or merged.

  Args:
    folder: with adapter_config.json and adapter_model.safetensors.
    policy, params: the base.

  Raises:
    UserError: a file is missing or broken, adapters of another kind or of another base.
  """
  folder = pathlib.Path(folder)
  said = safetensors_file.read_json(folder / CONFIG)
  if said.get("peft_type") != "LORA":
    kind = said.get("peft_type")
    raise UserError(f"{folder / CONFIG}: peft_type={kind!r} must be 'LORA'.")
  for key, must in PLAIN.items():
    if (said.get(key) or must) != must:
      raise UserError(
        f"{folder / CONFIG}: {key}={said[key]!r} cannot be computed; it must be"
        f" {must!r}."
      )
  files = safetensors_file.read_file(folder / TENSORS)
  leaves = hf_names.leaves(policy.config, hf.shapes(policy))
  shares = hf_names.tensors(leaves)
  found, wrong = {}, []
  for module in sorted({_module(name) for name in files}):
    down, up = files.get(PREFIX + module + DOWN), files.get(PREFIX + module + UP)
    of = shares.get(f"{module}.weight", [])
    if not of or down is None or up is None or not lora.chosen_by(of[0][0]):
      wrong.append(f"{module} is no matrix of this policy that has adapters, A and B")
      continue
    need = leaves[of[0][0]].tensor_shape
    if (*up.shape[:1], *down.shape[1:]) != need or up.shape[1:] != down.shape[:1]:
      wrong.append(f"{module}: B {up.shape} A {down.shape} is not of a weight {need}")
      continue
    found[module] = down.array(), up.array()
  pairs: dict[str, dict] = {}
  for path, leaf in leaves.items():
    modules = {at: name.removesuffix(".weight") for at, name in leaf.names.items()}
    there = [module for module in modules.values() if module in found]
    if not there:
      continue
    shapes = {found[module][0].shape for module in there}
    if len(there) < len(modules) or len(shapes) > 1:
      wrong.append(f"{path}: {len(there)} of {len(modules)} layers, of shapes {shapes}")
      continue
    scale = _scale(said, there[0], shapes.pop()[0])
    a, b = _pair(leaf, {at: found[module] for at, module in modules.items()})
    pairs[path] = dict(a=jnp.asarray(a), b=jnp.asarray(b), scale=scale)
  if wrong or not pairs:
    lines = "\n".join(f"  {line}" for line in wrong[:LISTED])
    raise UserError(
      f"{folder}: adapters of another base, {len(wrong)} of its matrices do not fit."
      f" Name the base that they were made with.\n{lines}"
    )

  def one(path, w):
    pair = pairs.get("/".join(key.key for key in path))
    return w if pair is None else Adapted(w, **pair)

  return jax.tree_util.tree_map_with_path(one, params)


def _module(name: str) -> str:
  return name.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP)


def _scale(said: Mapping[str, Any], module: str, rank: int) -> float:
  """alpha / r of a module; a pattern's key is the end of its name."""
  alpha = said.get("lora_alpha", 8)  # peft's default
  for key, value in (said.get("alpha_pattern") or {}).items():
    if f".{module}".endswith(f".{key}"):
      alpha = value
  return alpha / rank


def _pair(
  leaf: Leaf, layers: Mapping[tuple[int, ...], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
  """(A, B) of all layers out of (lora_A, lora_B) of each."""
  outs, ins = leaf.order[: leaf.rows], leaf.order[leaf.rows :]
  before, share = leaf.shape[: leaf.stacked], leaf.shape[leaf.stacked :]
  n, rank = len(ins), len(next(iter(layers.values()))[0])
  a = np.zeros((*before, *share[:n], rank), np.float32)
  b = np.zeros((*before, rank, *share[n:]), np.float32)
  for at, (down, up) in layers.items():
    down = down.reshape(rank, *(share[axis] for axis in ins))
    a[at].transpose(n, *ins)[...] = down
    up = up.reshape(*leaf.fold[: leaf.rows], rank)
    up = up[_columns(leaf, share[outs[-1]])]
    b[at].transpose(*(1 + axis - n for axis in outs), 0)[...] = up
  used = b.any(axis=tuple(axis for axis in range(b.ndim) if axis != leaf.stacked))
  if leaf.joined and used.any():  # the columns of another share
    a, b = a[..., used], b.compress(used, axis=leaf.stacked)
  return a, b
