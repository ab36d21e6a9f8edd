"""Multi-head latent attention (DeepSeek-V3 report, Eq. 1-11).

A token leaves one cache entry: its normalised kv latent and its rotated rope key,
shared by all heads. Training materialises keys and values from the latents; decoding
folds the up-projections into query and output instead ("absorbed"): the same numbers.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from r1jax.models import cache
from r1jax.models.config import PolicyConfig
from r1jax.models.layers import RMSNorm, apply_rope, attention_scale, weight
from r1jax.models.sequence import Sequence, attend


class MLA(nn.Module):
  config: PolicyConfig

  def setup(self):
    c = self.config
    qk, std = c.nope_dim + c.rope_dim, c.init_std

    def new(name, shape, axes, fan_in):
      return weight(self, name, shape, axes, fan_in=fan_in, std=std)

    if c.q_latent is None:
      self.w_q = new(
        "w_q", (c.width, c.heads, qk), ("embed", "heads", "head_dim"), c.width
      )
    else:
      self.w_dq = new("w_dq", (c.width, c.q_latent), ("embed", "latent"), c.width)
      self.q_norm = RMSNorm(c.latent_eps)
      self.w_uq = new(
        "w_uq", (c.q_latent, c.heads, qk), ("latent", "heads", "head_dim"), c.q_latent
      )
    entry = c.kv_latent + c.rope_dim
    self.w_dkv = new("w_dkv", (c.width, entry), ("embed", "latent"), c.width)
    self.kv_norm = RMSNorm(c.latent_eps)
    axes = ("latent", "heads", "head_dim")
    self.w_uk = new("w_uk", (c.kv_latent, c.heads, c.nope_dim), axes, c.kv_latent)
    self.w_uv = new("w_uv", (c.kv_latent, c.heads, c.v_dim), axes, c.kv_latent)
    self.w_o = new(
      "w_o",
      (c.heads, c.v_dim, c.width),
      ("heads", "head_dim", "embed"),
      2 * c.layers * c.heads * c.v_dim,
    )

  def _queries(self, x: jax.Array, turns: jax.Array) -> tuple[jax.Array, jax.Array]:
    c, dtype = self.config, x.dtype
    if c.q_latent is None:
      q = jnp.einsum("...d,dhk->...hk", x, self.w_q.astype(dtype))
    else:
      latent = self.q_norm(x @ self.w_dq.astype(dtype))
      q = jnp.einsum("...q,qhk->...hk", latent, self.w_uq.astype(dtype))
    return q[..., : c.nope_dim], apply_rope(q[..., c.nope_dim :], turns)

  def _entries(self, x: jax.Array, turns: jax.Array) -> jax.Array:
    """Entries [..., C + R]: the kv latent after its norm, the key after RoPE."""
    c = self.config
    both = x @ self.w_dkv.astype(x.dtype)
    latent = self.kv_norm(both[..., : c.kv_latent])
    rope_key = apply_rope(both[..., c.kv_latent :], turns)
    return jnp.concatenate([latent, rope_key], axis=-1)

  def _stored(self, entries: jax.Array) -> jax.Array:
    """Entries at the width of the cache, L."""
    fill = self.config.cache.width - entries.shape[-1]
    return jnp.pad(entries, [(0, 0)] * (entries.ndim - 1) + [(0, fill)])

  def __call__(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array]:
    """Full attention.

    Args:
      x: [B, T, D].
      seq: positions and segments of the tokens.

    Returns:
      ([B, T, D] output, [B, T, L] cache entries).
    """
    c, dtype = self.config, x.dtype
    q_nope, q_rope = self._queries(x, seq.turns)
    entries = self._entries(x, seq.turns)
    latent, rope_key = entries[..., : c.kv_latent], entries[..., c.kv_latent :]
    k_nope = jnp.einsum("bsc,chk->bshk", latent, self.w_uk.astype(dtype))
    v = jnp.einsum("bsc,chv->bshv", latent, self.w_uv.astype(dtype))
    rope_key = jnp.broadcast_to(rope_key[:, :, None], (*k_nope.shape[:3], c.rope_dim))
    out = attend(
      jnp.concatenate([q_nope, q_rope], axis=-1),
      jnp.concatenate([k_nope, rope_key], axis=-1),
      v,
      seq,
      scale=attention_scale(c),
      implementation=c.implementation,
    )
    out = jnp.einsum("bthv,hvd->btd", out, self.w_o.astype(dtype))
    return out, self._stored(entries)

  def decode(
    self,
    x: jax.Array,
    at: cache.DecodeStep,
    prompts: Any,
    own: tuple,
    layer: jax.Array | None,
  ) -> tuple[jax.Array, tuple]:
    """Absorbed attention of the new tokens.

    Args:
      x: [S, Q, D].
      at: where the tokens stand.
      prompts, own, layer: as in cache.attend.

    Returns:
      ([S, Q, D] output, own with the new entries).
    """
    c, dtype = self.config, x.dtype
    q_nope, q_rope = self._queries(x, at.turns)
    q_latent = jnp.einsum("sqhk,chk->sqhc", q_nope, self.w_uk.astype(dtype))
    out, own = cache.attend(
      at,
      jnp.concatenate([q_latent, q_rope], axis=-1),
      self._stored(self._entries(x, at.turns)),
      prompts,
      own,
      layer,
      layout=c.cache,
      scale=attention_scale(c),
      implementation=c.implementation,
    )
    out = jnp.einsum("sqhc,chv->sqhv", out, self.w_uv.astype(dtype))
    return jnp.einsum("sqhv,hvd->sqd", out, self.w_o.astype(dtype)), own
