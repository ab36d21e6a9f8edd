"""The softmax of the attention kernels: exp2 of scores times scale * log2(e).

The factor is applied to float32 scores: queries that were scaled in bfloat16 would be
rounded twice. A score that is masked is MASKED, a running maximum starts at FLOOR: no
score lies below it, and a row that keeps nothing sums to 0 instead of to NaN.
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634
MASKED, FLOOR = -1e30, -1e29  # exp2(MASKED - FLOOR) = 0


def check(dtype: jnp.dtype, *lengths: int) -> None:
  """Raises NotImplementedError for what no body serves."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"arrays are bfloat16 or float32 here, not {dtype}")
  if 0 in lengths:
    raise NotImplementedError("there must be tokens and slots here, at least one each")


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
  """Of a matrix product: float32 is kept whole."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def log_sum_exp(
  high: jax.Array, total: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """(natural log-sum-exp, divisor) of rows with these greatest scores and sums; -inf
  and 1 for a row that keeps nothing."""
  empty = total == 0.0
  total = jnp.where(empty, 1.0, total)
  return jnp.where(empty, -jnp.inf, high * scale + jnp.log2(total) / LOG2E), total


def in_base2(lse: jax.Array) -> jax.Array:
  """The way back, with a large number for -inf, so that exp2(score - it) is 0."""
  return jnp.where(jnp.isfinite(lse), lse * LOG2E, -FLOOR)


def merge(
  parts: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """Attention over several sets of keys from that over each.

  Args:
    parts: (outputs [..., dv], natural log-sum-exp [...] float32).

  Returns:
    ([..., dv] float32, [...] float32): zeros and -inf where no part keeps anything.
  """
  lses = jnp.stack([lse for _, lse in parts])
  high = jnp.where(jnp.isfinite(lses), lses, FLOOR).max(axis=0)
  high = jax.lax.stop_gradient(high)
  weights = jnp.exp(lses - high[None])
  total = weights.sum(axis=0)
  empty = total == 0.0
  safe = jnp.where(empty, 1.0, total)
  out = sum(
    (w / safe)[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)
  )
  return out, jnp.where(empty, -jnp.inf, high + jnp.log(safe))
