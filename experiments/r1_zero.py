"""R1-Zero: pre-train a small base, then improve it by GRPO with a rule-based reward.

  python -m experiments.r1_zero
  python -m experiments.r1_zero --config=experiments/configs/r1_zero.py:tiny \\
      --config.grpo.group_size=8 --workdir=runs/g8
  python -m experiments.r1_zero --config.seeds=5       # five runs and a table

The same command again continues a run that was stopped. Exit codes: 0 done, 2 a mistake
in the command, a config or a file, 1 anything else.
"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from experiments import command  # noqa: E402

HERE = pathlib.Path(__file__).parent
config_flags.DEFINE_config_file(
  "config", f"{HERE}/configs/r1_zero.py:tiny", "FILE.py:preset", lock_config=True
)
flags.DEFINE_string(
  "workdir", "", "the run's folder; default: runs/r1_zero-<preset>-<task>-seed<seed>"
)


def main() -> None:
  config = flags.FLAGS.config
  name = f"r1_zero-{config.preset}-{config.task}-seed{config.seed}"
  workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{name}").resolve()
  if config.seeds > 1:
    command.over_seeds("experiments.r1_zero", config, workdir)
    return
  from r1jax import loop
  from r1jax.progress import Clock

  command.use_compilation_cache(config.compilation_cache)
  loop.run(config, workdir, Clock(STARTED))


if __name__ == "__main__":
  command.run(main)
