"""Rewards -> advantages: GRPO's group-relative one and its kin, and PPO's GAE.

Each estimator is a function of a rollout's `Rewards` and a row of ADVANTAGES. A group
whose rewards are all equal gets exactly 0, not rounding noise over an epsilon.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r1jax.objective import Objective, pick
from r1jax.rewards.in_graph import Rewards


def _centred(rewards: jax.Array) -> jax.Array:
  """r - mean r in each group [B, G]; exactly 0 where a group's rewards are equal."""
  equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
  return jnp.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def _std(x: jax.Array, ddof: int, axis: int | None = None) -> jax.Array:
  """The std, over all values (a scalar) or along an axis (kept)."""
  count = x.size if axis is None else x.shape[axis]
  squares = jnp.square(x - x.mean(axis=axis, keepdims=axis is not None))
  total = squares.sum(axis=axis, keepdims=axis is not None)
  return jnp.sqrt(total / (count - ddof))


def _group_scaled(rewards: jax.Array, o: Objective) -> jax.Array:
  centred = _centred(rewards)
  return centred / jnp.where(
    (centred == 0).all(axis=1, keepdims=True),
    1.0,  # a group of equal rewards with std_eps 0
    _std(centred, o.std_ddof, axis=1) + o.std_eps,
  )


def grpo(rewards: Rewards, o: Objective) -> jax.Array:
  """A_i = (r_i - mean r) / (std r + std_eps) within each group.

  arXiv 2402.03300, section 4.1.1; arXiv 2501.12948, Eq. 3. The papers do not say which
  std; ddof 1 is what verl, TRL and OpenRLHF compute.
  """
  return _group_scaled(rewards.total, o)


def dr_grpo(rewards: Rewards, o: Objective) -> jax.Array:
  """A_i = r_i - mean r: no division that re-weighs problems (arXiv 2503.20783)."""
  return _centred(rewards.total)


def rloo(rewards: Rewards, o: Objective) -> jax.Array:
  """A_i = r_i - mean of the other G - 1 rewards (arXiv 2402.14740)."""
  g = rewards.total.shape[1]
  return _centred(rewards.total) * (g / (g - 1))


def batch_std(rewards: Rewards, o: Objective) -> jax.Array:
  """A_i = (r_i - group mean) / (std of the whole batch's rewards + std_eps).

  Lite PPO (arXiv 2508.08221); `scale_rewards="batch"` in TRL.
  """
  std = _std(rewards.total, o.std_ddof)
  return _centred(rewards.total) / jnp.where(std == 0, 1.0, std + o.std_eps)


def gdpo(rewards: Rewards, o: Objective) -> jax.Array:
  """Each reward is normalised in its group on its own, their weighted sum over the
  batch: rewards of different scale keep their say (GDPO, arXiv 2601.05242)."""
  total = sum(
    weight * _group_scaled(rewards.parts[name], o) for name, weight in rewards.weights
  )
  std = _std(total, o.std_ddof)
  scaled = (total - total.mean()) / jnp.where(std == 0, 1.0, std + o.std_eps)
  return jnp.where(jnp.all(total == total[:1, :1]), 0.0, scaled)


ADVANTAGES: dict[str, Callable[[Rewards, Objective], jax.Array]] = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "batch_std": batch_std,
  "gdpo": gdpo,
}


def group_relative(rewards: Rewards, o: Objective) -> jax.Array:
  """The advantage that `o.advantage` names.

  Args:
    rewards: [B, G] each, G of 2 or more.
    o: the choices.

  Returns:
    [B, G], in the rewards' dtype.

  Raises:
    UserError: no such estimator.
  """
  return pick(ADVANTAGES, o.advantage, "advantage")(rewards, o)


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (arXiv 1506.02438, Eq. 16).

    delta_t = r_t + gamma V_t+1 - V_t,   A_t = delta_t + gamma lam A_t+1,
    return_t = A_t + V_t,   V after the last token = 0

  Args:
    rewards: [M, T] float, a reward a token.
    values: [M, T] float.
    mask: [M, T] bool, the tokens; each row's stand at its beginning.
    gamma: discount.
    lam: lambda; with gamma = lam = 1, A_t is the rewards' sum from t on minus V_t.

  Returns:
    (advantages, returns), [M, T], 0 where there is no token.
  """
  rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)
  following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + gamma * following - values

  def back(later, delta):
    now = delta + gamma * lam * later
    return now, now

  _, advantages = jax.lax.scan(
    back, jnp.zeros_like(deltas[:, 0]), deltas.swapaxes(0, 1), reverse=True
  )
  advantages = jnp.where(mask, advantages.swapaxes(0, 1), 0.0)
  return advantages, advantages + values
