"""A command that is asked to end puts away what it began, and says how it ended."""

import signal
import subprocess
import sys
import threading

import pytest

from experiments import exits
from r1jax.errors import UserError

WAITS = """
import time
from experiments import exits

with exits.in_words("the same command goes on"):
  try:
    print("begun", flush=True)
    time.sleep(60)
  finally:
    print("put away", flush=True)
"""


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(sent, code):
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with subprocess.Popen([sys.executable, "-c", WAITS], **pipes) as process:
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (code, "put away\n"), err
  assert err == "stopped; the same command goes on\n"


def test_the_handler_of_before_is_back():
  before = signal.getsignal(signal.SIGTERM)
  with exits.in_words():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


def test_it_is_nothing_outside_the_main_thread():
  ended = []

  def command():
    with exits.in_words():
      ended.append(True)

  thread = threading.Thread(target=command)
  thread.start()
  thread.join()
  assert ended


class JaxRuntimeError(RuntimeError):
  """By the name of JAX's own."""


def test_a_full_device_is_one_line_that_says_what_needs_less(capsys):
  with pytest.raises(SystemExit, match="2"), exits.in_words(memory="Fewer --rows."):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
  (line,) = capsys.readouterr().err.splitlines()
  assert "99 bytes" in line and line.endswith("Fewer --rows.")


def test_other_errors_keep_their_traceback():
  with pytest.raises(ZeroDivisionError), exits.in_words():
    raise ZeroDivisionError


@pytest.mark.parametrize(
  "keys, said",
  [
    ((), "--maths-seconds=1 and --maths=exact"),
    (("maths",), "config.reward.maths_seconds=1 and --maths=exact"),
  ],
)
def test_a_mistake_names_the_flags_that_there_are(keys, said):
  with pytest.raises(UserError, match=f"^{said}$"), exits.flags_for(*keys):
    raise UserError("config.reward.maths_seconds=1 and config.reward.maths=exact")
