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
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import sharding
from r1jax.advantages import group_relative
from r1jax.errors import UserError
from r1jax.models import moe
from r1jax.models.mla import Sequence
from r1jax.models.policy import Policy, token_logprobs
from r1jax.optimizer import accumulate
from r1jax.prompts import PromptBatch
from r1jax.rollout import Rollout, sample
from r1jax.train_state import Reference, TrainState

# What a random draw is for.
ROLLOUT, SHUFFLE = 0, 1


def key_of(key: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
  """fold_in(fold_in(key, step), purpose): nothing random depends on anything else."""
  return jax.random.fold_in(jax.random.fold_in(key, step), purpose)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
  """R1-Zero's settings; the sources stand in experiments/configs/r1_zero.py."""

  group_size: int = 16  # G
  minibatches: int = 16  # K updates a rollout, each output in one of them
  micro_batches: int = 1  # parts of a minibatch whose gradients are summed
  max_tokens: int = 32_768  # T
  temperature: float = 1.0
  clip_eps: float = 10.0  # ratio kept in [1 - eps, 1 + eps]
  kl_coef: float = 0.001  # beta
  std_ddof: int = 1
  std_eps: float = 1e-6
  reference_refresh: int = 400  # updates; 0 never
  router_bias_rate: float = 0.001  # of the aux-loss-free balance

  def __post_init__(self):
    if self.group_size < 2:
      raise UserError(
        f"config.grpo.group_size={self.group_size}: a group-relative advantage needs at"
        " least 2 outputs a prompt (the paper uses 16)."
      )
    if min(self.minibatches, self.micro_batches, self.max_tokens) < 1:
      raise UserError(
        "config.grpo: grpo.minibatches, grpo.micro_batches and max_tokens must be at"
        f" least 1, got {self.minibatches}, {self.micro_batches}, {self.max_tokens}."
      )
    if self.reference_refresh % self.minibatches:
      raise UserError(
        f"config.grpo.reference_refresh={self.reference_refresh} must be a multiple of"
        f" minibatches={self.minibatches}: the reference is refreshed between rollouts."
      )
    if not 0 <= self.std_ddof < self.group_size or self.kl_coef < 0:
      raise UserError(
        f"config.grpo: std_ddof={self.std_ddof} must lie in 0..group_size - 1 and"
        f" kl_coef={self.kl_coef} must not be negative."
      )
    if not self.temperature > 0:
      raise UserError(
        f"config.grpo.temperature={self.temperature} must be above 0; a group of greedy"
        " outputs is one output G times."
      )


@struct.dataclass
class Rows:
  """Outputs as training rows: a left-padded prompt, then a right-padded completion."""

  prompts: jax.Array  # M P int32
  prompt_mask: jax.Array  # M P bool
  completions: jax.Array  # M T int32
  completion_mask: jax.Array  # M T bool, through the stop token
  old_logprobs: jax.Array  # M T float32, the sampler's
  reference_logprobs: jax.Array  # M T float32
  advantages: jax.Array  # M float32


def completion_logprobs(
  policy: Policy, params: Any, router: Any, rows: Rows, temperature: float
) -> tuple[jax.Array, dict]:
  """Log-probabilities of the completions, teacher-forced, and the experts' load.

  Returns:
    ([M, T] float32, {stack: [layers, E]}); only real tokens are counted as load.
  """
  length = rows.prompts.shape[1]
  tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
  mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
  seq = Sequence.of_mask(mask)
  variables = {"params": params, "router": router}
  out = policy.apply(variables, sharding.shard_batch(tokens), seq)
  hidden = out.hidden[:, length - 1 : -1]
  logits = policy.apply(variables, hidden, method="logits") / temperature
  return token_logprobs(logits, rows.completions), out.load


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
  """The KL estimator r - log r - 1 with r = reference / policy (R1, Eq. 2), per token.

  The log-ratio is clamped to +-20 so that exp stays finite. Never negative, unbiased on
  samples of the policy; its on-policy gradient is that of KL(reference || policy).
  """
  d = jnp.clip(reference_logprobs - logprobs, -20.0, 20.0)
  return jnp.expm1(d) - d


def grpo_loss(
  logprobs: jax.Array,
  rows: Rows,
  *,
  clip_eps: float,
  kl_coef: float,
  total_rows: int,
) -> tuple[jax.Array, dict]:
  """The GRPO objective, negated (arXiv 2402.03300, Eq. 3), token-level ratio.

    J = 1/M sum_i 1/|o_i| sum_t [ min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta k3 ]

  Differs: R1's Eq. 1 prints the ratio of whole outputs; its origin and every
  implementation take it token by token.

  Args:
    logprobs: [m, T] of the policy that is trained.
    rows: m rows.
    clip_eps: eps.
    kl_coef: beta.
    total_rows: M, the rows of the whole minibatch, so that its parts' losses add up.

  Returns:
    (scalar, metrics): each metric a share of the minibatch's, to be summed (names
    ending in `_max`: to be maximised) over micro-batches.
  """
  mask = rows.completion_mask
  tokens = jnp.maximum(mask.sum(axis=1), 1)
  log_ratio = jnp.where(mask, logprobs - rows.old_logprobs, 0.0)
  ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
  a = rows.advantages[:, None]
  surrogate = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * a)
  kl = jnp.where(mask, k3(logprobs, rows.reference_logprobs), 0.0)

  def mean(x):  # per-sequence mean, then this part's share of the mean over rows
    return jnp.sum(jnp.where(mask, x, 0.0).sum(axis=1) / tokens) / total_rows

  loss = -mean(surrogate) + kl_coef * mean(kl)
  bound = ((a > 0) & (ratio > 1 + clip_eps)) | ((a < 0) & (ratio < 1 - clip_eps))
  metrics = {
    "loss": loss,
    "kl": mean(kl),
    "clip_fraction": mean(bound.astype(jnp.float32)),
    "ratio_max": jnp.max(ratio),
    "sampler_gap_max": jnp.max(jnp.abs(log_ratio)),
  }
  return loss, jax.lax.stop_gradient(metrics)


