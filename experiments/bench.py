"""Benchmarks: each compares things in one run and prints a table.

  python -m experiments.bench algorithms            # every preset on one base
  python -m experiments.bench algorithms --presets=paper,dapo --seeds=1
  python -m experiments.bench algorithms --json     # the last line is one JSON object
  python -m experiments.bench algorithms --write    # and puts the table into the docs
  python -m experiments.bench rewards               # verdicts a second, on the host
  python -m experiments.bench kernels               # for a TPU or on a GPU
  python -m experiments.bench rollout               # against transformers, and itself
  python -m experiments.bench packing               # updates of packed outputs
  python -m experiments.bench scaling               # costs as sizes grow, and FLOPs
  python -m experiments.bench import                # a checkpoint: speed and memory
  python -m experiments.bench checkpoint            # what a save costs
  python -m experiments.bench smollm2               # GRPO and LoRA on a published model

A stopped benchmark of algorithms or of smollm2 goes on where it was. Exit codes: 0
done, 2 a mistake in the command, 42 stopped by SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
import json
import sys

from experiments import exits
from experiments.benches import (
  algorithms,
  checkpointing,
  importing,
  kernels,
  packing,
  rewards,
  rollout,
  scaling,
  smollm2,
)

BENCHES = {
  "algorithms": algorithms,
  "checkpoint": checkpointing,
  "kernels": kernels,
  "rewards": rewards,
  "import": importing,
  "packing": packing,
  "rollout": rollout,
  "scaling": scaling,
  "smollm2": smollm2,
}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.bench",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  benches = parser.add_subparsers(dest="bench", required=True)
  for name, bench in BENCHES.items():
    about = bench.__doc__.partition("\n")[0]
    child = benches.add_parser(name, help=about, description=about)
    bench.add_flags(child)
    child.add_argument(
      "--json", action="store_true", help="print the result as JSON in the last line"
    )
  options = parser.parse_args(argv)
  resumable = options.bench in ("algorithms", "smollm2")
  with exits.in_words("the same command goes on where it was" * resumable):
    result = BENCHES[options.bench].run(options)
  if options.json:
    print(json.dumps(result))


if __name__ == "__main__":
  main(sys.argv[1:])
