"""Rewards -> advantages: GRPO's group-relative one and its kin, and PPO's GAE.

Each estimator is a function of the rewards of B groups, of which groups there are
(`filled` [B]; slots that dynamic sampling left empty have no share in any statistic)
and of the choices, and a row of ADVANTAGES. A group whose rewards are all equal gets
exactly 0, not rounding noise over an epsilon.
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


def _group_std(x: jax.Array, ddof: int) -> jax.Array:
  """[B, G] -> [B, 1]."""
  squares = jnp.square(x - x.mean(axis=1, keepdims=True))
  return jnp.sqrt(squares.sum(axis=1, keepdims=True) / (x.shape[1] - ddof))


def _batch_std(x: jax.Array, filled: jax.Array, ddof: int) -> jax.Array:
  """Over all values of the groups that there are: a scalar."""
  kept = filled[:, None]
  count = jnp.maximum(filled.sum() * x.shape[1], ddof + 1)
  mean = jnp.where(kept, x, 0.0).sum() / count
  squares = jnp.where(kept, jnp.square(x - mean), 0.0)
  return jnp.sqrt(squares.sum() / (count - ddof))


def _over(x: jax.Array, std: jax.Array, eps: float) -> jax.Array:
  """x / (std + eps), and x where the std is 0: then x is 0, and eps may be."""
  return x / jnp.where(std == 0, 1.0, std + eps)


def _group_scaled(rewards: jax.Array, o: Objective) -> jax.Array:
  centred = _centred(rewards)
  return _over(centred, _group_std(centred, o.std_ddof), o.std_eps)


def grpo(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """A_i = (r_i - mean r) / (std r + std_eps) within each group.

  arXiv 2402.03300, section 4.1.1; arXiv 2501.12948, Eq. 3. The papers do not say which
  std; ddof 1 is what verl, TRL and OpenRLHF compute.
  """
  return _group_scaled(rewards.total, o)


def dr_grpo(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """A_i = r_i - mean r: no division that re-weighs problems (arXiv 2503.20783)."""
  return _centred(rewards.total)


def rloo(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """A_i = r_i - mean of the other G - 1 rewards (arXiv 2402.14740)."""
  g = rewards.total.shape[1]
  return _centred(rewards.total) * (g / (g - 1))


def batch_std(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """A_i = (r_i - group mean) / (std of the whole batch's rewards + std_eps).

  Lite PPO (arXiv 2508.08221); `scale_rewards="batch"` in TRL.
  """
  std = _batch_std(rewards.total, filled, o.std_ddof)
  return _over(_centred(rewards.total), std, o.std_eps)


def gdpo(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """Each reward is normalised in its group on its own, their weighted sum over the
  batch: rewards of different scale keep their say (GDPO, arXiv 2601.05242).

  The batch's mean, which the paper subtracts, is 0: every group's is.
  """
  total = sum(
    weight * _group_scaled(rewards.parts[name], o) for name, weight in rewards.weights
  )
  return _over(total, _batch_std(total, filled, o.std_ddof), o.std_eps)


ADVANTAGES: dict[str, Callable[[Rewards, jax.Array, Objective], jax.Array]] = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "batch_std": batch_std,
  "gdpo": gdpo,
}


def group_relative(rewards: Rewards, filled: jax.Array, o: Objective) -> jax.Array:
  """The advantage that `o.advantage` names.

  Args:
    rewards: [B, G] each, G of 2 or more.
    filled: [B] bool, the groups that there are.
    o: the choices.

  Returns:
    [B, G], in the rewards' dtype.

  Raises:
    UserError: no such estimator.
  """
  return pick(ADVANTAGES, o.advantage, "advantage")(rewards, filled, o)


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
