"""How a command ends that is no run: mistakes in a sentence and a code."""

from collections.abc import Iterator
import contextlib
import sys

from r1jax.errors import NumericalError, UserError


@contextlib.contextmanager
def in_words(stopped: str = "") -> Iterator[None]:
  """Ends the process with 2 for a user's mistake, 3 for numbers that are not finite and
  130 for Ctrl-C. Args: stopped: what Ctrl-C leaves, or is to be done about it."""
  try:
    yield
  except (UserError, NumericalError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UserError) else 3)
  except KeyboardInterrupt:
    print("; ".join(filter(None, ("stopped", stopped))), file=sys.stderr)
    sys.exit(130)
