"""Sinks get the numbers of metrics.jsonl, continue with the run, and never end it."""

import contextlib
import importlib.machinery
import json
import math
import os
import pathlib
import sqlite3
import struct
import subprocess
import sys
import types
from typing import ClassVar

import pytest
from tensorboardX.proto import event_pb2

from experiments.configs import ppo, r1, r1_zero
from r1jax import settings, sinks
from r1jax.errors import UserError
from r1jax.metrics import MetricsFile
from r1jax.sinks import Sinks

ROOT = pathlib.Path(__file__).parents[1]


def events(path):
  """The events of a file: length, its checksum, bytes, their checksum; again."""
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):
    (size,) = struct.unpack_from("<Q", data, at)
    found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
    at += 16 + size
  return found


def shown(folder):
  """What TensorBoard shows of a folder: {(tag, step): values}, by its own rule that a
  session's start, but for the first, drops what was there from its step on."""
  found, starts = [], 0
  for path in sorted(folder.glob("*tfevents*")):
    first, *rest = events(path)
    assert first.file_version == "brain.Event:2"
    for event in rest:
      if event.session_log.status == event_pb2.SessionLog.START:
        starts += 1
        found = [x for x in found if starts == 1 or x[1] < event.step]
      found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
  values = {}
  for tag, step, value in found:
    values.setdefault((tag, step), []).append(value)
  return values


def row(step, phase="rl", **figures):
  return {"phase": phase, "step": step, **figures}


def opened(folder, *names, say=print):
  return MetricsFile(folder / "metrics.jsonl", sinks=Sinks(names, folder, say))


def test_tensorboard_gets_the_numbers_alone_each_at_its_step(tmp_path):
  file = opened(tmp_path, "tensorboard")
  odd = dict(loss=math.nan, top=math.inf, gone=None, text="x", ok=True, many=[1, 2])
  file.write(row(2, reward=0.5, samples=16, **odd))
  file.write(row(4, reward=-0.25))
  file.write(row(4, phase="eval", pass_at_1=1))
  file.write(row(6, text="no number"))
  file.sinks.close()
  place = tmp_path / "tensorboard"
  assert shown(place / "rl") == {
    ("rl/reward", 2): [0.5],
    ("rl/samples", 2): [16.0],
    ("rl/reward", 4): [-0.25],
  }
  assert shown(place / "eval") == {("eval/pass_at_1", 4): [1.0]}
  assert len(file.rows()) == 4


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
  file = opened(tmp_path, "tensorboard")
  file.write(row(2, reward=0.5))
  assert shown(tmp_path / "tensorboard" / "rl") == {("rl/reward", 2): [0.5]}
  file.sinks.close()


@pytest.mark.parametrize("back", [0, 2, 4, 8])
def test_what_is_written_again_replaces_what_tensorboard_had(tmp_path, back):
  for begin, value in ((None, 0.5), (back, 0.75), (back, 0.25)):
    file = opened(tmp_path, "tensorboard")
    file.roll_back({"base": 30})
    file.roll_back({"rl": begin or 0, "eval": -1 if begin is None else begin})
    if begin is None:
      file.write(row(30, phase="base", nll=1.0))
      file.write(row(0, phase="eval", score=value))
    for step in range((begin or 0) + 2, 9, 2):
      file.write(row(step, reward=value))
      file.write(row(step, phase="eval", score=value))
    file.sinks.close()
  for phase, name in (("rl", "reward"), ("eval", "score"), ("base", "nll")):
    kept = {(f"{phase}/{name}", r["step"]): [r[name]] for r in file.rows() if name in r}
    assert shown(tmp_path / "tensorboard" / phase) == kept


def test_a_phase_without_rows_leaves_no_file(tmp_path):
  file = opened(tmp_path, "tensorboard")
  file.roll_back({"rl": 0})
  file.sinks.close()
  assert not (tmp_path / "tensorboard").exists()


# -- what a sink has got ---------------------------------------------------------------


class Kept(sinks.Sink):
  """Remembers what it gets."""

  got: ClassVar[list] = []

  def __init__(self, folder):
    pass

  def write(self, phase, step, numbers):
    self.got.append((phase, step, *numbers.values()))

  def close(self):
    pass


