"""Scores completions of a file with rewards, ours and yours.

  python -m experiments.score samples.jsonl
  python -m experiments.score --rewards=accuracy,format,language=0.1 samples.jsonl
  python -m experiments.score --rewards=my_rules.py:short=0.5 samples.jsonl

A line holds {"completion": "...", "answer": "..."}, or a program's completion with
"tests"; "problem" may stand too. Or it is one of a run's samples.jsonl: every output
that the run keeps is scored, of all its evaluations. A reward of yours is a function
(completion, problem) -> number. Prints the mean of each reward and how many samples
ended how; --out keeps every sample's rewards. Exit codes: 0 done, 2 a mistake in the
command or a file, 42 stopped by SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import math
import os
import sys

import rich.console
import rich.progress
import rich.table

from experiments import exits
from r1jax.data import rows, sources
from r1jax.data.problem import Problem, Tests
from r1jax.errors import UserError
from r1jax.rewards.program import Limits
from r1jax.rewards.rules import load_rules
from r1jax.rewards.scorer import MATHS, SANDBOXES, Scorer, ScorerConfig
from r1jax.rewards.total import Breakdown
from r1jax.rewards.verdict import OUTCOMES

OURS = ("accuracy", "format", "language")


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words(), exits.flags_for():
    result = score(options)
  if options.json:
    print(json.dumps(result))


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.score",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("file", help="JSON lines of completions")
  add(
    "--rewards",
    default="accuracy,format",
    help=f"of {', '.join(OURS)} and FILE.py:function, each perhaps with =weight",
  )
  add("--language", default="en", help="the target of `language`")
  add("--prefill-think", action="store_true", help="the prompts ended in <think>")
  add("--workers", type=int, default=0, help="samples at a time; 0: one a core")
  add("--maths", default="math-verify", choices=MATHS)
  add("--maths-seconds", type=float, default=2.0, help="of an answer's algebra")
  add("--sandbox", default=SANDBOXES[0], choices=SANDBOXES, help="of programs")
  add(
    "--code-seconds",
    type=float,
    default=6.0,
    help="of a program on one input, or of one call",
  )
  add("--out", default="", help="a file for every sample's rewards")
  add("--json", action="store_true", help="print the result as JSON in the last line")
  return parser


def score(options: argparse.Namespace) -> dict:
  """Scores the file; returns counts of outcomes, and means.

  Raises:
    UserError: in the command, the file, a rule or the machine.
  """
  weights, rules = chosen(options.rewards)
  samples = read(options.file, judged="accuracy" in weights)
  config = ScorerConfig(
    accuracy_weight=weights.get("accuracy", 0.0),
    format_weight=weights.get("format", 0.0),
    language_weight=weights.get("language", 0.0),
    language=options.language,
    prefill_think=options.prefill_think,
    workers=options.workers,
    maths=options.maths,
    maths_seconds=options.maths_seconds,
    sandbox=options.sandbox,
    limits=Limits(
      seconds=options.code_seconds, total_seconds=max(60.0, 10 * options.code_seconds)
    ),
  )
  may_write(options.out, samples=options.file)
  console = rich.console.Console(stderr=True)
  names, judged = [*weights, *rules], "accuracy" in weights
  scored: list[Breakdown] = []
  with (
    Scorer(config, [p for _, p in samples], rules) as scorer,
    written(options.out) as keep,
  ):
    for note in scorer.notes:
      console.print(note, highlight=False, soft_wrap=True)
    stream = scorer.stream(samples)
    for said in rich.progress.track(
      stream, "scoring", total=len(samples), console=console, transient=True
    ):
      scored.append(said)
      row = {"reward": said.total, **{name: said.parts[name] for name in names}}
      keep(row | ({"outcome": said.outcome, "detail": said.detail} if judged else {}))
  return summary(scored, names, judged=judged)


def chosen(spec: str) -> tuple[dict[str, float], dict]:
  """(weights of ours by name, rules of yours) of --rewards."""
  weights, theirs = {}, []
  for entry in filter(None, (e.strip() for e in spec.split(","))):
    name, weighted, weight = entry.partition("=")
    if name not in OURS:
      theirs.append(entry)
      continue
    if name in weights:
      raise UserError(f"--rewards names {name!r} twice.")
    try:
      weights[name] = float(weight) if weighted else 1.0
    except ValueError:
      weights[name] = math.nan
    if not math.isfinite(weights[name]):
      raise UserError(f"--rewards: {entry!r} has a weight that is no number.")
    if name == "language" and not weights[name]:
      raise UserError("--rewards: language with a weight of 0 is not computed.")
  unknown = [entry for entry in theirs if ":" not in entry]
  if unknown or not (weights or theirs):
    raise UserError(
      f"--rewards={spec!r}: {(unknown or ['nothing'])[0]!r} is not a reward; name"
      f" {', '.join(OURS)} or FILE.py:function."
    )
  return weights, load_rules(",".join(theirs))


def read(path: str, *, judged: bool) -> list[tuple[str, Problem]]:
  """The file's (completion, problem) pairs. Args: the file; if golds are needed."""
  texts = []

  def sample(row: dict) -> Problem:
    if row.get("phase") == "eval":
      texts.append(row.get("texts", []))
      return of_run(row, texts[-1])
    if not isinstance(row.get("completion"), str):
      raise ValueError('no text under "completion"')
    row.setdefault("problem", row.get("question", "(not given)"))
    golds = "answer" in row or "tests" in row or "test" in row
    problem = (
      sources.SOURCES["jsonl"](row)
      if judged or golds
      else rows.checked_problem(str(row["problem"]), kind="text")
    )
    texts.append([row["completion"]])
    return problem

  form = '{"completion": "...", "answer": "..."}'
  problems = sources.read_with(sample, path, form=form)
  pairs = zip(texts, problems, strict=True)
  return [(text, problem) for said, problem in pairs for text in said]


