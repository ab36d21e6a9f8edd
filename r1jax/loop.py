"""R1-Zero on the host: base, RL, evaluation, result.

All that a run does lies in its workdir: config.json, tokenizer.model, metrics.jsonl,
samples.jsonl, tokens.jsonl, events.jsonl, checkpoints/, summary.json, curves.png,
report.html, profile/ if asked for. The same command again resumes a run, and shows the
result of one that has ended.
"""

import contextlib
import json
import pathlib
import resource
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import rich.console

from r1jax import (
  attempts,
  config_checks,
  fine_tuning,
  html_report,
  lock,
  preemption,
  report,
  settings,
  sft,
  sharding,
  trained,
  watchdog,
)
from r1jax.data import corpus
from r1jax.data import world as worlds
from r1jax.errors import UserError
from r1jax.evals.interval import interval
from r1jax.metrics import MetricsFile, write_json
from r1jax.models import hf
from r1jax.progress import Clock, Progress
from r1jax.reinforcement import reinforce
from r1jax.rewards.verdict import OUTCOMES
from r1jax.run import Run, open_workdir, prepare
from r1jax.sinks import Sinks

PROGRAMS = (
  *("next_token_step", "evaluate", "whole_step"),
  # a step in segments
  *("wave", "start", "advance", "score", "fill", "experience", "update", "trace"),
)


def run(config: ConfigDict, workdir: pathlib.Path, clock: Clock) -> dict:
  """A whole run, or what is left of it. Returns the summary."""
  console = rich.console.Console(quiet=jax.process_index() > 0)
  config_checks.check(config, len(jax.devices()))
  if not (config.pretrain.steps or config.model.folder or config.init_from):
    raise UserError(
      "config.pretrain.steps=0: RL starts from a base. Name a Hugging Face checkpoint"
      " by config.model.folder or a run by config.init_from, or set pretrain.steps to"
      " train one on the task's pages."
    )
  for sentence in settings.idle(config):
    console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
  changes = open_workdir(config, workdir)
  ended = workdir / "summary.json"
  summary = json.loads(ended.read_text()) if ended.exists() else {}
  if summary and config.steps <= summary["final"]["step"]:
    show(console, workdir, summary)
    console.print(
      f"This run has ended; its files are in {workdir}.",
      highlight=False,
      soft_wrap=True,
    )
    if any(config.profile_steps):
      console.print("Nothing is left of it to profile: give another --workdir.")
    if config.sinks and not jax.process_index():
      print(f"What {', '.join(config.sinks)} lacks of its figures is sent now.")
      with contextlib.closing(Sinks(config.sinks, workdir)) as sinks:
        MetricsFile(workdir / "metrics.jsonl", sinks=sinks)
    return summary
  if changes:
    console.print(
      f"The run in {workdir} goes on with {'; '.join(changes)}. Its state comes back"
      " bit for bit; what follows is what it would have been but for rounding, and for"
      " a schedule that ends with the steps.",
      highlight=False,
      soft_wrap=True,
    )
  mesh = sharding.make_mesh(**config.mesh)
  with (
    lock.held(workdir),
    attempts.counted(workdir),
    jax.set_mesh(mesh),
    Progress(console) as progress,
    preemption.listened(progress.say),
    watchdog.watched(clock, workdir, config.watchdog_minutes),
  ):
    with clock.phase("prepare"):
      this = prepare(config, workdir, mesh, clock, progress)
    clock.record(workdir / "events.jsonl")
    with contextlib.closing(this):
      params, router = base(this)
      reinforce(this, params, router)
      summary = conclude(this)
  show(console, workdir, summary)
  console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)
  return summary


# -- the base ------------------------------------------------------------------


def base(this: Run) -> tuple[Any, Any]:
  """The base's (params, router): another run's last, of a published checkpoint, or
  trained on the task's pages."""
  if other := this.config.init_from:
    this.progress.say(f"base: the last policy of {other}")
    with this.clock.phase("restore"):
      return trained.initial(this.config, this.policy, this.mesh)
  if folder := this.config.model.folder:
    this.progress.say(f"base: reading {folder}")
    with this.clock.phase("restore"):
      return hf.load(folder, this.mesh, **settings.computed(this.config))[1:]
  return pretrain(this)


