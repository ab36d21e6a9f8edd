"""Causal attention of rows whose tokens are cut over the mesh axis `context`.

Keys and values go round the devices of a row (arXiv 2310.01889): in turn r each device
has those of the r-th device before it, attends to them where they are earlier than its
own tokens, and merges by log-sum-exp. Forwards no device ever has a whole row; for the
backward pass each keeps the keys and values that came by, and computes scores again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from r1jax import implementation as impl
from r1jax import ops

AXIS = "context"


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array,
  *,
  scale: float,
  implementation: str,
) -> jax.Array:
  """As the first result of ops.attention, causal, on a mesh with context > 1.

  Args:
    q: [B, T, H, d]; the axis `context` divides T.
    k: [B, T, Hk, d].
    v: [B, T, Hk, dv].
    segments: [B, T] int32, 0 is padding.
    scale, implementation: as in ops.attention.

  Returns:
    [B, T, H, dv] in v's dtype.
  """
  rows, heads = impl.axes(q.shape[0], k.shape[2])
  cut, of_rows = P(rows, AXIS, heads), P(rows, AXIS)
  local = functools.partial(
    _local, scale=scale, implementation=implementation, parts=impl.parts(AXIS)
  )
  return jax.shard_map(
    local, in_specs=(cut, cut, cut, of_rows), out_specs=cut, check_vma=False
  )(q, k, v, segments)


def _local(q, k, v, segments, *, scale, implementation, parts):
  how = dict(scale=scale, implementation=implementation)
  me = jax.lax.axis_index(AXIS)

  def found(out, lse):  # lse [B, H, T]
    return out.astype(jnp.float32), lse.swapaxes(1, 2)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def earlier(k, v, theirs):
    return found(*ops.attention(q, k, v, segments, theirs, causal=False, **how))

  def later(k, v, theirs):
    shape = *q.shape[:3], v.shape[-1]
    return jnp.zeros(shape), jnp.full(shape[:3], -jnp.inf)

  def turn(carry, r):
    theirs, sum_ = carry
    onwards = [(i, (i + 1) % parts) for i in range(parts)]
    theirs = jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, onwards), theirs)
    new = jax.lax.cond(me >= r, earlier, later, *theirs)
    return (theirs, ops.merge([sum_, new])), None

  own = found(*ops.attention(q, k, v, segments, segments, **how))
  turns = jnp.arange(1, parts)
  (_, (out, _)), _ = jax.lax.scan(turn, ((k, v, segments), own), turns)
  return out.astype(v.dtype)
