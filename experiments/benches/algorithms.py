"""Every preset of the objective, and PPO: the same base, the same number of updates.

For each seed the first row pre-trains the base and the others start from a copy of it.
Runs are processes of experiments.r1_zero or experiments.ppo, one a core.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
import os
import pathlib
import queue
import re
import shutil
import statistics
import subprocess
import sys

import rich.console
import rich.progress

from r1jax import presets
from r1jax.errors import UserError
from r1jax.metrics import MetricsFile

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md"
BEGIN, END = "<!-- algorithms: begin -->\n", "<!-- algorithms: end -->\n"
# What to expect of a row; the docs' table ends in these words.
EXPECT = {
  "paper": "R1's own: a wide one-sided clip and a light KL; steady.",
  "deepseekmath": "GRPO as it began; the stronger KL holds the policy nearer the base.",
  "dr_grpo": "No length and no difficulty bias; with short outputs, as the paper's.",
  "dapo": "Its overlong penalty shortens outputs; late steps sample 3 rollouts.",
  "gspo": "Its tiny clip drops most of the early second minibatches: a slower start.",
  "cispo": "Every token keeps its gradient; as the paper's wide clip.",
  "rloo": "No std, no clip, KL in the reward; as the paper's.",
  "trl": "Token mean, no KL, one pass more to recompute old log-probabilities.",
  "verl": "As `trl` but for a dual clip, which does not bind at such small ratios.",
  "tunix": "k1 in the loss does not pull: its KL to the base is no smaller.",
  "ppo λ=1.0": "Near GRPO, with a second network to train.",
  "ppo λ=0.95": "Slower: after 40 tokens an eighth of the reward arrives.",
  "ppo λ=1.0, not whitened": "Slow: V starts at 0 and at first pushes every output up.",
  "ppo λ=0.95, not whitened": "Far below, as R1 found: the working is unlearnt.",
}
# Of the final evaluation.
COLUMNS = ("pass_at_1", "mean_length", "kl_to_base", "reflection_rate")


@dataclasses.dataclass(frozen=True)
class Row:
  name: str
  module: str
  flags: tuple[str, ...]

  @property
  def preset(self) -> str:
    return self.name.partition(" ")[0]

  @property
  def folder(self) -> str:
    return re.sub(r"[^\w.]+", "_", self.name.replace("λ", "lambda"))


def all_rows() -> list[Row]:
  """The presets, and PPO at the two lambdas of R1's appendix A.3, with its advantages
  whitened as verl and TRL do, and as its equations are."""
  rows = [
    Row(name, "experiments.r1_zero", (f"--config.objective.preset={name}",))
    for name in presets.PRESETS
    if name != "ppo"
  ]
  return rows + [
    Row(
      f"ppo λ={lam}{name}",
      "experiments.ppo",
      (f"--config.objective.lam={lam}", f"--config.ppo.whiten={whiten}"),
    )
    for whiten, name in ((True, ""), (False, ", not whitened"))
    for lam in (1.0, 0.95)
  ]


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--presets", default="", help="comma-separated rows; all by default, PPO as ppo"
  )
  parser.add_argument("--seeds", type=int, default=2, help="runs a row")
  parser.add_argument("--steps", type=int, default=80, help="RL updates a run")
  parser.add_argument(
    "--jobs", type=int, default=0, help="processes at a time; 0: one a core"
  )
  parser.add_argument(
    "--workdir", default="runs/bench_algorithms", help="where the runs lie"
  )
  parser.add_argument(
    "--write", action="store_true", help="put the table into docs/algorithms.md"
  )
  parser.add_argument(
    "flags", nargs="*", help="more flags of a run, after --, such as --config.prompts=8"
  )


def run(options: argparse.Namespace) -> dict:
  """Runs what is missing, prints the table, returns everything as one value.

  Raises:
    UserError: no such row, or numbers that cannot be.
  """
  rows = chosen(options.presets)
  if min(options.seeds, options.steps) < 1 or options.jobs < 0:
    raise UserError(
      f"--seeds={options.seeds} and --steps={options.steps} must be at least 1 and"
      f" --jobs={options.jobs} 0 or more."
    )
  if options.write and (options.presets or options.flags):
    raise UserError(
      "--write puts the table of all rows at their own sizes into the docs; leave out"
      " --presets and the flags of a run."
    )
  root = pathlib.Path(options.workdir).resolve()
  shared = [f"--config.steps={options.steps}", *options.flags]
  cores: queue.Queue[int | None] = queue.Queue()
  places: list[int | None] = [None]
  if hasattr(os, "sched_getaffinity"):
    places = sorted(os.sched_getaffinity(0))
  count = options.jobs or len(places)
  for i in range(count):
    cores.put(places[i % len(places)] if count <= len(places) else None)
  console = rich.console.Console(stderr=True)

  def one(row: Row, seed: int) -> tuple[str, int, dict]:
    core = cores.get()
    try:
      return row.name, seed, start(row, seed, root, rows[0], shared, core)
    finally:
      cores.put(core)

  results: dict[str, list[dict]] = {row.name: [] for row in rows}
  with (
    rich.progress.Progress(console=console) as bar,
    ThreadPoolExecutor(count) as pool,
  ):
    task = bar.add_task("runs", total=len(rows) * options.seeds)
    # The first row makes the bases, so it goes first.
    for part in (rows[:1], rows[1:]):
      jobs = [(row, seed) for row in part for seed in range(options.seeds)]
      for name, seed, row in pool.map(lambda job: one(*job), jobs):
        results[name].append(row)
        bar.advance(task)
        bar.console.print(
          f"{name}, seed {seed}: pass@1 {row['pass_at_1']:.2f}",
          highlight=False,
        )
  table = caption(options, results) + markdown(results)
  print(table)
  if options.write:
    write(table)
  return {
    "bench": "algorithms",
    "steps": options.steps,
    "seeds": options.seeds,
    "rows": results,
  }


def chosen(names: str) -> list[Row]:
  """The rows that --presets names. Raises UserError for a name that is none."""
  rows = all_rows()
  if not names:
    return rows
  asked = names.split(",")
  for name in asked:
    if not any(name in (row.name, row.preset) for row in rows):
      known = ", ".join(dict.fromkeys(row.preset for row in rows))
      raise UserError(f"--presets: {name!r} is none of {known}.")
  return [row for row in rows if row.name in asked or row.preset in asked]


def start(
  row: Row,
  seed: int,
  root: pathlib.Path,
  first: Row,
  flags: list[str],
  core: int | None,
) -> dict:
  """One run in a process of its own, on one core; returns its summary."""
  workdir = root / row.folder / f"seed_{seed}"
  base = root / first.folder / f"seed_{seed}"
  if row != first and not (workdir / "tokenizer.model").exists():
    # The tokenizer comes last and by a rename: where it is, the copy is whole.
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(
      base / "checkpoints" / "pretrain", workdir / "checkpoints" / "pretrain"
    )
    partial = workdir / "tokenizer.partial"
    shutil.copy(base / "tokenizer.model", partial)
    partial.rename(workdir / "tokenizer.model")
  command = [sys.executable, "-m", row.module, *row.flags, *flags]
  command += [f"--config.seed={seed}", f"--workdir={workdir}"]
  log = root / row.folder / f"seed_{seed}.log"
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("w") as out:
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
      if core is not None:
        os.sched_setaffinity(process.pid, [core])
      code = process.wait()
    finally:
      process.kill()  # of a benchmark that was stopped
  if code:
    last = log.read_text().strip().splitlines()[-1:] or ["no output"]
    raise UserError(
      f"{row.name}, seed {seed} ended with code {code}: {last[0]} ({log})"
    )
  summary = json.loads((workdir / "summary.json").read_text())
  return figures(summary, MetricsFile(workdir / "metrics.jsonl"))


def figures(summary: dict, metrics: MetricsFile) -> dict:
  """What the table shows of a run: of its summary and its metrics."""
  final = summary["final"]
  early = min(
    metrics.phase("eval"), key=lambda row: abs(row["step"] - summary["steps"] / 4)
  )
  return {
    "seed": summary["seed"],
    "base_pass_at_1": summary["base"]["pass_at_1"],
    "early_pass_at_1": early["pass_at_1"],
    **{name: final[name] for name in COLUMNS},
    "rollouts": sum(row["waves"] for row in metrics.phase("rl")),
    "rl_seconds": summary["seconds"]["rl"],
    "devices": summary["devices"],
    "jax": summary["jax"],
  }


def caption(options: argparse.Namespace, results: dict[str, list[dict]]) -> str:
  """What was run, and on what."""
  run = next(iter(results.values()))[0]
  return (
    f"The same number of updates, {options.steps}, from the same base, means over"
    f" {options.seeds} seeds; 64 held-out problems x 16 samples; one process a core,"
    f" {run['devices']}, JAX {run['jax']}. Seeds differ by as much as many rows do.\n\n"
  )


def markdown(results: dict[str, list[dict]]) -> str:
  """A line a row: means over seeds, and the seeds' pass@1."""

  def mean(name: str, key: str) -> float:
    return statistics.fmean(run[key] for run in results[name])

  return "\n".join(_lines(results, mean)) + "\n"


def _lines(results: dict[str, list[dict]], mean) -> Iterator[str]:
  yield (
    "| | pass@1 base → a quarter → end | (seeds) | length | KL to the base | rollouts |"
    " RL seconds | what to expect |"
  )
  yield "|---" * 8 + "|"
  for name, runs in results.items():
    path = ("base_pass_at_1", "early_pass_at_1", "pass_at_1")
    steps = " → ".join(f"{mean(name, key):.2f}" for key in path)
    seeds = " ".join(f"{run['pass_at_1']:.2f}" for run in runs)
    yield (
      f"| `{name}` | {steps} | {seeds} | {mean(name, 'mean_length'):.1f}"
      f" | {mean(name, 'kl_to_base'):.3f} | {mean(name, 'rollouts'):.0f}"
      f" | {mean(name, 'rl_seconds'):.0f}"
      f" | {EXPECT.get(name, '')} |"
    )


def write(table: str) -> None:
  """Puts the table between its marks in the docs."""
  text = DOCS.read_text()
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  DOCS.write_text(before + BEGIN + table + END + after)
