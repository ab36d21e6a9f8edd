"""A pipeline from its config: checks, mesh, graph, and the result."""

from collections.abc import Mapping
import pathlib

import jax
from ml_collections import ConfigDict
import rich.console

from r1jax import settings, sharding
from r1jax.errors import UserError
from r1jax.pipeline import (
  cold_start,
  distill,
  hooks,
  judging,
  rejection,
  scoreboard,
)
from r1jax.pipeline.project import Project, with_changes
from r1jax.pipeline.stages import graph


def check(config: ConfigDict) -> None:
  """Everything about a pipeline's config that can be known before a file is touched.

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
  if c.data.prefill_think:
    raise UserError(
      "config.data.prefill_think=True: traces of the stages hold their whole thinking,"
      " its first tag included. Set it to False."
    )
  if c.reward.host:
    raise UserError(
      "config.reward.host=True: the stages read their rewards in the graph. Set it to"
      " False; python -m experiments.r1_zero reads rewards from text."
    )
  changed: Mapping[str, Mapping] = {
    "zero": c.zero,
    "rl_1": c.rl_1,
    "rl_2.changes": c.rl_2.changes,
    "student.rl": c.student.rl,
    "ppo_baseline": c.ppo_baseline,
  }
  for name, changes in changed.items():
    try:
      settings.check(with_changes(c, changes), devices)
    except KeyError as error:
      raise UserError(f"config.{name}: {error.args[0]}.") from error
    except UserError as error:
      raise UserError(f"in the stage of config.{name}: {error}") from error
  distill.check_mode(c.distill.mode)
  distill.with_rate(c)
  for key, ours in (
    ("cold_start.rewriter", cold_start.REWRITERS),
    ("rejection.judge", rejection.JUDGES),
    ("reward_models.judge", dict.fromkeys(judging.JUDGES)),
  ):
    hooks.load(settings.config_get(c, key), ours, key)
  k, r = c.grpo.minibatches, c.rl_2
  steps = with_changes(c, r.changes).steps
  rules = [
    (
      0 < r.window <= steps and r.window % k == 0,
      f"rl_2.window={r.window} must be a multiple of grpo.minibatches={k} and at most"
      f" the stage's {steps} updates",
    ),
    (
      0 < r.general_share < 1,
      f"rl_2.general_share={r.general_share} must lie between 0 and 1",
    ),
    *(
      (
        c[s].samples > 0 and c[s].samples % 4 == 0,
        f"{s}.samples={c[s].samples} must be a multiple of 4, drawn at a time",
      )
      for s in ("cold_start", "rejection", "reward_models", "report")
    ),
    *(
      (c[s].epochs > 0, f"{s}.epochs={c[s].epochs} must be above 0")
      for s in ("sft_1", "sft_3", "reward_models", "distill")
    ),
    *(
      (
        c[s].rows % c[s].micro_batches == 0,
        f"{s}.rows={c[s].rows} is not divisible by {s}.micro_batches="
        f"{c[s].micro_batches}",
      )
      for s in ("sft_1", "sft_3", "reward_models", "distill")
    ),
  ]
  for ok, rule in rules:
    if not ok:
      raise UserError(f"config.{rule}.")


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  stage: str = "",
  rerun: bool = False,
  status: bool = False,
) -> None:
  """Runs the stages that are not done, or one of them."""
  check(config)
  console = rich.console.Console()
  project = Project(config, workdir, sharding.make_mesh(config.mesh), console)
  stages = graph(project)
  if status:
    console.print(stages.table(workdir))
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}). Choose another one."
    ) from error

  def say(text: str) -> None:
    console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)

  with jax.set_mesh(project.mesh):
    stages.run(workdir, only=stage or None, rerun=rerun, say=say)
  found = stages.status(workdir)
  if not stage and found["report"].state == "done":
    scoreboard.show_file(console, workdir / "report" / "report.json")
    spent = sum(s.seconds for s in found.values())
    say(f"{spent / 60:.1f} minutes in all stages; the table: {workdir}/report")


def show_seeds(folders: list[pathlib.Path], workdir: pathlib.Path) -> None:
  """One table of several seeds' reports, with intervals over seeds."""
  console = rich.console.Console()
  figures = scoreboard.over_seeds([f / "report" / "report.json" for f in folders])
  text = scoreboard.markdown(figures)
  (workdir / "seeds.md").write_text(text, encoding="utf-8")
  scoreboard.plot(
    workdir / "seeds.png", figures, f"R1 in miniature, {len(folders)} seeds"
  )
  scoreboard.show(console, figures)
