"""RMSNorm, SwiGLU and rotary positions: what every block is made of."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from r1jax.models.config import Llama3, PolicyConfig, Yarn


def weight(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  *,
  fan_in: int,
  std: float | None,
) -> jax.Array:
  """A float32 weight with logical axes; std None means 1/sqrt(fan_in)."""
  init = nn.initializers.normal(std if std is not None else fan_in**-0.5)
  return module.param(
    name, nn.with_logical_partitioning(init, axes), shape, jnp.float32
  )


class RMSNorm(nn.Module):
  """x / rms(x) * scale, computed in float32 (arXiv 1910.07467)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


@jax.custom_vjp
def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
  """(silu(x gate) * (x up)) down (arXiv 2002.05202). Args: x [..., D], gate and up [D,
  F], down [F, D].

  The derivative is ours: it keeps the two products alone, and is written so that XLA
  transposes arrays of width D where it must. On a CPU a step waits for those copies.
  """
  return _swiglu(x, gate, up, down)[0]


def _swiglu(x, gate, up, down):
  g, u = x @ gate, x @ up
  return (jax.nn.silu(g) * u) @ down, (x, g, u, gate, up, down)


def _swiglu_back(kept, grad):
  x, g, u, gate, up, down = kept
  s = jax.nn.sigmoid(g)
  d_hidden = grad @ down.T
  d_g = d_hidden * u * s * (1 + g * (1 - s))
  d_u = d_hidden * g * s

  def product(a, b):  # sum over all rows
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])

  d_x = d_g @ gate.T + d_u @ up.T
  return d_x, product(x, d_g), product(x, d_u), product(grad, g * s * u).T


swiglu.defvjp(_swiglu, _swiglu_back)


class SwiGLU(nn.Module):
  """W_down(silu(W_gate x) * W_up x): the dense FFN and the shared expert."""

  config: PolicyConfig
  ffn: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, d = self.config, self.config.width
    std = c.init_std
    axes_in, axes_out = ("embed", "ffn"), ("ffn", "embed")
    gate = weight(self, "gate", (d, self.ffn), axes_in, fan_in=d, std=std)
    up = weight(self, "up", (d, self.ffn), axes_in, fan_in=d, std=std)
    down = weight(
      self, "down", (self.ffn, d), axes_out, fan_in=2 * c.layers * self.ffn, std=std
    )
    dtype = x.dtype
    return swiglu(x, gate.astype(dtype), up.astype(dtype), down.astype(dtype))


def rope_frequencies(
  dim: int, theta: float, scaling: Yarn | Llama3 | None
) -> jax.Array:
  """Radians a position turns each of the dim/2 pairs, [dim/2] float32.

  f_j = theta^(-2j/dim). Both extensions keep fast pairs and divide slow ones by
  `factor`. YaRN blends the two linearly in j, between the pairs that turn beta_fast and
  beta_slow times over the original length; Llama 3 linearly in the turns themselves.
  """
  j = jnp.arange(dim // 2, dtype=jnp.float32)
  f = theta ** (-2.0 * j / dim)
  if scaling is None:
    return f
  if isinstance(scaling, Llama3):
    turns = scaling.original_length * f / (2 * math.pi)
    keep = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return f / scaling.factor * (1.0 - keep) + f * keep
  yarn = scaling

  def pair_that_turns(times: float) -> float:
    length = yarn.original_length
    return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
  ramp = jnp.clip((j - low) / max(high - low, 1e-3), 0.0, 1.0)
  return f / yarn.factor * ramp + f * (1.0 - ramp)


def attention_scale(config: PolicyConfig) -> float:
  """(K + R)^(-1/2), times m^2 under YaRN with m = 0.1 mscale_all_dim ln(factor) + 1."""
  scale = (config.nope_dim + config.rope_dim) ** -0.5
  if config.yarn is not None and config.yarn.factor > 1:
    m = 0.1 * config.yarn.mscale_all_dim * math.log(config.yarn.factor) + 1.0
    scale *= m * m
  return scale


def rope_turns(positions: jax.Array, config: PolicyConfig) -> jax.Array:
  """(cos, sin) of position * f_j, [2, ..., R/2] float32: the same for all layers.

  Args:
    positions: [...] int32.
    config: theta, the width that turns (R, or K of grouped queries), the extension.
  """
  width = config.rope_dim or config.head_dim
  f = rope_frequencies(width, config.rope_theta, config.yarn or config.llama3)
  angle = positions.astype(jnp.float32)[..., None] * f.reshape(
    (1,) * positions.ndim + (-1,)
  )
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if config.yarn is not None and config.yarn.mscale != config.yarn.mscale_all_dim:
    y, log = config.yarn, math.log(config.yarn.factor)
    m = (0.1 * y.mscale * log + 1.0) / (0.1 * y.mscale_all_dim * log + 1.0)
    cos, sin = cos * m, sin * m
  return jnp.stack([cos, sin])


def apply_rope(
  x: jax.Array, turns: jax.Array, pairing: str = "neighbours"
) -> jax.Array:
  """Turns pairs of channels.

  Args:
    x: [..., R], or [..., heads, R].
    turns: [2, ..., R/2] of `rope_turns`.
    pairing: "neighbours": (x_2j, x_2j+1), DeepSeek's; "halves": (x_j, x_j+R/2), Llama's
      and Qwen's.
  """
  if x.ndim == turns.ndim:
    turns = turns[..., None, :]
  (cos, sin), wide = turns, x.astype(jnp.float32)
  if pairing == "halves":
    a, b = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)
  pairs = wide.reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)
