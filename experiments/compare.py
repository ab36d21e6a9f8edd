"""A few runs of the miniature beside each other: for notebooks.

  runs = compare.run("clip_ratio", {"0.2": {"objective.clip_high": 0.2}, "10": {}})

They lie in runs/notebooks, a folder a config: what has ended is not run again, and a
number that a reader changes makes a run of its own. With R1JAX_SMALL=1 every run takes
seconds, and means nothing. What is seen of them: experiments/curves.py.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib

from experiments import arms
from experiments.arms import Arm
from experiments.claim_arms import QUICK
from experiments.claim_table import Arms
from r1jax import config_checks, settings
from r1jax.errors import UserError

ROOT = pathlib.Path("runs/notebooks")
# What notebooks change of every run: a few of them fit into minutes.
SIZES = {"pretrain.steps": 800, "steps": 60, "checkpoint_every": 60}
SIZES |= {"eval.every": 10, "eval.samples": 8, "grpo.traced_groups": 0}
TEST = {
  **{"model.preset": "tiny_dense", "model.width": 32, "model.layers": 1},
  **{"pretrain.steps": 9, "pretrain.rows": 8, "pretrain.micro_batches": 2},
  **{"grpo.group_size": 4, "grpo.minibatches": 2, "grpo.micro_batches": 2},
  **{"prompts": 4, "steps": 8},
  **{"eval.problems": 8, "eval.samples": 4, "eval.every": 4, "checkpoint_every": 4},
  **{"grpo.reference_refresh": 4, "counts.pretrain": 400, "counts.train": 200},
}
SMALL = {"r1_zero": TEST, "ppo": TEST, "r1": QUICK["r1"]}


@dataclasses.dataclass(frozen=True)
class Runs:
  """Runs that have ended."""

  name: str  # of the notebook
  names: dict[str, str]  # label -> the arm's name
  read: Arms

  def curve(self, label: str, figure: str) -> tuple[list[int], list[float]]:
    """(updates, values) of a figure: of evaluations if they have it, else of rollouts.
    Empty where the run has no such figure."""
    rows = self.read.rows(self.names[label])
    for phase in ("eval", "rl"):
      found = [r for r in rows if r["phase"] == phase and r.get(figure) is not None]
      if found:
        return [r["step"] for r in found], [r[figure] for r in found]
    return [], []

  def curves(self, figure: str) -> dict[str, tuple[list[int], list[float]]]:
    """label -> its curve. Raises UserError: no run has such a figure."""
    found = {label: self.curve(label, figure) for label in self.names}
    if not any(values for _, values in found.values()):
      rows = self.read.rows(next(iter(self.names.values())))
      known = sorted({k for r in rows if r["phase"] in ("eval", "rl") for k in r})
      raise UserError(f"no run has the figure {figure!r}; one of {', '.join(known)}.")
    return found


def small() -> bool:
  """Whether runs are to be as small as tests want them."""
  return os.environ.get("R1JAX_SMALL", "") not in ("", "0")


def arm(changes: Mapping, module: str = "r1_zero", sizes: Mapping = SIZES) -> Arm:
  """`experiments.MODULE`'s preset at these sizes, with changes.

  Raises:
    UserError: no such module, no such key, or values that no run takes.
  """
  if module not in SMALL:
    raise UserError(f"module={module!r} is not one of {', '.join(SMALL)}.")
  made = Arm(module, {**sizes, **(SMALL[module] if small() else {}), **changes})
  config = made.config(0)
  if module != "r1":
    config_checks.check(config, 1)
  return made


def named(name: str, label: str, made: Arm, seed: int) -> str:
  """An arm's name: another one for another config."""
  return f"{name}/{label}-{settings.sha256(made.config(seed))[:8]}"


def run(
  name: str,
  changes: Mapping[str, Mapping | Arm],
  *,
  sizes: Mapping = SIZES,
  seed: int = 0,
) -> Runs:
  """Runs what has not ended: each in a process on a core, a base trained once.

  Args:
    name: of the notebook, and of its folder.
    changes: label -> what that run changes, or an arm.
    sizes: what all of them change, but for arms.
    seed: of the base, the problems' order and the samples.

  Raises:
    UserError: a config that no run takes, before anything begins; or runs that failed.
  """
  made = {
    label: of if isinstance(of, Arm) else arm(of, sizes=sizes)
    for label, of in changes.items()
  }
  names = {label: named(name, label, of, seed) for label, of in made.items()}
  by_name = {names[label]: of for label, of in made.items()}
  print(f"{len(made)} runs; each writes a .log in {ROOT / name}.")
  if failed := arms.run(ROOT, by_name, [(n, seed) for n in by_name]):
    raise UserError(
      f"{len(failed)} of {len(made)} runs failed: {'; '.join(failed)}. The log says"
      " why; the same cell again runs what is left."
    )
  return Runs(name, names, Arms(ROOT, seed))
