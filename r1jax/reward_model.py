"""R1's two reward models: the policy's network with a head that gives a response a
number s (arXiv 2501.12948, sections 3.1 and B.2).

The helpful one learns from pairs and reads the summary alone; the safety one learns
from single responses, safe or not, and reads the thinking too. A state starts as

  train_state.restart(*from_policy(params, router, width), optimizer, reference=False)

with a trunk from a policy and a head of 0 (models/value.py): every s is 0 at first.
The router biases stay as they are. The papers print no loss: both are the usual ones.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import sharding
from r1jax.errors import UserError
from r1jax.models.sequence import Sequence
from r1jax.models.value import Value
from r1jax.optimizer import accumulate, descend
from r1jax.train_state import TrainState


@struct.dataclass
class Responses:
  """A left-padded prompt, then a right-padded completion."""

  prompts: jax.Array  # M P int32
  prompt_mask: jax.Array  # M P bool
  completions: jax.Array  # M T int32
  completion_mask: jax.Array  # M T bool, through the stop token


@struct.dataclass
class Pairs:
  """Two responses each to M prompts."""

  chosen: Responses
  rejected: Responses
  valid: jax.Array  # M bool, False for the rows that fill up the last batch


@struct.dataclass
class Labelled:
  """Responses, and whether each is safe."""

  responses: Responses
  safe: jax.Array  # M bool
  valid: jax.Array  # M bool, as in Pairs


# -- scores ----------------------------------------------------------------------------


def _everything(responses: Responses, end_think_id: int) -> jax.Array:
  return responses.completion_mask


def _summary(responses: Responses, end_think_id: int) -> jax.Array:
  """What follows the last `</think>`; nothing where the thinking did not end."""
  ends = (responses.completions == end_think_id) & responses.completion_mask
  count = ends.sum(axis=1, keepdims=True)
  after = (jnp.cumsum(ends, axis=1) == count) & (count > 0) & ~ends
  return after & responses.completion_mask


VIEWS: dict[str, Callable[[Responses, int], jax.Array]] = {
  "all": _everything,  # the safety model's
  "summary": _summary,  # the helpful model's
}


def read(responses: Responses, view: str, end_think_id: int) -> jax.Array:
  """Which tokens a model sees: the prompt, and of the completion what its view keeps.

  Args:
    responses: M of them.
    view: a name in VIEWS.
    end_think_id: the token `</think>`; one that stands in the prompt ends no thinking.

  Returns:
    [M, P + T] bool.

  Raises:
    UserError: there is no such view.
  """
  if view not in VIEWS:
    raise UserError(
      f"the view {view!r} of a reward model is not one of {', '.join(VIEWS)}; take"
      " 'summary' for helpfulness and 'all' for safety."
    )
  kept = VIEWS[view](responses, end_think_id)
  return jnp.concatenate([responses.prompt_mask, kept], axis=1)


def score(
  value: Value,
  params: Any,
  router: Any,
  responses: Responses,
  view: str,
  end_think_id: int,
) -> jax.Array:
  """s, the head's number at the last token that is read.

  Dropped tokens belong to no segment and take no position, so that a summary's score is
  the one that it has without any thinking before it. Where nothing of the completion is
  read, s is said at the end of the prompt.

  Args:
    value: the network.
    params, router: its variables.
    responses: M of them.
    view, end_think_id: as in `read`.

  Returns:
    [M] float32.
  """
  keep = read(responses, view, end_think_id)
  tokens = jnp.concatenate([responses.prompts, responses.completions], axis=1)
  values, _ = value.apply(
    {"params": params, "router": router},
    sharding.shard_batch(tokens),
    Sequence.of_mask(keep),
  )
  last = keep.shape[1] - 1 - jnp.argmax(keep[:, ::-1], axis=1)
  return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


# -- losses ----------------------------------------------------------------------------


def pairwise_loss(
  chosen: jax.Array, rejected: jax.Array, valid: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
  """-mean log sigmoid(s_chosen - s_rejected), the Bradley-Terry likelihood.

  Args:
    chosen, rejected: [m] float32 scores.
    valid: [m] bool, the pairs that have a loss.
    count: [] of the whole batch's valid pairs, the mean's divisor.

  Returns:
    (loss, metrics), shares of the batch's.
  """
  mean_score = _mean(0.5 * (chosen + rejected), valid, count)
  return _likelihood(chosen - rejected, mean_score, valid, count)


def pointwise_loss(
  scores: jax.Array, safe: jax.Array, valid: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
  """Cross-entropy of the probability sigmoid(s) of being safe:
  -mean [safe] log sigmoid(s) + [unsafe] log sigmoid(-s).

  Args:
    scores: [m] float32.
    safe: [m] bool.
    valid, count: as in `pairwise_loss`.

  Returns:
    (loss, metrics), shares of the batch's.
  """
  towards_label = jnp.where(safe, scores, -scores)
  return _likelihood(towards_label, _mean(scores, valid, count), valid, count)


def _likelihood(
  margins: jax.Array, mean_score: jax.Array, valid: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict]:
  """-mean log sigmoid(margin), of how far each row's scores say what its label says."""
  margins = jnp.where(valid, margins, 0.0)  # so that a row without a loss gives no NaN
  loss = _mean(-jax.nn.log_sigmoid(margins), valid, count)
  metrics = {
    "loss": loss,
    "accuracy": _mean(0.5 * (1.0 + jnp.sign(margins)), valid, count),  # a tie is half
    "margin": _mean(margins, valid, count),
    "score_mean": mean_score,  # no loss on pairs holds it: it may drift
  }
  return loss, jax.lax.stop_gradient(metrics)


