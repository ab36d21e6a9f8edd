"""Group Relative Policy Optimisation (arXiv 2402.03300; arXiv 2501.12948, section 2.1).

A step in four sentences: the policy samples G completions a prompt. A rule scores them
and each group's rewards become advantages. The rows are shuffled into K minibatches,
and each gives one clipped policy-gradient update with a KL term against the reference.
After every update the router biases move by the experts' load, and every N updates the
reference becomes the policy.

`whole_step` is all of it in one program; `experience` and `update` are the pieces that
the loop runs one by one when a step is too long to lose.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax import diagnostics, lora
from r1jax.advantages import ADVANTAGES, group_relative
from r1jax.dynamic_sampling import Slots, collect
from r1jax.errors import UserError
from r1jax.experience import (
  Rows,
  completion_logprobs,
  counted,
  packed,
  recall,
  shaped,
  shuffled,
)
from r1jax.models import moe
from r1jax.models.policy import Policy
from r1jax.moe_losses import auxiliary_losses
from r1jax.optimizer import accumulate, accumulate_while, descend
from r1jax.policy_loss import Totals, policy_loss
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout, sample
from r1jax.step_config import StepConfig
from r1jax.train_state import Reference, TrainState

# What a random draw is for.
ROLLOUT, SHUFFLE = 0, 1


def key_of(key: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
  """fold_in(fold_in(key, step), purpose): nothing random depends on anything else."""
  return jax.random.fold_in(jax.random.fold_in(key, step), purpose)


class GRPOConfig(StepConfig):
  """A step of GRPO."""

  def __post_init__(self):
    super().__post_init__()
    o = self.objective
    if self.group_size < 2:
      raise UserError(
        f"config.grpo.group_size={self.group_size}: a group-relative advantage needs at"
        " least 2 outputs a prompt (the paper uses 16)."
      )
    if o.advantage == "gae":
      raise UserError(
        "config.objective.advantage='gae' needs a value model: python -m"
        f" experiments.ppo. Here it is one of {', '.join(sorted(ADVANTAGES))}."
      )
    if not 0 <= o.std_ddof < self.group_size:
      raise UserError(
        f"config.objective.std_ddof={o.std_ddof} must lie in 0..group_size - 1 ="
        f" {self.group_size - 1}."
      )


@jax.named_scope("experience")
def experience(
  state: TrainState,
  slots: Slots,
  key: jax.Array,
  *,
  policy: Policy,
  config: GRPOConfig,
) -> tuple[Rows, dict]:
  """Scores the sampled groups and splits them into shuffled minibatches.

  Advantages are taken over whole groups before the shuffle breaks them apart.

  Returns:
    (Rows with leading axes [K, B * G / K], metrics of the rollout).
  """
  c, o = config, config.objective
  rows = recall(counted(slots, o), state.asked, policy, c)
  rewards = shaped(slots, rows, o, c.max_tokens)
  advantages = group_relative(rewards, slots.filled, o).reshape(-1, 1)
  rows = rows.replace(advantages=jnp.broadcast_to(advantages, rows.completions.shape))
  metrics = diagnostics.of_batch(slots, rewards, rows.advantages)
  order = key_of(key, state.step, SHUFFLE)
  return shuffled(rows, order, c.minibatches, c.unit), metrics


@jax.named_scope("update")
def update(
  state: TrainState,
  rows: Rows,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  config: StepConfig,
) -> tuple[TrainState, dict, dict]:
  """One minibatch: gradient, AdamW, router biases, and the reference when it is due.

  Args:
    state: before.
    rows: [M, ...], the minibatch.

  Returns:
    (state, metrics, {"logprobs", "ratio", "clipped"} of every token [M, T]).
  """
  c = config
  totals = Totals.of(rows)
  weights, whole = lora.split(policy, state.params)

  def loss_fn(weights, some, part=None):
    params = whole(weights)
    logprobs, out = completion_logprobs(
      policy,
      params,
      state.router,
      some,
      c.temperature,
      replay=c.routing_replay,
      group=c.unit,
      part=part,
    )
    loss, (metrics, per_token) = policy_loss(
      logprobs, some, c.objective, totals, window=c.max_tokens
    )
    extra, figures, load = auxiliary_losses(
      policy,
      params,
      state.router,
      some,
      out,
      batch=rows,
      balance_coef=c.balance_coef,
      mtp_coef=c.mtp_coef,
      part=part,
    )
    return loss + extra, ({**metrics, **figures}, load, per_token)

  if c.pack:
    found = accumulate_packed(loss_fn, weights, rows, c)
  else:
    found = accumulate(loss_fn, weights, rows, c.micro_batches, c.unit)
  grads, metrics, load, per_token = found
  learnt = rows.mask.any()  # not of empty slots, masked or lost samples alone
  params, opt_state, finite = descend(
    optimizer, grads, lora.trained(state.params), state.opt_state, learnt=learnt
  )
  router = state.router
  if c.bias_rate:
    router = moe.balance(router, load, jnp.where(finite, c.bias_rate, 0.0))
  step = state.step + 1
  reference = state.reference
  if c.reference_refresh and reference is not None:
    reference = jax.lax.cond(
      step % c.reference_refresh == 0,
      lambda: Reference(params, router),
      lambda: state.reference,
    )
  metrics["grad_norm"] = optax.tree.norm(grads)
  metrics["skipped"] = 1.0 - finite
  metrics["load_imbalance"] = moe.load_imbalance(load)
  params = lora.put(state.params, params)
  return TrainState(step, params, router, opt_state, reference), metrics, per_token


def accumulate_packed(
  loss_fn: Callable, params: Any, rows: Rows, config: StepConfig
) -> tuple[Any, dict, Any, dict]:
  """As `accumulate`, of outputs that stand side by side in rows (packing.py). All do,
  those without a loss too: their tokens count in the experts' load.

  Args:
    loss_fn: (params, rows, the part of the packed rows that is computed) -> as there;
      only outputs of the part have a loss.
    params: where the gradient is taken.
    rows: the minibatch.
    config: its `pack` and `micro_batches`.
  """
  ordered, places = packed(rows, config, config.micro_batches)

  def of_part(params, i):
    part = places.part(i)
    here = ordered.replace(in_loss=ordered.in_loss & part.here)
    loss, (metrics, load, per_token) = loss_fn(params, here, part)
    kept = jax.tree.map(lambda x: jnp.where(part.here[:, None], x, 0), per_token)
    return loss, (metrics, load, kept)

  grads, metrics, load, per_token = accumulate_while(of_part, params, places.parts)
  metrics["packing_efficiency"] = places.efficiency
  return grads, metrics, load, places.unsort(per_token)


def draw(
  state: TrainState,
  key: jax.Array,
  *,
  policy: Policy,
  config: StepConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> Callable[[PromptBatch, jax.Array], Rollout]:
  """The step's sampler: (problems, how often each stood before) -> rollout."""
  c = config

  def sampled(prompts, earlier):
    return sample(
      policy,
      state.params,
      state.router,
      prompts,
      key_of(key, state.step, ROLLOUT),
      earlier=earlier,
      **c.sampling(stop_ids=stop_ids, pad_id=pad_id),
    )

  return sampled


