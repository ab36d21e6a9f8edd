"""Runs beside each other: bases are shared, what has ended stays, failures are named.
Nothing is trained here."""

import os
import signal
import subprocess
import sys

import pytest

from experiments import arms, exits
from experiments.arms import Arm
from r1jax import settings
from r1jax.errors import UserError

ARMS = {
  "one": Arm(),
  "two": Arm("r1_zero", {"grpo.group_size": 8}),
  "three": Arm("ppo"),
}
OTHER = {"other": Arm("r1_zero", {"pretrain.steps": 3})}


@pytest.fixture
def begun(monkeypatch):
  """What began, and with how many others under way; each process makes its base."""
  seen = []

  def start(root, arm, name, seed, core, environ):
    folder = arms.folder_of(root, name, seed)
    (folder / "checkpoints" / "pretrain").mkdir(parents=True)
    seen.append((name, seed, (root / "bases" / arm.base(seed)).exists()))
    code = f"import time; time.sleep(0.5); exit({3 * (name == 'two')})"
    return subprocess.Popen([sys.executable, "-c", code])

  monkeypatch.setattr(arms, "start", start)
  return seen


def test_a_base_is_made_once_and_then_shared(tmp_path, begun):
  wanted = [("one", 0), ("three", 0), ("other", 0)]
  failed = arms.run(tmp_path, ARMS | OTHER, wanted, jobs=2, say=lambda text: None)
  assert not failed
  assert begun == [("one", 0, False), ("other", 0, False), ("three", 0, True)]
  assert len(list((tmp_path / "bases").iterdir())) == 2


def test_a_base_is_shared_while_the_run_that_made_it_goes_on(tmp_path, monkeypatch):
  seen = []

  def start(root, arm, name, seed, core, environ):
    folder = arms.folder_of(root, name, seed) / "checkpoints"
    base = root / "bases" / arm.base(seed)
    seen.append((name, sorted(x.name for x in base.glob("*"))))
    # The first trains a base, leaves it in two steps, and ends when the other has.
    text = f"""
import pathlib, time
folder, seen = pathlib.Path({str(folder)!r}), pathlib.Path({str(tmp_path / "ended")!r})
(folder / "pretrain" / "600").mkdir(parents=True)
time.sleep(0.5)
(folder / "pretrain" / "900").mkdir()
(folder / "rl").mkdir()
until = time.monotonic() + 20
while {name == "one"} and not seen.exists():
  assert time.monotonic() < until
  time.sleep(0.05)
seen.touch()
"""
    return subprocess.Popen([sys.executable, "-c", text])

  monkeypatch.setattr(arms, "start", start)
  wanted = [("one", 0), ("three", 0)]
  free = {0, 1}  # two cores, whatever this machine has
  monkeypatch.setattr(arms.os, "sched_getaffinity", lambda _: free, raising=False)
  assert not arms.run(tmp_path, ARMS, wanted, say=lambda text: None)
  assert seen == [("one", []), ("three", ["600", "900"])]


def test_a_failure_is_named_and_the_others_run(tmp_path, begun):
  said = []
  wanted = [("two", 0), ("one", 0)]
  failed = arms.run(tmp_path, ARMS, wanted, jobs=1, say=said.append)
  assert len(failed) == 1 and "two, seed 0: exit code 3" in failed[0]
  assert "seed_0.log" in failed[0] and failed[0] in said
  assert [row[:2] for row in begun] == wanted


def test_a_run_under_way_ends_with_the_command(tmp_path, monkeypatch):
  going = []

  def start(*_):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    going.append(process)
    return process

  monkeypatch.setattr(arms, "start", start)
  with pytest.raises(SystemExit, match="42"), exits.in_words():
    say = lambda text: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    arms.run(tmp_path, ARMS, [("one", 0)], say=say)
  assert going[0].poll() is not None


def end(root, name, arm):
  folder = arms.folder_of(root, name, 0)
  folder.mkdir(parents=True)
  (folder / "summary.json").write_text("{}")
  arms.mark_of(folder).write_text(settings.sha256(arm.config(0)))


def test_what_has_ended_is_not_run_again(tmp_path, begun):
  end(tmp_path, "one", ARMS["one"])
  arms.run(tmp_path, ARMS, [("one", 0), ("one", 1)], say=lambda text: None)
  assert [row[:2] for row in begun] == [("one", 1)]


def test_what_has_ended_with_another_config_is_refused(tmp_path, begun):
  end(tmp_path, "one", Arm("r1_zero", {"steps": 16}))
  with pytest.raises(UserError, match=r"seed_0.*another config.*--workdir"):
    arms.run(tmp_path, ARMS, [("one", 1), ("one", 0)], say=lambda text: None)
  assert not begun


def test_a_run_has_its_variables_and_leaves_its_mark(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(arms.subprocess, "Popen", lambda line, **how: made.append(how))
  monkeypatch.setenv("MINE", "1")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  arms.start(tmp_path, ARMS["one"], "one", 0, [], {"R1JAX_XLA_FLAGS": "quick"})
  (how,) = made
  wanted = {"MINE": "1", "JAX_PLATFORMS": "cpu", "R1JAX_XLA_FLAGS": "quick"}
  assert wanted.items() <= how["env"].items()
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  arms.start(tmp_path, ARMS["one"], "one", 0, [], {})
  assert made[1]["env"]["JAX_PLATFORMS"] == "cuda"
  (tmp_path / "one" / "seed_0" / "summary.json").write_text("{}")
  assert arms.ended(tmp_path, "one", ARMS["one"], 0)


def test_an_unknown_key_is_refused():
  with pytest.raises(UserError, match=r"config\.grpo\.grup_size.*r1_zero"):
    Arm("r1_zero", {"grpo.grup_size": 8}).config(0)
