"""What a folder says of its run, and what a wrong clock changes: nothing."""

import json
import time
import types

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


@pytest.mark.parametrize("same", [True, False])
def test_an_exchanged_tokenizer_is_noticed_when_a_run_goes_on(tmp_path, same):
  """It has the same size, so that nothing else would differ."""
  config = get_config("tiny")
  progress = types.SimpleNamespace(say=lambda text: None)
  this = types.SimpleNamespace(workdir=tmp_path, config=config, progress=progress)
  this.clock, this.tokenizer = Clock(), types.SimpleNamespace(model=b"one")
  host = run.host_state(this)
  found = types.SimpleNamespace(step=4, state=None, host=host)
  checkpoints = types.SimpleNamespace(steps=lambda: [4], restore=lambda *_: found)
  this.tokenizer.model = b"one" if same else b"two"
  if same:
    assert run.resumed(this, checkpoints, "rl", None, None) is found
    return
  with pytest.raises(UserError, match=r"tokenizer\.model is not the tokenizer"):
    run.resumed(this, checkpoints, "rl", None, None)


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