def _mean(x: jax.Array, valid: jax.Array, count: jax.Array) -> jax.Array:
  return jnp.where(valid, x, 0.0).sum() / jnp.maximum(count, 1)


# -- updates ---------------------------------------------------------------------------


def pairwise_step(
  state: TrainState,
  batch: Pairs,
  *,
  value: Value,
  optimizer: optax.GradientTransformation,
  view: str,
  end_think_id: int,
  micro_batches: int = 1,
) -> tuple[TrainState, dict]:
  """One update on pairs; both responses of a pair are scored in one forward pass."""
  count = batch.valid.sum()

  def loss_fn(params, part):
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), part.chosen, part.rejected)
    scores = score(value, params, state.router, both, view, end_think_id)
    loss, metrics = pairwise_loss(*jnp.split(scores, 2), part.valid, count)
    return loss, (metrics, (), ())

  return _update(state, batch, loss_fn, optimizer, micro_batches)


def pointwise_step(
  state: TrainState,
  batch: Labelled,
  *,
  value: Value,
  optimizer: optax.GradientTransformation,
  view: str,
  end_think_id: int,
  micro_batches: int = 1,
) -> tuple[TrainState, dict]:
  """One update on labelled responses."""
  count = batch.valid.sum()

  def loss_fn(params, part):
    scores = score(value, params, state.router, part.responses, view, end_think_id)
    loss, metrics = pointwise_loss(scores, part.safe, part.valid, count)
    return loss, (metrics, (), ())

  return _update(state, batch, loss_fn, optimizer, micro_batches)


def _update(
  state: TrainState,
  batch: Pairs | Labelled,
  loss_fn: Callable[[Any, Any], tuple[jax.Array, tuple[dict, Any, Any]]],
  optimizer: optax.GradientTransformation,
  micro_batches: int,
) -> tuple[TrainState, dict]:
  grads, metrics, _, _ = accumulate(loss_fn, state.params, batch, micro_batches)
  params, opt_state, finite = descend(
    optimizer, grads, state.params, state.opt_state, learnt=batch.valid.any()
  )
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  norm = optax.tree.norm(grads)
  return state, {**metrics, "grad_norm": norm, "skipped": 1.0 - finite}
