"""Algebra on text, by math-verify in a process that can be killed."""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys

_SCRIPT = pathlib.Path(__file__).with_name("maths_worker.py")
_START = 120.0  # seconds for its imports on a busy machine
_GRACE = 5.0  # seconds over the deadline until the worker itself is given up


class MathsError(RuntimeError):
  """The worker cannot start, or is lost: our failure, not the answer's."""


class MathsWorker:
  """One worker process, for one thread at a time; it starts when it is first asked.

  Its deadline needs no signal, so it works in any thread.
  """

  def __init__(self, seconds: float = 2.0):
    self.seconds = seconds
    self._process = None

  def __call__(self, gold: str, answer: str, seconds: float | None = None) -> str:
    """equal, different, timeout, memory or crash, of two LaTeX expressions.

    Args:
      gold, answer: the expressions.
      seconds: at most; None: `self.seconds`.

    Raises:
      MathsError: the worker is lost; the next call starts another.
    """
    return self._ask(gold, answer, self.seconds if seconds is None else seconds)

  def reads(self, text: str) -> bool:
    """Whether a text is an expression at all. Raises MathsError."""
    return self._ask(text, None, self.seconds) == "equal"

  def start(self) -> None:
    """Starts the process unless it runs. Raises MathsError."""
    if self._process is None:
      self._start()

  def _ask(self, gold: str, answer: str | None, seconds: float) -> str:
    self.start()
    asked = {"gold": gold, "answer": answer, "seconds": seconds}
    try:
      self._process.stdin.write(json.dumps(asked).encode() + b"\n")
      self._process.stdin.flush()
      return self._line(seconds + _GRACE)
    except (OSError, MathsError) as error:
      self.close()
      raise MathsError(f"the maths worker was lost ({error})") from error

  def _start(self) -> None:
    # -P: the folder of the script must not stand in for the standard library.
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_SCRIPT)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
      env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    try:
      said = self._line(_START)
    except MathsError as error:
      self.close()
      raise MathsError(
        "the maths worker does not start. Is math-verify there? pip install"
        f" 'r1jax[maths]' ({error})"
      ) from error
    assert said == "ready", said

  def _line(self, seconds: float) -> str:
    out = self._process.stdout
    poll = select.poll()
    poll.register(out, select.POLLIN)
    if not poll.poll(seconds * 1000):
      raise MathsError("it does not answer")
    line = out.readline()
    if not line:
      raise MathsError("it has ended")
    return line.decode().strip()

  def close(self) -> None:
    """Ends it and its child; again is harmless."""
    if self._process is None:
      return
    process, self._process = self._process, None
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
      with contextlib.suppress(OSError):  # what it was not told any more
        pipe.close()
