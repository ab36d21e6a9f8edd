"""Proximal Policy Optimisation with a value model: the baseline of R1's appendix A.3.

A step in four sentences: the policy samples as in GRPO. The last token of an output
gets the rule's reward, and every token pays for its KL to the reference. A value model
of the policy's size predicts what is still to come, and generalised advantage
estimation turns its errors into an advantage a token. Each minibatch then gives one
clipped update of the policy (`grpo.update`) and one of the value model.

Objective: arXiv 2402.03300, Eq. 1-2; GAE: arXiv 1506.02438.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import diagnostics, grpo, lora, train_state
from r1jax.advantages import gae
from r1jax.dynamic_sampling import Slots, collect
from r1jax.errors import UserError
from r1jax.experience import (
  Rows,
  by_parts,
  counted,
  recall,
  sequences,
  shaped,
  shuffled,
  token_kl,
)
from r1jax.models import moe
from r1jax.models.policy import Policy
from r1jax.models.value import Value, from_policy
from r1jax.objective import Objective, pick
from r1jax.optimizer import accumulate, descend
from r1jax.policy_loss import AGGREGATIONS, Totals
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout
from r1jax.step_config import StepConfig
from r1jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class PPOConfig(StepConfig):
  """A step of PPO; gamma and lambda stand in the objective."""

  value_clip: float = 0.2  # values stay this near to the old ones in the loss; 0: free
  whiten: bool = True  # advantages to mean 0, std 1 over the rollout's tokens

  def __post_init__(self):
    super().__post_init__()
    if self.objective.advantage != "gae":
      raise UserError(
        f"config.objective.advantage={self.objective.advantage!r}: PPO's advantage is"
        " 'gae' (objective.preset='ppo'); the others are python -m experiments.r1_zero."
      )
    if self.group_size == 1 and self.objective.pool > 1:
      raise UserError(
        f"config.objective.pool={self.objective.pool} with grpo.group_size=1: a single"
        " output never differs from its group, so no slot would ever be filled. Set"
        " pool=1 or sample more outputs a prompt."
      )
    if self.group_size < 1 or self.value_clip < 0:
      raise UserError(
        f"config: grpo.group_size={self.group_size} must be at least 1 and"
        f" ppo.value_clip={self.value_clip} must not be negative."
      )


@struct.dataclass
class PPOState:
  policy: TrainState
  value: TrainState

  @property
  def step(self) -> jax.Array:
    return self.policy.step

  @property
  def params(self) -> Any:
    return self.policy.params

  @property
  def router(self) -> Any:
    return self.policy.router

  @property
  def kept(self) -> "PPOState":
    """As TrainState.kept."""
    return self.replace(policy=self.policy.kept)

  def on(self, begun: "PPOState") -> "PPOState":
    """As TrainState.on."""
    return self.replace(policy=self.policy.on(begun.policy))


@struct.dataclass
class ValueRows:
  """Training rows with what the value model learns from."""

  rows: Rows
  old_values: jax.Array  # M T float32
  returns: jax.Array  # M T float32


def restart(
  params: Any,
  router: Any,
  optimizer: optax.GradientTransformation,
  value_optimizer: optax.GradientTransformation,
  *,
  reference: bool,
  adapt: Callable[[Any], Any] = lambda params: params,
) -> PPOState:
  """Step 0 from a base; the value model starts as a copy of it.

  Args:
    adapt: gives the policy its adapters (lora.adapt); the value model learns all of its
      weights in any case.
  """
  policy = train_state.restart(adapt(params), router, optimizer, reference=reference)
  width = params["final_norm"]["scale"].shape[0]
  value = train_state.restart(
    *from_policy(params, router, width), value_optimizer, reference=False
  )
  return PPOState(policy, value)


def shardings(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  value_optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  reference: bool,
  adapters: lora.LoraConfig | None = None,
) -> PPOState:
  """The PPOState's NamedShardings."""
  value, how = Value(policy.config), dict(reference=reference, adapters=adapters)
  return PPOState(
    train_state.shardings(policy, optimizer, mesh, **how),
    train_state.shardings(value, value_optimizer, mesh, reference=False),
  )


def token_values(
  value: Value, params: Any, router: Any, rows: Rows
) -> tuple[jax.Array, dict]:
  """V before each token of the completions, [M, T] float32, and the experts' load."""
  values, load = value.apply({"params": params, "router": router}, *sequences(rows))
  return values[:, rows.prompts.shape[1] - 1 : -1], load


def token_rewards(rewards: jax.Array, rows: Rows, kl_coef: float) -> jax.Array:
  """r_t = [t is the last token] R - kl_coef (log pi_old - log pi_reference), [M, T].

  Float from the start: a fractional reward put into an array of token ids is cut to 0.

  Args:
    rewards: [M] float32, R of each output.
    rows: M rows, with reference log-probabilities where kl_coef > 0.
    kl_coef: beta.
  """
  mask = rows.completion_mask
  following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  at_last = jnp.where(mask & ~following, rewards[:, None], 0.0)
  return at_last - kl_coef * token_kl(rows) if kl_coef else at_last


def whitened(x: jax.Array, mask: jax.Array) -> jax.Array:
  """(x - mean) / (std + 1e-8) over the kept entries, ddof 1; 0 elsewhere."""
  count = mask.sum()
  mean = jnp.where(mask, x, 0.0).sum() / jnp.maximum(count, 1)
  squares = jnp.where(mask, jnp.square(x - mean), 0.0).sum()
  std = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
  return jnp.where(mask, (x - mean) / (std + 1e-8), 0.0)


