"""Gradients over micro-batches, and AdamW with warm-up and a schedule."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  learning_rate: float  # peak
  steps: int  # updates the schedule spans
  warmup_steps: int = 0
  schedule: str = "constant"  # or "cosine", down to final_fraction of the peak
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # of the global gradient
  moments: str = "float32"  # or "bfloat16": half the memory of AdamW's two moments


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """Update number -> learning rate."""
  c = config
  if c.schedule not in ("constant", "cosine"):
    raise UserError(
      f"config.optimizer.schedule={c.schedule!r} must be 'constant' or 'cosine'."
    )
  rest = max(c.steps - c.warmup_steps, 1)
  if c.schedule == "cosine":
    main = optax.cosine_decay_schedule(c.learning_rate, rest, c.final_fraction)
  else:
    main = optax.constant_schedule(c.learning_rate)
  # The first update already moves: warm-up runs from 1/warmup to 1.
  warm = optax.linear_schedule(
    c.learning_rate / max(c.warmup_steps, 1),
    c.learning_rate,
    max(c.warmup_steps - 1, 1),
  )
  return optax.join_schedules([warm, main], [c.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW; norms' scales are not decayed."""
  c = config
  if c.moments not in ("float32", "bfloat16"):
    raise UserError(
      f"config.optimizer.moments={c.moments!r} must be 'float32' or 'bfloat16'."
    )

  def matrices(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: getattr(path[-1], "key", None) != "scale", params
    )

  adamw = optax.adamw(
    learning_rate(c),
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mask=matrices,
  )
  if c.moments != "float32":
    adamw = kept_as(adamw, jnp.dtype(c.moments))
  return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw)


def kept_as(
  optimizer: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
  """The optimizer with its floating-point state rounded to a dtype between updates,
  each of which computes in the gradient's dtype."""

  def cast(state, dtype):
    def one(x):
      return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, state)

  def update(grads, state, params=None):
    wide = jax.tree.leaves(grads)[0].dtype
    updates, state = optimizer.update(grads, cast(state, wide), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(
    lambda params: cast(optimizer.init(params), dtype), update
  )


@jax.named_scope("optimizer")
def descend(
  optimizer: optax.GradientTransformation,
  grads: Any,
  params: Any,
  opt_state: Any,
  *,
  learnt: jax.Array | None = None,
) -> tuple[Any, Any, jax.Array]:
  """One update, or none at all where the gradient is not finite: neither weights nor
  moments nor the optimizer's count change then.

  Args:
    optimizer: its transformation.
    grads, params, opt_state: of the same tree.
    learnt: [] bool; where False nothing changes at all, so that AdamW's momentum does
      not move weights on a batch without a loss. None: there always is one.

  Returns:
    (params, opt_state, [] bool: the gradient is finite).
  """
  updates, new_state = optimizer.update(grads, opt_state, params)
  new = optax.apply_updates(params, updates), new_state
  finite = jnp.isfinite(optax.tree.norm(grads))
  takes = finite if learnt is None else finite & learnt
  kept = jax.tree.map(lambda a, b: jnp.where(takes, a, b), new, (params, opt_state))
  return *kept, finite


def _zeros(shapes, wide=True):
  """Sums to begin with; of gradients in float32, whatever those of a part are in."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32 if wide else x.dtype), shapes
  )


def accumulate_while(
  loss_fn: Callable[[Any, jax.Array], tuple[jax.Array, tuple[dict, Any, Any]]],
  params: Any,
  parts: jax.Array,
) -> tuple[Any, dict, Any, Any]:
  """As `accumulate`, of parts whose number is known on the device alone.

  Args:
    loss_fn: (params, part's number) -> (loss, (metrics, counts, per_row)), all of which
      add up, but for metrics named `_max`.
    params: where the gradient is taken.
    parts: [] int32, at least 1.

  Returns:
    (gradients, metrics, counts, per_row).
  """
  grad_fn = jax.grad(loss_fn, has_aux=True)

  def add(i, total):
    (grads, (metrics, *rest)), (summed, sums) = grad_fn(params, i), total
    metrics = {
      k: (jnp.maximum if k.endswith("_max") else jnp.add)(summed[k], v)
      for k, v in metrics.items()
    }
    return metrics, jax.tree.map(jnp.add, sums, (grads, *rest))

  grads, (metrics, *rest) = jax.eval_shape(grad_fn, params, jnp.int32(0))
  metrics = {
    k: jnp.full(x.shape, -jnp.inf if k.endswith("_max") else 0, x.dtype)
    for k, x in metrics.items()
  }
  zeros = _zeros(grads), *_zeros(rest, wide=False)
  metrics, (grads, *rest) = jax.lax.fori_loop(0, parts, add, (metrics, zeros))
  return grads, metrics, *rest


def accumulate(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, tuple[dict, Any, Any]]],
  params: Any,
  batch: Any,
  micro_batches: int,
  group: int = 1,
) -> tuple[Any, dict, Any, Any]:
  """The gradient of a sum of losses, one part of the batch at a time.

  Part i takes groups i, i + n, ..., so that every part is spread over all devices.

  Args:
    loss_fn: (params, part) -> (loss, (metrics, counts, per_row)); losses, metrics and
      counts of the parts add up to those of the batch (metrics named `_max` take the
      maximum); per_row holds arrays whose first axis is the part's rows.
    params: where the gradient is taken.
    batch: arrays with a common first axis, that n * group divides.
    micro_batches: n.
    group: rows that stay together.

  Returns:
    (gradients, metrics, counts, per_row in the order of the batch's rows).

  Raises:
    ValueError: the rows do not divide into the parts.
  """
  rows = jax.tree.leaves(batch)[0].shape[0]
  if rows % (micro_batches * group):
    raise ValueError(
      f"{rows} rows do not divide into micro_batches={micro_batches} equal parts of"
      f" whole groups of {group}; use a divisor of {rows // group}."
    )
  grad_fn = jax.grad(loss_fn, has_aux=True)

  def cut(x):
    x = x.reshape(-1, micro_batches, group, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(micro_batches, -1, *x.shape[3:])

  def join(x):
    x = x.reshape(micro_batches, -1, group, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(rows, *x.shape[3:])

  parts = jax.tree.map(cut, batch)

  def add(total, part):
    grads, (metrics, counts, per_row) = grad_fn(params, part)
    return jax.tree.map(jnp.add, total, (grads, counts)), (metrics, per_row)

  shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts))
  zeros = _zeros(shapes[0]), _zeros(shapes[1][1], wide=False)
  (grads, counts), (metrics, per_row) = jax.lax.scan(add, zeros, parts)
  metrics = {
    k: v.max(axis=0) if k.endswith("_max") else v.sum(axis=0)
    for k, v in metrics.items()
  }
  return grads, metrics, counts, jax.tree.map(join, per_row)
