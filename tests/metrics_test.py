"""metrics.jsonl survives kills: half lines are passed over and a resume rolls back."""

import json
import math

import pytest

from r1jax.metrics import MetricsFile, write_json


@pytest.fixture
def file(tmp_path):
  return MetricsFile(tmp_path / "metrics.jsonl")


def row(phase, step, **more):
  return {"phase": phase, "step": step, **more}


def test_rows_come_back_in_order(file):
  rows = [row("rl", 2, reward=0.5), row("eval", 0, name="x"), row("rl", 4, reward=0.25)]
  for r in rows:
    file.write(r)
  assert file.rows() == rows
  assert file.phase("rl") == [rows[0], rows[2]]
  assert file.phase("none") == []
  assert len(file.path.read_text().splitlines()) == 3


def test_a_file_that_is_not_there_has_no_rows(file):
  assert file.rows() == []
  assert file.phase("rl") == []


@pytest.mark.parametrize("cut", [1, 10, -3, -1])
def test_a_half_line_is_passed_over(file, cut):
  file.write(row("rl", 2, reward=0.5))
  file.write(row("rl", 4, reward=0.75))
  line = json.dumps(row("rl", 6, reward=0.875))
  with file.path.open("a") as f:
    f.write(line[:cut])
  assert [r["step"] for r in file.rows()] == [2, 4]


def test_a_line_that_is_no_text_is_passed_over(file):
  file.write(row("rl", 2))
  with file.path.open("ab") as f:
    f.write(b"\xff\xfe\x00 garbage\n")
  file.write(row("rl", 4))
  assert file.rows() == [row("rl", 2), row("rl", 4)]


def test_after_a_roll_back_a_half_line_harms_no_later_row(file):
  file.write(row("rl", 2))
  with file.path.open("a") as f:
    f.write('{"phase": "rl", "st')
  file.roll_back({"rl": 2})
  file.write(row("rl", 4))
  assert file.rows() == [row("rl", 2), row("rl", 4)]


def test_roll_back_drops_what_will_be_written_again(file):
  for phase, step in [("pretrain", 10), ("eval", 0), ("rl", 2), ("rl", 4), ("eval", 4)]:
    file.write(row(phase, step))
  file.roll_back({"pretrain": 10, "rl": 2, "eval": 2})
  assert file.rows() == [row("pretrain", 10), row("eval", 0), row("rl", 2)]
  file.roll_back({"eval": -1})  # a phase not named keeps all
  assert file.rows() == [row("pretrain", 10), row("rl", 2)]


def test_roll_back_leaves_no_second_file_behind(file, tmp_path):
  file.write(row("rl", 2))
  file.roll_back({"rl": 9})
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_during_a_roll_back_leaves_the_old_rows(file, monkeypatch):
  file.write(row("rl", 2))
  before = file.path.read_bytes()

  def killed(self, target):
    raise KeyboardInterrupt

  monkeypatch.setattr(type(file.path), "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    file.roll_back({})
  assert file.path.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_becomes_null(file, value):
  file.write(row("rl", 2, loss=value))
  assert "null" in file.path.read_text()
  assert file.rows() == [row("rl", 2, loss=None)]


def test_text_of_any_kind_stays_on_one_line(file):
  text = "a\nb\u2028c\u0085d\u6f22\r"
  file.write(row("eval", 0, text=text))
  assert file.rows() == [row("eval", 0, text=text)]


def test_write_json_replaces_the_whole_file(tmp_path):
  path = tmp_path / "summary.json"
  write_json(path, {"a": list(range(99))})
  write_json(path, {"b": 1})
  assert json.loads(path.read_text()) == {"b": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_process_that_does_not_write_knows_the_same_rows(tmp_path):
  path = tmp_path / "metrics.jsonl"
  MetricsFile(path).write({"phase": "rl", "step": 1, "reward": 0.5})
  before = path.read_bytes()
  other = MetricsFile(path, writes=False)
  other.write({"phase": "rl", "step": 2, "reward": math.nan})
  assert [r["step"] for r in other.phase("rl")] == [1, 2]
  assert other.rows()[1]["reward"] is None
  other.roll_back({"rl": 1})
  assert [r["step"] for r in other.rows()] == [1]
  assert path.read_bytes() == before