def value_loss(
  values: jax.Array,
  batch: ValueRows,
  o: Objective,
  totals: Totals,
  *,
  value_clip: float,
  window: int,
) -> tuple[jax.Array, dict]:
  """1/2 max((V - ret)^2, (V_old + clip(V - V_old, -c, c) - ret)^2), aggregated as the
  policy's loss is.

  Args:
    values: [m, T].
    batch: m rows.
    o: its aggregation.
    totals: of the whole minibatch.
    value_clip: c; 0 leaves the second term out.
    window: output tokens.

  Returns:
    (scalar, metrics), shares of the minibatch's.
  """
  rows = batch.rows
  error = jnp.square(values - batch.returns)
  clipped = jnp.zeros_like(rows.mask)
  if value_clip:
    near = batch.old_values + jnp.clip(
      values - batch.old_values, -value_clip, value_clip
    )
    second = jnp.square(near - batch.returns)
    clipped = (jnp.abs(values - batch.old_values) > value_clip) & (second > error)
    error = jnp.maximum(error, second)
  aggregate = pick(AGGREGATIONS, o.aggregation, "aggregation")
  norm = o.sum_norm or window
  loss = 0.5 * aggregate(error, rows.mask, totals, norm)
  mean = AGGREGATIONS["token-mean"]
  metrics = {
    "value_loss": loss,
    "value_clip_fraction": mean(clipped.astype(values.dtype), rows.mask, totals, norm),
    "value_mean": mean(values, rows.mask, totals, norm),
    "value_error": mean(jnp.abs(values - batch.returns), rows.mask, totals, norm),
  }
  return loss, jax.lax.stop_gradient(metrics)


@jax.named_scope("experience")
def experience(
  state: PPOState,
  slots: Slots,
  key: jax.Array,
  *,
  policy: Policy,
  config: PPOConfig,
) -> tuple[ValueRows, dict]:
  """Values, token rewards and advantages of the sampled outputs, in shuffled
  minibatches: ([K, M / K] rows, metrics of the rollout)."""
  c, o, value = config, config.objective, Value(policy.config)
  rows = recall(counted(slots, o), state.policy.asked, policy, c)
  rewards = shaped(slots, rows, o, c.max_tokens)
  with jax.named_scope("values"):
    values = by_parts(
      lambda part: token_values(value, state.value.params, state.value.router, part)[0],
      rows,
      c.minibatches * c.micro_batches,
    )
  advantages, returns = gae(
    token_rewards(
      rewards.total.reshape(-1), rows, o.kl_coef if o.kl == "k1-in-reward" else 0.0
    ),
    values,
    rows.completion_mask,
    gamma=o.gamma,
    lam=o.lam,
  )
  if c.whiten:
    advantages = whitened(advantages, rows.mask)
  rows = rows.replace(advantages=advantages)
  metrics = diagnostics.of_batch(slots, rewards, advantages)
  batch = ValueRows(rows, old_values=values, returns=returns)
  order = grpo.key_of(key, state.step, grpo.SHUFFLE)
  return shuffled(batch, order, c.minibatches, c.unit), metrics


@jax.named_scope("update_value")
def update_value(
  state: TrainState,
  batch: ValueRows,
  *,
  value: Value,
  optimizer: optax.GradientTransformation,
  config: PPOConfig,
) -> tuple[TrainState, dict]:
  """One minibatch of regression on the returns."""
  c = config
  totals = Totals.of(batch.rows)

  def loss_fn(params, part):
    values, load = token_values(value, params, state.router, part.rows)
    loss, metrics = value_loss(
      values, part, c.objective, totals, value_clip=c.value_clip, window=c.max_tokens
    )
    return loss, (metrics, load, ())

  grads, metrics, load, _ = accumulate(loss_fn, state.params, batch, c.micro_batches)
  learnt = batch.rows.mask.any()
  params, opt_state, finite = descend(
    optimizer, grads, state.params, state.opt_state, learnt=learnt
  )
  router = state.router
  if c.bias_rate and router:
    rate = jnp.where(finite, c.bias_rate, 0.0)
    router = {"policy": moe.balance(router["policy"], load, rate)}
  state = state.replace(
    step=state.step + 1,
    params=params,
    router=router,
    opt_state=opt_state,
  )
  norm = optax.tree.norm(grads)
  return state, {**metrics, "value_grad_norm": norm, "value_skipped": 1.0 - finite}


def whole_step(
  state: PPOState,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  value_optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], Rewards],
  config: PPOConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> tuple[PPOState, Rollout, dict, diagnostics.Trace]:
  """As `grpo.whole_step`, with a value model beside the policy."""
  c = config
  sampler = grpo.draw(
    state.policy, key, policy=policy, config=c, stop_ids=stop_ids, pad_id=pad_id
  )
  slots = collect(prompts, sampler, reward_fn, c.objective)
  batches, metrics = experience(state, slots, key, policy=policy, config=c)

  def one(state, batch):
    actor, figures, per_token = grpo.update(
      state.policy, batch.rows, policy=policy, optimizer=optimizer, config=c
    )
    critic, more = update_value(
      state.value,
      batch,
      value=Value(policy.config),
      optimizer=value_optimizer,
      config=c,
    )
    return PPOState(actor, critic), ({**figures, **more}, per_token)

  state, (per_update, per_token) = jax.lax.scan(one, state, batches)
  count = c.traced_groups * c.group_size
  traced = diagnostics.trace(batches.rows, per_token, slots, count)
  metrics = {**metrics, **diagnostics.over_updates(per_update)}
  return state, slots.rollout.spoken(), metrics, traced
