"""From a ConfigDict to the rooms' dataclasses, and the checks before any compile."""

import dataclasses
import hashlib
import json
import math

from ml_collections import ConfigDict

from r1jax import lora, presets, prompts, sharding, sinks
from r1jax.errors import UserError
from r1jax.grpo import GRPOConfig
from r1jax.lora import LoraConfig
from r1jax.models import hf
from r1jax.models.config import PRESETS, PolicyConfig
from r1jax.models.policy import Policy
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, learning_rate
from r1jax.ppo import PPOConfig
from r1jax.rewards.program import Limits
from r1jax.rewards.rules import load_rules
from r1jax.rewards.scorer import ScorerConfig
from r1jax.rewards.verdict import OUTCOMES
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


def profiled(c: ConfigDict) -> bool:
  """Whether profile_steps names updates that there are, or none."""
  match tuple(c.profile_steps):
    case (int(first), int(last)):
      return (first, last) == (0, 0) or 1 <= first <= min(last, c.steps)
  return False


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
  # A window that is fitted to the pages is checked again when it is known.
  for _, tokens in windows(c, longest_page=2**15):
    step_config(c, tokens)
  o, sizes = objective(c), policy_config(c, vocab=512)
  learning_rate(optimizer_config(c))
  scorer_config(c)
  sinks.check(c.sinks)
  mesh = sharding.check_mesh(c.mesh, devices)
  shards = math.prod(mesh[axis] for axis in sharding.BATCH)
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
        "watchdog_minutes",
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
      not c.pretrain.mix.request or c.task == "assistant",
      f"pretrain.mix.request={c.pretrain.mix.request}: task={c.task!r} has no requests,"
      " the task 'assistant' alone has; leave it at 0",
    ),
    (
      c.steps % g.minibatches == 0,
      f"steps={c.steps} updates must be whole rollouts of grpo.minibatches="
      f"{g.minibatches}; try {-(-c.steps // g.minibatches) * g.minibatches}",
    ),
    (
      c.prompts % shards == 0,
      f"prompts={c.prompts} is not divisible by the {shards} data shards (data x fsdp"
      f" x expert) of mesh={mesh}; try {-(-c.prompts // shards) * shards}",
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
      not g.whole_groups or c.prompts % (parts * shards) == 0,
      f"grpo.whole_groups=True: prompts={c.prompts} groups do not divide into"
      f" grpo.minibatches x grpo.micro_batches = {g.minibatches} x {g.micro_batches}"
      f" parts over {shards} data shards; lower grpo.micro_batches, or make prompts a"
      f" multiple of {parts * shards}",
    ),
    (
      not g.whole_groups or mesh["context"] == 1,
      f"grpo.whole_groups=True with mesh.context={mesh['context']}: rows of whole"
      " groups are not cut along their tokens; set one of them to False or 1",
    ),
    (
      c.pretrain.steps == 0 or c.pretrain.rows % (micro * shards) == 0,
      f"pretrain.rows={c.pretrain.rows} is not divisible by"
      f" pretrain.micro_batches={micro} x {shards} data shards; try"
      " pretrain.micro_batches=1",
    ),
    (
      profiled(c),
      f"profile_steps={c.profile_steps} must be the (first, last) update of"
      f" steps={c.steps} to profile, or (0, 0)",
    ),
    (c.eval.samples >= 2, f"eval.samples={c.eval.samples} must be at least 2"),
    (
      all(n > 0 and n % g.minibatches == 0 for n in (c.eval.every, c.checkpoint_every)),
      f"eval.every={c.eval.every} and checkpoint_every={c.checkpoint_every} must be"
      f" positive multiples of grpo.minibatches={g.minibatches}",
    ),
    (
      not c.pretrain.mtp_coef or bool(sizes.mtp_depth),
      f"pretrain.mtp_coef={c.pretrain.mtp_coef} needs model.mtp_depth=1",
    ),
    *learning_rules(c, o, sizes),
    *adapter_rules(c, sizes),
    *reward_rules(c),
    *base_rules(c),
    *chat_rules(c),
    (
      0 < c.data.held_out < 1,
      f"data.held_out={c.data.held_out} must lie between 0 and 1",
    ),
  ]
  for ok, rule in rules:
    if not ok:
      raise UserError(f"config.{rule}.")


