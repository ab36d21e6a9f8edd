"""Attention and the experts' grouped product: one door each to the implementations.

The XLA form written here is the definition that any other must equal.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row that keeps nothing gives numbers and no NaN


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float
) -> jax.Array:
  """softmax(scale q k^T) v over the kept positions; softmax in float32.

  Args:
    q: [B, T, H, d].
    k: [B, S, Hk, d]; each key head serves H / Hk consecutive query heads.
    v: [B, S, Hk, dv].
    mask: [B, T, S] bool, True where a query may look.
    scale: of the scores.

  Returns:
    [B, T, H, dv] in v's dtype.
  """
  if q.shape[2] > k.shape[2]:
    return _grouped_attention(q, k, v, mask, scale=scale)
  scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None], scores * scale, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bhts,bshd->bthd", weights, v)


def _grouped_attention(q, k, v, mask, *, scale):
  """The n query heads of a key head as n times as many queries: no key is repeated."""
  b, t, heads, d = q.shape
  n = heads // k.shape[2]
  q = q.reshape(b, t, -1, n, d).transpose(0, 3, 1, 2, 4).reshape(b, n * t, -1, d)
  mask = jnp.broadcast_to(mask[:, None], (b, n, *mask.shape[1:]))
  out = attention(q, k, v, mask.reshape(b, n * t, -1), scale=scale)
  out = out.reshape(b, n, t, -1, v.shape[-1]).transpose(0, 2, 3, 1, 4)
  return out.reshape(b, t, heads, -1)


def latent_decode(
  q: jax.Array,
  prefix: jax.Array,
  prefix_mask: jax.Array,
  suffix: jax.Array,
  slot: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """One token of absorbed MLA over a prefix shared by the group and each row's suffix.

  Args:
    q: [B, G, H, L] queries already in latent space (L = kv latent + rope).
    prefix: [B, P, L] the prompt's cache, one for the G rows of a group.
    prefix_mask: [B, P] bool.
    suffix: [B, G, S, L] the rows' own cache; slots after `slot` are not written yet.
    slot: [] int32, the slot of the present token.
    scale: of the scores.

  Returns:
    [B, G, H, L]: the weighted sum of cache entries.
  """
  length = prefix.shape[1]
  before = jnp.einsum("bghl,bpl->bghp", q, prefix, preferred_element_type=jnp.float32)
  own = jnp.einsum("bghl,bgsl->bghs", q, suffix, preferred_element_type=jnp.float32)
  before = jnp.where(prefix_mask[:, None, None], before * scale, MASKED)
  written = jnp.arange(suffix.shape[2]) <= slot
  own = jnp.where(written[None, None, None], own * scale, MASKED)
  weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1)
  weights = weights.astype(suffix.dtype)
  return jnp.einsum("bghp,bpl->bghl", weights[..., :length], prefix) + jnp.einsum(
    "bghs,bgsl->bghl", weights[..., length:], suffix
  )


def gqa_decode(
  q: jax.Array,
  prefix: jax.Array,
  prefix_mask: jax.Array,
  suffix: jax.Array,
  slot: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """One token of grouped-query attention over a shared prefix and each row's suffix.

  Args:
    q: [B, G, H, K].
    prefix: [B, P, 2, Hk, K] keys and values of the prompt, one for the G rows of a
      group; each key head serves H / Hk consecutive query heads.
    prefix_mask: [B, P] bool.
    suffix: [B, G, S, 2, Hk, K] of the rows' own tokens; slots after `slot` are not
      written yet.
    slot: [] int32, the slot of the present token.
    scale: of the scores.

  Returns:
    [B, G, H, K].
  """
  b, g, heads, k = q.shape
  length, kv_heads = prefix.shape[1], prefix.shape[3]
  q = q.reshape(b, g, kv_heads, -1, k)
  f32 = dict(preferred_element_type=jnp.float32)
  before = jnp.einsum("bghnk,bphk->bghnp", q, prefix[:, :, 0], **f32)
  own = jnp.einsum("bghnk,bgshk->bghns", q, suffix[:, :, :, 0], **f32)
  before = jnp.where(prefix_mask[:, None, None, None], before * scale, MASKED)
  written = jnp.arange(suffix.shape[2]) <= slot
  own = jnp.where(written[None, None, None, None], own * scale, MASKED)
  weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1)
  weights = weights.astype(suffix.dtype)
  out = jnp.einsum("bghnp,bphk->bghnk", weights[..., :length], prefix[:, :, 1])
  out += jnp.einsum("bghns,bgshk->bghnk", weights[..., length:], suffix[:, :, :, 1])
  return out.reshape(b, g, heads, k)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Rows of x, sorted by group, times their group's matrix.

  Args:
    x: [M, D].
    w: [E, D, F].
    group_sizes: [E] int32, summing to M.

  Returns:
    [M, F] in x's dtype.
  """
  return jax.lax.ragged_dot(x, w, group_sizes)
