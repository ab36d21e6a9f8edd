"""A graph of stages that can be stopped, continued, edited and run again.

A stage writes into `workdir/<name>/`. `begun.json`, the first file there, says with
which inputs and config it was begun; `manifest.json`, the last one, that it is done:

  missing   nothing is there
  partly    begun and not done: a killed run, which goes on in the same folder
  done      the manifest is there, and its inputs and config are the present ones
  stale     its inputs or config are others now, an input is not done, an artefact gone

An input is known by a digest of what lies in its artefacts now: an edited data set of a
done stage makes the stages stale that read it, not the stage itself; and a stage that
is run again with the same outcome makes none stale. Nothing is overwritten: a stage
that is run again has its old folder moved to `workdir/old/`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import itertools
import json
import pathlib
import re
import time

import rich.table
import rich.text

from r1jax import preemption
from r1jax.errors import UserError
from r1jax.metrics import write_json
from r1jax.pipeline.artefacts import contents, digest
from r1jax.settings import differences

BEGUN, MANIFEST, OLD = "begun.json", "manifest.json", "old"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the pipeline.

  `run(folder, inputs)` gets its own folder and {input: folder}, continues what a killed
  call left in its folder, and returns JSON-like figures. These are for people: only
  artefacts are in the digest, so what another stage reads has to be one.
  """

  name: str  # also its folder's
  inputs: tuple[str, ...]  # names of the stages whose artefacts it reads
  config: dict  # JSON-like: the part of the config that it depends on
  run: Callable[[pathlib.Path, dict[str, pathlib.Path]], dict]
  artefacts: tuple[str, ...]  # files and folders that it leaves, relative to its folder
  about: str = ""  # one line for tables
  # Keys of the config, with which a stopped stage may go on even if they change: it
  # begins with something that they have no say in.
  late: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Status:
  """How a stage stands in a workdir."""

  state: str  # "done", "stale", "partly" or "missing"
  reasons: tuple[str, ...] = ()  # why it is stale, or what is odd about it
  cause: str = ""  # of a stale one: `stage: reason`, where that began
  digest: str = ""  # of a done one's artefacts
  seconds: float | None = None  # of the call of `run` that finished it
  figures: dict | None = None  # what that call returned

  def __str__(self) -> str:
    why = self.cause or "; ".join(self.reasons)
    return self.state.replace("partly", "not finished") + (f" ({why})" if why else "")


