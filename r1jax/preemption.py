"""SIGTERM and Ctrl-C: a run that is asked to stop saves its last finished step.

A step cannot be broken off inside its program, and need not be: what follows from a
checkpoint is the same whenever it is computed. The first signal is noted and looked at
between steps; a second one ends the process at once. Of several processes one is told,
and all stop after the same step, on which JAX's coordinator makes them agree.
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from r1jax.errors import TransientError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked: list[int] = []
_agreed: list[int] = []  # what all processes have agreed on
_turns = itertools.count(1)  # how often all processes have asked


@contextlib.contextmanager
def listened(say: Callable[[str], None]) -> Iterator[None]:
  """Notes signals, in the main thread. JAX's coordinator has SIGTERM where there are
  several processes, and Ctrl-C is passed on to it.

  Args:
    say: is told the first one.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  several = jax.process_count() > 1

  def note(number: int, _: Any) -> None:
    if _asked:
      raise KeyboardInterrupt
    _asked.append(number)
    name = signal.Signals(number).name
    say(f"{name}: stopping after this step, which is saved; again: at once")
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  numbers = (signal.SIGINT,) if several else SIGNALS
  before = {number: signal.signal(number, note) for number in numbers}
  try:
    yield
  finally:
    _asked.clear()
    _agreed.clear()
    for number, handler in before.items():
      signal.signal(number, handler)


def asked() -> bool:
  """Whether the run is to stop after this step. Several processes all have to call it,
  equally often, and all get the same answer."""
  if jax.process_count() == 1:
    return bool(_asked)
  if multihost_utils.reached_preemption_sync_point(next(_turns)):
    _agreed.append(signal.SIGTERM)
  return bool(_agreed)


def leave() -> None:
  """Ends a run that was asked to stop, after it has saved.

  Raises:
    KeyboardInterrupt: by Ctrl-C.
    TransientError: by SIGTERM: who sends it will start the run again.
  """
  if _agreed:  # process 0, with which the others end, goes last
    multihost_utils.sync_global_devices("leave")
    time.sleep(jax.process_index() == 0)
  if signal.SIGINT in _asked:
    raise KeyboardInterrupt
  if _asked or _agreed:
    raise TransientError("SIGTERM: the last finished step is saved; start it again.")
