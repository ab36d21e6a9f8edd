"""What a folder says of its run, and what a wrong clock changes: nothing."""

import json
import time

import pytest

from experiments.configs.r1_zero import get_config
from r1jax import attempts, events, lock, run
from r1jax.errors import UserError
from r1jax.goodput import Goodput
from r1jax.metrics import write_json
from r1jax.progress import Clock

LINE = {"problem": "1 + 1?", "answer": "2"}


def test_other_problems_in_the_same_file_are_refused(tmp_path):
  file, workdir = tmp_path / "problems.jsonl", tmp_path / "run"
  file.write_text(json.dumps(LINE) + "\n")
  config = get_config("tiny")
  config.data.problems = str(file)
  assert run.open_workdir(config, workdir) == []
  write_json(workdir / "config.json", run.identity(config))
  assert run.open_workdir(config, workdir) == []
  file.write_text(json.dumps(LINE | {"answer": "3"}) + "\n")
  with pytest.raises(UserError, match=r"problems\.jsonl"):
    run.open_workdir(config, workdir)


def test_a_clock_that_jumps_back_decides_nothing(tmp_path, monkeypatch):
  now = time.time
  for back in (0.0, 3600.0):
    monkeypatch.setattr(time, "time", lambda back=back: now() - back)
    with lock.held(tmp_path), attempts.counted(tmp_path):
      clock = Clock()
      clock.record(tmp_path / "events.jsonl")
      with clock.phase("rl", event="step", step=1):
        time.sleep(0.01)
  found = events.read(tmp_path / "events.jsonl")
  assert [e["name"] for e in found] == ["init", "step", "restart", "init", "step"]
  assert all(e["seconds"] >= 0 for e in found)
  assert Goodput.of(found).restarts == 1
