"""PPO's value model: a network of the policy's size that gives a number a token."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from r1jax.models.config import PolicyConfig
from r1jax.models.layers import weight
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence


class Value(nn.Module):
  """V = w . hidden, with w = 0 at first: a value model that expects nothing."""

  config: PolicyConfig

  def setup(self):
    d = self.config.width
    self.policy = Policy(self.config)  # its head over the vocabulary is not used
    self.value_head = weight(self, "value_head", (d,), ("embed",), fan_in=d, std=0.0)

  def __call__(self, tokens: jax.Array, seq: Sequence) -> tuple[jax.Array, dict]:
    """Args: tokens [B, T] int32 and where they stand.

    Returns:
      ([B, T] float32: the value of what has been said up to and with each token,
      {stack: [layers, E]} the experts' load).
    """
    out = self.policy(tokens, seq)
    hidden = out.hidden.astype(jnp.float32)
    return jnp.einsum("btd,d->bt", hidden, self.value_head), out.load


def from_policy(params: Any, router: Any, width: int) -> tuple[dict, dict]:
  """(params, router) of a value model that starts as a copy of a policy.

  Args:
    params, router: the policy's.
    width: D.
  """
  trunk = jax.tree.map(jnp.copy, params)
  head = jnp.zeros((width,), jnp.float32)
  biases = {"policy": jax.tree.map(jnp.copy, router)} if router else {}
  return {"policy": trunk, "value_head": head}, biases
