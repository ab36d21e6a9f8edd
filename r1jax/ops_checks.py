"""What the doors of ops.py refuse: arrays that do not belong together, and numbers that
mean nothing, where they are known (not while a program is traced)."""

import jax
import numpy as np


def _known(*arrays) -> list[np.ndarray] | None:
  """The arrays' numbers, or None while a program is traced."""
  if any(isinstance(x, jax.core.Tracer) for x in arrays):
    return None
  return [np.asarray(x) for x in arrays]


def _int32(**arrays):
  wrong = {name: str(x.dtype) for name, x in arrays.items() if x.dtype != np.int32}
  if wrong:
    raise ValueError(f"{wrong} must be int32; cast with .astype(jnp.int32).")


def scale(number):
  if not number > 0:
    raise ValueError(f"scale={number} must be above 0; it is 1 / sqrt(head dim) or so.")


def attention(q, k, v, q_segments, k_segments, causal, something=True):
  """something: a mask that keeps nothing is refused."""
  shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
    raise ValueError(
      f"{shapes} must be [B, T, H, d], [B, S, Hk, d] and [B, S, Hk, dv]."
    )
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
    raise ValueError(
      f"{shapes}: rows and widths of q and k must be equal, and their heads divide."
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      f"q is {q.dtype}, k {k.dtype} and v {v.dtype}: they must be of one dtype; cast"
      " them to the compute dtype."
    )
  if causal and q.shape[1] != k.shape[1]:
    raise ValueError(
      f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys: the lengths"
      " must be equal. Pass causal=False for keys that all lie before."
    )
  if (q_segments is None) != (k_segments is None):
    raise ValueError("q_segments and k_segments come together or not at all.")
  if q_segments is None:
    return
  if q_segments.shape != q.shape[:2] or k_segments.shape != k.shape[:2]:
    raise ValueError(
      f"q_segments {q_segments.shape} and k_segments {k_segments.shape} must be"
      f" {q.shape[:2]} and {k.shape[:2]}."
    )
  _int32(q_segments=q_segments, k_segments=k_segments)
  numbers = _known(q_segments, k_segments)
  if numbers is None:
    return
  mine, theirs = numbers
  if min(mine.min(initial=0), theirs.min(initial=0)) < 0:
    raise ValueError("segments are numbered from 1, and 0 is padding; one is negative.")
  if something and not any(
    np.intersect1d(a, b[b > 0]).size for a, b in zip(mine, theirs, strict=True)
  ):
    raise ValueError(
      "no query has a key of its own segment: the mask keeps nothing. Real tokens have"
      " segments from 1 on."
    )


def decode_attention(q, prefix, suffix, layer, starts, stops, lengths, layout):
  if q.ndim != 4 or q.shape[3] != layout.key_width or q.shape[2] % layout.kv_heads:
    raise ValueError(
      f"q {q.shape} must be [B, G, H, {layout.key_width}] with H a multiple of"
      f" {layout.kv_heads}."
    )
  if prefix.ndim != 4 or suffix.ndim != 5:
    raise ValueError(
      f"prefix {prefix.shape} and suffix {suffix.shape} must be [N, B, P, L] and"
      " [N, B, G, S, L]."
    )
  b, g = q.shape[:2]
  n, p, s = prefix.shape[0], prefix.shape[2], suffix.shape[3]
  wanted = (n, b, p, layout.width), (n, b, g, s, layout.width)
  if (prefix.shape, suffix.shape) != wanted:
    raise ValueError(
      f"prefix {prefix.shape} and suffix {suffix.shape} must be [N, B, P, L] and"
      f" [N, B, G, S, L] with B {b}, G {g} and L {layout.width}."
    )
  if not q.dtype == prefix.dtype == suffix.dtype:
    raise ValueError(
      f"q is {q.dtype}, prefix {prefix.dtype} and suffix {suffix.dtype}:"
      " they must be of one dtype."
    )
  if starts.shape != (b,) or stops.shape != (b,) or lengths.shape != (b, g):
    raise ValueError(
      f"starts {starts.shape}, stops {stops.shape} and lengths {lengths.shape} must be"
      f" ({b},), ({b},) and {(b, g)}."
    )
  _int32(layer=layer, starts=starts, stops=stops, lengths=lengths)
  numbers = _known(layer, starts, stops, lengths)
  if numbers is None:
    return
  layer, first, last, own = numbers
  if layer.size != 1 or not 0 <= layer < n:
    raise ValueError(f"layer {layer} must be one of the caches' {n}, from 0 on.")
  low, high = min(first.min(), last.min(), own.min()), max(first.max(), last.max())
  if low < 0 or high > p or own.max() > s:
    raise ValueError(
      f"starts {first}, stops {last} and lengths {own}: must lie in 0..{p}, 0..{p} and"
      f" 0..{s}."
    )
  if not (own > 0).any() and not (last > first).any():
    raise ValueError("no row sees any slot of the cache: nothing can be attended to.")


def grouped_matmul(x, w, group_sizes):
  if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
    raise ValueError(f"x {x.shape} and w {w.shape} must be [M, D] and [E, D, F].")
  if x.dtype != w.dtype:
    raise ValueError(f"x is {x.dtype} and w {w.dtype}: they must be of one dtype.")
  if group_sizes.shape != w.shape[:1]:
    raise ValueError(f"group_sizes {group_sizes.shape} must be {w.shape[:1]}.")
  _int32(group_sizes=group_sizes)
  numbers = _known(group_sizes)
  if numbers is None:
    return
  if numbers[0].min() < 0 or numbers[0].sum() > x.shape[0]:
    raise ValueError(
      f"group_sizes {numbers[0]} must be 0 or more and sum to at most {x.shape[0]}, the"
      " rows of x."
    )