class Graph:
  """Stages in an order in which each comes after its inputs."""

  def __init__(self, stages: Iterable[Stage]):
    """Raises ValueError: a name or path that cannot be, an unknown input, a cycle."""
    given, named = list(stages), {}
    for stage in given:
      if not re.fullmatch(r"[A-Za-z0-9_]+", stage.name) or stage.name == OLD:
        raise ValueError(f"{stage.name!r}: letters, digits and _, and not {OLD!r}.")
      if stage.name in named:
        raise ValueError(f"two stages are named {stage.name!r}.")
      for path in map(pathlib.PurePosixPath, stage.artefacts):
        own = not path.parts or path.parts[0] in (BEGUN, MANIFEST)
        if own or path.is_absolute() or ".." in path.parts:
          raise ValueError(f"{stage.name}: {str(path)!r} must lie in its folder.")
      # As JSON gives it back: a tuple and a list are the same.
      config = json.loads(json.dumps(stage.config))
      named[stage.name] = dataclasses.replace(stage, config=config)
    self.stages: dict[str, Stage] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
      if name not in named:
        raise ValueError(f"{way[-1]} reads {name!r}, which is not a stage.")
      if name in way:
        raise ValueError(f"a cycle: {' <- '.join([*way[way.index(name) :], name])}.")
      if name not in self.stages:
        for needed in named[name].inputs:
          visit(needed, (*way, name))
        self.stages[name] = named[name]

    for name in named:
      visit(name, ())

  def part(self, wanted: Iterable[str], instead: Mapping[str, str]) -> "Graph":
    """Some stages and what they need, with others left out.

    Args:
      wanted: their names.
      instead: a stage that is left out -> the one whose artefacts take its place.

    Raises:
      ValueError: no such stage.
    """
    found = {}

    def add(name: str) -> None:
      if name not in self.stages:
        raise ValueError(f"{name!r} is not one of {', '.join(self.stages)}.")
      stage = self.stages[name]
      reads = {old: instead.get(old, old) for old in stage.inputs}

      def made(folder, inputs, run=stage.run, reads=reads):
        return run(folder, {old: inputs[new] for old, new in reads.items()})

      for new in reads.values():
        add(new)
      inputs = tuple(dict.fromkeys(reads.values()))
      found[name] = dataclasses.replace(stage, inputs=inputs, run=made)

    for name in wanted:
      add(name)
    return Graph(found.values())

  def status(self, workdir: pathlib.Path) -> dict[str, Status]:
    """How every stage stands; reads files and writes none."""
    found: dict[str, Status] = {}
    for name, stage in self.stages.items():
      found[name] = _status(stage, workdir / name, found)
    return found

  def table(self, workdir: pathlib.Path) -> rich.table.Table:
    """A row a stage: its name, how it stands, seconds, and why or what it is."""
    table = rich.table.Table("stage", "state", "seconds", "")
    for name, now in self.status(workdir).items():
      seconds = "" if now.seconds is None else f"{now.seconds:.1f}"
      said = "; ".join(now.reasons) or self.stages[name].about
      table.add_row(*map(rich.text.Text, (name, now.state, seconds, said)))
    return table

  def run(
    self,
    workdir: pathlib.Path,
    only: str | None = None,
    rerun: bool = False,
    say: Callable[[str], None] = print,
  ) -> None:
    """Runs what is missing and continues what was stopped.

    Args:
      workdir: holds a folder a stage.
      only: this stage alone, if its inputs are done.
      rerun: what is stale is run again, and so is `only` if it is done. What was
        stopped goes on all the same.
      say: gets a line when a stage begins, ends or is passed over.

    Raises:
      UserError: an unknown `only`, its input is not done, or a stage is stale and not
        to be run again; before anything is touched.
      RuntimeError: a stage did not leave what it promised.
    """
    workdir = workdir.absolute()  # Orbax takes no relative one
    if only is not None and only not in self.stages:
      raise UserError(f"--stage={only!r} is not one of {', '.join(self.stages)}.")
    chosen = list(self.stages) if only is None else [only]
    for name in chosen:
      # Anew for each stage: someone may have edited a file while the last one ran.
      found, stage, folder = self.status(workdir), self.stages[name], workdir / name
      now = found[name]
      _check_inputs(stage, found)
      if not rerun:
        _check_stale({n: found[n] for n in chosen}, workdir)
      if now.state == "done" and not (only and rerun):
        say(f"{name}: done before, in {now.seconds:.1f} s")
        continue
      if now.state in ("done", "stale"):
        say(f"{name}: its old folder is now {_move(folder, workdir / OLD)}")
      how = "goes on where it was stopped" if now.state == "partly" else "begins"
      say(f"{name}: {'; '.join([*now.reasons, how])}")
      seconds = _make(stage, folder, {n: found[n].digest for n in stage.inputs})
      say(f"{name}: done in {seconds:.1f} s")
      if preemption.asked() and name != chosen[-1]:
        preemption.leave()