def whole_step(
  state: TrainState,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], Rewards],
  config: GRPOConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> tuple[TrainState, Rollout, dict, diagnostics.Trace]:
  """Rollout, reward, advantages and K updates; pure, and meant for one `jax.jit`.

  Args:
    state: donated by the caller's jit.
    prompts: B problems, or pool * B for dynamic sampling.
    key: the run's key; the draw of a step depends on it and on `state.step` alone.
    policy, optimizer, reward_fn, config, stop_ids, pad_id: static.

  Returns:
    (state after K updates, the rollout that was trained on, metrics as float32 scalars,
    the tokens of a few groups).
  """
  c = config
  sampler = draw(state, key, policy=policy, config=c, stop_ids=stop_ids, pad_id=pad_id)
  slots = collect(prompts, sampler, reward_fn, c.objective)
  rows, metrics = experience(state, slots, key, policy=policy, config=c)

  def one(state, part):
    state, figures, per_token = update(
      state, part, policy=policy, optimizer=optimizer, config=c
    )
    return state, (figures, per_token)

  state, (per_update, per_token) = jax.lax.scan(one, state, rows)
  traced = diagnostics.trace(rows, per_token, slots, c.traced_groups * c.group_size)
  metrics = {**metrics, **diagnostics.over_updates(per_update)}
  return state, slots.rollout.spoken(), metrics, traced
