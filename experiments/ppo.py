"""PPO: the baseline of R1's appendix A.3, on the same base and rewards as r1_zero.

  python -m experiments.ppo
  python -m experiments.ppo --config.objective.lam=0.95
  python -m experiments.ppo --config.seeds=3

A value model of the policy's size, GAE, and the KL in the reward. The same command
again continues a run that was stopped. Exit codes as in experiments.r1_zero.
"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402

from ml_collections import ConfigDict  # noqa: E402

from experiments import command  # noqa: E402
from experiments.configs.ppo import get_config  # noqa: E402

CONFIG = pathlib.Path(__file__).parent / "configs" / "ppo.py"


def main(config: ConfigDict, workdir: str) -> None:
  command.launch("ppo", get_config, config, workdir, STARTED)


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
