"""What a config must hold, found before a mesh, a file or a compile."""

import math

from ml_collections import ConfigDict

from r1jax import lora, prompts, settings, sharding, sinks
from r1jax.errors import UserError
from r1jax.models.config import PolicyConfig
from r1jax.models.policy import Policy
from r1jax.objective import Objective
from r1jax.optimizer import learning_rate
from r1jax.rewards.verdict import OUTCOMES

Rules = list[tuple[bool, str]]  # (holds, what came and the rule)


def check(config: ConfigDict, devices: int) -> None:
  """Raises UserError: with what came, the rule, and what to do."""
  c, g = config, config.grpo
  if min(g.minibatches, c.pretrain.micro_batches) < 1:
    raise UserError(
      f"config.grpo.minibatches={g.minibatches} and config.pretrain.micro_batches="
      f"{c.pretrain.micro_batches} must be at least 1."
    )
  # A window that is fitted to the pages is checked again when it is known.
  for _, tokens in settings.windows(c, longest_page=2**15):
    settings.step_config(c, tokens)
  o, sizes = settings.objective(c), settings.policy_config(c, vocab=512)
  learning_rate(settings.optimizer_config(c))
  settings.scorer_config(c)
  sinks.check(c.sinks)
  mesh = sharding.check_mesh(c.mesh, devices)
  rules = [
    *count_rules(c),
    *corpus_rules(c, sizes),
    *batch_rules(c, mesh),
    *schedule_rules(c),
    *learning_rules(c, o, sizes),
    *adapter_rules(c, sizes),
    *reward_rules(c),
    *base_rules(c),
    *chat_rules(c),
  ]
  for ok, rule in rules:
    if not ok:
      raise UserError(f"config.{rule}.")


def count_rules(c: ConfigDict) -> Rules:
  """Of numbers that stand for themselves."""
  positive = ("steps", "prompts", "eval.problems", "pretrain.rows")
  positive += ("pretrain.facts_a_page", "counts.pretrain", "counts.train")
  positive += ("counts.held_out",)
  natural = ("seed", "segment_tokens", "pretrain.steps", "pretrain.width")
  natural += ("watchdog_minutes", "data.prompt_length")
  get = settings.config_get
  return [
    *((get(c, k) >= 1, f"{k}={get(c, k)} must be at least 1") for k in positive),
    *((get(c, k) >= 0, f"{k}={get(c, k)} must not be negative") for k in natural),
    (c.eval.samples >= 2, f"eval.samples={c.eval.samples} must be at least 2"),
    (
      0 < c.data.held_out < 1,
      f"data.held_out={c.data.held_out} must lie between 0 and 1",
    ),
  ]


def corpus_rules(c: ConfigDict, sizes: PolicyConfig) -> Rules:
  """Of the pages, and of the training on them."""
  return [
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
      not c.pretrain.mtp_coef or bool(sizes.mtp_depth),
      f"pretrain.mtp_coef={c.pretrain.mtp_coef} needs model.mtp_depth=1",
    ),
  ]


def batch_rules(c: ConfigDict, mesh: dict[str, int]) -> Rules:
  """Of what is divided: outputs and pages into parts, those over the data shards."""
  g, micro = c.grpo, c.pretrain.micro_batches
  shards = math.prod(mesh[axis] for axis in sharding.BATCH)
  rows, parts = c.prompts * g.group_size, g.minibatches * g.micro_batches
  return [
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
  ]


def schedule_rules(c: ConfigDict) -> Rules:
  """Of what happens every so many updates."""
  g = c.grpo
  return [
    (
      c.steps % g.minibatches == 0,
      f"steps={c.steps} updates must be whole rollouts of grpo.minibatches="
      f"{g.minibatches}; try {-(-c.steps // g.minibatches) * g.minibatches}",
    ),
    (
      all(n > 0 and n % g.minibatches == 0 for n in (c.eval.every, c.checkpoint_every)),
      f"eval.every={c.eval.every} and checkpoint_every={c.checkpoint_every} must be"
      f" positive multiples of grpo.minibatches={g.minibatches}",
    ),
    (
      profiled(c),
      f"profile_steps={c.profile_steps} must be the (first, last) update of"
      f" steps={c.steps} to profile, or (0, 0)",
    ),
  ]


def profiled(c: ConfigDict) -> bool:
  """Whether profile_steps names updates that there are, or none."""
  match tuple(c.profile_steps):
    case (int(first), int(last)):
      return (first, last) == (0, 0) or 1 <= first <= min(last, c.steps)
  return False


def learning_rules(c: ConfigDict, o: Objective, sizes: PolicyConfig) -> Rules:
  """Of the objective beside the rest of the config."""
  g, parts = c.grpo, settings.reward_parts(c)
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


def adapter_rules(c: ConfigDict, sizes: PolicyConfig) -> Rules:
  """Of low-rank adapters, if there are some.

  Raises:
    UserError: their settings, or targets that the policy does not have.
  """
  found = settings.lora_config(c)
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


def base_rules(c: ConfigDict) -> Rules:
  """Of a policy that is read from a folder."""
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


def chat_rules(c: ConfigDict) -> Rules:
  """Of prompts in a published model's own template,
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


def reward_rules(c: ConfigDict) -> Rules:
  """Of the reward."""
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
