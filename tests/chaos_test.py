"""tests/chaos.py, small; python -m pytest -m slow tests/chaos_test.py for all of it."""

import json
import random

import chaos
import pytest

pytestmark = pytest.mark.xdist_group("chaos")  # they share a run


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """A run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("chaos") / "one"
  chaos.whole(folder, 1)
  return folder


def test_a_run_that_is_killed_twice_ends_where_it_would_have_ended(one):
  killed = one.with_name("killed")
  saves = len(chaos.digests(one))
  done = chaos.disturbed(killed, 2, 1, saves, random.Random(1))
  assert chaos.differences(one, killed) == [], done


def test_every_save_has_its_digest(one):
  saves = chaos.digests(one)
  assert {step for stage, step in saves if stage == "rl"} == set(range(2, 17, 2))
  assert all(len(found) == 1 for found in saves.values())
  assert len({min(found) for found in saves.values()}) == len(saves)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--kills=5"], ["--kills=3", "--processes=2"]])
def test_many_kills(flags, capsys):
  assert chaos.main(flags) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_what_is_not_restored_is_seen(capsys):
  assert chaos.main(["--broken"]) == 0
  assert json.loads(capsys.readouterr().out)["broken"]["whole"] == []
