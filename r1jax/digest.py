"""A checksum of arrays: of their bits and of where in the array each stands, the same
however they lie on a mesh, for sums of integers wrap around and have no order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def mix(h: jax.Array) -> jax.Array:
  """The last rounds of MurmurHash3 (public domain): each bit of it depends on all."""
  h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def of_array(x: jax.Array) -> jax.Array:
  """[2] uint32 of an array whose entries have 1, 2 or 4 bytes."""
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place * np.uint32(size % 2**32) + along
  h = mix(bits ^ mix(place + np.uint32(0x9E3779B9)))
  total = [jnp.sum(part, dtype=jnp.uint32) for part in (h, mix(h + np.uint32(1)))]
  return jnp.stack(total)


@jax.jit
def _of_leaves(leaves: list) -> tuple[jax.Array, jax.Array]:
  finite = [
    jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.stack([of_array(x) for x in leaves]), jnp.stack(finite or [True]).all()


def of_tree(tree: Any) -> tuple[dict[str, str], bool]:
  """({path of a leaf: 16 hexadecimal digits}, whether all floats are finite)."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  pairs, finite = _of_leaves([x for _, x in found])
  names = (name(path) for path, _ in found)
  hexes = (f"{a:08x}{b:08x}" for a, b in np.asarray(pairs).tolist())
  return dict(zip(names, hexes, strict=True)), bool(finite)


def name(path: tuple) -> str:
  """A leaf's path with slashes, whether its containers are classes or dicts."""
  keys = (getattr(k, "name", getattr(k, "key", getattr(k, "idx", k))) for k in path)
  return "/".join(map(str, keys))
