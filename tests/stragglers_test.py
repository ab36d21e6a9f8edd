"""A process that is slower than the others is named."""

import json
import os
import subprocess
import sys

from launch_test import free_port, member
import pytest

from r1jax.stragglers import Stragglers, sentences

LEAST = {"probe": 0.0, "rewards": 0.5}
HOSTS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
  "figures, words",
  [
    ({"probe": [1.0, 1.1, 0.9, 1.4]}, []),
    ({"probe": [1.0, 1.1, 0.9, 1.7]}, ["process 3 (d)", "products", "1.7 s", "1 s"]),
    ({"rewards": [4.0, 9.0, 4.0, 4.0]}, ["process 1 (b)", "rewards", "9 s", "4 s"]),
    ({"rewards": [0.0, 0.4, 0.0, 0.0]}, []),  # too little to matter
    ({"rewards": [0.0, 0.6, 0.0, 0.0]}, ["process 1 (b)"]),
  ],
)
def test_one_that_takes_half_as_long_again_is_slow(figures, words):
  found = sentences(figures, LEAST, HOSTS)
  assert len(found) == bool(words)
  assert all(word in found[0] for word in words)


def test_of_two_the_slower_one_is(tmp_path):
  (said,) = sentences({"rewards": [4.0, 9.0]}, LEAST, HOSTS)
  assert said.startswith("process 1 (b)")


def test_one_alone_compares_nothing(tmp_path):
  said = []
  Stragglers(tmp_path, said.append).look(2, 100.0)
  assert not said and not list(tmp_path.iterdir())


TWO = """
import pathlib, sys, time
import jax, numpy as np
from r1jax import launch, sharding
from r1jax.data.problem import Problem
from r1jax.host_reward import HostReward
from r1jax.rewards.total import Breakdown
from r1jax.stragglers import Stragglers

launch.start({})


class Sleepy:
  weights = {"accuracy": 1.0}

  def score(self, samples):
    time.sleep(2.0 * jax.process_index())
    return [Breakdown(0.0, {"accuracy": 0.0}, "wrong") for _ in samples]


class Letters:
  def decode(self, ids):
    return "a"


reward = HostReward(Sleepy(), [Problem("1", ("1",))], Letters())
stragglers = Stragglers(pathlib.Path(sys.argv[1]), print)
reward._on_host((1, 1, 1), [0], np.array([1]))
with jax.set_mesh(sharding.make_mesh(fsdp=-1)):
  stragglers.look(2, reward.seconds)
  stragglers.look(4, reward.seconds)
"""


def test_a_process_whose_rewards_take_long_is_said_by_all(tmp_path):
  port = free_port()
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, str(tmp_path)],
      text=True,
      stdout=subprocess.PIPE,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", **member(i, port)},
    )
    for i in range(2)
  ]
  for process in pair:
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    slow = [line for line in printed.splitlines() if "rewards" in line]
    assert len(slow) == 1 and slow[0].startswith("update 2: process 1 ("), printed
  rows = [
    json.loads(x) for x in (tmp_path / "processes.jsonl").read_text().split("\n")[:2]
  ]
  assert [row["step"] for row in rows] == [2, 4]
  assert rows[0]["rewards"][1] >= 2.0 and rows[1]["rewards"] == [0.0, 0.0]
  assert len(rows[0]["hosts"]) == 2 and all(rows[0]["hosts"])
