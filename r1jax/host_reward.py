"""The host's rewards inside the compiled step: a callback with each device's own rows.

Every device's callback runs in the process that holds its rows, decodes them and asks
the scorer; results come back where the rows stood. Devices along the tensor axis hold
the same rows: the first of them asks, for all.

An error cannot travel through a compiled program. It is kept and its samples count as
lost, so that the step does no harm; the loop raises it with `check`.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import functools
import time
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
from r1jax.rewards.journal import Journal
from r1jax.rewards.scorer import Scorer
from r1jax.rewards.total import Breakdown
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout
from r1jax.sharding import BATCH


class HostReward:
  """A reward function for the step: (PromptBatch, Rollout) -> Rewards."""

  def __init__(
    self,
    scorer: Scorer,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    journal: Journal | None = None,
  ):
    """Args: the scorer; the problems that the batches' ids count; the tokenizer; what
    has been said of rollouts that a killed run draws again."""
    self.scorer, self.problems, self.tokenizer = scorer, problems, tokenizer
    self.journal = journal
    self.seconds = 0.0  # that steps have waited for it, on this process
    # (problem, tokens) -> (the scores that a thread works on, which of them)
    self._ahead: dict[tuple[int, bytes], tuple[concurrent.futures.Future, int]] = {}
    self._worker = concurrent.futures.ThreadPoolExecutor(1)
    self._error: BaseException | None = None
    self._why = ""  # a sample was lost

  def __call__(self, prompts: PromptBatch, rollout: Rollout) -> Rewards:
    names = list(self.scorer.weights)
    parts, outcome = _on_each_device(
      self._on_host, len(names), prompts.ids, rollout.tokens, rollout.mask
    )
    weighted = {
      name: (self.scorer.weights[name], parts[:, :, i]) for i, name in enumerate(names)
    }
    return Rewards.of(outcome, **weighted)

  def ahead(self, ids: Sequence[int], outputs: Sequence[np.ndarray]) -> None:
    """Begins to score outputs, in a thread, while others are still being written. The
    step's own call finds their scores, or waits for them.

    Args:
      ids: of their problems.
      outputs: their tokens, without padding.
    """
    keys = [_key(i, tokens) for i, tokens in zip(ids, outputs, strict=True)]
    new = {
      key: tokens
      for key, tokens in zip(keys, outputs, strict=True)
      if key not in self._ahead
    }
    if not new:
      return
    pairs = [
      (self.tokenizer.decode(tokens), self.problems[i])
      for (i, _), tokens in new.items()
    ]
    scores = self._worker.submit(lambda: self._judged(pairs))
    for place, key in enumerate(new):
      self._ahead[key] = (scores, place)

  def _scores(self, ids: Sequence[int], outputs: Sequence[np.ndarray]) -> list:
    """Of the outputs, with what was begun ahead."""
    keys = [_key(i, tokens) for i, tokens in zip(ids, outputs, strict=True)]
    begun = [self._ahead.pop(key, None) for key in keys]
    left = [
      (self.tokenizer.decode(tokens), self.problems[i])
      for i, tokens, found in zip(ids, outputs, begun, strict=True)
      if found is None
    ]
    fresh = iter(self._judged(left))
    return [
      next(fresh) if found is None else found[0].result()[found[1]] for found in begun
    ]

  def _judged(self, samples: list[tuple[str, Problem]]) -> list[Breakdown]:
    """What the journal remembers, else what the scorer says."""
    if self.journal is None:
      return self.scorer.score(samples) if samples else []
    known = [self.journal.recall(*sample) for sample in samples]
    left = [x for x, said in zip(samples, known, strict=True) if said is None]
    scores = self.scorer.score(left) if left else []
    self.journal.keep(left, scores)
    fresh = iter(scores)
    return [next(fresh) if said is None else said for said in known]

  def check(self, lost: float) -> None:
    """Raises the error that a step met, a rule's UserError or Ctrl-C say, and a
    UserError where a whole step was lost.

    Args:
      lost: the share of the step's samples whose outcome is infrastructure.
    """
    if self._error:
      error, self._error = self._error, None
      raise error
    if lost == 1.0:
      raise UserError(
        f"no sample of a step could be scored: {self._why}. The run stands at its last"
        " checkpoint; mend the cause and give the same command again."
      )

  def _on_host(
    self, shape: tuple[int, int, int], ids: Any, *pieces: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """The callback: (parts [B, G, width] float32, outcome [B, G] int32).

    Args:
      shape: B, G, T of the device's rows.
      ids: [B].
      pieces: their tokens, -1 where there is none, in pieces.
    """
    b, g, _ = shape
    begun = time.monotonic()
    names = list(self.scorer.weights)
    parts = np.zeros((b * g, len(names)), np.float32)
    outcome = np.full(b * g, OUTCOMES.index("infrastructure"), np.int32)
    try:
      tokens = np.concatenate([np.asarray(x) for x in pieces]).reshape(b * g, -1)
      outputs = [row[row >= 0] for row in tokens]
      of_rows = [int(i) for i in np.asarray(ids) for _ in range(g)]
      for i, said in enumerate(self._scores(of_rows, outputs)):
        parts[i] = [said.parts[name] for name in names]
        outcome[i] = OUTCOMES.index(said.outcome)
        if said.outcome == "infrastructure":
          self._why = said.detail
    except BaseException as error:  # Ctrl-C too: the callback may be on any thread
      self._error = self._error or error
    self.seconds += time.monotonic() - begun
    return parts.reshape(b, g, -1), outcome.reshape(b, g)


def _key(problem: int, tokens: np.ndarray) -> tuple[int, bytes]:
  return int(problem), np.asarray(tokens, np.int32).tobytes()


# int32 of an operand of a callback. On CPU devices JAX copies operands of 100 KB and
# more in the threads that run the callbacks, and when all of them wait nobody copies.
_PIECE = 16_384


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
    flat = jnp.where(mask, tokens, -1).reshape(-1)
    size = _PIECE if jax.default_backend() == "cpu" else flat.size
    pieces = [flat[i : i + size] for i in range(0, flat.size, size)]
    call = functools.partial(on_host, tokens.shape)
    return jax.pure_callback(call, shapes, ids, *pieces)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ask(ids, tokens, mask)

  def once(ids, tokens, mask):
    if mesh.shape["tensor"] * mesh.shape["context"] == 1:
      return ask(ids, tokens, mask)
    b, g, _ = tokens.shape
    nothing = jnp.zeros((b, g, width)), jnp.zeros((b, g), jnp.int32)
    said = jax.lax.cond(
      jax.lax.axis_index(("tensor", "context")) == 0,
      lambda: ask(ids, tokens, mask),
      lambda: nothing,
    )
    return jax.lax.psum(said, ("tensor", "context"))

  rows = P(BATCH)
  return jax.shard_map(
    once, in_specs=(rows, rows, rows), out_specs=(rows, rows), check_vma=False
  )(ids, tokens, mask)
