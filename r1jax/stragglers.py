"""Which of several processes is slower than the others, who wait for it in every step.

All of them see the same time for a step. What differs is what each does by itself: the
seconds that its rewards took, and a probe, the same small products on its own device.
"""

from collections.abc import Callable, Mapping
import functools
import json
import pathlib
import socket
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from r1jax.agreement import several

SLOW = 1.5  # times the median
LEAST = 0.05  # of the time that has passed; less does not matter
NAME = "processes.jsonl"


class Stragglers:
  """Compares the processes of a run now and then; alone it does nothing."""

  def __init__(self, workdir: pathlib.Path, say: Callable[[str], None]):
    self.path, self.say = workdir / NAME, say
    self._since, self._rewards = time.monotonic(), 0.0

  def look(self, step: int, rewards: float) -> None:
    """Compares; all processes have to call it.

    Args:
      step: the update that has ended.
      rewards: seconds that this process has spent on rewards so far.
    """
    if not several():
      return
    passed = time.monotonic() - self._since
    own = np.array([probe(), rewards - self._rewards, passed], np.float32)
    self._rewards = rewards
    probes, waits, passes = multihost_utils.process_allgather(own).T
    figures = {"probe": probes.tolist(), "rewards": waits.tolist()}
    least = {"probe": 0.0, "rewards": LEAST * float(passes.max())}
    names = hosts()
    for sentence in sentences(figures, least, names):
      self.say(f"update {step}: {sentence}")
    if jax.process_index() == 0:
      with self.path.open("a") as file:
        file.write(json.dumps({"step": step, "hosts": names, **figures}) + "\n")
    self._since = time.monotonic()


def sentences(
  figures: Mapping[str, list[float]], least: Mapping[str, float], names: list[str]
) -> list[str]:
  """What is to be said of processes that are slow.

  Args:
    figures: name -> seconds of every process.
    least: name -> seconds beyond the median that matter.
    names: of their hosts.
  """
  what = {
    "probe": "products on a device of its own take",
    "rewards": "rewards since the last look took",
  }
  found = []
  for name, seconds in figures.items():
    usual = sorted(seconds)[(len(seconds) - 1) // 2]
    for i, own in enumerate(seconds):
      if own > SLOW * usual and own - usual > least[name]:
        found.append(
          f"process {i} ({names[i]}) is slow, and the others wait for it: {what[name]}"
          f" {own:.3g} s, at the median {usual:.3g} s. Look at that host, or leave it"
          " out."
        )
  return found


def probe() -> float:
  """Seconds of some products on this process's first device, at best of three."""
  device = jax.local_devices()[0]
  times = []
  with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):  # out of the run's
    x = jax.device_put(np.ones((512, 512), np.float32), device)
    _products(x).block_until_ready()
    for _ in range(3):
      begun = time.perf_counter()
      _products(x).block_until_ready()
      times.append(time.perf_counter() - begun)
  return min(times)


@jax.jit
def _products(x: jax.Array) -> jax.Array:
  return jax.lax.fori_loop(0, 16, lambda _, y: jnp.tanh(x @ y), x)


@functools.cache
def hosts() -> list[str]:
  """The names of all processes' hosts."""
  name = np.zeros(64, np.uint8)
  own = socket.gethostname().encode()[:64]
  name[: len(own)] = np.frombuffer(own, np.uint8)
  rows = multihost_utils.process_allgather(name)
  return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