@pytest.fixture
def kept(monkeypatch):
  monkeypatch.setattr(Kept, "got", [])
  monkeypatch.setitem(sinks.KINDS, "kept", ("json", Kept))
  return Kept.got


def test_a_new_sink_gets_all_earlier_rows_and_no_row_twice(tmp_path, kept):
  said = []
  file = opened(tmp_path, "tensorboard")
  for step in (2, 4):
    file.write(row(step, reward=0.5))
    file.write(row(step, phase="eval", text="no number"))
  file.sinks.close()
  file = opened(tmp_path, "tensorboard", "kept", say=said.append)
  assert kept == [("rl", 2, 0.5), ("rl", 4, 0.5)]
  assert said == ["sink kept gets 4 earlier rows of metrics.jsonl"]
  file.write(row(6, reward=0.25))
  file.sinks.close()
  opened(tmp_path, "tensorboard", "kept", say=said.append).sinks.close()
  assert len(kept) == 3 and len(said) == 1
  assert len(shown(tmp_path / "tensorboard" / "rl")) == 3


@pytest.mark.parametrize("back", [0, 2, 6])
def test_where_nothing_is_replaced_a_step_is_sent_once(tmp_path, kept, back):
  for begin in (0, back):
    file = opened(tmp_path, "kept")
    file.roll_back({"rl": begin})
    for step in range(begin + 2, 9, 2):
      file.write(row(step, reward=begin))
    file.sinks.close()
  assert kept == [("rl", step, 0) for step in (2, 4, 6, 8)]


def test_a_sink_that_failed_gets_what_it_missed_at_the_next_start(
  tmp_path, kept, monkeypatch
):
  with monkeypatch.context() as patched:
    patched.setattr(Kept, "__init__", lambda self, folder: sys.exit("no network"))
    file = opened(tmp_path, "kept", say=kept.append)
    file.write(row(2, reward=0.5))
  assert len(kept) == 1 and "SystemExit: no network" in kept.pop()
  opened(tmp_path, "kept")
  assert kept == [("rl", 2, 0.5)]


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("tensorbord",), ("wandb", "x"), "wandb"])
def test_an_unknown_sink_is_refused_with_those_that_there_are(names):
  with pytest.raises(UserError, match=r"config\.sinks=.*tensorboard, wandb, trackio"):
    sinks.check(names)


@pytest.mark.parametrize("name", sinks.KINDS)
def test_a_missing_library_is_refused_with_its_extra(name, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, sinks.KINDS[name][0], None)
  with pytest.raises(UserError, match=rf'pip install "r1jax\[{name}\]"'):
    sinks.check((name,))
  # a folder of that name, as wandb leaves one, is no library
  monkeypatch.delitem(sys.modules, sinks.KINDS[name][0])
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  (tmp_path / sinks.KINDS[name][0]).mkdir()
  with pytest.raises(UserError, match=rf'pip install "r1jax\[{name}\]"'):
    sinks.check((name,))


@pytest.mark.parametrize(
  ("mode", "key", "refused"),
  [("online", False, True), ("online", True, False), ("offline", False, False)],
)
def test_wandb_without_a_login_is_refused_before_it_asks(
  mode, key, refused, monkeypatch
):
  wandb = types.ModuleType("wandb")
  wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
  wandb.Error = RuntimeError
  wandb.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
  wandb.login = lambda *, prompt, verify: key and not prompt and not verify
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  found = contextlib.nullcontext()
  if refused:
    found = pytest.raises(UserError, match=r"`wandb login`.*WANDB_MODE=offline")
  with found:
    sinks.check(("wandb",))


@pytest.mark.parametrize("config", [r1_zero, ppo, r1])
def test_every_config_has_the_key_and_none_by_default(config):
  c = config.get_config()
  assert c.sinks == () and "sinks" not in settings.plain(c)
  sinks.check(c.sinks)


# -- failures --------------------------------------------------------------------------


class Broken(sinks.Sink):
  def __init__(self, folder):
    self.calls, self.folder = [], folder
    self.act("begin")

  def act(self, name):
    self.calls.append(name)
    if name == self.at:
      raise OSError("no space\nleft")

  def write(self, phase, step, numbers):
    self.act("write")

  def roll_back(self, last_steps):
    self.act("roll_back")

  def close(self):
    self.act("close")


