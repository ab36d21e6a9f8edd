"""R1-Zero: pre-train a small base, then improve it by GRPO with a rule-based reward.

  python -m experiments.r1_zero
  python -m experiments.r1_zero --config.grpo.group_size=8 --workdir=runs/g8
  python -m experiments.r1_zero --config=experiments/configs/r1_zero.py:puzzle
  python -m experiments.r1_zero --config.data.problems=FILE.jsonl
  python -m experiments.r1_zero --config.seeds=5       # five runs and a table

The same command again continues a run that was stopped. Exit codes: 0 done, 2 a mistake
in the command, a config or a file, 130 stopped by Ctrl-C, 1 anything else.
"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402

from ml_collections import ConfigDict  # noqa: E402

from experiments import command  # noqa: E402
from experiments.configs.r1_zero import get_config  # noqa: E402

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1_zero.py"


def main(config: ConfigDict, workdir: str) -> None:
  from r1jax import loop, settings

  # A changed config gets a folder of its own.
  preset = get_config(config.preset)
  changed = settings.differences(settings.plain(preset), settings.plain(config))
  kind = settings.sha256(config)[:8] if any("seed:" not in c for c in changed) else ""
  name = "-".join(filter(None, ["r1_zero", config.preset, kind]))
  if config.seeds > 1:
    folder = pathlib.Path(workdir or f"runs/{name}-seeds").resolve()
    command.over_seeds("experiments.r1_zero", config, folder)
    return
  from r1jax.progress import Clock

  command.use_compilation_cache(config.compilation_cache)
  folder = pathlib.Path(workdir or f"runs/{name}-seed{config.seed}").resolve()
  loop.run(config, folder, Clock(STARTED))


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
