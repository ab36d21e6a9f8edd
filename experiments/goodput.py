"""Where the time of a run went, and how much of it was work that was kept.

  python -m experiments.goodput runs/r1_zero-tiny-seed0
  python -m experiments.goodput runs/r1-tiny-seed0 --json

Reads events.jsonl of each folder; of one that has none, those of the folders in it (the
stages of R1, the seeds of a sweep). Sums over all processes that worked there: a run
that was stopped and started again counts what it lost in between, and the steps that it
computed twice. Exit codes: 0 done, 2 a mistake in the command or a folder, 42 stopped
by SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
import json
import sys

import rich.console
import rich.table

from experiments import exits, folders
from r1jax import events
from r1jax.goodput import OVERHEAD, Goodput

FILE = "events.jsonl"


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words():
    found = folders.runs(options.folder, FILE, events.read)
    runs = {name: Goodput.of(events.read(path)) for name, path in found}
  if len(runs) > 1:
    runs["all"] = Goodput.total(runs.values())
  if options.json:
    print(json.dumps({name: run.as_dict() for name, run in runs.items()}))
  else:
    rich.console.Console().print(table(runs))


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.goodput",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", nargs="+", help="of a run")
  parser.add_argument("--json", action="store_true", help="print JSON, no table")
  return parser


def table(runs: dict[str, Goodput]) -> rich.table.Table:
  """A column a run, in seconds; `all` is their sum."""
  columns = runs.values()
  shown = rich.table.Table("", *runs, title="seconds")

  def row(name: str, values: list[float], text: str = "{:.1f}") -> None:
    shown.add_row(name, *(text.format(value) for value in values))

  row("wall time", [run.wall for run in columns])
  row("work that was kept", [run.kept for run in columns])
  row("goodput", [run.goodput for run in columns], "[bold]{:.1%}")
  shown.add_section()
  names = dict.fromkeys(name for run in columns for name in run.seconds)
  for name in sorted(names, key=lambda name: name in OVERHEAD):
    if name != "restart":
      row(name, [run.seconds.get(name, 0.0) for run in columns])
  row("without a name", [run.unnamed for run in columns])
  shown.add_section()
  row("restarts", [run.restarts for run in columns], "{}")
  row("between processes", [run.seconds.get("restart", 0.0) for run in columns])
  row("work done again", [run.again for run in columns])
  row("steps done again", [run.steps_again for run in columns], "{}")
  return shown


if __name__ == "__main__":
  main(sys.argv[1:])
