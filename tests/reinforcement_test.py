"""What the loop says of a rollout whose logits were not finite."""

import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command
from r1jax import reinforcement
from r1jax.errors import NumericalError, UserError
from r1jax.metrics import MetricsFile
from r1jax.rollout import Rollout


def test_the_step_the_row_and_the_norms_are_named():
  mask = np.zeros((2, 3, 5), bool)
  mask[1, 2, :4] = True
  bad = np.zeros((2, 3), bool)
  bad[1, 2] = True
  norms = np.zeros((2, 3, 2), np.float32)
  norms[1, 2] = 12.5, np.nan
  zeros = jnp.zeros((2, 3, 5))
  said = Rollout(zeros, mask, zeros, zeros, zeros, nonfinite=bad, norms=norms)
  this = types.SimpleNamespace(workdir=pathlib.Path("runs/x"))
  text = reinforcement.broken_off(this, 12, said, 0.2)
  for part in ("update 12", "token 4 of output 2 of row 1", "12.5, nan", "runs/x"):
    assert part in text


def test_the_third_rollout_in_a_row_without_a_gradient_ends_the_run(tmp_path):
  """Those before are kept for people to look at, and so is this one."""
  mask = np.ones((2, 3, 5), bool)
  ones = np.ones((2, 3, 5))
  said = Rollout(ones, mask, ones, ones, np.ones((2, 3), bool))
  told, metrics = [], MetricsFile(tmp_path / "metrics.jsonl")
  this = types.SimpleNamespace(
    workdir=tmp_path, metrics=metrics, progress=types.SimpleNamespace(say=told.append)
  )
  for step, share in ((2, 0.5), (4, 0.0), (6, 1.0), (8, 0.5)):
    figures = {"skipped": share, "reward": 1.0}
    if share:
      reinforcement.skipped(this, step, said, figures)
    metrics.write({"phase": "rl", "step": step, **figures})
  assert [text.partition(":")[0] for text in told] == [f"update {n}" for n in (2, 6, 8)]
  with pytest.raises(NumericalError, match="third rollout in a row"):
    reinforcement.skipped(this, 10, said, {"skipped": 1.0})
  names = sorted(path.name for path in (tmp_path / "bad_steps").iterdir())
  assert names == ["10.npz", "2.npz", "6.npz", "8.npz"]
  with np.load(tmp_path / "bad_steps" / "6.npz") as kept:
    assert kept["tokens"].shape == (2, 3, 5) and kept["reward"] == 1.0


def test_adapters_of_another_base_are_refused():
  then = {"params/embedding": "00ff", "params/head": "1234"}
  reinforcement.check_base("runs/mine", then, dict(then))
  with pytest.raises(UserError, match=r"runs/mine.*params/head.*init_from"):
    reinforcement.check_base("runs/mine", then, then | {"params/head": "1235"})


def test_it_ends_the_command_with_exit_code_3(monkeypatch, capsys):
  def main(config, workdir):
    raise NumericalError("logits are not finite")

  monkeypatch.setattr(command, "parse", lambda argv, file: (None, ""))
  with pytest.raises(SystemExit) as stop:
    command.run(main, "")
  assert stop.value.code == 3
  assert capsys.readouterr().err == "error: logits are not finite\n"
