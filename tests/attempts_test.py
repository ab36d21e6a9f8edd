"""Three attempts that reach nothing are enough; what a person did is none."""

import json

import pytest

from r1jax import attempts
from r1jax.errors import NumericalError, TransientError, UserError


def attempt(workdir, error=None, reached=None):
  with attempts.counted(workdir):
    if reached:
      (workdir / "checkpoints" / "rl" / str(reached)).mkdir(parents=True)
    if error:
      raise error


def killed(workdir):
  """What a kill leaves: a start, and half a line."""
  row = {"began": 0.0, "reached": attempts.reached(workdir)}
  with (workdir / attempts.NAME).open("a") as file:
    file.write(json.dumps(row) + '\n{"en')


def test_the_fourth_attempt_is_refused_with_the_ends_of_three(tmp_path):
  attempt(tmp_path, reached=2)
  for error in (TransientError("no peer"), OSError("disk\nfull")):
    with pytest.raises(type(error)):
      attempt(tmp_path, error)
  killed(tmp_path)
  with pytest.raises(NumericalError) as stop:
    attempt(tmp_path)
  text = str(stop.value)
  assert "{'rl': 2}" in text and str(tmp_path / attempts.NAME) in text
  assert text.splitlines()[-3:] == [
    "  TransientError: no peer",
    "  OSError: disk full",
    "  killed",
  ]
  (tmp_path / attempts.NAME).unlink()  # the remedy
  attempt(tmp_path)


def test_half_a_line_of_a_killed_writer_hides_no_start(tmp_path):
  with (tmp_path / attempts.NAME).open("a") as file:
    file.write('{"beg')
  for _ in range(attempts.MOST):
    with pytest.raises(OSError):
      attempt(tmp_path, OSError("x"))
  with pytest.raises(NumericalError):
    attempt(tmp_path)


def test_a_new_checkpoint_begins_the_count_again(tmp_path):
  for step in range(1, 8):
    with pytest.raises(OSError):
      attempt(tmp_path, OSError("x"), reached=step if step % 3 == 0 else None)


@pytest.mark.parametrize("error", [UserError("no such key"), KeyboardInterrupt()])
def test_what_a_person_did_does_not_count(tmp_path, error):
  for _ in range(5):
    with pytest.raises(type(error)):
      attempt(tmp_path, error)
  attempt(tmp_path)


def test_of_a_pipeline_a_checkpoint_and_a_line_of_any_stage_count(tmp_path):
  assert attempts.reached(tmp_path) == {}
  (tmp_path / "zero" / "checkpoints" / "rl" / "4").mkdir(parents=True)
  (tmp_path / "zero" / "checkpoints" / "rl" / "12").mkdir()
  (tmp_path / "zero" / "events.jsonl").write_text('{"name": "step"}\n')
  (tmp_path / "rejection").mkdir()
  (tmp_path / "rejection" / "samples.jsonl").write_text('{"step": 0}\n{"st')
  (tmp_path / "old" / "zero" / "checkpoints" / "rl" / "99").mkdir(parents=True)
  assert attempts.reached(tmp_path) == {"zero/rl": 12, "rejection": 1}
