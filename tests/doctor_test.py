"""The doctor: eight runs that were broken on purpose, and one that was not."""

import json
import re
import subprocess
import sys

import broken_runs
from broken_runs import BROKEN, recorded
import pytest

from experiments.configs.r1_zero import get_config
from r1jax import doctor


def names(rows, **how):
  return [complaint.name for complaint in doctor.examine(rows, **how)]


@pytest.mark.parametrize("name", BROKEN)
def test_the_cause_is_named_and_no_other(name):
  found = names(recorded(name))
  assert [x for x in found if x != doctor.NOTE or x == name] == [name]


def healthy(count=16):
  """Rows of a run that learns."""
  rows = [dict(row) for row in recorded("loss near 0")][:1] * count
  return [
    row
    | dict(accuracy=0.2 + 0.03 * i, reward=0.6 + 0.03 * i, kl=1e-3 * i, loss=0.01)
    | dict(equal_groups=0.1, entropy=0.3, format=0.9, length=12.0 + i, truncated=0.0)
    for i, row in enumerate(rows)
  ]


def test_a_run_that_learns_has_no_complaint():
  assert names(healthy()) == []


def test_a_run_that_has_solved_its_problems_has_none_either():
  solved = dict(accuracy=0.99, equal_groups=1.0, entropy=0.001, format=1.0)
  assert names([*healthy(), *[healthy()[-1] | solved] * 5]) == []


@pytest.mark.parametrize("count", range(doctor.LOOK))
def test_too_few_rollouts_say_nothing(count):
  assert names(recorded("truncated")[:count]) == []


def test_one_rollout_that_differs_is_enough_to_be_silent():
  rows = recorded("truncated")
  rows[-2] = rows[-2] | dict(truncated=0.5)
  assert "truncated" not in names(rows)
  assert "truncated" in names(rows, look=1)


def test_rows_without_a_figure_are_not_judged_by_it():
  rows = [row | dict(truncated=None) for row in recorded("truncated")]
  assert "truncated" not in names(rows)
  assert names([{"step": 1, "reward": 1.0}] * 5) == []


@pytest.mark.parametrize("name", BROKEN)
def test_every_knob_that_is_named_exists(name):
  (text,) = [c.text for c in doctor.examine(recorded(name)) if c.name == name]
  keys = re.findall(r"config\.([a-z_.]*[a-z_])", text)
  for key in keys:
    place = get_config("tiny")
    for part in key.split("."):
      assert part in place, key
      place = place[part]
  assert keys or name == doctor.NOTE


def command(*args):
  line = [sys.executable, "-m", "experiments.doctor", *map(str, args)]
  return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
  for name in ("no format", "loss near 0"):
    run = tmp_path / name.replace(" ", "_")
    run.mkdir()
    lines = [json.dumps({"phase": "rl", **row}) for row in recorded(name)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"phase": "r')
  return tmp_path


def test_the_command_says_it_of_a_folder_and_of_the_folders_in_it(folder):
  done = command(folder / "no_format")
  assert done.returncode == 0 and "! no format" in done.stdout
  assert "config.data.examples" in done.stdout
  said = json.loads(command(folder, "--json").stdout)
  assert [run["complaints"][0]["name"] for run in said.values()] == [
    *("loss near 0", "no format")
  ]


def test_a_folder_that_is_no_runs_is_named(tmp_path):
  for path, words in ((tmp_path, "metrics.jsonl"), (tmp_path / "none", "no folder")):
    done = command(path)
    assert done.returncode == 2 and words in done.stderr and str(path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_says_itself_what_ails_it(name, tmp_path):
  printed = broken_runs.run(name, tmp_path / "run")
  assert f"{name}: " in " ".join(printed.split())
  found = names(broken_runs.rows(tmp_path / "run"))
  assert [x for x in found if x != doctor.NOTE or x == name] == [name]
