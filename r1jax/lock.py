"""One run a folder: two would write over each other, and neither would say so."""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket

import jax

from r1jax.errors import UserError

NAME = "LOCK"


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Holds a folder, by the first of several processes. The system lets go of it with
  the process, however that ends, so no lock is ever left over.

  Args:
    workdir: it exists.

  Raises:
    UserError: another run holds it; says which.
  """
  if jax.process_index() > 0:
    yield
    return
  with (workdir / NAME).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(
        f"--workdir={workdir} is in use by {_said(file.read())}. Wait for it, stop it,"
        " or choose another --workdir."
      ) from error
    except OSError:  # a file system without locks
      yield
      return
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()
    yield


def _said(text: str) -> str:
  try:
    owner = json.loads(text)
    return "process {pid} of {host} since {since}".format(**owner)
  except (ValueError, KeyError, TypeError):
    return "another process"
