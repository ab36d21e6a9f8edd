"""One stage beside a pipeline: a reward model on your own data, a student on your own
traces. Both begin with what a pipeline has left in its workdir."""

from collections.abc import Iterator, Sequence
import contextlib
import json
import pathlib

import jax
from ml_collections import ConfigDict
import rich.console
import rich.table

from r1jax import settings, sharding
from r1jax.data import preferences
from r1jax.errors import UserError
from r1jax.evals.report_card import ROWS, Card
from r1jax.metrics import write_json
from r1jax.pipeline import (
  distill,
  hooks,
  preference_models,
  scoreboard,
)
from r1jax.pipeline.checks import check
from r1jax.pipeline.graph import MANIFEST
from r1jax.pipeline.project import Project, Weights, load_weights
from r1jax.pipeline.sampling import Decoding, sample
from r1jax.run import Run


@contextlib.contextmanager
def opened(
  config: ConfigDict,
  source: str,
  workdir: pathlib.Path,
  needs: Sequence[str],
  begun: dict,
) -> Iterator[Project]:
  """The Project of a pipeline's workdir, with a folder of its own for the result.

  Args:
    config: as the pipeline's, where it speaks of the world.
    source: the pipeline's workdir.
    workdir: of the result.
    needs: stages that have to be done there.
    begun: what a call is begun with; a folder goes on only with the same.

  Raises:
    UserError: no pipeline there, one of another config, a stage that is not done, or a
      folder of another call or with a finished result.
  """
  check(config)
  if not source:
    raise UserError("--from=DIR is needed: the workdir of python -m experiments.r1.")
  folder = pathlib.Path(source).resolve()
  for stage in ("world", *needs):
    if not (folder / stage / MANIFEST).exists():
      raise UserError(
        f"--from={source} has no finished stage {stage!r}. Run it: python -m"
        f" experiments.r1 --workdir={source} --stage={stage}"
      )
  then = json.loads((folder / "world" / MANIFEST).read_text())["config"]
  changes = settings.differences(then, {k: settings.plain(config)[k] for k in then})
  if changes:
    raise UserError(
      f"--from={source} is a pipeline of another config ({'; '.join(changes)}). Give"
      " the same --config values as there."
    )
  if (workdir / "summary.json").exists():
    raise UserError(
      f"--workdir={workdir} holds a finished result; nothing was overwritten. Choose"
      " another one."
    )
  mark, begun = workdir / "begun.json", {"from": str(folder), **begun}
  if mark.exists():
    other = settings.differences(json.loads(mark.read_text()), begun)
    if other:
      raise UserError(
        f"--workdir={workdir} was begun otherwise ({'; '.join(other)}); nothing was"
        " overwritten. Choose another one, or call it as it was begun."
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(mark, begun)
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}). Choose another one."
    ) from error
  mesh, console = sharding.make_mesh(config.mesh), rich.console.Console()
  with jax.set_mesh(mesh):
    yield Project(config, folder, mesh, console)


