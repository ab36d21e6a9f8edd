"""config.json of Hugging Face <-> PolicyConfig, for the families that we can express.

What a family's config may say is one row of FAMILIES. Whatever else would change the
numbers (a window, a bias, another RoPE) is refused by name.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from r1jax.errors import UserError
from r1jax.models import hf_rope
from r1jax.models.config import PolicyConfig

# PolicyConfig's name of a size -> config.json's.
COMMON = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "dense_ffn": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "tied_embeddings": "tie_word_embeddings",
}
HEADS = COMMON | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
EXPERTS = {
  "expert_ffn": "moe_intermediate_size",
  "active_experts": "num_experts_per_tok",
  "renormalise": "norm_topk_prob",
}
LATENT = (
  COMMON
  | EXPERTS
  | {
    "dense_layers": "first_k_dense_replace",
    "q_latent": "q_lora_rank",
    "kv_latent": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "expert_groups": "n_group",
    "active_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
  }
)
LARGE = dict(moe="ragged", remat="nothing")  # how what is worth an import computes
# What a key means that is left out or null; and what null alone means.
DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "norm_topk_prob": False,
  "num_nextn_predict_layers": 0,
}
NULLS = {
  "q_lora_rank": None,
  "n_shared_experts": 0,
  "n_group": 1,
  "topk_group": 1,
}


@dataclasses.dataclass(frozen=True)
class Family:
  architecture: str
  sizes: Mapping[str, str]
  is_: Mapping[str, Any]  # what PolicyConfig says of each
  says: Mapping[str, tuple]  # what these keys of config.json may be; the first is ours
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SILU = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
WINDOWLESS = {
  "hidden_act": ("silu",),
  "use_sliding_window": (False,),
  "use_mrope": (False,),
}
V2 = {"attention": "mla", "latent_eps": 1e-6}
DENSE = {"attention": "gqa", "moe_layers": 0, "mtp_depth": 0}
FAMILIES = {
  "deepseek_v3": Family(
    "DeepseekV3ForCausalLM",
    LATENT | {"mtp_depth": "num_nextn_predict_layers"},
    V2 | {"scoring": "sigmoid"},
    SILU
    | {
      "scoring_func": ("sigmoid",),
      "topk_method": ("noaux_tc",),
      "moe_layer_freq": (1,),
      "rope_interleave": (True,),
    },
    {"norm_topk_prob": True},
  ),
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    LATENT,
    V2 | {"scoring": "softmax", "renormalise": False, "mtp_depth": 0},
    SILU
    | {
      "scoring_func": ("softmax",),
      "topk_method": ("greedy", "group_limited_greedy"),
      "moe_layer_freq": (1,),
      "norm_topk_prob": (False,),  # transformers and DeepSeek's code differ on True
    },
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM", HEADS, DENSE | {"qkv_bias": True, "qk_norm": False}, WINDOWLESS
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    HEADS,
    DENSE | {"qkv_bias": False, "qk_norm": True},
    WINDOWLESS | {"attention_bias": (False,)},
    {"head_dim": 128},
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    HEADS | EXPERTS | {"experts": "num_experts"},
    dict(attention="gqa", qkv_bias=False, qk_norm=True, scoring="softmax", mtp_depth=0)
    | dict(shared_experts=0, expert_groups=1, active_groups=1, route_scale=1.0),
    WINDOWLESS | {"attention_bias": (False,)},
  ),
  "llama": Family(
    "LlamaForCausalLM", HEADS, DENSE | {"qkv_bias": False, "qk_norm": False}, SILU
  ),
}


def from_hf(said: Mapping[str, Any], where: str = "config.json") -> PolicyConfig:
  """The PolicyConfig of a config.json, of either generation of keys, and LARGE.

  Args:
    said: its content.
    where: its path, for messages.

  Raises:
    UserError: it is of no family of FAMILIES, lacks a size, or asks for what a policy
      of r1jax does not compute.
  """
  name = said.get("model_type")
  if name not in FAMILIES:
    raise UserError(
      f"{where}: model_type={name!r} is none of {', '.join(FAMILIES)}, which can be"
      " imported."
    )
  family = FAMILIES[name]
  for key, allowed in family.says.items():
    if said.get(key) is not None and said[key] not in allowed:
      raise UserError(
        f"{where}: {key}={said[key]!r} of a {name} cannot be expressed; it must be"
        f" {' or '.join(map(repr, allowed))}."
      )
  if set(said.get("layer_types") or ()) - {"full_attention"}:
    kinds = ", ".join(sorted(set(said["layer_types"])))
    raise UserError(
      f"{where}: layer_types has {kinds}; full_attention alone can be expressed."
    )
  defaults = {**DEFAULTS, **family.defaults}
  if family.is_["attention"] == "gqa":
    heads = _number(said, "num_attention_heads", where)
    per_head = _number(said, "hidden_size", where) // max(heads, 1)
    defaults = {"head_dim": per_head, "num_key_value_heads": heads} | defaults
  sizes = {
    ours: _number(said, theirs, where, defaults)
    for ours, theirs in family.sizes.items()
  }
  known = {field.name for field in dataclasses.fields(PolicyConfig)}
  sizes |= {ours: value for ours, value in family.is_.items() if ours in known}
  if family.is_["attention"] == "gqa":
    sizes["dense_layers"] = _dense_layers(said, name, sizes["layers"], where)
  else:
    sizes["q_latent"] = sizes["q_latent"] or None  # some say 0
  if name == "deepseek_v2" and (said.get("topk_method") or "greedy") == "greedy":
    sizes |= {"expert_groups": 1, "active_groups": 1}
  sizes |= hf_rope.from_hf(said, where) | {"dtype": _dtype(said, where)}
  try:
    return PolicyConfig(**sizes, **LARGE)
  except UserError as error:
    raise UserError(f"{where}: as a policy of r1jax, {error}") from error


def _number(
  said: Mapping[str, Any], key: str, where: str, defaults: Mapping | None = None
) -> Any:
  if key == "num_experts" and key not in said:
    key = "num_local_experts"  # as transformers 5 may write it
  value = said.get(key)
  if value is None and key in (defaults or {}):
    return defaults[key]
  if value is None and key in NULLS and key in said:
    return NULLS[key]
  if not isinstance(value, int | float):
    came = f"has {key}={value!r}, which is no number" if key in said else f"lacks {key}"
    raise UserError(f"{where} {came}. Take the model's own config.json.")
  return value


def _dense_layers(said: Mapping[str, Any], name: str, layers: int, where: str) -> int:
  """How many layers at the start have no experts."""
  if name != "qwen3_moe":
    return layers
  step, dense = said.get("decoder_sparse_step") or 1, said.get("mlp_only_layers") or []
  without = [i for i in range(layers) if i in dense or (i + 1) % step]
  if without != list(range(len(without))):
    raise UserError(
      f"{where}: decoder_sparse_step={step} and mlp_only_layers={dense} put layers"
      " without experts between others; they can only come first."
    )
  return len(without)


def _dtype(said: Mapping[str, Any], where: str) -> str:
  name = said.get("dtype") or said.get("torch_dtype") or "float32"
  name = {"float16": "bfloat16"}.get(name, name)  # we compute in no float16
  if name not in ("float32", "bfloat16"):
    raise UserError(
      f"{where}: dtype={name!r} must be float32, bfloat16 or float16 (which is computed"
      " in bfloat16)."
    )
  return name


def float8_block(said: Mapping[str, Any], where: str) -> tuple[int, int] | None:
  """(rows, columns) that one scale of a float8 matrix serves; None: no matrix is one.

  Raises:
    UserError: the weights are quantised in another way.
  """
  how = said.get("quantization_config")
  if not how:
    return None
  block = how.get("weight_block_size")
  blocks = isinstance(block, list) and len(block) == 2 and min(block) >= 1
  if how.get("quant_method") != "fp8" or not blocks:
    raise UserError(
      f"{where}: weights quantised by quant_method={how.get('quant_method')!r} with"
      f" weight_block_size={block!r} cannot be read; it must be 'fp8' with the [rows,"
      " columns] of a block. Take the checkpoint in bfloat16."
    )
  return block[0], block[1]


def family_of(config: PolicyConfig) -> str:
  """The model_type that computes what this policy computes.

  Raises:
    UserError: none does.
  """
  wrong = {}
  for name, family in FAMILIES.items():
    pairs = {key: getattr(config, key) for key in family.is_}
    wrong[name] = {k: v for k, v in pairs.items() if v != family.is_[k]}
    if not wrong[name]:
      return name
  near = min(wrong, key=lambda name: len(wrong[name]))
  changes = ", ".join(
    f"{key}={value!r} (must be {FAMILIES[near].is_[key]!r})"
    for key, value in wrong[near].items()
  )
  raise UserError(
    f"no family of Hugging Face is this policy; the nearest is {near}, but for"
    f" {changes}."
  )


def to_hf(config: PolicyConfig, dtype: str) -> dict[str, Any]:
  """config.json of a policy, in the keys that every version of transformers reads.

  Args:
    config: the policy's.
    dtype: of the tensors.

  Raises:
    UserError: as `family_of`.
  """
  name = family_of(config)
  family = FAMILIES[name]
  said = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
  said |= {key: allowed[0] for key, allowed in family.says.items()}
  if name == "deepseek_v2" and config.expert_groups > 1:
    said["topk_method"] = "group_limited_greedy"
  if config.attention == "mla":
    said["num_key_value_heads"] = config.heads
  if name == "qwen3_moe":
    said |= dict(
      mlp_only_layers=list(range(config.dense_layers)), decoder_sparse_step=1
    )
  return {
    "architectures": [family.architecture],
    "model_type": name,
    **said,
    **hf_rope.to_hf(config),
    "initializer_range": config.init_std or 0.02,
    "torch_dtype": dtype,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
  }
