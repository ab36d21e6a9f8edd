"""What ails a run of RL, and which knob to turn.

  python -m experiments.doctor runs/r1_zero-tiny-seed0
  python -m experiments.doctor runs/r1-tiny-seed0 --json

Reads metrics.jsonl of each folder, whether the run goes on or has ended; of one that
has none, those of the folders in it (the stages of R1, the seeds of a sweep). Exit
codes: 0 done, 2 a mistake in the command or a folder, 1 anything else.
"""

import argparse
import dataclasses
import json
import sys

import rich.console

from experiments import exits, folders
from r1jax import doctor
from r1jax.metrics import MetricsFile

FILE = "metrics.jsonl"


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words():
    found = folders.runs(options.folder, FILE, MetricsFile.rows_of)
  said = {name: of(MetricsFile(path), options.look) for name, path in found}
  if options.json:
    print(json.dumps(said))
    return
  console = rich.console.Console()
  for name, told in said.items():
    console.print(f"[bold]{name}[/bold]: {told['rollouts']} rollouts", highlight=False)
    if told["rollouts"] < options.look:
      console.print(f"  Too few to judge; {options.look} have to agree.")
    for complaint in told["complaints"]:
      mark = "note" if complaint["name"] == doctor.NOTE else "!"
      text = f"  {mark} {complaint['name']}: {complaint['text']}"
      console.print(text, highlight=False, markup=False)
    if told["rollouts"] >= options.look and not told["complaints"]:
      console.print("  Nothing to complain of.")


def of(file: MetricsFile, look: int) -> dict:
  """{"rollouts": how many, "complaints": [{"name", "text"}]}."""
  rows = file.phase("rl")
  complaints = [dataclasses.asdict(c) for c in doctor.examine(rows, look)]
  return {"rollouts": len(rows), "complaints": complaints}


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.doctor",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", nargs="+", help="of a run")
  parser.add_argument(
    "--look", type=_positive, default=doctor.LOOK, help="rollouts that have to agree"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
  return value


if __name__ == "__main__":
  main(sys.argv[1:])