def pretrain(this: Run) -> tuple[Any, Any]:
  """The base model's (params, router), trained on the task's pages or restored."""
  c, p = this.config, this.config.pretrain

  def pages() -> sft.Pages:
    # Enough at 14 tokens a page; with shorter ones the rows come round again.
    width = p.width or this.page
    made = worlds.pages(c, this.world, count=p.steps * p.rows * width // 14)
    return corpus.pack([prompt + page for prompt, page in made], this.tokenizer, width)

  return fine_tuning.tune(this, pages, settings.pretrain_config(c), phase="pretrain")


# -- the result -----------------------------------------------------


def conclude(this: Run) -> dict:
  """summary.json, curves.png and report.html, by the first process."""
  c, clock = this.config, this.clock
  evals, train = this.metrics.phase("eval"), this.metrics.phase("rl")
  half = min(evals, key=lambda row: abs(row["step"] - c.steps / 2))

  def figures(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "phase"}

  spent = {k: round(v, 1) for k, v in clock.seconds.items()}
  unit = 2**20 if sys.platform == "linux" else 2**30  # ru_maxrss: KiB, bytes on macOS
  summary = {
    "task": c.task if not c.data.problems else c.data.problems,
    "base": figures(evals[0]),
    "half_way": figures(half),
    "final": figures(evals[-1]),
    "intervals": intervals(this.samples.rows(), evals[0]["step"], evals[-1]["step"]),
    "steps": c.steps,
    "outcomes": outcomes(train),
    "seconds": {**spent, "total": round(clock.elapsed, 1)},
    "compilations": {
      name: clock.compilations[name] for name in PROGRAMS if clock.compilations[name]
    },
    "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2),
    "seed": c.seed,
    "config_sha256": settings.sha256(c),
    "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
  }
  if jax.process_index():
    return summary
  title = html_report.title(settings.plain(c), this.workdir)
  report.curves(this.workdir / "curves.png", train, evals, title)
  write_json(this.workdir / "summary.json", summary)
  page = html_report.page(this.workdir)
  (this.workdir / "report.html").write_text(page, encoding="utf-8")
  return summary


def intervals(rows: list[dict], first: int, last: int) -> dict:
  """95 % intervals over the held-out problems, of pass@1 and the format's rate.

  Args:
    rows: of samples.jsonl.
    first, last: the evaluations to compare, by their steps.

  Returns:
    figure -> base, final and their change -> (low, high).
  """
  found = {}
  for name, marks in (("pass_at_1", "correct"), ("format_rate", "format")):
    base, final = (
      np.array([np.mean(row[marks]) for row in rows if row["step"] == step])
      for step in (first, last)
    )
    values = {"base": base, "final": final, "change": final - base}
    found[name] = {column: interval(x) for column, x in values.items()}
  return found


def outcomes(rows: list[dict]) -> dict[str, int]:
  """How many of all samples drawn in RL ended how, and their number."""
  counts = {
    name: sum(round(row.get(f"outcome_{name}", 0.0) * row["samples"]) for row in rows)
    for name in OUTCOMES
  }
  return {**counts, "samples": round(sum(row["samples"] for row in rows))}


def show(console: rich.console.Console, workdir: pathlib.Path, summary: dict) -> None:
  """The result in the terminal: groups before and after, the table, the verdict."""
  rows = [r for r in MetricsFile(workdir / "samples.jsonl").rows() if "texts" in r]
  for heading, name in (("Before RL", "base"), ("After RL", "final")):
    step = summary[name]["step"]
    report.show_groups(console, [r for r in rows if r["step"] == step], heading)
  report.show_table(console, summary)
  console.print(report.verdict(summary), highlight=False, soft_wrap=True)
