"""What the loop says of a rollout whose logits were not finite."""

import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command
from r1jax import reinforcement
from r1jax.errors import NumericalError
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


def test_it_ends_the_command_with_exit_code_3(monkeypatch, capsys):
  def main(config, workdir):
    raise NumericalError("logits are not finite")

  monkeypatch.setattr(command, "parse", lambda argv, file: (None, ""))
  with pytest.raises(SystemExit) as stop:
    command.run(main, "")
  assert stop.value.code == 3
  assert capsys.readouterr().err == "error: logits are not finite\n"
