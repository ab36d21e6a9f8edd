"""What a person sees while a run works, and how long each phase took."""

from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib
import time

import jax
import rich.console
import rich.progress

from r1jax import events


@dataclasses.dataclass
class _Phase:
  name: str
  step: int | None
  inner: float = 0.0  # seconds of the phases inside it


class Clock:
  """Seconds by phase, over all processes of a run; compilations of this process.

  A phase's seconds are its own, without those of the phases inside it.
  """

  def __init__(self, started: float | None = None):
    """Args: started: `time.monotonic()` of the process's first line."""
    self.started = time.monotonic() if started is None else started
    self.before = 0.0  # seconds that earlier processes of the run had taken
    self.seconds: dict[str, float] = {}
    self.compilations: Counter[str] = Counter()
    self.turns = 0  # phases that have begun or ended
    self._open: list[_Phase] = []  # the innermost is the last
    self._path: pathlib.Path | None = None
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, seconds: float, fun_name: str = "", **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.compilations[fun_name.removeprefix("jit(").removesuffix(")")] += 1
      if self._open and self._open[-1].name != "compile":
        self._open[-1].inner += seconds
        self.add("compile", seconds)
        self._write("compile", seconds, self._open[-1].step)

  @property
  def open(self) -> str:
    """The phase that is under way, and what it leads up to."""
    if not self._open:
      return "no phase"
    last = self._open[-1]
    return last.name if last.step is None else f"{last.name} of update {last.step}"

  @property
  def elapsed(self) -> float:
    """Seconds of the run up to now."""
    return self.before + time.monotonic() - self.started

  def state(self) -> dict:
    return {"seconds": dict(self.seconds), "elapsed": self.elapsed}

  def restore(self, state: dict) -> None:
    """Goes on from a checkpoint's clock."""
    self.seconds, self.before = dict(state["seconds"]), state["elapsed"]

  def record(self, path: pathlib.Path) -> None:
    """From now on every phase that ends leaves a line in the file (events.py), if this
    is the first process; and what was before, one: `init`, and `restart` where the file
    has events."""
    if jax.process_index():
      return
    self._path = path
    init = time.monotonic() - self.started
    if earlier := events.resume(path):
      gap = time.time() - init - events.end_of(earlier)
      self._write("restart", max(gap, 0.0), ago=gap + init)
    self._write("init", init)

  def _write(
    self, name: str, seconds: float, step: int | None = None, ago: float | None = None
  ) -> None:
    """A line of what began so many seconds ago, or has just ended."""
    if self._path is not None:
      begun = time.time() - (seconds if ago is None else ago)
      event = {"time": begun, "seconds": seconds, "name": name}
      events.append(self._path, event if step is None else {**event, "step": step})

  def add(self, phase: str, seconds: float) -> None:
    self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

  @contextlib.contextmanager
  def phase(
    self, name: str, *, event: str = "", step: int | None = None
  ) -> Iterator[None]:
    """Times what is done in it.

    Args:
      name: of its seconds.
      event: its name in the file of events; "": the same.
      step: the update that it leads up to; None: that of the phase around it.
    """
    if step is None and self._open:
      step = self._open[-1].step
    here = _Phase(event or name, step)
    self._open.append(here)
    self.turns += 1
    begun = time.monotonic()
    try:
      yield
    finally:
      whole = time.monotonic() - begun
      self._open.pop()
      self.turns += 1
      if self._open:
        self._open[-1].inner += whole
      own = max(whole - here.inner, 0.0)
      self.add(name, own)
      self._write(here.name, own, step, ago=whole)


class Progress:
  """One bar a phase: done, figures of the last step, time left.

  Where the output is no terminal, a plain line is printed every tenth of a phase.
  """

  def __init__(self, console: rich.console.Console):
    self.console = console
    columns = (
      rich.progress.TextColumn("[bold]{task.description:<9}"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn("{task.fields[figures]}"),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("left"),
      rich.progress.TimeRemainingColumn(),
    )
    self._bars = rich.progress.Progress(
      *columns, console=console, disable=not console.is_terminal
    )
    self._tasks: dict[str, rich.progress.TaskID] = {}
    self._tenth: dict[str, int] = {}

  def __enter__(self) -> "Progress":
    self._bars.start()
    return self

  def __exit__(self, *_) -> None:
    self._bars.stop()

  def say(self, text: str) -> None:
    self.console.print(text, highlight=False, markup=False, soft_wrap=True)

  def update(self, phase: str, done: int, total: int, **figures: float) -> None:
    shown = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
    if phase not in self._tasks:
      self._tasks[phase] = self._bars.add_task(phase, total=total, figures="")
    self._bars.update(self._tasks[phase], completed=done, total=total, figures=shown)
    tenth = 10 * done // total
    if not self.console.is_terminal and self._tenth.get(phase) != tenth:
      self._tenth[phase] = tenth
      self.say(f"{phase} {done}/{total}  {shown}")
