"""Log-probabilities and entropies over the vocabulary, without all tokens' logits.

The logits of [B, T] tokens are the largest array of an update: 4.2 GB of float32 for
8,192 tokens and DeepSeek-V3's 129,280 pieces. Where they would be large, some positions
at a time have theirs, and the backward pass makes them again.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import implementation as impl
from r1jax import sharding
from r1jax import support as supports

ELEMENTS = 2**27  # of the logits that a device holds at a time: 512 MiB


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log softmax(logits)[tokens], float32. Args: logits [..., V], tokens [...]."""
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
  """-sum p log p in nats. Args: logits [..., V] float32."""
  logp = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def positions_at_a_time(rows: int, length: int, vocab: int) -> int:
  """Of `length`, so that a device's logits hold at most ELEMENTS, in equal chunks."""
  shards = impl.parts(sharding.BATCH)
  most = max(1, ELEMENTS // (-(-rows // shards) * vocab))
  chunks = -(-length // most)
  return -(-length // chunks)


def token_statistics(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  support: jax.Array | None = None,
  *,
  temperature: float = 1.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(log-probabilities of the tokens, entropies in nats), both [B, T] float32.

  Args:
    hidden: [B, T, D].
    head: [D, V] in hidden's dtype.
    tokens: [B, T] int32.
    support: [B, T, V/8] uint8, the truncated supports' bits (support.py); None: all.
    temperature: divides the logits.
    chunk: positions whose logits [B, chunk, V] float32 exist at a time. None: as many
      as ELEMENTS allows; all of them are differentiated plainly.
  """
  rows, length = tokens.shape
  if chunk is None:
    chunk = positions_at_a_time(rows, length, head.shape[1])
  if chunk < length:
    return _chunked(hidden, head, tokens, support, temperature, chunk)
  logits = _logits(hidden, head, support, temperature)
  return token_logprobs(logits, tokens), entropy(logits)


def over_chunks(function: Callable, arrays: Any, chunk: int) -> Any:
  """A function of [B, T, ...] arrays whose results are [B, T, ...], for `chunk`
  positions at a time; the backward pass computes it again.

  Args:
    function: (arrays of [B, chunk, ...]) -> arrays of [B, chunk, ...].
    arrays: a tree of [B, T, ...].
    chunk: positions at a time; T or more is all of them, computed once.
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  if chunk >= length:
    return function(arrays)
  parts = jax.tree.map(lambda x: _chunks(x, chunk), arrays)
  found = jax.lax.map(jax.checkpoint(function), parts)
  return jax.tree.map(lambda x: _whole(x, length), found)


def _logits(hidden, head, support, temperature):
  logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
  return supports.restrict(logits / temperature, support)


def _chunks(x, chunk):
  """[B, T, ...] -> [T / chunk, B, chunk, ...], T filled up with zeros."""
  b, t = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _whole(parts, length):
  """The way back."""
  n, b, chunk = parts.shape[:3]
  return parts.swapaxes(0, 1).reshape(b, n * chunk, *parts.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, head, tokens, support, temperature, chunk):
  return _forward(hidden, head, tokens, support, temperature, chunk)[0]


def _forward(hidden, head, tokens, support, temperature, chunk):
  def part(x):
    hidden, tokens, support = x
    logits = _logits(hidden, head, support, temperature)
    return token_logprobs(logits, tokens), entropy(logits)

  rows = jax.tree.map(lambda x: _chunks(x, chunk), (hidden, tokens, support))
  found = jax.lax.map(part, rows)
  logprobs, entropies = (_whole(x, tokens.shape[1]) for x in found)
  return (logprobs, entropies), (hidden, head, tokens, support, entropies)


def _backward(temperature, chunk, kept, grads):
  hidden, head, tokens, support, entropies = kept

  def part(d_head, x):
    hidden, tokens, support, entropies, g_logprob, g_entropy = x
    logits = _logits(hidden, head, support, temperature)
    logp = jax.nn.log_softmax(logits, axis=-1)
    # d logprob / d logits = [v = token] - p; d entropy / d logits = -p (log p + H).
    push = g_logprob[..., None] + g_entropy[..., None] * (logp + entropies[..., None])
    one = jnp.arange(logp.shape[-1])[None, None] == tokens[..., None]
    d_logits = jnp.where(one, g_logprob[..., None], 0.0) - jnp.exp(logp) * push
    d_logits = (d_logits / temperature).astype(hidden.dtype)
    f32 = dict(preferred_element_type=jnp.float32)
    d_hidden = jnp.einsum("btv,dv->btd", d_logits, head, **f32)
    d_head += jnp.einsum("btd,btv->dv", hidden, d_logits, **f32)
    return d_head, d_hidden.astype(hidden.dtype)

  rows = (hidden, tokens, support, entropies, *grads)
  rows = jax.tree.map(lambda x: _chunks(x, chunk), rows)
  d_head, d_hidden = jax.lax.scan(part, jnp.zeros(head.shape, jnp.float32), rows)
  return _whole(d_hidden, tokens.shape[1]), d_head.astype(head.dtype), None, None


_chunked.defvjp(_forward, _backward)
