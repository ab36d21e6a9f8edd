"""How a command ends that is no run: mistakes in a sentence and a code."""

from collections.abc import Iterator
import contextlib
import re
import signal
import sys
import threading

from r1jax.errors import NumericalError, UserError


class Terminated(KeyboardInterrupt):
  """SIGTERM, which ends a command as Ctrl-C does: what it began is put away."""


@contextlib.contextmanager
def in_words(stopped: str = "", *, memory: str = "") -> Iterator[None]:
  """Ends the process with 2 for a user's mistake or a device that is full, 3 for
  numbers that are not finite, 42 for SIGTERM or a full disk, and 130 for Ctrl-C.

  Args:
    stopped: what SIGTERM and Ctrl-C leave, or what is to be done about it.
    memory: what needs less of a full device's; "": what a run is told.
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
  except Exception as error:
    from experiments import command

    if not (room := command.no_room(error, memory)):
      raise
    print(f"error: {room[1]}", file=sys.stderr)
    sys.exit(room[0])


@contextlib.contextmanager
def flags_for(*keys: str) -> Iterator[None]:
  """Mistakes in the config's `reward` name flags: --sandbox, not config.reward.sandbox.

  Args:
    keys: those that have a flag; none: all.
  """
  try:
    yield
  except UserError as error:
    names = "|".join(keys) or r"\w+"
    text = re.sub(rf"config\.reward\.({names})\b", _flag, str(error))
    raise UserError(text) from error


def _flag(key: re.Match) -> str:
  return "--" + key[1].replace("_", "-")


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
