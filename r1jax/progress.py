"""What a person sees while a run works, and how long each phase took."""

from collections import Counter
from collections.abc import Iterator
import contextlib
import time

import jax
import rich.console
import rich.progress


class Clock:
  """Seconds by phase, over all processes of a run; compilations of this process."""

  def __init__(self, started: float | None = None):
    """Args: started: `time.monotonic()` of the process's first line."""
    self.started = time.monotonic() if started is None else started
    self.before = 0.0  # seconds that earlier processes of the run had taken
    self.seconds: dict[str, float] = {}
    self.compilations: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, _: float, fun_name: str = "", **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      self.compilations[fun_name.removeprefix("jit(").removesuffix(")")] += 1

  @property
  def elapsed(self) -> float:
    """Seconds of the run up to now."""
    return self.before + time.monotonic() - self.started

  def state(self) -> dict:
    return {"seconds": dict(self.seconds), "elapsed": self.elapsed}

  def restore(self, state: dict) -> None:
    """Goes on from a checkpoint's clock."""
    self.seconds, self.before = dict(state["seconds"]), state["elapsed"]

  def add(self, phase: str, seconds: float) -> None:
    self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    begun = time.monotonic()
    try:
      yield
    finally:
      self.add(name, time.monotonic() - begun)


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
