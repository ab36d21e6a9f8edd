"""Checkpoints at step boundaries: the whole TrainState and what the host needs.

Orbax's v1 API behind three verbs. `host` is a small JSON-like tree: the position of the
problem stream, and the clock by phase.
"""

import pathlib
from typing import Any
import warnings

import jax
from orbax.checkpoint import v1 as ocp

from r1jax.errors import UserError


class Checkpoints:
  """The numbered checkpoints of one stage of a run."""

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    self.folder = folder
    policies = ocp.training.save_decision_policies
    preserve = ocp.training.preservation_policies
    self._checkpointer = ocp.training.Checkpointer(
      folder,
      save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when
      preservation_policy=preserve.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  def latest(self) -> int | None:
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def save(self, step: int, state: Any, host: dict) -> None:
    """Writes a temporary folder, then renames it: a killed save leaves the last one."""
    self._checkpointer.save_checkpointables(step, {"state": state, "host": host})

  def restore_host(self, step: int) -> dict:
    return self._load(step, {"host": None})["host"]

  def restore(self, step: int, shapes: Any, shardings: Any) -> Any:
    """The state of a step, as arrays on the mesh of `shardings`.

    Args:
      step: an existing one.
      shapes: the state's tree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of shardings.
    """
    abstract = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    return self._load(step, {"state": abstract})["state"]

  def weights(self, step: int) -> tuple[Any, Any]:
    """(params, router) of a step's policy, whatever stage it is of."""
    with warnings.catch_warnings():  # of another mesh than the run's: it is told none
      warnings.simplefilter("ignore")
      state = self._load(step, {"state": None})["state"]
    state = state.get("policy", state)  # PPO's beside its value model
    return state["params"], state.get("router") or {}

  def close(self) -> None:
    self._checkpointer.close()

  def _load(self, step: int, what: dict) -> dict:
    try:
      return self._checkpointer.load_checkpointables(step, what)
    except Exception as error:
      raise UserError(
        f"checkpoint {step} in {self.folder} cannot be read: {_root_cause(error)}."
        f" Remove {self.folder / str(step)} to fall back to an older one, or start in"
        " another --workdir."
      ) from error


def _root_cause(error: BaseException) -> BaseException:
  while (inner := error.__cause__ or error.__context__) is not None:
    error = inner
  return error
