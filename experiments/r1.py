"""R1: all stages, from a base to a distilled student, as one resumable run.

  python -m experiments.r1
  python -m experiments.r1 --workdir=runs/my_r1 --status
  python -m experiments.r1 --stage=rejection           # that stage alone
  python -m experiments.r1 --rerun                     # what became stale, too
  python -m experiments.r1 --config.seeds=3            # three runs and a table

The same command again continues a run that was stopped. Exit codes: 0 done, 2 a mistake
in the command, a config or a file, 42 stopped by SIGTERM, 130 by Ctrl-C, 1 anything
else.
"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from experiments import command  # noqa: E402
from experiments.configs.r1 import get_config  # noqa: E402

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1.py"
flags.DEFINE_string("stage", "", "run this stage alone")
flags.DEFINE_bool("rerun", False, "run stale stages again; the old ones move to old/")
flags.DEFINE_bool("status", False, "say how every stage stands, and run nothing")


def main(config: ConfigDict, workdir: str) -> None:
  from r1jax.pipeline import run

  path = command.folder_of("r1", get_config, config, workdir)
  if config.seeds > 1:
    command.one_process(f"config.seeds={config.seeds}", "Start a run for every seed.")
    folders = command.over_seeds("experiments.r1", config, path)
    if not (flags.FLAGS.status or flags.FLAGS.stage):
      run.show_seeds(folders, path)
    return
  command.use_compilation_cache(config.compilation_cache)
  command.start_alone("experiments.r1")
  flag = flags.FLAGS
  run.run(config, path, stage=flag.stage, rerun=flag.rerun, status=flag.status)


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
