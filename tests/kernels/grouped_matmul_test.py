"""The experts' product: the definition against a row at a time, and the kernels,
interpreted, against the definition, with both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from r1jax import ops

KERNELS = ("mosaic", "triton")
REL = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest number of an array
GARBAGE = np.nan  # in rows of no group

# Rows, inner and outer width, sizes of the groups.
CASES = {
  "odd, empty groups, rows left": (77, 80, 208, [10, 0, 33, 1, 20, 0]),
  "one has all": (130, 208, 48, [0, 130, 0]),
  "more groups than rows": (19, 16, 32, [1, 0, 2, 0, 0, 3, 1, 1, 0, 5, *[0] * 20, 6]),
  "one row": (1, 128, 64, [0, 0, 1]),
  "whole tiles": (256, 128, 256, [128, 64, 64]),
  "several tiles": (301, 1040, 160, [150, 90, 20]),
  "no row": (9, 48, 32, [0, 0]),
}


def near(got, want, rel, name):
  """Equal but for rel times the largest number."""
  assert got.shape == want.shape and got.dtype == want.dtype, name
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  atol = rel * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def arrays(name, dtype):
  """(x, w, cotangent, group sizes)."""
  rows, d, f, sizes = CASES[name]
  rng = np.random.default_rng(0)
  x, cotangent = rng.normal(size=(rows, d)), rng.normal(size=(rows, f))
  x[sum(sizes) :] = cotangent[sum(sizes) :] = GARBAGE
  w = rng.normal(size=(len(sizes), d, f)) / np.sqrt(d)
  parts = [jnp.asarray(part, dtype) for part in (x, w, cotangent)]
  return *parts, jnp.asarray(sizes, jnp.int32)


@functools.partial(jax.jit, static_argnames="implementation", compiler_options=QUICK)
def everything(x, w, cotangent, sizes, implementation):
  """(product, dx, dw)."""

  def product(x, w):
    return ops.grouped_matmul(x, w, sizes, implementation=implementation)

  out, backward = jax.vjp(product, x, w)
  return out, *backward(cotangent)


@functools.cache
def result(name, dtype, implementation):
  return everything(*arrays(name, dtype), implementation)


def oracle(x, w, cotangent, sizes):
  """(product, dx, dw), a row at a time, in float64."""
  x, w, cotangent = (np.asarray(a, np.float64) for a in (x, w, cotangent))
  out, dx, dw = np.zeros(cotangent.shape), np.zeros(x.shape), np.zeros(w.shape)
  for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
    out[row] = x[row] @ w[group]
    dx[row] = cotangent[row] @ w[group].T
    dw[group] += np.outer(x[row], cotangent[row])
  return out, dx, dw


@pytest.mark.parametrize("name", CASES)
def test_the_definition_multiplies_a_row_by_its_groups_matrix(name):
  got, want = result(name, "float32", "xla"), oracle(*arrays(name, "float32"))
  for x, y, part in zip(got, want, ("out", "dx", "dw"), strict=True):
    near(x, y.astype(np.float32), 2e-6, part)


class TestKernels:
  @pytest.mark.parametrize("implementation", KERNELS)
  @pytest.mark.parametrize("dtype", REL)
  @pytest.mark.parametrize("name", CASES)
  def test_product_and_gradients_equal_the_definition(
    self, name, dtype, implementation
  ):
    got, want = (result(name, dtype, x) for x in (implementation, "xla"))
    for x, y, part in zip(got, want, ("out", "dx", "dw"), strict=True):
      near(x, y, REL[dtype], part)

  @pytest.mark.parametrize("implementation", ("xla", *KERNELS))
  @pytest.mark.parametrize("name", CASES)
  def test_rows_of_no_group_and_groups_of_no_row_give_zeros(self, name, implementation):
    *_, sizes = CASES[name]
    out, dx, dw = (np.asarray(x) for x in result(name, "float32", implementation))
    assert not out[sum(sizes) :].any() and not dx[sum(sizes) :].any()
    assert all(part.any() == (size > 0) for part, size in zip(dw, sizes, strict=True))