def experience(
  state: TrainState,
  prompts: PromptBatch,
  rollout: Rollout,
  key: jax.Array,
  *,
  policy: Policy,
  reward_fn: Callable[[PromptBatch, Rollout], dict],
  config: GRPOConfig,
) -> tuple[Rows, dict]:
  """Scores a rollout and splits it into shuffled minibatches.

  Advantages are taken over whole groups before the shuffle breaks them apart.

  Returns:
    (Rows with leading axes [K, B * G / K], metrics of the rollout).
  """
  c = config
  rewards = reward_fn(prompts, rollout)
  advantages = group_relative(rewards["reward"], std_ddof=c.std_ddof, std_eps=c.std_eps)
  b, g, t = rollout.tokens.shape
  rows = Rows(
    prompts=jnp.repeat(prompts.tokens, g, axis=0),
    prompt_mask=jnp.repeat(prompts.mask, g, axis=0),
    completions=rollout.tokens.reshape(b * g, t),
    completion_mask=rollout.mask.reshape(b * g, t),
    old_logprobs=rollout.logprobs.reshape(b * g, t),
    reference_logprobs=jnp.zeros((b * g, t), jnp.float32),
    advantages=advantages.reshape(b * g),
  )
  order = jax.random.permutation(key_of(key, state.step, SHUFFLE), b * g)
  parts = c.minibatches * c.micro_batches
  rows = jax.tree.map(lambda x: x[order].reshape(parts, -1, *x.shape[1:]), rows)
  if c.kl_coef:
    with jax.named_scope("reference"):
      reference = jax.lax.map(
        lambda part: completion_logprobs(
          policy, state.reference.params, state.reference.router, part, c.temperature
        )[0],
        rows,
      )
    rows = rows.replace(reference_logprobs=reference)
  rows = jax.tree.map(lambda x: x.reshape(c.minibatches, -1, *x.shape[2:]), rows)
  r = rewards["reward"]
  metrics = {
    **{name: x.mean() for name, x in rewards.items()},
    "length": rollout.lengths.mean(dtype=jnp.float32),
    "entropy": rollout.entropy.sum() / rollout.mask.sum(),
    "truncated": 1.0 - rollout.ended.mean(dtype=jnp.float32),
    "equal_groups": jnp.all(r == r[:, :1], axis=1).mean(dtype=jnp.float32),
  }
  return rows, metrics


