"""tests/chaos.py, small; python -m pytest -m slow tests/chaos_test.py for all of it."""

import json
import random

import chaos
import pytest

pytestmark = pytest.mark.xdist_group("chaos")  # they share a run


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """(a run that nothing disturbed, its seconds)."""
  folder = tmp_path_factory.mktemp("chaos") / "one"
  return folder, chaos.whole(folder, 1)


def test_a_run_that_is_killed_twice_ends_where_it_would_have_ended(one):
  folder, seconds = one
  done = chaos.disturbed(
    folder.with_name("killed"), 2, 1, 0.9 * seconds, random.Random(1)
  )
  assert len(done) == 2, done
  assert chaos.differences(folder, folder.with_name("killed")) == [], done


def test_every_save_has_its_digest(one):
  saves = chaos.digests(one[0])
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
