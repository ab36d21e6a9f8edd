"""A run, or R1's stages, in the process of a notebook, to be gone through room by room.
Sizes and folders as in experiments/compare.py."""

from collections.abc import Mapping, Sequence
import types

import jax
from ml_collections import ConfigDict
import rich.console

from experiments import command, compare
from r1jax import run, sharding
from r1jax.evals.report_card import Card
from r1jax.pipeline import scoreboard
from r1jax.pipeline.checks import check
from r1jax.pipeline.project import Project
from r1jax.pipeline.stages import Stages
from r1jax.progress import Clock, Progress

NOTHING = types.MappingProxyType({})


def open_run(
  name: str,
  changes: Mapping = NOTHING,
  *,
  sizes: Mapping = compare.SIZES,
  seed: int = 0,
) -> run.Run:
  """A run of R1-Zero before its first step: problems, tokenizer, an untrained policy.

  Args:
    name: of the notebook.
    changes: of the tiny preset.
    sizes: what takes the time; others with R1JAX_SMALL=1.
    seed: of the run.

  Raises:
    UserError: as `compare.arm`.
  """
  arm = compare.arm(changes, sizes=sizes)
  config = arm.config(seed)
  folder = (compare.ROOT / compare.named(name, "by_hand", arm, seed)).resolve()
  run.make_folder(folder)
  mesh = _begin(config)
  progress = Progress(rich.console.Console())
  return run.prepare(config, folder, mesh, Clock(), progress)


def open_pipeline(
  name: str,
  changes: Mapping = NOTHING,
  *,
  sizes: Mapping = NOTHING,
  seed: int = 0,
) -> Project:
  """R1's stages before the first. Args and errors: as `open_run`, of the tiny preset of
  `experiments.r1`."""
  arm = compare.arm(changes, "r1", sizes)
  config = arm.config(seed).lock()
  check(config)
  folder = (compare.ROOT / compare.named(name, "r1", arm, seed)).resolve()
  run.make_folder(folder)
  return Project(config, folder, _begin(config), rich.console.Console())


def _begin(config: ConfigDict) -> jax.sharding.Mesh:
  """The config's mesh, from now on that of the process."""
  command.use_compilation_cache(config.compilation_cache)
  mesh = sharding.make_mesh(**config.mesh)
  jax.set_mesh(mesh)
  return mesh


def cards(project: Project, columns: Sequence[str]) -> dict[str, Card]:
  """The columns of R1's table (scoreboard.COLUMNS) whose stages are done: what their
  policies say to held-out prompts.

  Raises:
    UserError: a stage has left no weights.
  """
  found, stages = {}, Stages(project)
  for column in columns:
    stage, is_student = (scoreboard.COLUMNS | scoreboard.ABLATIONS)[column]
    model = project.config.student.model if is_student else None
    folder = project.workdir / "cards"
    folder.mkdir(exist_ok=True)
    with project.run(folder, {}, model=model) as this:
      weights = stages.weights(project.workdir / stage, model)
      found[column] = scoreboard.card_of(
        project, this, weights, folder / stage, model=model
      )
  return found