def update(
  state: TrainState,
  rows: Rows,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  config: GRPOConfig,
) -> tuple[TrainState, dict]:
  """One minibatch: gradient, AdamW, router biases, and the reference when it is due.

  Args:
    state: before.
    rows: [M, ...], the minibatch.
  """
  c = config
  total = rows.advantages.shape[0]

  def loss_fn(params, part):
    logprobs, load = completion_logprobs(
      policy, params, state.router, part, c.temperature
    )
    loss, metrics = grpo_loss(
      logprobs, part, clip_eps=c.clip_eps, kl_coef=c.kl_coef, total_rows=total
    )
    return loss, (metrics, load)

  grads, metrics, load = accumulate(loss_fn, state.params, rows, c.micro_batches)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  router = moe.balance(state.router, load, c.router_bias_rate)
  step = state.step + 1
  reference = state.reference
  if c.reference_refresh and reference is not None:
    reference = jax.lax.cond(
      step % c.reference_refresh == 0,
      lambda: Reference(params, router),
      lambda: state.reference,
    )
  metrics["grad_norm"] = optax.tree.norm(grads)
  metrics["load_imbalance"] = load_imbalance(load)
  return TrainState(step, params, router, opt_state, reference), metrics


def load_imbalance(load: dict) -> jax.Array:
  """Busiest expert's load over the mean, averaged over layers; 1 is perfect balance."""
  if not load:
    return jnp.ones(())
  layers = jnp.concatenate(
    [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(load)], axis=0
  )
  return jnp.mean(layers.max(axis=-1) / jnp.maximum(layers.mean(axis=-1), 1e-6))


def over_minibatches(per_update: dict) -> dict:
  """A rollout's metrics from its K updates': means, except that maxima stay maxima and
  the sampler's gap is read before the first update, where policy and sampler agree."""
  return {
    name: x[0]
    if name == "sampler_gap_max"
    else x.max()
    if name.endswith("_max")
    else x.mean()
    for name, x in per_update.items()
  }


def whole_step(
  state: TrainState,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], dict],
  config: GRPOConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> tuple[TrainState, Rollout, dict]:
  """Rollout, reward, advantages and K updates; pure, and meant for one `jax.jit`.

  Args:
    state: donated by the caller's jit.
    prompts: B problems.
    key: the run's key; the draw of a step depends on it and on `state.step` alone.
    policy, optimizer, reward_fn, config, stop_ids, pad_id: static.

  Returns:
    (state after K updates, the rollout, metrics as float32 scalars).
  """
  c = config
  rollout = sample(
    policy,
    state.params,
    state.router,
    prompts,
    key_of(key, state.step, ROLLOUT),
    group_size=c.group_size,
    max_tokens=c.max_tokens,
    temperature=c.temperature,
    stop_ids=stop_ids,
    pad_id=pad_id,
  )
  rows, metrics = experience(
    state, prompts, rollout, key, policy=policy, reward_fn=reward_fn, config=c
  )
  one = functools.partial(update, policy=policy, optimizer=optimizer, config=c)
  state, per_update = jax.lax.scan(one, state, rows)
  return state, rollout, {**metrics, **over_minibatches(per_update)}
