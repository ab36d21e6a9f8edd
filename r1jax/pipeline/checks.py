"""Everything about a pipeline's config that can be known before a file is touched."""

from collections.abc import Mapping
import math
import pathlib

import jax
from ml_collections import ConfigDict

from r1jax import config_checks, settings, sharding
from r1jax.data import traces
from r1jax.errors import UserError
from r1jax.pipeline import cold_start, distill, hooks, judging, rejection
from r1jax.pipeline.all_scenarios_rl import SQUASH
from r1jax.pipeline.project import with_changes
from r1jax.pipeline.sampling import GROUP

# Sections of the config that say how rows are learned.
TUNED = ("sft_1", "sft_3", "distill", "reward_models")


def check(config: ConfigDict) -> None:
  """What can be known of a pipeline's config before a file is touched.

  Raises:
    UserError: what came, the rule, and what to do.
  """
  c, devices = config, len(jax.devices())
  if not c.pretrain.steps:
    raise UserError(
      "config.pretrain.steps=0: the stages begin with a base, and r1jax cannot read a"
      " published one. Set pretrain.steps to train one on the task's pages."
    )
  if c.task != "assistant" or c.data.problems:
    raise UserError(
      f"config.task={c.task!r} and config.data.problems={c.data.problems!r}: the stages"
      " need sums, instructions and requests, which the task 'assistant' alone has. For"
      " problems of your own there is python -m experiments.r1_zero."
    )
  if c.data.prefill_think or c.data.stop_on_answer:
    raise UserError(
      f"config.data.prefill_think={c.data.prefill_think} and"
      f" config.data.stop_on_answer={c.data.stop_on_answer}: traces of the stages hold"
      " their whole thinking, and replies may go on after the answer. Set both to"
      " False."
    )
  if c.reward.host:
    raise UserError(
      "config.reward.host=True: the stages read their rewards in the graph. Set it to"
      " False; python -m experiments.r1_zero reads rewards from text."
    )
  config_checks.check(c, devices)
  student = {"model": c.student.model}
  of_student = {**student, "pretrain": c.student.pretrain}
  stages: dict[str, Mapping] = {
    "zero": c.zero,
    "rl_1": c.rl_1,
    "rl_2.changes": c.rl_2.changes,
    "rl_2_uncapped": {**c.rl_2.changes, **c.rl_2_uncapped},
    "student.pretrain": of_student,
    "student.rl": {**c.student.rl, **student},
    "ppo_baseline": c.ppo_baseline,
  }
  for name, changes in stages.items():
    try:
      config_checks.check(with_changes(c, changes), devices)
    except KeyError as error:
      raise UserError(f"config.{name}: {error.args[0]}.") from error
    except UserError as error:
      raise UserError(f"in the stage of config.{name}: {error}") from error
  for ok, rule in (*rules_of_data(c), *rules_of_learning(c)):
    if not ok:
      raise UserError(f"config.{rule}.")
  for key, ours, form in (
    ("cold_start.rewriter", cold_start.REWRITERS, cold_start.FORM),
    ("rejection.judge", rejection.JUDGES, rejection.FORM),
    ("judging.judge", dict.fromkeys(judging.JUDGES), judging.FORM),
  ):
    hooks.load(settings.config_get(c, key), ours, key, form)
  if c.rejection.general_data:
    traces.read(pathlib.Path(c.rejection.general_data))
  distill.check_mode(c.distill.mode)
  if c.distill.mode == "on_policy":
    distill.on_policy_config(distill.with_rate(c), window=1)
  distill.logit_config(distill.with_rate(c))


