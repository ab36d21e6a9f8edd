"""R1-Zero: pre-train a small base, then improve it by GRPO with a rule-based reward.

  python -m experiments.r1_zero
  python -m experiments.r1_zero --config.grpo.group_size=8 --workdir=runs/g8
  python -m experiments.r1_zero --config=experiments/configs/r1_zero.py:puzzle
  python -m experiments.r1_zero --config.data.problems=FILE.jsonl
  python -m experiments.r1_zero --config.seeds=5       # five runs and a table

The same command again continues a run that was stopped. Exit codes: 0 done, 2 a mistake
in the command, a config or a file, 3 a number that is not finite, 42 another process
cannot be reached (start again), 130 stopped by Ctrl-C, 1 anything else. On several
hosts: experiments/pods/README.md.
"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402

from ml_collections import ConfigDict  # noqa: E402

from experiments import command  # noqa: E402
from experiments.configs.r1_zero import get_config  # noqa: E402

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1_zero.py"


def main(config: ConfigDict, workdir: str) -> None:
  command.launch("r1_zero", get_config, config, workdir, STARTED)


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
