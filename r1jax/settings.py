"""From a ConfigDict to the rooms' dataclasses, and the checks before any compile."""

import hashlib
import json

from ml_collections import ConfigDict

from r1jax import sharding
from r1jax.errors import UserError
from r1jax.grpo import GRPOConfig
from r1jax.models.config import PRESETS, PolicyConfig
from r1jax.optimizer import OptimizerConfig, learning_rate

# Keys that change neither the weights nor the figures of a run.
FREE = ("seeds", "compilation_cache")


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


def policy_config(config: ConfigDict, vocab: int) -> PolicyConfig:
  options = {k: v for k, v in config.model.to_dict().items() if v is not None}
  preset = options.pop("preset")
  if preset not in PRESETS:
    raise UserError(f"config.model.preset={preset!r} is not one of {sorted(PRESETS)}.")
  return PRESETS[preset](vocab, **options)


def grpo_config(config: ConfigDict, max_tokens: int) -> GRPOConfig:
  return GRPOConfig(max_tokens=max_tokens, **config.grpo)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
  return OptimizerConfig(steps=config.steps, **config.optimizer)


def pretrain_optimizer_config(config: ConfigDict) -> OptimizerConfig:
  p = config.pretrain
  return OptimizerConfig(
    learning_rate=p.learning_rate,
    steps=p.steps,
    warmup_steps=p.warmup_steps,
    schedule="cosine",
    final_fraction=0.06,
    b2=p.b2,
    weight_decay=p.weight_decay,
  )


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


def check(config: ConfigDict, devices: int) -> None:
  """Everything about a config that can be known before a mesh, a file or a compile.

  Raises:
    UserError: with what came, the rule, and what to do.
  """
  c, g = config, config.grpo
  if min(g.minibatches, c.pretrain.micro_batches) < 1:
    raise UserError(
      f"config.grpo.minibatches={g.minibatches} and config.pretrain.micro_batches="
      f"{c.pretrain.micro_batches} must be at least 1."
    )
  for _, tokens in windows(c, longest_page=1):
    grpo_config(c, tokens)
  policy_config(c, vocab=512)
  learning_rate(optimizer_config(c))
  shape = sharding.check_mesh(c.mesh, devices)
  shards = shape[0] * shape[1]
  rows, parts = c.prompts * g.group_size, g.minibatches * g.micro_batches
  micro = c.pretrain.micro_batches
  rules = [
    *(
      (config_get(c, key) >= 1, f"{key}={config_get(c, key)} must be at least 1")
      for key in (
        *("steps", "prompts", "eval.problems", "pretrain.rows"),
        *("pretrain.facts_a_page", "counts.pretrain", "counts.train"),
        "counts.held_out",
      )
    ),
    *(
      (config_get(c, key) >= 0, f"{key}={config_get(c, key)} must not be negative")
      for key in (
        *("seed", "segment_tokens", "pretrain.steps", "pretrain.width"),
        "data.prompt_length",
      )
    ),
    (
      c.pretrain.vocab >= 300,
      f"pretrain.vocab={c.pretrain.vocab} must be at least 300: 256 bytes and the tags",
    ),
    (
      min(c.pretrain.mix.values()) >= 0 and max(c.pretrain.mix.values()) > 0,
      f"pretrain.mix={c.pretrain.mix.to_dict()} needs weights of 0 or more, and one"
      " above 0",
    ),
    (
      c.steps % g.minibatches == 0,
      f"steps={c.steps} updates must be whole rollouts of grpo.minibatches="
      f"{g.minibatches}; try {-(-c.steps // g.minibatches) * g.minibatches}",
    ),
    (
      c.prompts % shards == 0,
      f"prompts={c.prompts} is not divisible by the {shards} data shards (fsdp x"
      f" expert) of mesh={shape}; try {-(-c.prompts // shards) * shards}",
    ),
    (
      rows % (parts * shards) == 0,
      f"prompts={c.prompts} x grpo.group_size={g.group_size} = {rows} outputs do not"
      " divide into"
      f" grpo.minibatches x grpo.micro_batches = {g.minibatches} x {g.micro_batches}"
      f" parts over {shards} data shards; change one of them so that {rows} is a"
      f" multiple of {parts * shards}",
    ),
    (
      c.pretrain.steps == 0 or c.pretrain.rows % (micro * shards) == 0,
      f"pretrain.rows={c.pretrain.rows} is not divisible by"
      f" pretrain.micro_batches={micro} x {shards} data shards; try"
      " pretrain.micro_batches=1",
    ),
    (c.eval.samples >= 2, f"eval.samples={c.eval.samples} must be at least 2"),
    (
      all(n > 0 and n % g.minibatches == 0 for n in (c.eval.every, c.checkpoint_every)),
      f"eval.every={c.eval.every} and checkpoint_every={c.checkpoint_every} must be"
      f" positive multiples of grpo.minibatches={g.minibatches}",
    ),
    (
      not c.pretrain.mtp_coef or bool(policy_config(c, vocab=512).mtp_depth),
      f"pretrain.mtp_coef={c.pretrain.mtp_coef} needs model.mtp_depth=1",
    ),
    (
      0 < c.data.held_out < 1,
      f"data.held_out={c.data.held_out} must lie between 0 and 1",
    ),
  ]
  for ok, rule in rules:
    if not ok:
      raise UserError(f"config.{rule}.")
