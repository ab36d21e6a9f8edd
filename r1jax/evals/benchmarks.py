"""What is asked in an evaluation, how often, and in which words."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from r1jax.data import gym, sources
from r1jax.data import world as worlds
from r1jax.data.problem import Problem
from r1jax.errors import UserError

STEPS = "Please reason step by step, and put "
BOX = STEPS + "your final answer within \\boxed{}."
LETTER = STEPS + "the letter of your choice within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A source of problems, and how R1 is evaluated on it (supplement D.1)."""

  samples: int  # of each problem
  instruction: str = ""  # after a problem, for a model that was not trained on ours
  note: str = ""  # where `samples` is not the paper's


# Samples are the paper's where it says them: 64 for AIME and GPQA, 16 for MATH, 8 for
# LiveCodeBench.
BENCHMARKS = {
  "aime": Benchmark(64, BOX),
  "math500": Benchmark(16, BOX),
  "gpqa": Benchmark(64, LETTER),
  "livecodebench": Benchmark(8),
  "gsm8k": Benchmark(4, BOX, "ours: the paper does not evaluate on it"),
  "humaneval": Benchmark(8, "", "ours: the paper does not evaluate on it"),
  "ifeval": Benchmark(1, "", "ours: the paper does not say"),
  "jsonl": Benchmark(16, BOX, "ours: a file of yours"),
}
GENERATED = Benchmark(16, BOX, "ours: generated problems")


def of_file(name: str, path: str) -> list[Problem]:
  """A benchmark's problems.

  Raises:
    UserError: no such benchmark, or a file of another form.
  """
  if name not in BENCHMARKS:
    raise UserError(
      f"--benchmark={name!r} is not one of {', '.join(BENCHMARKS)}. A file of your own"
      " is jsonl."
    )
  return sources.read(name, path, key="--file")


def generated(task: str, count: int, seed: int, config: ConfigDict) -> list[Problem]:
  """Problems of one of our tasks, of those that are held out; or of reasoning-gym.

  Args:
    task: a name in world.TASKS, or `gym:NAME`.
    count: how many, at most.
    seed: of reasoning-gym's.
    config: has the difficulty of our tasks, and how many are generated of each.

  Raises:
    UserError: no such task, or reasoning-gym is not installed.
  """
  library, _, name = task.rpartition(":")
  if library == "gym":
    return gym.generate(name, count, seed=seed, options={})
  if library:
    raise UserError(f"--task={task!r} is neither a task of ours nor gym:NAME.")
  c = config.copy_and_resolve_references().unlock()
  c.task, c.data.problems = task, ""
  return held_out(c)[:count]


def held_out(config: ConfigDict) -> list[Problem]:
  """What a run of this config keeps for evaluation, all of it."""
  return worlds.of_config(config).held_out


def folder_name(parts: list[str]) -> pathlib.Path:
  """Where an evaluation is kept, under the folder of what is evaluated."""
  return pathlib.Path("evals") / "-".join(filter(None, parts))
