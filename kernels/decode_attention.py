"""One token's attention over a cache: absorbed MLA and grouped queries.

A group's prompt lies in the cache once, its rows' own tokens in another; a row's output
is that over both, merged by log-sum-exp. Both caches hold all layers, [N, rows, slots,
width], and a kernel reads one layer's slots in place: no slice of a cache is copied. Of
a row, the slots from its first to its last are seen; blocks outside are not read.

Bodies: decode_attention_mosaic (TPU), decode_attention_triton (GPU).
"""

import dataclasses

import jax
import jax.numpy as jnp

from r1jax.kernels import base2, decode_attention_mosaic, decode_attention_triton

PART = {
  "mosaic": decode_attention_mosaic.decode,
  "triton": decode_attention_triton.decode,
}
FOLDED = 512  # query rows, of several samples of a group, that read a prefix at once


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where keys and values lie in an entry of the cache, for each of the key heads: keys
  from head * stride on, values from head * stride + value_start on."""

  width: int  # as stored
  kv_heads: int
  key_width: int
  value_width: int
  value_start: int

  @property
  def stride(self) -> int:
    return self.width // self.kv_heads

  def cut(self, parts: int) -> "Layout":
    """Of an entry that is cut over devices, along its key heads."""
    heads, width = self.kv_heads // parts, self.width // parts
    return dataclasses.replace(self, kv_heads=heads, width=width)

  @classmethod
  def mla(cls, kv_latent: int, rope_dim: int) -> "Layout":
    """[latent C, rope key R]: both are the key of all heads, the latent is their value.
    Above 128 an entry is filled up to a multiple of 128 (576 -> 640): XLA copies a
    cache of another width into such a one before a TPU kernel may read it."""
    width = kv_latent + rope_dim
    stored = width if width <= 128 else -(-width // 128) * 128
    return cls(stored, 1, width, kv_latent, 0)

  @classmethod
  def gqa(cls, kv_heads: int, head_dim: int) -> "Layout":
    """[key, value] of each key head in turn, so that heads can be cut over devices."""
    return cls(2 * kv_heads * head_dim, kv_heads, head_dim, head_dim, head_dim)


def decode(
  q: jax.Array,
  prefix: jax.Array,
  suffix: jax.Array,
  layer: jax.Array,
  starts: jax.Array,
  stops: jax.Array,
  lengths: jax.Array,
  *,
  layout: Layout,
  scale: float,
  body: str,
  interpret: bool,
) -> jax.Array:
  """Attention of one token a row over its group's prompt and its own tokens.

  Args:
    q: [B, G, H, d], d = layout.key_width.
    prefix: [N, B, P, L].
    suffix: [N, B, G, S, L].
    layer: [] int32, which of the N.
    starts, stops: [B] int32; slots starts .. stops - 1 of the prefix are seen.
    lengths: [B, G] int32, a row's own slots 0 .. lengths - 1 are seen.
    layout: of an entry.
    scale: of the scores.
    body: "mosaic" or "triton".
    interpret: run as XLA, on any platform.

  Returns:
    [B, G, H, dv] in the cache's dtype; 0 for rows that see nothing.

  Raises:
    NotImplementedError: the body cannot serve the shape.
  """
  b, g, heads, d = q.shape
  how = dict(layout=layout, scale=scale, body=body, interpret=interpret)
  # `f` samples of a group are one row with f times as many heads: the prefix is read
  # once for them.
  f = max(n for n in range(1, g + 1) if g % n == 0 and n * heads <= max(FOLDED, heads))
  folded = q.reshape(b * (g // f), f, layout.kv_heads, -1, d).swapaxes(1, 2)
  seen = [jnp.repeat(x, g // f) for x in (starts, stops)]
  rows = jnp.repeat(jnp.arange(b, dtype=jnp.int32), g // f)
  out, lse = part(folded.reshape(-1, f * heads, d), prefix, layer, rows, *seen, **how)

  def unfold(x):
    x = x.reshape(b * (g // f), layout.kv_heads, f, -1, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(b * g, heads, *x.shape[4:])

  own = part(
    q.reshape(b * g, heads, d),
    suffix.reshape(suffix.shape[0], b * g, *suffix.shape[3:]),
    layer,
    jnp.arange(b * g, dtype=jnp.int32),
    jnp.zeros(b * g, jnp.int32),
    lengths.reshape(-1),
    **how,
  )
  out, _ = base2.merge([(unfold(out), unfold(lse)), own])
  return out.reshape(b, g, heads, -1).astype(suffix.dtype)


def part(
  q: jax.Array,
  cache: jax.Array,
  layer: jax.Array,
  rows: jax.Array,
  starts: jax.Array,
  stops: jax.Array,
  *,
  layout: Layout,
  scale: float,
  body: str,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """Attention over one cache.

  Args:
    q: [R, H, d], the heads of a key head side by side.
    cache: [N, M, S, L].
    layer: [] int32, which of the N.
    rows: [R] int32, which of the M each query reads.
    starts, stops: [R] int32; slots starts .. stops - 1 are seen.
    layout, scale, body, interpret: as `decode`'s.

  Returns:
    ([R, H, dv] float32, natural log-sum-exp [R, H] float32): 0 and -inf where a row
    sees nothing.
  """
  # A traced number may be any: nothing outside the cache is read.
  starts, stops = (jnp.clip(x, 0, cache.shape[2]) for x in (starts, stops))
  layer = jnp.clip(jnp.reshape(layer, (1,)), 0, cache.shape[0] - 1)
  scalars = layer, rows, starts, stops
  return PART[body](q, cache, *scalars, layout=layout, scale=scale, interpret=interpret)
