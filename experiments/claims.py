"""The paper's claims in miniature: each an experiment over seeds, with a verdict.

  python -m experiments.claims                         # all twelve, a night's work
  python -m experiments.claims --claim=8 --claim=9     # some of them
  python -m experiments.claims --status                # what has been run
  python -m experiments.claims --quick                 # minutes, to see that it works

Runs lie in --workdir, a folder an arm and seed: what has ended is not run again, what
was stopped goes on, and arms that begin with the same base share it. Each core has a
run of its own; an accelerator is not used unless JAX_PLATFORMS names it. Verdicts:
shown, where the 95 % interval over seeds is above what the claim says; opposite, where
it is below; else not shown. --write puts the table and the figure into docs/. Exit
codes: 0 done, 1 a run failed, 2 a mistake in the command, 42 stopped by SIGTERM, 130 by
Ctrl-C: the runs under way are stopped with it.
"""

import argparse
from collections.abc import Mapping, Sequence
import datetime
import json
import math
import os
import pathlib
import sys
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.console
import rich.table

from experiments import arms, claim_arms, claim_table, exits
from experiments.arms import Arm
from experiments.claim_table import CLAIMS, Arms, Claim, Found
from r1jax import events
from r1jax.errors import UserError

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- claims: begin -->\n", "<!-- claims: end -->\n"


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words("the same command goes on"):
    failed = claims(options)
  if failed:
    print("failed:\n  " + "\n  ".join(failed), file=sys.stderr)
    sys.exit(1)


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.claims",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--claim", type=int, action="append", help="1 to 12; again for several")
  add("--seeds", type=int, default=0, help="0: five, and three of whole pipelines")
  add("--quick", action="store_true", help="tiny sizes and two seeds")
  add("--jobs", type=int, default=0, help="runs at a time; 0: one a core, the most")
  add("--workdir", default="", help="default: runs/claims, or runs/claims-quick")
  add("--status", action="store_true", help="say what has been run, and run nothing")
  add("--write", action="store_true", help="the table and the figure into docs/")
  add("--json", action="store_true", help="print the effects as JSON in the last line")
  return parser


def claims(options: argparse.Namespace) -> list[str]:
  """Runs, prints the table and leaves it in the workdir. Returns what failed.

  Raises:
    UserError: no such claim, too few seeds, or a part or quick figures for the docs.
  """
  o, console = options, rich.console.Console()
  asked = [claim for claim in CLAIMS if not o.claim or claim.number in o.claim]
  check(o, asked)
  root = pathlib.Path(o.workdir or ("runs/claims-quick" if o.quick else "runs/claims"))
  seeds = {claim: o.seeds or (2 if o.quick else claim.seeds) for claim in asked}
  wanted = [
    (arm, seed)
    for seed in range(max(seeds.values()))
    for arm in claim_arms.ARMS
    if any(arm in claim.arms and seed < n for claim, n in seeds.items())
  ]
  wanted.sort(key=lambda run: run[0] != "r1")  # the longest first
  made, failed = claim_arms.arms(o.quick), []
  if not o.status:
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    environ = {"R1JAX_XLA_FLAGS": "quick"} if o.quick else {}
    failed = arms.run(root, made, wanted, jobs=o.jobs, environ=environ, say=say)
  effects = measured(root, made, seeds)
  if effects:
    console.print(table(effects))
  done = sum(arms.ended(root, name, made[name], seed) for name, seed in wanted)
  console.print(f"{done} of {len(wanted)} runs have ended, in {root}.", highlight=False)
  if o.quick:
    console.print("--quick trains too little for verdicts that mean anything.")
  told = [effect._asdict() | {"verdict": effect.verdict} for effect in effects]
  if effects and not o.status:
    (root / "claims.json").write_text(json.dumps(told, indent=2))
    (root / "claims.md").write_text(markdown(effects))
    plot(root / "claims.png", effects)
    if o.write and done == len(wanted):
      write(effects, seconds_of(root, wanted))
    elif o.write:
      console.print("Not written into docs/: runs are missing.")
  if o.json:
    print(json.dumps(told))
  return failed


def check(o: argparse.Namespace, asked: Sequence[Claim]) -> None:
  unknown = sorted(set(o.claim or ()) - {claim.number for claim in CLAIMS})
  if unknown:
    raise UserError(f"--claim={unknown[0]} is not one of 1 to {len(CLAIMS)}.")
  if o.seeds == 1 or o.seeds < 0:
    raise UserError(
      f"--seeds={o.seeds}: an interval over seeds needs two or more; 0 is the table's"
      " number."
    )
  if o.jobs < 0:
    raise UserError(f"--jobs={o.jobs} must not be negative; 0 is one a core.")
  if o.write and (o.quick or o.status or o.seeds or len(asked) < len(CLAIMS)):
    raise UserError(
      "--write takes the full table: without --quick, --claim, --seeds and --status."
    )