@pytest.mark.parametrize("at", ["begin", "roll_back", "write", "close"])
def test_a_sink_that_fails_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, at):
  said, made = [], []

  class Here(Broken):
    def __init__(self, folder):
      made.append(self)
      self.at = at
      super().__init__(folder)

  monkeypatch.setitem(sinks.KINDS, "broken", ("json", Here))
  file = opened(tmp_path, "broken", "tensorboard", say=said.append)
  file.roll_back({"rl": 0})
  for step in (2, 4):
    file.write(row(step, reward=0.5))
  file.sinks.close()
  file.sinks.close()
  assert len(said) == len(made) == 1 and "\n" not in said[0]
  assert "broken" in said[0] and "OSError: no space left" in said[0]
  assert made[0].calls.count(at) == 1 and made[0].calls[-1] == at
  assert [r["step"] for r in file.rows()] == [2, 4]
  assert len(shown(tmp_path / "tensorboard" / "rl")) == 2


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path):
  said = []
  (tmp_path / "tensorboard").write_text("a file in its place")
  file = opened(tmp_path, "tensorboard", say=said.append)
  for step in (2, 4):
    file.write(row(step, reward=0.5))
  file.sinks.close()
  assert len(said) == 1 and len(file.rows()) == 2


def test_a_process_that_does_not_write_has_no_sink(tmp_path):
  found = Sinks(("tensorboard",), tmp_path)
  file = MetricsFile(tmp_path / "metrics.jsonl", writes=False, sinks=found)
  file.roll_back({"rl": 0})
  file.write(row(2, reward=0.5))
  found.close()
  assert list(tmp_path.iterdir()) == []


# -- libraries that are not always there -----------------------------------------------

TWICE = """
import pathlib, sys
from r1jax.metrics import MetricsFile
from r1jax.sinks import Sinks
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
for begin in (0, 2):
  sinks = Sinks((name,), folder)
  file = MetricsFile(folder / "metrics.jsonl", sinks=sinks)
  file.roll_back({"pretrain": 30})
  if not begin:
    file.write({"phase": "pretrain", "step": 30, "nll": 2.5})
  file.roll_back({"rl": begin})
  for step in range(begin + 2, 7, 2):
    file.write({"phase": "rl", "step": step, "reward": begin + step, "text": "secret"})
  sinks.close()
"""
ROWS = [("pretrain/nll", 30, 2.5)]
ROWS += [("rl/reward", step, step) for step in (2, 4, 6)]  # as they came first


def twice(folder, name, **environment):
  """A run and its resume, in a process of its own."""
  folder.mkdir()
  paths = os.pathsep.join([str(ROOT), *sys.path])
  done = subprocess.run(
    [sys.executable, "-c", TWICE, str(folder), name],
    env={**os.environ, "PYTHONPATH": paths, **environment},
    capture_output=True,
    text=True,
    check=True,
    cwd=folder,
  )
  assert "failed" not in done.stdout, done.stdout
  assert len(MetricsFile.rows_of(folder / "metrics.jsonl")) == 4


def test_wandb_continues_the_run_of_the_workdir(tmp_path):
  pytest.importorskip("wandb")
  twice(tmp_path / "zero", "wandb", WANDB_MODE="offline")
  mine = (tmp_path / "zero" / "run_id").read_text()
  files = sorted((tmp_path / "zero" / "wandb").glob(f"offline-run-*-{mine}/*.wandb"))
  data = b"".join(path.read_bytes() for path in files)
  assert files and b"pretrain/nll" in data and b"rl/reward" in data
  assert b"secret" not in data and sys.executable.encode() not in data


def test_trackio_continues_the_run_of_the_workdir(tmp_path):
  pytest.importorskip("trackio")
  home = tmp_path / "trackio"
  twice(tmp_path / "zero", "trackio", TRACKIO_DIR=str(home))
  mine = (tmp_path / "zero" / "run_id").read_text()
  with sqlite3.connect(home / "r1jax.db") as base:
    rows = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
  base.close()
  assert {name for name, _, _ in rows} == {f"zero-{mine}"}
  got = [(k, step, v) for _, step, text in rows for k, v in json.loads(text).items()]
  assert sorted(got) == sorted(ROWS)
