"""One run a folder: two would write over each other, and neither would say so.

The system keeps a second run out. Where a file system has no locks it cannot: there
the last that began has the folder, and the others are refused their next save.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import uuid

import jax

from r1jax.errors import UserError

NAME = "LOCK"
_mine: dict[pathlib.Path, str] = {}  # folders that this process has, and what it wrote


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
  workdir = workdir.absolute()
  with (workdir / NAME).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(
        f"--workdir={workdir} is in use by {_said(file.read())}. Wait for it, stop it,"
        " or choose another --workdir."
      ) from error
    except OSError:
      pass  # a file system without locks
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    text = json.dumps({**owner, "start": uuid.uuid4().hex})
    file.truncate(0)
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
    _mine[workdir] = text
    try:
      yield
    finally:
      del _mine[workdir]


def check(path: pathlib.Path) -> None:
  """Asked before something under a held folder is written that another run would read.

  Raises:
    UserError: another run has begun there since; says which.
  """
  for folder in path.absolute().parents:
    if folder in _mine:
      now = (folder / NAME).read_text()
      if now != _mine[folder]:
        raise UserError(
          f"{folder} has been taken over by {_said(now)}, on a file system without"
          f" locks. This run ends and saves nothing more; its last checkpoint is there."
        )


def _said(text: str) -> str:
  try:
    owner = json.loads(text)
    return "process {pid} of {host} since {since}".format(**owner)
  except (ValueError, KeyError, TypeError):
    return "another process"