def measured(
  root: pathlib.Path, made: Mapping[str, Arm], seeds: Mapping[Claim, int]
) -> list[Found]:
  """The effects of the claims of which two seeds or more have ended.

  Args:
    root: of the runs.
    made: arms by name.
    seeds: of each claim, how many.
  """
  effects = []
  for claim, n in seeds.items():
    done = [
      Arms(root, seed)
      for seed in range(n)
      if all(arms.ended(root, arm, made[arm], seed) for arm in claim.arms)
    ]
    for effect in claim.effects:
      values = [effect.measure(seed) for seed in done]
      values = [x for x in values if math.isfinite(x)]
      if len(values) > 1:
        effects.append(claim_table.found(claim, effect, values))
  return effects


def table(effects: Sequence[Found]) -> rich.table.Table:
  heads = ("", "claim", "measured", "effect (95 % over seeds)", "seeds", "")
  shown = rich.table.Table(*heads)
  says = {claim.number: claim.says for claim in CLAIMS}
  last = 0
  for e in effects:
    head = (str(e.claim), says[e.claim]) if e.claim != last else ("", "")
    last = e.claim
    shown.add_row(*head, e.what, figures(e), str(len(e.seeds)), e.verdict)
  return shown


def figures(e: Found) -> str:
  size = max(abs(x) for x in (e.mean, e.low, e.high))
  digits = 1 if size >= 10 else 3 if size < 1 else 2
  return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def markdown(effects: Sequence[Found]) -> str:
  says = {claim.number: claim.says for claim in CLAIMS}
  lines = [
    "| | the paper says | measured | effect, 95 % over seeds | seeds | |",
    "|---|---|---|---|---|---|",
  ]
  last = 0
  for e in effects:
    head = (str(e.claim), says[e.claim]) if e.claim != last else ("", "")
    last = e.claim
    cells = [*head, e.what, figures(e), str(len(e.seeds)), e.verdict]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, effects: Sequence[Found]) -> None:
  """A panel an effect: its seeds, mean and interval; the line it should be above."""
  columns = 4
  rows = -(-len(effects) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(13, 1.7 * rows), squeeze=False)
  colours = {"shown": "C2", "not shown": "0.5", "opposite": "C3"}
  for axis, e in zip(axes.flat, effects, strict=False):
    axis.axvline(e.least, color="0.8", lw=1)
    axis.plot(e.seeds, [0.4] * len(e.seeds), "o", ms=4, color="0.6")
    colour = colours[e.verdict]
    axis.plot([e.low, e.high], [0, 0], color=colour, lw=2)
    axis.plot([e.mean], [0], "o", color=colour)
    axis.set_ylim(-0.6, 0.9)
    axis.set_yticks([])
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    title = textwrap.fill(f"{e.claim}. {e.what}: {e.verdict}", 46)
    axis.set_title(title, fontsize=7, color=colour)
  for axis in axes.flat[len(effects) :]:
    axis.axis("off")
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def seconds_of(root: pathlib.Path, wanted: Sequence[tuple[str, int]]) -> float:
  """Of all runs, each on its core; wall time, pauses included."""
  spent = 0.0
  for pair in wanted:
    for path in arms.folder_of(root, *pair).rglob("events.jsonl"):
      spent += sum(e["seconds"] for e in events.read(path) if e["name"] != "restart")
  return spent


def write(effects: Sequence[Found], of_runs: float) -> None:
  """Puts the table and the figure into docs/claims.md. Args: of_runs: their seconds."""
  path = DOCS / "claims.md"
  head, _, tail = path.read_text().partition(BEGIN)
  _, _, tail = tail.partition(END)
  date = datetime.date.today().isoformat()
  how = f"`python -m experiments.claims --write`, {date}, on {os.cpu_count()} cores:"
  how += f" {of_runs / 3600:.1f} hours of runs, each on a core."
  picture = "![each effect: seeds, mean, interval](claims.png)"
  text = f"{how}\n\n{markdown(effects)}\n{picture}\n"
  path.write_text(f"{head}{BEGIN}{text}{END}{tail}")
  plot(DOCS / "claims.png", effects)


if __name__ == "__main__":
  main(sys.argv[1:])