def _status(stage: Stage, folder: pathlib.Path, found: dict[str, Status]) -> Status:
  """How one stage stands, given how its inputs do."""
  manifest = _read(folder / MANIFEST, "artefacts")
  record = manifest or _read(folder / BEGUN, "inputs")
  if not record:
    # A kill before begun.json was whole leaves nothing of the stage's.
    if {path.name for path in folder.glob("*")} <= {f"{BEGUN}.partial"}:
      return Status("missing")
    why = f"nothing says with what {folder} was begun"
    return Status("stale", (why,), f"{stage.name}: {why}")
  late = () if manifest else stage.late
  reasons = _changes(stage, record, found, late)
  seconds = manifest and manifest["seconds"]
  if manifest:
    wanted = {*stage.artefacts, *manifest["artefacts"]}
    if gone := sorted(a for a in wanted if not (folder / a).exists()):
      reasons.append(f"artefact {gone[0]} is missing")
  if reasons:
    first = next((found[n].cause for n in stage.inputs if found[n].cause), "")
    cause = first or f"{stage.name}: {reasons[0]}"
    return Status("stale", tuple(reasons), cause, seconds=seconds)
  if not manifest:
    return Status(
      "partly", (f"{MANIFEST} is not whole",) * (folder / MANIFEST).exists()
    )
  present = digest(contents(folder, stage.artefacts, manifest["artefacts"]))
  return Status("done", (), "", present, seconds, manifest["figures"])


def _changes(
  stage: Stage, record: dict, found: dict[str, Status], late: tuple[str, ...]
) -> list[str]:
  """In words: what is not as it was when the stage was begun, but for some keys."""
  then, reasons = record["inputs"], []
  for name in stage.inputs:
    if found[name].state != "done":
      reasons.append(f"input {name} is {found[name]}")
    elif then.get(name) != found[name].digest:
      reasons.append(f"input {name} {'changed' if name in then else 'is new'}")
  reasons += [f"input {n} is no longer read" for n in then if n not in stage.inputs]
  then, now = (
    {key: value for key, value in config.items() if key not in late}
    for config in (record["config"], stage.config)
  )
  return reasons + differences(then, now, "config.")


def _check_inputs(stage: Stage, found: dict[str, Status]) -> None:
  for name in stage.inputs:
    if found[name].state != "done":
      again = " --rerun" if found[name].state == "stale" else ""
      raise UserError(
        f"{stage.name} reads {name}, which is {found[name]}. Run it first:"
        f" --stage={name}{again}, or all that is not done: without --stage."
      )


def _check_stale(found: dict[str, Status], workdir: pathlib.Path) -> None:
  if stale := [(n, s.reasons) for n, s in found.items() if s.state == "stale"]:
    raise UserError(
      f"--workdir={workdir} holds stages that are stale:\n"
      + "".join(f"  {name}: {'; '.join(why)}\n" for name, why in stale)
      + f"--rerun runs them again and moves what is there to {workdir / OLD}. Or undo"
      " the change, or use another --workdir. Nothing was overwritten."
    )


def _move(folder: pathlib.Path, old: pathlib.Path) -> pathlib.Path:
  """Moves a stage's folder to the first free `old/<name>-<n>`."""
  old.mkdir(exist_ok=True)
  places = (old / f"{folder.name}-{n}" for n in itertools.count(1))
  return folder.rename(next(place for place in places if not place.exists()))


def _make(stage: Stage, folder: pathlib.Path, inputs: dict[str, str]) -> float:
  """Runs or continues a stage; only then is there a manifest. Returns its seconds."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / MANIFEST).unlink(missing_ok=True)  # one that is not whole
  # The manifest keeps what it was begun with, even if an input is edited meanwhile.
  record = {"stage": stage.name, "inputs": inputs, "config": stage.config}
  write_json(folder / BEGUN, record)
  started = time.monotonic()
  figures = stage.run(folder, {name: folder.parent / name for name in inputs})
  seconds = time.monotonic() - started
  if missing := [a for a in stage.artefacts if not (folder / a).exists()]:
    raise RuntimeError(f"stage {stage.name} ended and did not leave {missing}.")
  left = {"artefacts": contents(folder, stage.artefacts, {}), "figures": figures}
  write_json(folder / MANIFEST, {**record, **left, "seconds": seconds})
  return seconds


def _read(path: pathlib.Path, key: str) -> dict | None:
  """A JSON object with `key`; None where there is no file, or not a whole one."""
  try:
    value = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) and key in value else None