def learning_rules(
  c: ConfigDict, o: Objective, sizes: PolicyConfig
) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of the objective beside the rest of the config."""
  g, parts = c.grpo, reward_parts(c)
  return [
    (
      "ppo" not in c or not c.segment_tokens,
      f"segment_tokens={c.segment_tokens}: PPO's step is one program; set it to 0",
    ),
    (
      not g.mtp_coef or bool(sizes.mtp_depth),
      f"grpo.mtp_coef={g.mtp_coef} needs model.mtp_depth=1",
    ),
    (
      bool(sizes.moe_layers) or not (g.routing_replay or g.balance_coef),
      f"grpo.routing_replay={g.routing_replay} and grpo.balance_coef={g.balance_coef}"
      " need a policy with experts; model.dense_layers leaves it none",
    ),
    (
      min(g.router_bias_rate, g.balance_coef, g.mtp_coef) >= 0,
      "grpo.router_bias_rate, grpo.balance_coef and grpo.mtp_coef must not be negative",
    ),
    (
      0 <= g.traced_groups <= c.prompts,
      f"grpo.traced_groups={g.traced_groups} must lie in 0..prompts={c.prompts}",
    ),
    (
      o.filter_on in ("reward", *parts),
      f"objective.filter_on={o.filter_on!r} is neither 'reward' nor one of its parts,"
      f" {', '.join(parts)}",
    ),
    (
      o.pool == 1 or o.filter_on == "reward" or parts.get(o.filter_on, 1) > 0,
      f"objective.filter_on={o.filter_on!r} chooses groups by a part of the reward"
      f" whose weight, reward.{o.filter_on}_weight, is 0: their advantages would be 0",
    ),
  ]


def adapter_rules(c: ConfigDict, sizes: PolicyConfig) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of low-rank adapters, if there are some.

  Raises:
    UserError: their settings, or targets that the policy does not have.
  """
  found = lora_config(c)
  if found is None:
    return []
  lora.matrices(Policy(sizes), found.targets)
  on = f"lora.rank={found.rank}"
  return [
    (
      c.grpo.gather_weights,
      f"grpo.gather_weights=False with {on}: every layer would add its adapters at"
      " every token; set it to True",
    ),
    (
      not c.grpo.mtp_coef,
      f"grpo.mtp_coef={c.grpo.mtp_coef} with {on}: the MTP module has no adapters and"
      " would learn nothing; set one of them to 0",
    ),
  ]


def base_rules(c: ConfigDict) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of a policy that is read from a folder."""
  folder = c.model.folder
  return [
    (
      not folder or not c.pretrain.steps,
      f"pretrain.steps={c.pretrain.steps}: model.folder={folder!r} has weights; set it"
      " to 0",
    ),
    (
      not folder or all(tokens for _, tokens in c.windows),
      f"windows={c.windows}: 0 fits a window to the task's pages, and model.folder="
      f"{folder!r} never saw them; set the tokens, as in ((0, 96),)",
    ),
    (
      not folder or c.reward.host,
      "reward.host=False: the tags of a published model are several tokens, which only"
      " the host's rules read; set it to True",
    ),
  ]


def chat_rules(c: ConfigDict) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of prompts in a published model's own template,
  whose vocabulary has no token for `<answer>`, and mostly none for `<think>`."""
  d, chat = c.data, c.data.template == prompts.CHAT
  templates = sorted((prompts.CHAT, *prompts.TEMPLATES))
  return [
    (
      d.template in templates,
      f"data.template={d.template!r} must be one of {templates}",
    ),
    (
      0 <= d.examples <= (len(prompts.EXAMPLES) if chat else 0),
      f"data.examples={d.examples}: there are {len(prompts.EXAMPLES)}, for"
      " data.template='chat'",
    ),
    (
      not chat or c.model.folder,
      "data.template='chat' is a published model's own; set model.folder, or another"
      " template",
    ),
    (
      not chat or not d.stop_on_answer,
      "data.stop_on_answer=True: data.template='chat' has no token </answer>; set"
      " data.stop=('</answer>',) instead",
    ),
  ]


def reward_rules(c: ConfigDict) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of the reward."""
  r = c.reward
  return [
    (
      c.data.problems or c.data.source == "jsonl",
      f"data.source={c.data.source!r} needs data.problems: the file, or the task",
    ),
    (
      r.host or not (r.rules or r.language_detector),
      f"reward.rules={r.rules!r} and reward.language_detector={r.language_detector}"
      " need text: set reward.host=True",
    ),
    *(
      (0 <= share <= 1, f"reward.alarm.{name}={share} is a share: 0 to 1")
      for name, share in r.alarm.items()
    ),
    *(
      (
        name in (*OUTCOMES, "hacking"),
        f"reward.alarm.{name}: an outcome is one of {OUTCOMES}",
      )
      for name in r.alarm
    ),
  ]
