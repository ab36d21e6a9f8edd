"""Attention: the definition against plain loops in NumPy, and the kernels, interpreted,
against the definition, with every gradient."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK

from r1jax import ops, sharding

KERNELS = ("mosaic", "triton")
REL = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest number of an array
PARTS = ("out", "lse", "dq", "dk", "dv")


def near(got, want, rel, name=""):
  """Equal but for rel times the largest number; what is infinite is so in both."""
  assert got.shape == want.shape and got.dtype == want.dtype, name
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  largest = np.abs(want[np.isfinite(want)]).max(initial=0)
  np.testing.assert_allclose(got, want, rtol=0, atol=rel * largest, err_msg=name)


def segments(length, *rows):
  """[rows, length] int32 of (number, how many) pairs, filled up with padding."""
  runs = [np.repeat(*np.array(row, int).T) for row in rows]
  return np.stack([np.pad(x, (0, length - len(x))) for x in runs]).astype(np.int32)


# The definition.


def seen(rows, t, s, causal, mine=None, theirs=None):
  """[rows, T, S] bool, a pair at a time."""
  mask = np.zeros((rows, t, s), bool)
  for b, i, j in np.ndindex(rows, t, s):
    ours = mine is None or mine[b, i] == theirs[b, j] != 0
    mask[b, i, j] = ours and (j <= i or not causal)
  return mask


def oracle(q, k, v, mask, scale):
  """(output, log-sum-exp), a query at a time, in float64."""
  (rows, t, heads, _), of_one = q.shape, q.shape[2] // k.shape[2]
  out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((rows, heads, t), -np.inf)
  for b, i, h in np.ndindex(rows, t, heads):
    keep = mask[b, i]
    if keep.any():
      scores = scale * k[b, keep, h // of_one] @ q[b, i, h]
      weights = np.exp(scores - scores.max())
      out[b, i, h] = weights @ v[b, keep, h // of_one] / weights.sum()
      lse[b, h, i] = scores.max() + np.log(weights.sum())
  return out, lse


def assert_slopes(loss, arrays, gradients):
  """Gradients are those of a float64 loss, along random directions."""
  rng = np.random.default_rng(5)
  for n, gradient in enumerate(gradients):
    for _ in range(3):
      direction = rng.normal(size=arrays[n].shape)
      ends = []
      for step in (1e-5, -1e-5):
        moved = list(arrays)
        moved[n] = arrays[n] + step * direction
        ends.append(loss(*moved))
      got = (np.asarray(gradient, np.float64) * direction).sum()
      want, size = (ends[0] - ends[1]) / 2e-5, np.abs(gradient).sum()
      assert abs(got - want) <= 2e-6 * size, (n, got, want)


LEFT = segments(6, [(0, 2), (1, 4)], [(0, 5), (1, 1)])
PACKED = segments(9, [(1, 4), (2, 1), (3, 2)], [(5, 9)], [(0, 9)])
RETURN = segments(6, [(2, 2), (1, 1), (2, 3)])
# Heads, key heads, T, S, causal, segments of queries, of keys.
SMALL = {
  "causal": (2, 2, 7, 7, True),
  "causal, one key head": (4, 1, 5, 5, True),
  "packed": (4, 2, 9, 9, True, PACKED, PACKED),
  "left-padded": (2, 1, 6, 6, True, LEFT, LEFT),
  "numbers return": (2, 2, 6, 6, True, RETURN, RETURN),
  "not causal": (3, 3, 5, 8, False),
  "not causal, packed": (
    *(6, 3, 8, 5, False),
    segments(8, [(1, 3), (2, 3), (3, 2)], [(0, 8)], [(1, 8)]),
    segments(5, [(1, 2), (3, 2)], [(1, 5)], [(0, 5)]),
  ),
}


def drawn(dtype, *shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def shapes(rows, t, s, heads, kv_heads, d, dv):
  """Of q, k, v and the cotangents of output and log-sum-exp."""
  return (
    (rows, t, heads, d),
    (rows, s, kv_heads, d),
    (rows, s, kv_heads, dv),
    (rows, t, heads, dv),
    (rows, heads, t),
  )


@functools.partial(
  jax.jit, static_argnames=("implementation", "causal"), compiler_options=QUICK
)
def everything(q, k, v, d_out, d_lse, *pages, implementation, causal):
  """(output, log-sum-exp, dq, dk, dv)."""

  def attend(q, k, v):
    how = dict(scale=q.shape[3] ** -0.5, causal=causal, implementation=implementation)
    return ops.attention(q, k, v, *pages, **how)

  outs, backward = jax.vjp(attend, q, k, v)
  return *outs, *backward((d_out, d_lse))


@pytest.mark.parametrize("name", SMALL)
def test_the_definition_is_softmax_attention_over_what_a_query_sees(name):
  heads, kv_heads, t, s, causal, *pages = SMALL[name]
  rows = len(pages[0]) if pages else 2
  arrays = drawn("float32", *shapes(rows, t, s, heads, kv_heads, 6, 4))
  got = everything(*arrays, *pages, implementation="xla", causal=causal)
  *qkv, d_out, d_lse = (np.asarray(x, np.float64) for x in arrays)
  mask, scale = seen(rows, t, s, causal, *pages), 6**-0.5
  for x, y, part in zip(got, oracle(*qkv, mask, scale), PARTS, strict=False):
    near(x, y.astype(np.float32), 1e-6, part)

  def loss(q, k, v):
    out, lse = oracle(q, k, v, mask, scale)
    return (out * d_out).sum() + (np.where(np.isfinite(lse), lse, 0) * d_lse).sum()

  assert_slopes(loss, qkv, got[2:])


# The kernels.


class Case(NamedTuple):
  t: int
  s: int
  heads: int
  kv_heads: int
  d: int
  dv: int
  causal: bool = True
  pages: tuple = ()  # segments of queries and of keys
  rows: int = 2
  dtypes: tuple = tuple(REL)

  def arrays(self, dtype):
    rows = len(self.pages[0]) if self.pages else self.rows
    *arrays, d_lse = drawn(dtype, *shapes(rows, *self[:6]))
    d_lse = d_lse.astype(jnp.float32)
    if self.pages:  # as a derivative at -inf may be
      d_lse = jnp.where(self.pages[0][:, None] == 0, jnp.nan, d_lse)
    return *arrays, d_lse, *map(jnp.asarray, self.pages)


MLA = (192, 128)
PAGES = segments(
  333,
  [(1, 100), (2, 1), (3, 150), (4, 40)],  # a page of one token, and padding
  [(0, 333)],
  [(3, 130), (1, 1), (2, 99), (1, 60)],  # in any order, and one that returns
)
LEFT_PADDED = segments(130, [(0, 57), (1, 73)], [(1, 130)], [(0, 129), (1, 1)])
LONG = segments(1900, [(1, 1100), (2, 1), (3, 300), (4, 450)])
CASES = {
  "MLA": Case(130, 130, 2, 2, *MLA),
  "MLA, packed": Case(333, 333, 2, 2, *MLA, True, (PAGES, PAGES)),
  "GQA 64, left-padded": Case(
    *(130, 130, 4, 2, 64, 64, True), (LEFT_PADDED, LEFT_PADDED), dtypes=("float32",)
  ),
  "GQA 128, one token": Case(1, 1, 4, 1, 128, 128, dtypes=("float32",)),
  "long": Case(1900, 1900, 1, 1, 64, 64, rows=1, dtypes=("float32",)),
  "long, packed": Case(1900, 1900, 1, 1, 64, 64, True, (LONG, LONG)),
  "a number returns": Case(
    *(333, 333, 2, 1, 64, 64, True),
    (segments(333, [(1, 100), (2, 100), (1, 133)], [(1, 300)]),) * 2,
    dtypes=("float32",),
  ),
  "GQA 64, not causal": Case(130, 333, 4, 2, 64, 64, False),
  "MLA, not causal, packed": Case(
    *(333, 70, 2, 2, *MLA, False),
    (
      segments(333, [(1, 100), (2, 133), (3, 100)], [(0, 333)], [(1, 333)]),
      segments(70, [(1, 30), (3, 35)], [(1, 70)], [(0, 70)]),
    ),
  ),
  "GQA 128, one query of many keys": Case(
    *(1, 1000, 4, 1, 128, 128, False),
    (segments(1, [(2, 1)]), segments(1000, [(1, 300), (2, 600)])),
    dtypes=("float32",),
  ),
}
CHOICES = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]


@functools.cache
def result(name, dtype, implementation):
  case = CASES[name]
  how = dict(implementation=implementation, causal=case.causal)
  return everything(*case.arrays(dtype), **how)


class TestKernels:
  @pytest.mark.parametrize("implementation", KERNELS)
  @pytest.mark.parametrize("name, dtype", CHOICES)
  def test_output_log_sum_exp_and_gradients_equal_the_definition(
    self, name, dtype, implementation
  ):
    got, want = (result(name, dtype, x) for x in (implementation, "xla"))
    for x, y, part in zip(got, want, PARTS, strict=True):
      near(x, y, REL[dtype], part)

  @pytest.mark.parametrize("implementation", ("xla", *KERNELS))
  @pytest.mark.parametrize("name", ["MLA, packed", "MLA, not causal, packed"])
  def test_a_query_without_keys_gives_zero_and_no_gradient(self, name, implementation):
    out, lse, dq, dk, dv = result(name, "float32", implementation)
    mine, theirs = CASES[name].pages
    common = (mine[:, :, None] == theirs[:, None]) & (theirs[:, None] > 0)
    empty, unseen = ~common.any(axis=2), ~common.any(axis=1)
    assert empty.all(axis=1).any() and not empty.all() and unseen.any()
    assert np.array_equal(np.isneginf(lse), np.repeat(empty[:, None], 2, axis=1))
    for x, nothing in ((out, empty), (dq, empty), (dk, unseen), (dv, unseen)):
      x = np.asarray(x)
      assert np.isfinite(x).all() and not x[nothing].any() and x[~nothing].all()


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
def test_large_scores_neither_overflow_nor_vanish(implementation):
  """Scores of thousands, whose exponentials no float32 holds; the least of a row, too,
  where it is the only one."""
  q, k, v, d_out, d_lse = drawn("float32", *shapes(1, 9, 9, 2, 2, 16, 16))
  q, k = q.at[:, :3].multiply(-1000.0), k * 10
  pages = segments(9, [(1, 1), (2, 8)])
  got = everything(
    *(q, k, v, d_out, d_lse, pages, pages), implementation=implementation, causal=True
  )
  mask = seen(1, 9, 9, True, pages, pages)
  want = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), mask, 0.25)
  assert np.abs(want[1]).max() > 1e4
  for x, y, part in zip(got, want, PARTS, strict=False):
    near(x, y.astype(np.float32), 2e-3, part)
  assert all(np.isfinite(x).all() for x in got)


# A group's completions over the prompt they share.

GROUP = dict(q=(2, 3, 5, 4), k=(2, 3, 5, 2), prefix=(2, 21, 2))


def group_arrays(d, dv, dtype="float32"):
  """(q, k, v, prefix_k, prefix_v, cotangent), (segments, the prompts')."""
  q, k, prefix = GROUP.values()
  arrays = drawn(
    *(dtype, (*q, d), (*k, d), (*k, dv), (*prefix, d), (*prefix, dv), (*q, dv))
  )
  mine = [
    segments(5, [(1, 5)], [(1, 3)], [(0, 5)]),
    segments(5, [(1, 1)], [(1, 2), (2, 3)], [(1, 4)]),
  ]
  prompts = segments(21, [(0, 8), (1, 13)], [(0, 21)])  # the second has none
  return arrays, (np.stack(mine), prompts)


@functools.partial(jax.jit, static_argnames=("implementation",), compiler_options=QUICK)
def group_everything(q, k, v, prefix_k, prefix_v, d_out, mine, prompts, implementation):
  def attend(q, k, v, prefix_k, prefix_v):
    return ops.group_attention(
      *(q, k, v, mine, prefix_k, prefix_v, prompts),
      scale=q.shape[4] ** -0.5,
      implementation=implementation,
    )

  out, backward = jax.vjp(attend, q, k, v, prefix_k, prefix_v)
  return out, *backward(d_out)


def test_a_group_sees_its_prompt_and_each_completion_itself():
  arrays, (mine, prompts) = group_arrays(6, 4)
  got = group_everything(*arrays, mine, prompts, implementation="xla")
  *parts, d_out = (np.asarray(x, np.float64) for x in arrays)

  def whole(q, k, v, prefix_k, prefix_v):
    out = np.zeros((*q.shape[:4], v.shape[4]))
    for b, g in np.ndindex(*q.shape[:2]):
      own = seen(1, 5, 5, True, mine[b, g][None], mine[b, g][None])
      real = (mine[b, g] > 0)[:, None] & (prompts[b] > 0)[None]
      mask = np.concatenate([real[None], own], axis=2)
      keys = np.concatenate([prefix_k[b], k[b, g]])[None]
      values = np.concatenate([prefix_v[b], v[b, g]])[None]
      out[b, g] = oracle(q[b, g][None], keys, values, mask, 6**-0.5)[0][0]
    return out

  near(got[0], whole(*parts).astype(np.float32), 1e-6)
  assert_slopes(lambda *x: (whole(*x) * d_out).sum(), parts, got[1:])


@pytest.mark.parametrize("implementation", KERNELS)
def test_group_attention_is_the_same_by_a_kernel(implementation):
  arrays, pages = group_arrays(64, 64)
  got, want = (
    group_everything(*arrays, *pages, implementation=x) for x in (implementation, "xla")
  )
  for x, y, part in zip(got, want, ("out", "q", "k", "v", "pk", "pv"), strict=True):
    near(x, y, REL["float32"], part)


# Cut over devices.


@pytest.mark.parametrize(
  "rows, heads, kv_heads, d, dv",
  [(4, 4, 4, *MLA), (4, 4, 2, 64, 64), (3, 4, 2, 64, 64), (4, 3, 1, 64, 64)],
  ids=["MLA", "GQA", "rows that do not divide", "heads that do not divide"],
)
def test_attention_is_invariant_to_the_mesh(rows, heads, kv_heads, d, dv):
  t = 20
  arrays = drawn("float32", *shapes(rows, t, t, heads, kv_heads, d, dv))
  lengths = 7 + 4 * np.arange(rows)[:, None]
  pages = [(np.arange(t)[None] < lengths).astype(np.int32)] * 2
  want = everything(*arrays, *pages, implementation="xla", causal=True)
  mesh = mesh_of((2, 2, 2))
  batch = sharding.BATCH if rows == 4 else None
  tensor = "tensor" if kv_heads > 1 else None
  with jax.set_mesh(mesh):

    def put(x, *spec):
      return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    arrays = [put(x, batch, None, tensor) for x in arrays[:4]] + [
      put(arrays[4], batch, tensor)
    ]
    pages = [put(x, batch) for x in pages]
    got = everything(*arrays, *pages, implementation="mosaic", causal=True)
  for x, y, part in zip(got, want, PARTS, strict=True):
    near(x, y, REL["float32"], part)
  part = got[0].addressable_shards[0].data.shape
  assert part == (rows // (4 if batch else 1), t, heads // (2 if tensor else 1), dv)
