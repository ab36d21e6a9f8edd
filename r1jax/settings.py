"""From a ConfigDict to the rooms' dataclasses."""

import dataclasses
import hashlib
import json

from ml_collections import ConfigDict

from r1jax import presets
from r1jax.errors import UserError
from r1jax.grpo import GRPOConfig
from r1jax.lora import LoraConfig
from r1jax.models import hf
from r1jax.models.config import PRESETS, PolicyConfig
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig
from r1jax.ppo import PPOConfig
from r1jax.rewards.program import Limits
from r1jax.rewards.rules import load_rules
from r1jax.rewards.scorer import ScorerConfig
from r1jax.sft import TuningConfig

# Keys that change neither the weights nor the figures of a run.
FREE = ("seeds", "compilation_cache", "profile_steps", "watchdog_minutes", "sinks")


def plain(config: ConfigDict) -> dict:
  """The config as JSON-like values, without the FREE keys."""
  values = json.loads(json.dumps(config.to_dict()))
  return {k: v for k, v in values.items() if k not in FREE}


def sha256(config: ConfigDict) -> str:
  return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """`key: old -> new` for every leaf that differs."""
  found = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found += differences(a, b, f"{prefix}{key}.")
    elif a != b:
      found.append(f"{prefix}{key}: {a} -> {b}")
  return found


# What may differ from a given checkpoint: how it is computed, not what.
COMPUTED = ("dtype", "moe", "expert_capacity", "drop_tokens", "remat")
COMPUTED += ("implementation", "rules")


def policy_config(config: ConfigDict, vocab: int) -> PolicyConfig:
  """The policy's sizes: a preset's with the config's changes, or those of a checkpoint.

  Args:
    config: its `model`.
    vocab: of the tokenizer; a checkpoint has its own.

  Raises:
    UserError: no such preset, or a size that a checkpoint has is set.
  """
  if config.model.get("folder"):
    return hf.policy_config(config.model.folder, **computed(config))
  options = {k: v for k, v in config.model.to_dict().items() if v is not None}
  preset = options.pop("preset")
  options.pop("folder", None)
  if preset not in PRESETS:
    raise UserError(f"config.model.preset={preset!r} is not one of {sorted(PRESETS)}.")
  return PRESETS[preset](vocab, **options)


def computed(config: ConfigDict) -> dict:
  """What the config's `model` changes of a checkpoint's policy.

  Raises:
    UserError: a size that the checkpoint has is set.
  """
  options = {k: v for k, v in config.model.to_dict().items() if v is not None}
  options = {k: v for k, v in options.items() if k not in ("preset", "folder")}
  if sizes := sorted(set(options) - set(COMPUTED)):
    raise UserError(
      f"config.model: {', '.join(sizes)} set beside model.folder="
      f"{config.model.folder!r}, which has its own. Leave them out;"
      f" {', '.join(COMPUTED)} may be set."
    )
  return options


def chosen(config: ConfigDict) -> dict:
  """The objective's choices that the config sets beside its preset."""
  options = config.objective.to_dict()
  return {k: v for k, v in options.items() if v is not None and k != "preset"}


def objective(config: ConfigDict) -> Objective:
  return presets.objective(config.objective.preset, **chosen(config))


def step_config(config: ConfigDict, max_tokens: int) -> GRPOConfig | PPOConfig:
  """Of a step with this output window: PPO's where the config has a section `ppo`."""
  parts = dict(max_tokens=max_tokens, objective=objective(config), **config.grpo)
  if "ppo" not in config:
    return GRPOConfig(**parts)
  return PPOConfig(**parts, value_clip=config.ppo.value_clip, whiten=config.ppo.whiten)


def scorer_config(config: ConfigDict) -> ScorerConfig:
  r = config.reward
  limits = Limits(
    seconds=r.code_seconds,
    total_seconds=r.code_total_seconds,
    cpu_seconds=r.code_cpu_seconds,
    memory_mib=r.code_memory_mib,
  )
  same = ("accuracy_weight", "format_weight", "format_style", "language_weight")
  same += ("language",)
  same += ("language_detector", "workers", "maths", "maths_seconds", "sandbox")
  return ScorerConfig(
    **{key: r[key] for key in same},
    prefill_think=config.data.prefill_think,
    limits=limits,
  )


def reward_parts(config: ConfigDict) -> dict[str, float]:
  """The parts of the reward and their weights."""
  r = config.reward
  parts = {"accuracy": r.accuracy_weight, "format": r.format_weight}
  if r.language_weight:
    parts["language"] = r.language_weight
  return {**parts, **{n: weight for n, (weight, _) in load_rules(r.rules).items()}}


def idle(config: ConfigDict) -> list[str]:
  """A sentence for every choice that was set and has no effect."""
  g, said = (
    config.grpo,
    presets.without_effect(config.objective.preset, **chosen(config)),
  )
  if config.reward.language_detector and not config.reward.language_weight:
    said.append("reward.language_detector has no effect: reward.language_weight is 0.")
  if not g.keep_sampling_mask:
    said.append("grpo.keep_sampling_mask has no effect: nothing is truncated.")
  return said


def lora_config(config: ConfigDict) -> LoraConfig | None:
  """None where all weights are learned. Raises UserError: as LoraConfig."""
  section = getattr(config, "lora", None)  # runs of before have none
  if section is None or section.rank == 0:
    return None
  return LoraConfig(section.rank, section.alpha, tuple(section.targets))


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
  return OptimizerConfig(steps=config.steps, **config.optimizer)


def value_optimizer_config(config: ConfigDict) -> OptimizerConfig:
  """PPO's value model: the policy's optimizer at a rate of its own."""
  rate = config.ppo.value_learning_rate
  return dataclasses.replace(optimizer_config(config), learning_rate=rate)


def pretrain_config(config: ConfigDict) -> TuningConfig:
  p = config.pretrain
  optimizer = OptimizerConfig(
    learning_rate=p.learning_rate,
    steps=p.steps,
    warmup_steps=p.warmup_steps,
    schedule="cosine",
    final_fraction=0.06,
    b2=p.b2,
    weight_decay=p.weight_decay,
  )
  same = ("rows", "micro_batches", "router_bias_rate", "mtp_coef")
  return TuningConfig(optimizer, **{key: p[key] for key in same})


def windows(config: ConfigDict, longest_page: int) -> list[tuple[int, int]]:
  """(first update, output tokens) of each window.

  A window begins with the next whole rollout; one of 0 tokens is the longest page of
  the corpus and an eighth more.
  """
  k = config.grpo.minibatches
  if not all(isinstance(w, tuple | list) and len(w) == 2 for w in config.windows):
    raise UserError(
      f"config.windows={config.windows} must be a tuple of (update, tokens) pairs, such"
      " as ((0, 64),)."
    )
  fitted = -(-longest_page * 9 // 8)
  pairs = [(-(-int(a) // k) * k, int(tokens) or fitted) for a, tokens in config.windows]
  if not pairs or pairs[0][0] != 0 or pairs != sorted(pairs) or min(pairs)[1] < 0:
    raise UserError(
      f"config.windows={config.windows} must be (update, tokens) pairs in rising order,"
      " the first of them at update 0."
    )
  return pairs


def window_at(pairs: list[tuple[int, int]], step: int) -> int:
  """Output tokens of the rollout that begins at update `step`."""
  return [tokens for start, tokens in pairs if start <= step][-1]


def config_get(config: ConfigDict, key: str):
  """The value of a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config
