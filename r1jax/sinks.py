"""Where a run's figures also go (config.sinks): metrics.jsonl has all of them anyway.

Only numbers are sent, as `phase/name` at the row's step, by the process that writes
metrics.jsonl. WORKDIR/sinks.json keeps the last step of each phase that a sink got: one
that is new gets the earlier rows first, and what a run that goes on writes again after
its checkpoint is sent where it replaces what was there, or else left out.

tensorboard  Event files in WORKDIR/tensorboard, a folder for each phase. What is
             written again replaces what was there (purge_step).
wandb        The run that WORKDIR/run_id names, files in WORKDIR/wandb; `wandb login`
             before, or WANDB_MODE=offline and `wandb sync` later. Steps are of a phase
             (`rl/step`).
trackio      A run in trackio's folder (TRACKIO_DIR): trackio show --project r1jax.

A run is named by its folder, in the group of the folder around it; so is a stage of R1.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import importlib.util
import json
import math
import pathlib
import time
import uuid

from r1jax.errors import UserError


class Sink:
  """Made of a run's folder when there is a row for it. Any of its methods may fail."""

  replaces = False  # whether a row of a step that it has replaces what it has

  @staticmethod
  def missing() -> str:
    """What has to be done before a run can begin with it, or ""."""
    return ""

  def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
    """Args: numbers: `phase/name` -> value."""
    raise NotImplementedError

  def roll_back(self, last_steps: dict[str, int]) -> None:
    """As MetricsFile.roll_back, where it `replaces`."""

  def close(self) -> None:
    """Sends what is left."""


class TensorBoard(Sink):
  """Without SummaryWriter, whose thread a full disk ends: its queue would block."""

  replaces = True

  def __init__(self, folder: pathlib.Path):
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2

    self._folder, self._event = folder / "tensorboard", event_pb2
    self._open, self._files = record_writer.RecordWriter, {}
    self._last: dict[str, int] = {}  # phase -> step, to roll back to

  def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
    if phase not in self._files:
      path = self._folder / phase / f"events.out.tfevents.{time.time_ns()}"
      path.parent.mkdir(parents=True, exist_ok=True)
      self._files[phase] = self._open(str(path))
      self._put(phase, file_version="brain.Event:2")
    if phase in self._last:  # a folder's first start drops nothing, later ones do
      start = {"status": self._event.SessionLog.START}
      self._put(phase, step=self._last.pop(phase) + 1, session_log=start)
    values = [{"tag": tag, "simple_value": x} for tag, x in numbers.items()]
    self._put(phase, step=step, summary={"value": values})
    self._files[phase].flush()

  def _put(self, phase: str, **parts) -> None:
    event = self._event.Event(wall_time=time.time(), **parts)
    self._files[phase].write(event.SerializeToString())

  def roll_back(self, last_steps: dict[str, int]) -> None:
    self._last.update(last_steps)

  def close(self) -> None:
    for file in self._files.values():
      file.close()


class Wandb(Sink):
  @staticmethod
  def missing() -> str:
    import wandb

    if wandb.setup().settings.mode != "online":
      return ""
    with contextlib.suppress(wandb.Error):
      if wandb.login(prompt=False, verify=False):  # a prompt would hold up the run
        return ""
    return "wandb knows no key here: `wandb login`, or WANDB_MODE=offline"

  def __init__(self, folder: pathlib.Path):
    import wandb

    only = dict(console="off", x_disable_machine_info=True, x_save_requirements=False)
    self._run = wandb.init(
      project="r1jax",
      id=run_id(folder),
      name=folder.name,
      group=folder.parent.name,
      dir=folder,
      resume="allow",
      settings=wandb.Settings(**only, finish_timeout=60.0),
    )
    self._phases: set[str] = set()

  def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
    if phase not in self._phases:  # its own step may only rise, over all phases
      self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
      self._phases.add(phase)
    self._run.log({f"{phase}/step": step, **numbers})

  def close(self) -> None:
    self._run.finish()


