"""Rewards -> advantages."""

import jax
import jax.numpy as jnp


def group_relative(
  rewards: jax.Array, *, std_ddof: int = 1, std_eps: float = 1e-6
) -> jax.Array:
  """GRPO's advantage: A_i = (r_i - mean r) / (std r + std_eps) within each group.

  arXiv 2402.03300, section 4.1.1; arXiv 2501.12948, Eq. 3. The papers do not say which
  std; ddof 1 is what verl, TRL and OpenRLHF compute.

  A group whose rewards are all equal gets exactly 0, not rounding noise over std_eps.

  Args:
    rewards: [B, G] float32.
    std_ddof: 1 divides the squared deviations by G - 1, 0 by G.
    std_eps: added to the std.

  Returns:
    [B, G] float32.
  """
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  g = rewards.shape[1]
  std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / (g - std_ddof))
  equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
  return jnp.where(equal, 0.0, centred / (std + std_eps))
