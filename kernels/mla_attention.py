"""Flash attention for training and prefill (Dao, arXiv 2307.08691).

For MLA's heads (queries and keys 192 wide, values 128) and grouped-query heads (64,
128). Scores exist a block at a time. The forward pass keeps each row's log-sum-exp,
from which the backward pass makes the probabilities again. Here: the derivative, and
whole blocks. Bodies: mla_attention_mosaic with its _backward (TPU),
mla_attention_triton (GPU).
"""

import functools

import jax
import jax.numpy as jnp

from r1jax.kernels import (
  base2,
  mla_attention_mosaic,
  mla_attention_mosaic_backward,
  mla_attention_triton,
)

FIT = {"mosaic": mla_attention_mosaic.fit, "triton": mla_attention_triton.fit}
FORWARD = {
  "mosaic": mla_attention_mosaic.forward,
  "triton": mla_attention_triton.forward,
}
BACKWARD = {
  "mosaic": mla_attention_mosaic_backward.backward,
  "triton": mla_attention_triton.backward,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_segments: jax.Array | None,
  k_segments: jax.Array | None,
  causal: bool,
  scale: float,
  body: str,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale q k^T) v and its log-sum-exp.

  Args:
    q: [B, T, H, d].
    k: [B, S, Hk, d]; each key head serves H / Hk consecutive query heads.
    v: [B, S, Hk, dv].
    q_segments, k_segments: [B, T] and [B, S] int32; a query sees keys of its own number
      alone, and none that is 0. None: everything is one segment.
    causal: T == S and a query sees no later key.
    scale: of the scores.
    body: "mosaic" or "triton".
    interpret: run as XLA, on any platform.

  Returns:
    ([B, T, H, dv] in v's dtype, [B, H, T] float32): 0 and -inf where a row keeps
    nothing.

  Raises:
    NotImplementedError: the body cannot serve the shape.
  """
  return _forward(q, k, v, q_segments, k_segments, causal, scale, body, interpret)[0]


def _plan(q, k, v, segments, causal, body):
  """(blocks, padded T, padded S, whether segments are needed)."""
  t, s = q.shape[1], k.shape[1]
  blocks = FIT[body](q.shape, k.shape, v.shape, q.dtype)
  side = max(blocks.q, blocks.k)
  whole_t = -(-t // (side if causal else blocks.q)) * (side if causal else blocks.q)
  whole_s = whole_t if causal else -(-s // blocks.k) * blocks.k
  # Under a causal mask no real query sees the keys that fill up.
  segmented = segments is not None or (not causal and whole_s != s)
  return blocks, whole_t, whole_s, segmented


def _rows(x, length):
  """Axis 1 filled up with zeros."""
  return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _numbers(segments, like, length):
  """Segments [B, length]: what fills up is padding."""
  if segments is None:
    segments = jnp.ones(like.shape[:2], jnp.int32)
  return _rows(segments, length)


def _forward(q, k, v, q_segments, k_segments, causal, scale, body, interpret):
  blocks, t, s, segmented = _plan(q, k, v, q_segments, causal, body)
  out, lse = FORWARD[body](
    _rows(q, t),
    _rows(k, s),
    _rows(v, s),
    _numbers(q_segments, q, t) if segmented else None,
    _numbers(k_segments, k, s) if segmented else None,
    causal=causal,
    scale=scale,
    blocks=blocks,
    interpret=interpret,
  )
  out, lse = out[:, : q.shape[1]], lse[:, :, : q.shape[1]]
  return (out, lse), (q, k, v, q_segments, k_segments, out, lse)


def _backward(causal, scale, body, interpret, kept, grads):
  q, k, v, q_segments, k_segments, out, lse = kept
  d_out, d_lse = grads
  blocks, t, s, segmented = _plan(q, k, v, q_segments, causal, body)
  # dS = P * (dP - delta): the row's sum of P dP, less what the log-sum-exp asks for.
  delta = jnp.einsum("bthv,bthv->bht", d_out, out, preferred_element_type=jnp.float32)
  delta = delta - jnp.where(jnp.isfinite(lse), d_lse, 0.0)
  fill = ((0, 0), (0, 0), (0, t - q.shape[1]))
  dq, dk, dv = BACKWARD[body](
    _rows(q, t),
    _rows(k, s),
    _rows(v, s),
    _numbers(q_segments, q, t) if segmented else None,
    _numbers(k_segments, k, s) if segmented else None,
    jnp.pad(base2.in_base2(lse), fill),
    jnp.pad(delta, fill),
    _rows(d_out, t),
    causal=causal,
    scale=scale,
    blocks=blocks,
    interpret=interpret,
  )
  return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, None


attention.defvjp(_forward, _backward)
