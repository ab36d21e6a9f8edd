"""A pipeline from its config: checks, mesh, graph, and the result."""

import pathlib

import jax
from ml_collections import ConfigDict
import rich.console

from r1jax import attempts, lock, preemption, sharding
from r1jax.pipeline import display, scoreboard
from r1jax.pipeline.checks import check
from r1jax.pipeline.project import Project
from r1jax.pipeline.wiring import graph
from r1jax.run import make_folder


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  stage: str = "",
  rerun: bool = False,
  status: bool = False,
) -> None:
  """Runs the stages that are not done, or one of them."""
  check(config)
  console = rich.console.Console()
  project = Project(config, workdir, sharding.make_mesh(**config.mesh), console)
  stages = graph(project)
  if status:
    console.print(stages.table(workdir))
    return
  make_folder(workdir)

  def say(text: str) -> None:
    console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)

  with (
    lock.held(workdir),
    attempts.counted(workdir),
    jax.set_mesh(project.mesh),
    preemption.listened(say),
  ):
    stages.run(workdir, only=stage or None, rerun=rerun, say=say)
  found = stages.status(workdir)
  if not stage and found["report"].state == "done":
    display.show_file(console, workdir / "report" / "report.json")
    spent = sum(s.seconds for s in found.values())
    say(
      f"{spent / 60:.1f} minutes in the calls that finished the stages; the table:"
      f" {workdir}/report"
    )


def show_seeds(folders: list[pathlib.Path], workdir: pathlib.Path) -> None:
  """One table of several seeds' reports, with intervals over seeds."""
  console = rich.console.Console()
  figures = scoreboard.over_seeds([f / "report" / "report.json" for f in folders])
  text = display.markdown(figures)
  (workdir / "seeds.md").write_text(text, encoding="utf-8")
  display.plot(workdir / "seeds.png", figures, f"R1 in miniature, {len(folders)} seeds")
  display.show(console, figures)
