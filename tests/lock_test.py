"""A folder belongs to one run, and to none that has ended."""

import contextlib
import errno
import fcntl
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from r1jax import lock
from r1jax.checkpoint import Checkpoints
from r1jax.errors import UserError

HOLD = """
import pathlib, sys, time
from r1jax import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(100)
"""
# A file system without locks.
BROKEN = "lambda *_: (_ for _ in ()).throw(OSError(37, 'no locks'))"


@contextlib.contextmanager
def holder(folder: pathlib.Path):
  command = [sys.executable, "-c", HOLD, str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
    try:
      assert child.stdout.readline() == "held\n"
      yield child
    finally:
      child.kill()


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
  with holder(tmp_path) as child:
    words = rf"in use by process {child.pid} of \S+ since 20"
    with pytest.raises(UserError, match=words), lock.held(tmp_path):
      pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_lock(tmp_path, end):
  with holder(tmp_path) as child:
    child.send_signal(end)
  with lock.held(tmp_path):
    pass


def test_a_run_that_ended_or_failed_lets_go(tmp_path):
  with lock.held(tmp_path):
    pass
  with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
    raise ZeroDivisionError
  with lock.held(tmp_path):
    assert str(pathlib.Path(tmp_path / lock.NAME).read_text()).startswith("{")


def test_without_locks_the_last_to_begin_has_the_folder(tmp_path, monkeypatch):
  def none(*_):
    raise OSError(errno.ENOLCK, "no locks available")

  monkeypatch.setattr(fcntl, "flock", none)
  place = tmp_path / "checkpoints" / "rl"
  with lock.held(tmp_path):
    lock.check(place)
    script = HOLD.replace("with", f"lock.fcntl.flock = {BROKEN}\nwith")
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
      assert child.stdout.readline() == "held\n"
      child.kill()
    checkpoints = Checkpoints(place)
    with pytest.raises(UserError, match=f"taken over by process {child.pid} of"):
      checkpoints.save(2, {"x": jnp.zeros(3)}, {})
    checkpoints.close()
    assert not any(path.name.startswith("2") for path in place.iterdir())
  lock.check(place)  # held by nobody here: nobody to take it from


def test_what_stands_in_the_file_does_not_matter(tmp_path):
  (tmp_path / lock.NAME).write_text("{half")
  with (
    lock.held(tmp_path),
    pytest.raises(UserError, match="in use by process"),
    lock.held(tmp_path),
  ):
    pass
