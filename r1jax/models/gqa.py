"""Grouped-query attention (arXiv 2305.13245) as in Llama 3, Qwen2 and Qwen3.

A token leaves one cache entry: for each key head its key after RoPE and its value.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from r1jax.models import cache
from r1jax.models.config import PolicyConfig
from r1jax.models.layers import RMSNorm, apply_rope, weight
from r1jax.models.sequence import Sequence, attend


class GQA(nn.Module):
  config: PolicyConfig

  def setup(self):
    c, std = self.config, self.config.init_std

    def projection(name, heads, axis):
      shape, axes = (heads, c.head_dim), (axis, "head_dim")
      w_shape, w_axes = (c.width, *shape), ("embed", *axes)
      w = weight(self, f"w_{name}", w_shape, w_axes, fan_in=c.width, std=std)
      if not c.qkv_bias:
        return w, None
      return w, weight(self, f"b_{name}", shape, axes, fan_in=1, std=0.0)

    self.to_q = projection("q", c.heads, "heads")
    self.to_k = projection("k", c.kv_heads, "kv_heads")
    self.to_v = projection("v", c.kv_heads, "kv_heads")
    self.q_norm = RMSNorm(c.norm_eps) if c.qk_norm else None
    self.k_norm = RMSNorm(c.norm_eps) if c.qk_norm else None
    self.w_o = weight(
      self,
      "w_o",
      (c.heads, c.head_dim, c.width),
      ("heads", "head_dim", "embed"),
      fan_in=2 * c.layers * c.heads * c.head_dim,
      std=std,
    )

  def _project(self, x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    heads = jnp.einsum("btd,dhk->bthk", x, w.astype(x.dtype))
    return heads if b is None else heads + b.astype(x.dtype)[None, None]

  def _queries(self, x: jax.Array, turns: jax.Array) -> jax.Array:
    q = self._project(x, *self.to_q)
    q = q if self.q_norm is None else self.q_norm(q)
    return apply_rope(q, turns, "halves")

  def _keys_and_values(self, x: jax.Array, turns: jax.Array) -> tuple:
    """[B, T, Hk, K] each: the keys after RoPE, the values."""
    k, v = self._project(x, *self.to_k), self._project(x, *self.to_v)
    k = k if self.k_norm is None else self.k_norm(k)
    return apply_rope(k, turns, "halves"), v

  def _entries(self, k: jax.Array, v: jax.Array) -> jax.Array:
    """[B, T, L]: key and value of each head, beside each other."""
    return jnp.stack([k, v], axis=3).reshape(*k.shape[:2], self.config.cache.width)

  def _output(self, heads: jax.Array) -> jax.Array:
    return jnp.einsum("bthk,hkd->btd", heads, self.w_o.astype(heads.dtype))

  def __call__(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array, jax.Array]:
    """Full attention.

    Args:
      x: [B, T, D].
      seq: positions and segments of the tokens.

    Returns:
      ([B, T, D] output, [B, T, L] cache entries).
    """
    c = self.config
    q, (k, v) = self._queries(x, seq.turns), self._keys_and_values(x, seq.turns)
    out = attend(
      q,
      k,
      v,
      seq,
      scale=c.head_dim**-0.5,
      implementation=c.implementation,
    )
    return self._output(out), self._entries(k, v)

  def decode(
    self,
    x: jax.Array,
    at: cache.DecodeStep,
    prompts: Any,
    own: tuple,
    layer: jax.Array | None,
  ) -> tuple[jax.Array, tuple]:
    """Attention of the new tokens.

    Args:
      x: [S, Q, D].
      at: where the tokens stand.
      prompts, own, layer: as in cache.attend.

    Returns:
      ([S, Q, D] output, own with the new entries).
    """
    c = self.config
    q, (k, v) = self._queries(x, at.turns), self._keys_and_values(x, at.turns)
    out, own = cache.attend(
      at,
      q,
      self._entries(k, v),
      prompts,
      own,
      layer,
      layout=c.cache,
      scale=c.head_dim**-0.5,
      implementation=c.implementation,
    )
    return self._output(out), own
