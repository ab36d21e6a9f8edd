"""Signals: one is noted, a second one ends; several processes stop after one step."""

import os
import signal
import subprocess
import sys

from launch_test import free_port, member
import pytest

from r1jax import preemption
from r1jax.errors import TransientError


@pytest.mark.parametrize(
  "number, error",
  [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TransientError)],
)
def test_the_first_signal_is_noted_and_said(number, error):
  said = []
  with preemption.listened(said.append):
    assert not preemption.asked()
    os.kill(os.getpid(), number)
    assert preemption.asked() and number.name in said[0]
    with pytest.raises(error):
      preemption.leave()
  assert not preemption.asked()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ends_at_once(second):
  with preemption.listened(lambda text: None):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), second)


STEPS = """
import os, signal, sys, time
import jax
from r1jax import launch, preemption
from r1jax.errors import TransientError

launch.start({})
with preemption.listened(lambda text: print("said", flush=True)):
  for step in range(1, 400):
    time.sleep(0.05 if jax.process_index() else 0.02)  # never at one step
    if step == 20 and jax.process_index() == 1:
      os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    if preemption.asked():
      assert preemption.asked()  # it stays so
      print("stopped at", step, flush=True)
      break
  try:
    preemption.leave()
  except TransientError:
    print("start again", flush=True)
  except KeyboardInterrupt:
    print("Ctrl-C", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
  "name, words", [("SIGTERM", "start again"), ("SIGINT", "Ctrl")]
)
def test_several_processes_stop_after_the_same_step(name, words):
  port = free_port()
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", STEPS, name],
      text=True,
      stdout=subprocess.PIPE,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", **member(i, port)},
    )
    for i in range(2)
  ]
  printed = [process.communicate(timeout=120)[0] for process in pair]
  stops = [[x for x in text.splitlines() if "stopped" in x] for text in printed]
  assert len(stops[0]) == 1 and stops[0] == stops[1], printed
  assert "start again" in printed[0] and words in printed[1]
