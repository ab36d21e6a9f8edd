"""How a command ends that is no run: mistakes in a sentence and a code."""

from collections.abc import Iterator
import contextlib
import signal
import sys
import threading

from r1jax.errors import NumericalError, UserError


class Terminated(KeyboardInterrupt):
  """SIGTERM, which ends a command as Ctrl-C does: what it began is put away."""


@contextlib.contextmanager
def in_words(stopped: str = "") -> Iterator[None]:
  """Ends the process with 2 for a user's mistake, 3 for numbers that are not finite, 42
  for SIGTERM and 130 for Ctrl-C.

  Args:
    stopped: what the two last leave, or what is to be done about it.
  """
  try:
    with terminated():
      yield
  except (UserError, NumericalError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UserError) else 3)
  except KeyboardInterrupt as signalled:
    print("; ".join(filter(None, ("stopped", stopped))), file=sys.stderr)
    sys.exit(42 if isinstance(signalled, Terminated) else 130)


@contextlib.contextmanager
def terminated() -> Iterator[None]:
  """Raises Terminated at SIGTERM, in the main thread; others get no signals."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def handler(number, frame):
    raise Terminated

  before = signal.signal(signal.SIGTERM, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