def rules_of_data(c: ConfigDict) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of what is sampled and judged."""
  sampled = ("cold_start", "rejection", "judging", "report")
  samples = [f"{section}.samples" for section in sampled] + ["report.request_samples"]
  least_one = ("cold_start.prompts", "cold_start.keep", "cold_start.most")
  least_one += ("rejection.prompts", "rejection.keep", "judging.pairs_a_prompt")
  get = settings.config_get
  return [
    *(
      (
        get(c, key) > 0 and get(c, key) % GROUP == 0,
        f"{key}={get(c, key)} must be a multiple of {GROUP}, drawn at a time",
      )
      for key in samples
    ),
    *(
      (c[s].temperature > 0, f"{s}.temperature={c[s].temperature} must be above 0")
      for s in sampled
    ),
    *((get(c, k) >= 1, f"{k}={get(c, k)} must be at least 1") for k in least_one),
    (
      c.judging.judgments >= 2 and c.judging.judgments % 2 == 0,
      f"judging.judgments={c.judging.judgments} must be even, 2 or more: half of them"
      " show the replies swapped",
    ),
    (
      0 <= c.rejection.general_weight < math.inf,
      f"rejection.general_weight={c.rejection.general_weight} must be a number, 0 or"
      " more",
    ),
    (
      2 <= c.report.problems <= c.counts.held_out,
      f"report.problems={c.report.problems} must lie between 2 and counts.held_out="
      f"{c.counts.held_out}",
    ),
    (
      0 < c.report.top_p <= 1,
      f"report.top_p={c.report.top_p} must lie above 0 and up to 1",
    ),
  ]


def rules_of_learning(c: ConfigDict) -> list[tuple[bool, str]]:
  """(holds, what came and the rule): of SFT, reward models and RL stage 2."""
  r, stage = c.rl_2, with_changes(c, c.rl_2.changes)
  k, requests = stage.grpo.minibatches, round(stage.prompts * r.general_share)
  sizes = sharding.check_mesh(c.mesh, len(jax.devices()))
  shards = math.prod(sizes[axis] for axis in sharding.BATCH)
  rates = {s: c[s].learning_rate for s in TUNED} | {
    "distill": distill.with_rate(c).learning_rate
  }
  return [
    *((c[s].epochs > 0, f"{s}.epochs={c[s].epochs} must be above 0") for s in TUNED),
    (
      c.reward_models.schedule in ("constant", "cosine"),
      f"reward_models.schedule={c.reward_models.schedule!r} must be 'constant' or"
      " 'cosine'",
    ),
    (
      c.distill.on_policy_steps > 0,
      f"distill.on_policy_steps={c.distill.on_policy_steps} must be above 0",
    ),
    (
      c.reward_models.safety_epochs > 0,
      f"reward_models.safety_epochs={c.reward_models.safety_epochs} must be above 0",
    ),
    *(
      (0 < rate < math.inf, f"{s}.learning_rate={rate} must be a number above 0")
      for s, rate in rates.items()
    ),
    *(
      (
        c[s].micro_batches > 0
        and c[s].rows > 0
        and c[s].rows % (c[s].micro_batches * shards) == 0,
        f"{s}.rows={c[s].rows} must be a multiple of {s}.micro_batches="
        f"{c[s].micro_batches} x {shards} data shards of the mesh, all above 0",
      )
      for s in TUNED
    ),
    (
      0 < r.window <= stage.steps and r.window % k == 0,
      f"rl_2.window={r.window} must be a multiple of grpo.minibatches={k} and at most"
      f" the stage's {stage.steps} updates",
    ),
    (
      0 < requests < stage.prompts,
      f"rl_2.general_share={r.general_share} must lie between 0 and 1, and leave a"
      f" request and a sum, at least, in config.prompts={stage.prompts}",
    ),
    (
      r.squash in SQUASH,
      f"rl_2.squash={r.squash!r} is not one of {', '.join(SQUASH)}",
    ),
    (
      settings.objective(stage).pool == 1
      or settings.objective(stage).filter_on == "reward",
      "objective.filter_on: requests vary in the reward alone; set it to 'reward', or"
      " objective.pool=1",
    ),
  ]
