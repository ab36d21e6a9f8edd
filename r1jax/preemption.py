"""SIGTERM and Ctrl-C: a run that is asked to stop saves its last finished step.

A step cannot be broken off inside its program, and need not be: what follows from a
checkpoint is the same whenever it is computed. The first signal is noted and looked at
between steps; a second one ends the process at once. Of several processes none listens:
they would have to stop at one step, and are started again by their last checkpoint.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading
from typing import Any

import jax

from r1jax.errors import TransientError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked: list[int] = []


@contextlib.contextmanager
def listened(say: Callable[[str], None]) -> Iterator[None]:
  """Notes signals, in the main thread of a process that is alone.

  Args:
    say: is told the first one.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or jax.process_count() > 1:
    yield
    return

  def note(number: int, _: Any) -> None:
    if _asked:
      raise KeyboardInterrupt
    _asked.append(number)
    name = signal.Signals(number).name
    say(f"{name}: stopping after this step, which is saved; again: at once")

  before = {number: signal.signal(number, note) for number in SIGNALS}
  try:
    yield
  finally:
    _asked.clear()
    for number, handler in before.items():
      signal.signal(number, handler)


def asked() -> bool:
  """Whether the run is to stop after this step."""
  return bool(_asked)


def leave() -> None:
  """Ends a run that was asked to stop, after it has saved.

  Raises:
    KeyboardInterrupt: by Ctrl-C.
    TransientError: by SIGTERM: who sends it will start the run again.
  """
  if signal.SIGINT in _asked:
    raise KeyboardInterrupt
  if _asked:
    raise TransientError("SIGTERM: the last finished step is saved; start it again.")