def of_run(row: dict, texts: list[str]) -> Problem:
  """The problem of a line of a run's samples.jsonl, after a look at its outputs."""
  try:
    "".join(texts).encode()
    known = {f.name: row[f.name] for f in dataclasses.fields(Problem)}
    if tests := known["tests"]:
      known["tests"] = Tests(**tests | {"cases": tuple(map(tuple, tests["cases"]))})
    return Problem(**known | {"answers": tuple(known["answers"])})
  except (KeyError, TypeError, UnicodeEncodeError) as error:
    raise ValueError(f"no line of a run's samples.jsonl: {error!r}") from error


def may_write(path: str, *, samples: str) -> None:
  """Raises UserError where --out cannot be written, or is the samples' own file; what
  it holds stays."""
  if path and os.path.exists(path) and os.path.samefile(path, samples):
    raise UserError(f"--out={path} is the file of the samples itself; take another.")
  try:
    if path:
      with open(path, "a"):
        pass
  except OSError as error:
    raise UserError(f"--out={path} cannot be written ({error.strerror}).") from error


@contextlib.contextmanager
def written(path: str) -> Iterator[Callable[[dict], None]]:
  """A function that appends a row to the file, or to none where the path is ""."""
  if not path:
    yield lambda row: None
    return
  with open(path, "w", encoding="utf-8") as file:
    yield lambda row: file.write(json.dumps(row) + "\n")


def summary(scored: list[Breakdown], names: list[str], *, judged: bool) -> dict:
  """Means over the samples that were scored, and the counts; printed as a table too."""
  kept = [s for s in scored if s.outcome != "infrastructure"]
  mean = {"reward": sum(s.total for s in kept) / max(len(kept), 1)}
  for name in names:
    mean[name] = sum(s.parts[name] for s in kept) / max(len(kept), 1)
  counts = {o: sum(s.outcome == o for s in scored) for o in OUTCOMES} if judged else {}
  table = rich.table.Table("", "mean", title=f"{len(scored)} samples")
  for name, value in mean.items():
    table.add_row(name, f"{value:.3f}")
  console = rich.console.Console()
  console.print(table)
  if judged:
    table = rich.table.Table("outcome", "samples")
    for name, count in counts.items():
      table.add_row(name, str(count))
    console.print(table)
  return {"samples": len(scored), "mean": mean, "outcomes": counts}


if __name__ == "__main__":
  main(sys.argv[1:])
