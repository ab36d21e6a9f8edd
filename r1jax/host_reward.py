"""The host's rewards inside the compiled step: a callback with each device's own rows.

Every device's callback runs in the process that holds its rows, decodes them and asks
the scorer; results come back where the rows stood. Devices along the tensor axis hold
the same rows: the first of them asks, for all.

An error cannot travel through a compiled program. It is kept and its samples count as
lost, so that the step does no harm; the loop raises it with `check`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rewards.scorer import Scorer
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout
from r1jax.sharding import BATCH


class HostReward:
  """A reward function for the step: (PromptBatch, Rollout) -> Rewards."""

  def __init__(self, scorer: Scorer, problems: Sequence[Problem], tokenizer: Tokenizer):
    """Args: the scorer; the problems that the batches' ids count; the tokenizer."""
    self.scorer, self.problems, self.tokenizer = scorer, problems, tokenizer
    self._error: Exception | None = None
    self._lost: str = ""

  def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Rewards:
    names = list(self.scorer.weights)
    parts, outcome = _on_each_device(
      self._on_host, len(names), prompts.ids, rollout.tokens, rollout.mask
    )
    weighted = {
      name: (self.scorer.weights[name], parts[:, :, i]) for i, name in enumerate(names)
    }
    return Rewards.of(outcome, **weighted)

  def check(self) -> None:
    """Raises the error that a step met, a rule's UserError say, and a UserError where
    a whole step was lost."""
    if self._error:
      raise self._error
    if self._lost:
      raise UserError(
        f"no sample of a step could be scored: {self._lost}. The run stands at its"
        " last checkpoint; mend the cause and give the same command again."
      )

  def _on_host(self, ids: Any, tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    ids, tokens, mask = (np.asarray(x) for x in (ids, tokens, mask))
    b, g, _ = tokens.shape
    samples = [
      (self.tokenizer.decode(tokens[i, j][mask[i, j]]), self.problems[ids[i]])
      for i in range(b)
      for j in range(g)
    ]
    names = list(self.scorer.weights)
    parts = np.zeros((b * g, len(names)), np.float32)
    outcome = np.full(b * g, OUTCOMES.index("infrastructure"), np.int32)
    try:
      scored = self.scorer.score(samples)
    except Exception as error:
      self._error = self._error or error
      scored = []
    for i, said in enumerate(scored):
      parts[i] = [said.parts[name] for name in names]
      outcome[i] = OUTCOMES.index(said.outcome)
    if scored and all(said.outcome == "infrastructure" for said in scored):
      self._lost = scored[0].detail
    return parts.reshape(b, g, -1), outcome.reshape(b, g)


def _on_each_device(
  on_host: Callable, width: int, ids: jax.Array, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(parts [B, G, width] float32, outcome [B, G] int32) from a callback a device."""

  def ask(ids, tokens, mask):
    b, g, _ = tokens.shape
    shapes = (
      jax.ShapeDtypeStruct((b, g, width), jnp.float32),
      jax.ShapeDtypeStruct((b, g), jnp.int32),
    )
    return jax.pure_callback(on_host, shapes, ids, tokens, mask)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ask(ids, tokens, mask)

  def once(ids, tokens, mask):
    if mesh.shape["tensor"] == 1:
      return ask(ids, tokens, mask)
    b, g, _ = tokens.shape
    nothing = jnp.zeros((b, g, width)), jnp.zeros((b, g), jnp.int32)
    said = jax.lax.cond(
      jax.lax.axis_index("tensor") == 0,
      lambda: ask(ids, tokens, mask),
      lambda: nothing,
    )
    return jax.lax.psum(said, "tensor")

  rows = P(BATCH)
  return jax.shard_map(
    once, in_specs=(rows, rows, rows), out_specs=(rows, rows), check_vma=False
  )(ids, tokens, mask)
