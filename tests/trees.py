"""Comparing trees of arrays."""

import jax
import numpy as np


def host(tree):
  """Numbers that outlive donation."""
  return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(a, b, **tolerance):
  """Equal trees; bit for bit unless a tolerance is given."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if tolerance:
      np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
    else:
      assert np.array_equal(x, y), name
