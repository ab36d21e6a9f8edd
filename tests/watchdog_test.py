"""The watchdog, in processes of its own: it ends them."""

import subprocess
import sys

import pytest

SCRIPT = """
import pathlib, sys, threading, time
from r1jax import watchdog
from r1jax.progress import Clock

watchdog.SECOND = 0.05
clock, folder = Clock(), pathlib.Path(sys.argv[1])


def waits_for_a_peer():
  time.sleep(float(sys.argv[2]))


with watchdog.watched(clock, folder, float(sys.argv[3])):
  for step in range(1, 4):
    with clock.phase("rl", event="step", step=step):
      threading.Thread(target=waits_for_a_peer).start() if step == 1 else None
      time.sleep(0.3)
  with clock.phase("rl", event="step", step=4):
    waits_for_a_peer()
print("done")
"""


HANGING_RULE = """
import pathlib, sys, time
import jax, jax.numpy as jnp
from r1jax import watchdog
from r1jax.progress import Clock

watchdog.SECOND = 0.05
clock, folder = Clock(), pathlib.Path(sys.argv[1])


def my_rule(x):
  time.sleep(90)
  return x


@jax.jit
def step(x):
  return jax.pure_callback(my_rule, jax.ShapeDtypeStruct((), jnp.float32), x)


with watchdog.watched(clock, folder, 1 / 30):
  with clock.phase("rl", event="step", step=4):
    step(jnp.float32(1.0)).block_until_ready()
"""


def run(folder, seconds, minutes, script=SCRIPT):
  line = [sys.executable, "-c", script, str(folder), str(seconds), str(minutes)]
  return subprocess.run(line, capture_output=True, text=True, timeout=100)


def test_a_run_that_hangs_ends_with_42_and_leaves_its_stacks(tmp_path):
  done = run(tmp_path, 90, 1 / 60)
  assert done.returncode == 42 and "done" not in done.stdout
  assert "step of update 4" in done.stderr and "watchdog_minutes" in done.stderr
  stacks = (tmp_path / "stacks-0.txt").read_text()
  assert "step of update 4" in stacks
  assert stacks.count("in waits_for_a_peer") == 2  # of both threads


def test_a_rule_that_hangs_inside_a_compiled_step_is_named_by_the_stacks(tmp_path):
  done = run(tmp_path, 0, 0, HANGING_RULE)
  assert done.returncode == 42, done.stderr
  assert "in my_rule" in (tmp_path / "stacks-0.txt").read_text()


@pytest.mark.parametrize("seconds, minutes", [(0.5, 1 / 60), (2, 0)])
def test_one_that_does_not_or_is_not_watched_ends_as_ever(tmp_path, seconds, minutes):
  done = run(tmp_path, seconds, minutes)
  assert done.returncode == 0, done.stderr
  assert "done" in done.stdout and not list(tmp_path.iterdir())
