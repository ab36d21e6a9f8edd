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
from r1jax.data import notions, preferences, traces
from r1jax.errors import UserError
from r1jax.evals.report_card import ROWS
from r1jax.metrics import write_json
from r1jax.pipeline import (
  distill,
  preference_models,
  scoreboard,
)
from r1jax.pipeline.checks import check
from r1jax.pipeline.project import Project, load_weights
from r1jax.pipeline.wiring import graph
from r1jax.rewards.rules import file_digests
from r1jax.run import make_folder


@contextlib.contextmanager
def opened(
  config: ConfigDict, source: str, needs: Sequence[str], workdir: pathlib.Path
) -> Iterator[tuple[Project, dict]]:
  """The Project of a pipeline's workdir, and the digests of what its stages left.

  Args:
    config: as the pipeline's, where it speaks of these stages.
    source: the pipeline's workdir.
    needs: stages that have to be done there.
    workdir: of the result.

  Raises:
    UserError: no pipeline there, a stage that is not done or of another config, or a
      folder with a finished result.
  """
  check(config)
  if not source:
    raise UserError("--from=DIR is needed: the workdir of python -m experiments.r1.")
  if (workdir / "summary.json").exists():
    raise UserError(
      f"--workdir={workdir} holds a finished result; nothing was overwritten. Choose"
      " another one."
    )
  mesh, console = sharding.make_mesh(**config.mesh), rich.console.Console()
  project = Project(config, pathlib.Path(source).resolve(), mesh, console)
  found = graph(project).status(project.workdir)
  for stage in ("world", *needs):
    if found[stage].state != "done":
      raise UserError(
        f"--from={source}: the stage {stage!r} there is {found[stage]}. Run it: python"
        f" -m experiments.r1 --workdir={source} --stage={stage}; or give the --config"
        " values that it was made with."
      )
  with jax.set_mesh(mesh):
    yield project, {stage: found[stage].digest for stage in needs}


def claim(workdir: pathlib.Path, begun: dict) -> None:
  """Makes the folder of a result, or goes on in it.

  Args:
    workdir: the folder.
    begun: what a call is begun with; it goes on only with the same.

  Raises:
    UserError: a folder of another call, or one that cannot be written.
  """
  mark = workdir / "begun.json"
  if mark.exists():
    other = settings.differences(json.loads(mark.read_text()), begun)
    if other:
      raise UserError(
        f"--workdir={workdir} was begun otherwise ({'; '.join(other)}); nothing was"
        " overwritten. Choose another one, or call it as it was begun."
      )
  make_folder(workdir)
  write_json(mark, begun)


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
  with opened(config, source, needs, workdir) as (project, made):
    name = "pairs" if kind == "helpful" else "labels"
    own = project.workdir / "judging"
    files = {
      "train": pathlib.Path(train or own / f"train_{name}.jsonl"),
      "held_out": pathlib.Path(held_out or own / f"held_out_{name}.jsonl"),
    }
    read = pairs_of if kind == "helpful" else preferences.read_safety
    data = {side: read(path) for side, path in files.items()}
    policy = project.policy()
    start = load_weights(project.workdir / "sft_3", policy, project.mesh)
    section = settings.plain(config)["reward_models"]
    named = file_digests(train, held_out)
    claim(workdir, {"kind": kind, "reward_models": section, "made": made, **named})
    with project.run(workdir, {}) as this:
      figures = preference_models.train(
        project, this, start, data, kind, config.reward_models, workdir
      )
    figures = {"kind": kind, name: len(data["train"]), **figures}
    write_json(workdir / "summary.json", figures)
    table = rich.table.Table(f"{kind} reward model", "held out")
    for key, value in figures.items():
      if isinstance(value, int | float):
        table.add_row(key, f"{value:.4g}")
    project.console.print(table)
    project.console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)


def pairs_of(path: pathlib.Path) -> list[preferences.Preference]:
  """A file's pairs, whose summaries differ.

  Raises:
    UserError: as preferences.read_preferences; or a pair that is none to a model that
      reads summaries.
  """
  pairs, _ = preferences.read_preferences(path)
  same = [
    pair
    for pair in pairs
    if notions.summary_of(pair.chosen) == notions.summary_of(pair.rejected)
  ]
  if same:
    raise UserError(
      f"{path}: {len(same)} of {len(pairs)} pairs have the same summary, the first"
      f" {same[0].chosen[:60]!r} and {same[0].rejected[:60]!r}. The helpful model reads"
      " what follows </think> and nothing else: write '<think></think>' before replies"
      " without thinking, and take equal ones out."
    )
  return pairs


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
  needs = ["student_base"] if not student_from else []
  needs += [] if file else ["rejection"]
  needs += [] if config.distill.mode == "sft" else ["rl_2"]
  with opened(config, source, needs, workdir) as (project, made):
    teacher = project.workdir
    base = pathlib.Path(student_from).resolve() if student_from else teacher
    distill.same_tokenizer(base / "world", teacher / "world")
    weights = base / "student_base" / "weights.json"
    if not weights.exists():
      raise UserError(f"--student={base} has no finished stage 'student_base'.")
    data = pathlib.Path(file or teacher / "rejection" / "traces.jsonl")
    traces.read(data)
    plain = settings.plain(config)
    begun = {k: plain[k] for k in ("student", "distill", "report", "prompts")}
    claim(workdir, {"made": made, **begun, **file_digests(file, str(weights))})
    figures = distill.run(
      project,
      workdir,
      student=base / "student_base",
      teacher=teacher / "rl_2",
      data=data,
    )
    cards = {}
    for name, folder in (("before", base / "student_base"), ("after", workdir)):
      with project.run(workdir, {}, model=config.student.model) as this:
        weights = load_weights(folder, this.policy, project.mesh)
        cards[name] = scoreboard.card_of(
          project, this, weights, workdir / name, model=config.student.model
        )
    table = rich.table.Table("percent", *cards)
    for row in ROWS:
      table.add_row(row, *(f"{100 * card.mean(row):.1f}" for card in cards.values()))
    project.console.print(table)
    means = {n: {row: card.mean(row) for row in ROWS} for n, card in cards.items()}
    write_json(
      workdir / "summary.json", {"mode": config.distill.mode, **figures, **means}
    )
    project.console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)
