"""Rewards -> advantages: GRPO's group-relative one and its kin, and PPO's GAE.

Each estimator is a function of the rewards of B groups, of which samples there are
(`there` [B, G]: not those of slots that dynamic sampling left empty, nor those that
could not be scored; they have no share in any statistic and an advantage of 0) and of
the choices, and a row of ADVANTAGES. A group whose rewards are all equal gets exactly
0, not rounding noise over an epsilon.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r1jax.dynamic_sampling import varied
from r1jax.objective import Objective, pick
from r1jax.rewards.in_graph import Rewards


def _centred(rewards: jax.Array, there: jax.Array) -> jax.Array:
  """r - mean r in each group [B, G]; exactly 0 where a group's rewards are equal."""
  count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
  mean = jnp.where(there, rewards, 0.0).sum(axis=1, keepdims=True) / count
  differs = varied(rewards, there)[:, None]
  return jnp.where(there & differs, rewards - mean, 0.0)


def _std(x: jax.Array, there: jax.Array, ddof: int, axis: int | None) -> jax.Array:
  """Of the values that are there: in each group [B, 1], or of all with axis None."""
  count = jnp.maximum(there.sum(axis=axis, keepdims=True), ddof + 1)
  mean = jnp.where(there, x, 0.0).sum(axis=axis, keepdims=True) / count
  squares = jnp.where(there, jnp.square(x - mean), 0.0).sum(axis=axis, keepdims=True)
  return jnp.sqrt(squares / (count - ddof))


def _over(x: jax.Array, std: jax.Array, eps: float) -> jax.Array:
  """x / (std + eps), and x where the std is 0: then x is 0, and eps may be."""
  return x / jnp.where(std == 0, 1.0, std + eps)


def _group_scaled(rewards: jax.Array, there: jax.Array, o: Objective) -> jax.Array:
  centred = _centred(rewards, there)
  return _over(centred, _std(centred, there, o.std_ddof, axis=1), o.std_eps)


def grpo(rewards: Rewards, there: jax.Array, o: Objective) -> jax.Array:
  """A_i = (r_i - mean r) / (std r + std_eps) within each group.

  arXiv 2402.03300, section 4.1.1; arXiv 2501.12948, Eq. 3. The papers do not say which
  std; ddof 1 is what verl, TRL and OpenRLHF compute.
  """
  return _group_scaled(rewards.total, there, o)


def dr_grpo(rewards: Rewards, there: jax.Array, o: Objective) -> jax.Array:
  """A_i = r_i - mean r: no division that re-weighs problems (arXiv 2503.20783)."""
  return _centred(rewards.total, there)


def rloo(rewards: Rewards, there: jax.Array, o: Objective) -> jax.Array:
  """A_i = r_i - mean of the other G - 1 rewards (arXiv 2402.14740)."""
  g = there.sum(axis=1, keepdims=True)
  return _centred(rewards.total, there) * (g / jnp.maximum(g - 1, 1))


def batch_std(rewards: Rewards, there: jax.Array, o: Objective) -> jax.Array:
  """A_i = (r_i - group mean) / (std of the whole batch's rewards + std_eps).

  Lite PPO (arXiv 2508.08221); `scale_rewards="batch"` in TRL.
  """
  std = _std(rewards.total, there, o.std_ddof, axis=None)
  return _over(_centred(rewards.total, there), std, o.std_eps)


def gdpo(rewards: Rewards, there: jax.Array, o: Objective) -> jax.Array:
  """Each reward is normalised in its group on its own, their weighted sum over the
  batch: rewards of different scale keep their say (GDPO, arXiv 2601.05242).

  The batch's mean, which the paper subtracts, is 0: every group's is.
  """
  total = sum(
    weight * _group_scaled(rewards.parts[name], there, o)
    for name, weight in rewards.weights
  )
  return _over(total, _std(total, there, o.std_ddof, axis=None), o.std_eps)


ADVANTAGES: dict[str, Callable[[Rewards, jax.Array, Objective], jax.Array]] = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "batch_std": batch_std,
  "gdpo": gdpo,
}


@jax.named_scope("advantages")
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
  there = filled[:, None] & rewards.valid
  return pick(ADVANTAGES, o.advantage, "advantage")(rewards, there, o)


@jax.named_scope("advantages")
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
