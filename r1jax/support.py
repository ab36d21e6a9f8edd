"""Truncated sampling: which tokens may be drawn, and the mask that is kept of them.

A ratio of probabilities is right only over the support that was sampled from. So the
rollout keeps each token's support as packed bits, V / 8 bytes a token, and the update
applies it to the policy, the old policy and the reference alike ("keep sampling mask",
DeepSeek-V3.2, arXiv 2512.02556).
"""

import jax
import jax.numpy as jnp

from r1jax.errors import UserError

MASKED = -1e30  # finite, so that 0 * log 0 is 0


def check(top_k: int, top_p: float, min_p: float = 0.0) -> None:
  """Raises UserError where a bound keeps nothing or means nothing."""
  if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
    raise UserError(
      f"top_k={top_k} must be 0 (off) or more, top_p={top_p} above 0 and at most 1"
      f" (off), and min_p={min_p} from 0 (off) to 1."
    )


def truncates(top_k: int, top_p: float, min_p: float = 0.0) -> bool:
  return bool(top_k) or top_p < 1 or min_p > 0


def support(
  logits: jax.Array, *, top_k: int, top_p: float, min_p: float = 0.0
) -> jax.Array:
  """The tokens that may be drawn: top-k first, then the nucleus of what is left, then
  min-p (the order of transformers).

  The nucleus is the smallest set of most likely tokens whose probability reaches top_p;
  the token that crosses it is in. Tokens tied with the last one kept are kept too.
  min-p keeps tokens at least min_p times as likely as the most likely one (arXiv
  2407.01082).

  Args:
    logits: [..., V] float32, divided by the temperature.
    top_k: 0 keeps all.
    top_p: 1 keeps all.
    min_p: 0 keeps all.

  Returns:
    [..., V] bool, with at least one token each.
  """
  keep = jnp.ones(logits.shape, bool)
  if top_k and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    keep = logits >= least
  if top_p < 1:
    left = jnp.where(keep, logits, MASKED)
    ranked = -jnp.sort(-left, axis=-1)
    p = jax.nn.softmax(ranked, axis=-1)
    inside = jnp.cumsum(p, axis=-1) - p < top_p  # the mass before a token
    inside = inside.at[..., 0].set(True)  # whatever a top_p near 0 rounds to
    least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    keep = keep & (left >= least)
  if min_p > 0:
    least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
    keep = keep & (logits >= least)
  return keep


def pack(keep: jax.Array) -> jax.Array:
  """[..., V] bool -> [..., ceil(V / 8)] uint8."""
  return jnp.packbits(keep, axis=-1)


def restrict(logits: jax.Array, packed: jax.Array | None) -> jax.Array:
  """Logits with everything outside a packed support masked; None changes nothing."""
  if packed is None:
    return logits
  keep = jnp.unpackbits(packed, axis=-1, count=logits.shape[-1]).astype(bool)
  return jnp.where(keep, logits, MASKED)