def reward_model(
  config: ConfigDict,
  source: str,
  workdir: pathlib.Path,
  *,
  kind: str,
  train: str,
  held_out: str,
) -> None:
  """Trains a reward model on a user's file, or on the pipeline's data.

  Args:
    config: with a section `reward_models`.
    source: the pipeline's workdir.
    workdir: of the result.
    kind: `helpful` or `safety`.
    train, held_out: files of preferences.py's rows; "": the pipeline's own.
  """
  if kind not in preference_models.VIEW:
    raise UserError(f"--kind={kind!r} is neither 'helpful' nor 'safety'.")
  if bool(train) != bool(held_out):
    raise UserError("--train and --held_out: give both files, or none.")
  needs = ("sft_3",) if train else ("sft_3", "judging")
  begun = {
    "kind": kind,
    "reward_models": settings.plain(config)["reward_models"],
    **hooks.contents(train, held_out),
  }
  with opened(config, source, workdir, needs, begun) as project:
    name = "pairs" if kind == "helpful" else "labels"
    own = project.workdir / "judging"
    files = {
      "train": train or own / f"train_{name}.jsonl",
      "held_out": held_out or own / f"held_out_{name}.jsonl",
    }
    data = {}
    for side, path in files.items():
      if kind == "helpful":
        data[side], counts = preferences.read_preferences(path)
        if not data[side]:
          raise UserError(
            f"{path}: no pair is left that the judge is sure of: {counts}."
          )
      else:
        data[side] = preferences.read_safety(path)
    policy = project.policy()
    start = load_weights(project.workdir / "sft_3", policy, project.mesh)
    with project.run(workdir, {}) as this:
      figures = preference_models.train(
        project, this, start, data, kind, config.reward_models, workdir
      )
    rows = {
      "kind": kind,
      "pairs" if kind == "helpful" else "labels": len(data["train"]),
    }
    figures = {**rows, **figures}
    write_json(workdir / "summary.json", figures)
    table = rich.table.Table(f"{kind} reward model", "held out")
    for key, value in figures.items():
      if isinstance(value, int | float):
        table.add_row(key, f"{value:.4g}")
    project.console.print(table)
    project.console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)


def student(
  config: ConfigDict,
  source: str,
  workdir: pathlib.Path,
  *,
  student_from: str,
  file: str,
) -> None:
  """Distils a pipeline's R1 into a student.

  Args:
    config: with the sections `student` and `distill`.
    source: the teacher's pipeline.
    workdir: of the result.
    student_from: the pipeline whose student_base begins; "": the teacher's.
    file: traces; "": those of the teacher's rejection sampling.
  """
  distill.check_mode(config.distill.mode)
  needs = ["student_base"] if not student_from else []
  needs += [] if file else ["rejection"]
  needs += [] if config.distill.mode == "sft" else ["rl_2"]
  begun = {
    "student": str(pathlib.Path(student_from).resolve()) if student_from else "",
    **{k: settings.plain(config)[k] for k in ("student", "distill", "report")},
    **hooks.contents(file),
  }
  with opened(config, source, workdir, needs, begun) as project:
    teacher = project.workdir
    base = pathlib.Path(student_from).resolve() if student_from else teacher
    distill.same_tokenizer(base / "world", teacher / "world")
    if not (base / "student_base" / MANIFEST).exists():
      raise UserError(f"--student={base} has no finished stage 'student_base'.")
    figures = distill.run(
      project,
      workdir,
      student=base / "student_base",
      teacher=teacher / "rl_2",
      data=pathlib.Path(file or teacher / "rejection" / "traces.jsonl"),
    )
    cards = {}
    for name, folder in (("before", base / "student_base"), ("after", workdir)):
      with project.run(workdir, {}, model=config.student.model) as this:
        weights = load_weights(folder, this.policy, project.mesh)
        cards[name] = card_of(project, this, weights, workdir / f"{name}.jsonl")
    table = rich.table.Table("percent", *cards)
    for row in ROWS:
      table.add_row(row, *(f"{100 * card.mean(row):.1f}" for card in cards.values()))
    project.console.print(table)
    means = {n: {row: card.mean(row) for row in ROWS} for n, card in cards.items()}
    write_json(
      workdir / "summary.json", {"mode": config.distill.mode, **figures, **means}
    )
    project.console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)


def card_of(project: Project, this: Run, weights: Weights, path: pathlib.Path) -> Card:
  """A student's row of the table."""
  r, prompts = project.config.report, scoreboard.sets_of(project)
  every = [p for rows in prompts.values() for p in rows]
  said = sample(
    project,
    this,
    weights,
    every,
    path,
    samples=r.samples,
    decoding=Decoding(r.temperature, r.top_p),
    model=project.config.student.model,
  )
  return scoreboard.card_of(prompts, said.texts)