class Trackio(Sink):
  def __init__(self, folder: pathlib.Path):
    import trackio

    how = dict(resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    name = f"{folder.name}-{run_id(folder)}"  # by which it knows a run
    self._run = trackio.init("r1jax", name=name, group=folder.parent.name, **how)
    self.close = trackio.finish

  def write(self, phase: str, step: int, numbers: dict[str, float]) -> None:
    self._run.log(numbers, step=step)


# name, and the extra's -> (library, sink)
KINDS: dict[str, tuple[str, type[Sink]]] = {
  "tensorboard": ("tensorboardX", TensorBoard),
  "wandb": ("wandb", Wandb),
  "trackio": ("trackio", Trackio),
}


def run_id(folder: pathlib.Path) -> str:
  """Made once: a run that goes on is the same to a viewer."""
  path = folder / "run_id"
  if not path.exists():
    path.write_text(uuid.uuid4().hex[:8])
  return path.read_text()


def check(names: Sequence[str]) -> None:
  """Raises UserError: config.sinks names no sink, or one that something is missing for:
  its library, a login."""
  if isinstance(names, str) or not set(names) <= set(KINDS):
    raise UserError(
      f"config.sinks={names!r} must be a tuple of {', '.join(KINDS)}, as in"
      " ('tensorboard',)."
    )
  for name in names:
    spec = importlib.util.find_spec(KINDS[name][0])
    if spec is None or spec.origin is None:  # a mere folder of that name
      raise UserError(
        f"config.sinks={tuple(names)} needs {KINDS[name][0]}: pip install"
        f' "r1jax[{name}]", or leave {name!r} out.'
      )
    if missing := KINDS[name][1].missing():
      raise UserError(f"config.sinks={tuple(names)}: {missing}; or leave {name!r} out.")


class Sinks:
  """A run's. One that fails is named once and gets no more rows; the run goes on."""

  def __init__(
    self,
    names: Sequence[str] = (),
    folder: pathlib.Path = pathlib.Path(),
    say: Callable[[str], None] = print,
  ):
    self._sinks: dict[str, Sink | None] = dict.fromkeys(names)  # None: not begun
    self._say, self._folder, self._file = say, folder, folder / "sinks.json"
    # sink -> phase -> the last step that it got
    self._got: dict[str, dict[str, int]] = {name: {} for name in names}
    if names and self._file.exists():
      self._got |= json.loads(self._file.read_text())

  def catch_up(self, rows: Sequence[dict]) -> None:
    """Sends the rows of metrics.jsonl that a sink has not got, as one that is new."""
    for name in list(self._sinks):
      late = [row for row in rows if self._lacks(name, row)]
      if late:
        self._say(f"sink {name} gets {len(late)} earlier rows of metrics.jsonl")
        self._send(name, late)

  def write(self, row: dict) -> None:
    """Args: row: of metrics.jsonl; what is no number is left out."""
    for name in list(self._sinks):
      if self._lacks(name, row):
        self._send(name, [row])

  def roll_back(self, last_steps: dict[str, int]) -> None:
    for name in list(self._sinks):
      self._try(name, lambda sink: sink.roll_back(last_steps))
      if self._sinks.get(name) and self._sinks[name].replaces:
        got = self._got[name]
        got |= {k: min(got[k], last) for k, last in last_steps.items() if k in got}

  def close(self) -> None:
    for name in [name for name, sink in self._sinks.items() if sink]:
      self._try(name, lambda sink: sink.close())
    self._sinks = {}

  def _lacks(self, name: str, row: dict) -> bool:
    return row["step"] > self._got[name].get(row["phase"], -math.inf)

  def _send(self, name: str, rows: Iterable[dict]) -> None:
    def send(sink: Sink) -> None:
      for row in rows:
        phase, step = row["phase"], row["step"]
        numbers = {f"{phase}/{k}": v for k, v in row.items() if _is_number(v)}
        numbers.pop(f"{phase}/step", None)
        if numbers:
          sink.write(phase, step, numbers)
        self._got[name][phase] = step
      partial = self._file.with_suffix(".partial")
      partial.write_text(json.dumps(self._got))
      partial.replace(self._file)

    self._try(name, send)

  def _try(self, name: str, do: Callable[[Sink], None]) -> None:
    try:
      if self._sinks[name] is None:
        self._sinks[name] = KINDS[name][1](self._folder)
      do(self._sinks[name])
    except (Exception, SystemExit) as error:  # a library may end the process
      del self._sinks[name]
      what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
      self._say(f"sink {name} failed and gets no more rows, metrics.jsonl does: {what}")


def _is_number(x: object) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
