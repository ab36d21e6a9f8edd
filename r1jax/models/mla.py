"""Multi-head latent attention (DeepSeek-V3 report, Eq. 1-11).

A token leaves one cache entry: its normalised kv latent and its rotated rope key,
shared by all heads. Training materialises keys and values from the latents; decoding
folds the up-projections into query and output instead ("absorbed"): the same numbers.
"""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from r1jax import ops
from r1jax.models.config import PolicyConfig
from r1jax.models.layers import RMSNorm, apply_rope, attention_scale, weight


@struct.dataclass
class Sequence:
  """Where the tokens of a full forward pass stand."""

  positions: jax.Array  # B T int32, for RoPE
  # B T int32; 0 is padding; a token sees its own segment only, whose number must not
  # return later in the row.
  segments: jax.Array

  @classmethod
  def of_mask(cls, mask: jax.Array) -> "Sequence":
    """One page a row: positions count the real tokens. Args: mask [B, T] bool."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return cls(positions=positions, segments=mask.astype(jnp.int32))


@struct.dataclass
class DecodeStep:
  """Where the one new token of every row of every group stands."""

  positions: jax.Array  # B G int32, for RoPE
  prefix_starts: jax.Array  # B int32, the first slot of each prompt; it ends the prefix
  slot: jax.Array  # [] int32, the suffix slot the token is written to

  def written(self, suffix: jax.Array, layer: jax.Array, entry: jax.Array) -> jax.Array:
    """The rows' own cache with the tokens' entries. Args: suffix [N, B, G, S, L], layer
    [] int32, entry [B, G, L]."""
    where = (layer, 0, 0, self.slot, 0)
    return jax.lax.dynamic_update_slice(suffix, entry[None, :, :, None], where)

  def attend(self, q, prefix, suffix, layer, *, config: PolicyConfig, scale: float):
    """ops.decode_attention over the prompts and all that is written."""
    return ops.decode_attention(
      q,
      prefix,
      suffix,
      layer,
      self.prefix_starts,
      jnp.full_like(self.prefix_starts, prefix.shape[2]),
      jnp.broadcast_to(self.slot + 1, q.shape[:2]),
      layout=config.cache,
      scale=scale,
      implementation=config.implementation,
    )


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
      self.q_norm = RMSNorm(c.norm_eps)
      self.w_uq = new(
        "w_uq", (c.q_latent, c.heads, qk), ("latent", "heads", "head_dim"), c.q_latent
      )
    entry = c.kv_latent + c.rope_dim
    self.w_dkv = new("w_dkv", (c.width, entry), ("embed", "latent"), c.width)
    self.kv_norm = RMSNorm(c.norm_eps)
    axes = ("latent", "heads", "head_dim")
    self.w_uk = new("w_uk", (c.kv_latent, c.heads, c.nope_dim), axes, c.kv_latent)
    self.w_uv = new("w_uv", (c.kv_latent, c.heads, c.v_dim), axes, c.kv_latent)
    self.w_o = new(
      "w_o",
      (c.heads, c.v_dim, c.width),
      ("heads", "head_dim", "embed"),
      2 * c.layers * c.heads * c.v_dim,
    )

  def _queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    c, dtype = self.config, x.dtype
    if c.q_latent is None:
      q = jnp.einsum("...d,dhk->...hk", x, self.w_q.astype(dtype))
    else:
      latent = self.q_norm(x @ self.w_dq.astype(dtype))
      q = jnp.einsum("...q,qhk->...hk", latent, self.w_uq.astype(dtype))
    return q[..., : c.nope_dim], apply_rope(q[..., c.nope_dim :], positions, c)

  def _entries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Entries [..., C + R]: the kv latent after its norm, the key after RoPE."""
    c = self.config
    both = x @ self.w_dkv.astype(x.dtype)
    latent = self.kv_norm(both[..., : c.kv_latent])
    rope_key = apply_rope(both[..., c.kv_latent :], positions, c)
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
    q_nope, q_rope = self._queries(x, seq.positions)
    entries = self._entries(x, seq.positions)
    latent, rope_key = entries[..., : c.kv_latent], entries[..., c.kv_latent :]
    k_nope = jnp.einsum("bsc,chk->bshk", latent, self.w_uk.astype(dtype))
    v = jnp.einsum("bsc,chv->bshv", latent, self.w_uv.astype(dtype))
    rope_key = jnp.broadcast_to(rope_key[:, :, None], (*k_nope.shape[:3], c.rope_dim))
    out, _ = ops.attention(
      jnp.concatenate([q_nope, q_rope], axis=-1),
      jnp.concatenate([k_nope, rope_key], axis=-1),
      v,
      seq.segments,
      seq.segments,
      scale=attention_scale(c),
      implementation=c.implementation,
    )
    out = jnp.einsum("bthv,hvd->btd", out, self.w_o.astype(dtype))
    return out, self._stored(entries)

  def decode(
    self,
    x: jax.Array,
    at: DecodeStep,
    prefix: jax.Array,
    suffix: jax.Array,
    layer: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Absorbed attention of one new token a row.

    Args:
      x: [B, G, D].
      at: where the tokens stand.
      prefix: [N, B, P, L], all layers' prompt caches.
      suffix: [N, B, G, S, L], and those of the rows' own tokens.
      layer: [] int32, which of the N.

    Returns:
      ([B, G, D] output, suffix with the new entries written).
    """
    c, dtype = self.config, x.dtype
    q_nope, q_rope = self._queries(x, at.positions)
    suffix = at.written(suffix, layer, self._stored(self._entries(x, at.positions)))
    q_latent = jnp.einsum("bghk,chk->bghc", q_nope, self.w_uk.astype(dtype))
    out = at.attend(
      jnp.concatenate([q_latent, q_rope], axis=-1),
      prefix,
      suffix,
      layer,
      config=c,
      scale=attention_scale(c),
    )
    out = jnp.einsum("bghc,chv->bghv", out, self.w_uv.astype(dtype))
    return jnp.einsum("bghv,hvd->bgd", out, self.w_o.astype(dtype)), suffix
