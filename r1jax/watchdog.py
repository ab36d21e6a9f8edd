"""A run in which nothing ends any more is ended, with the stacks of all its threads.

A collective that waits for a process which is gone, a reward that never returns,
storage that hangs: JAX waits for ever. Exit code 42 tells who starts runs again.
"""

from collections.abc import Iterator
import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from typing import NoReturn

import jax

from r1jax.progress import Clock

SECOND = 1.0


@contextlib.contextmanager
def watched(clock: Clock, workdir: pathlib.Path, minutes: float) -> Iterator[None]:
  """Ends this process with 42 where no phase of the run begins or ends for so long.

  Args:
    clock: the run's; its phases are what is watched.
    workdir: gets stacks-PROCESS.txt.
    minutes: longer than the longest step, compilation or save; 0: nobody watches.
  """
  if not minutes:
    yield
    return
  over = threading.Event()

  def watch() -> None:
    quiet, turns = 0.0, -1
    # It counts its own seconds: a process that was itself stopped is not late.
    while not over.wait(SECOND):
      quiet, turns = quiet + SECOND if clock.turns == turns else 0.0, clock.turns
      if quiet >= 60 * minutes:
        leave(clock, workdir, minutes)

  thread = threading.Thread(target=watch, name="watchdog", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def leave(clock: Clock, workdir: pathlib.Path, minutes: float) -> NoReturn:
  """Writes down what every thread is at, and ends the process."""
  path = workdir / f"stacks-{jax.process_index()}.txt"
  with contextlib.suppress(OSError), path.open("a") as file:
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, in {clock.open}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
  print(
    f"error: nothing has ended for {minutes:g} minutes, in {clock.open}; all threads'"
    f" stacks are in {path}. The same command goes on from the last checkpoint; if a"
    " step takes longer than this, raise config.watchdog_minutes.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(42)
