"""Decoding from the cache: the definition against keys and values that are gathered one
at a time, and the kernels, interpreted, against the definition."""

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
from r1jax.kernels import decode_attention, decode_attention_mosaic

KERNELS = ("mosaic", "triton")
REL = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest number of an array
LAYERS, LAYER = 3, 2
GARBAGE = 1e3


def near(got, want, rel):
  """Equal but for rel times the largest number; what is infinite is so in both."""
  assert got.shape == want.shape and got.dtype == want.dtype
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  largest = np.abs(want[np.isfinite(want)]).max(initial=0)
  np.testing.assert_allclose(got, want, rtol=0, atol=rel * largest)


def oracle(q, prefix, suffix, starts, stops, lengths, scale, latent=None, key_heads=1):
  """A head at a time, in float64. latent: MLA's, whose first numbers are an entry's
  value; None: an entry is a key and a value of each key head."""
  q, prefix, suffix = (np.asarray(x, np.float64) for x in (q, prefix, suffix))
  d = q.shape[3]
  out = np.zeros((*q.shape[:3], latent or d))
  for b, g, h in np.ndindex(*q.shape[:3]):
    entries = [prefix[LAYER, b, n] for n in range(starts[b], stops[b])]
    entries += [suffix[LAYER, b, g, n] for n in range(lengths[b, g])]
    if not entries:
      continue
    entries = np.stack(entries)
    if latent:
      keys, values = entries[:, :d], entries[:, :latent]
    else:
      at = 2 * d * (h // (q.shape[2] // key_heads))
      keys, values = entries[:, at : at + d], entries[:, at + d : at + 2 * d]
    scores = scale * keys @ q[b, g, h]
    weights = np.exp(scores - scores.max())
    out[b, g, h] = weights @ values / weights.sum()
  return out


class Case(NamedTuple):
  layout: ops.Layout
  heads: int
  slots: tuple  # of the prefix, of a row's own
  starts: list
  stops: list
  lengths: list  # of every row of every group

  @property
  def seen(self):
    return [jnp.asarray(x, jnp.int32) for x in self[3:]]

  @property
  def scale(self):
    return self.layout.key_width**-0.5

  def arrays(self, dtype, garbage=GARBAGE):
    """(q, prefix, suffix): in other layers, and in slots that are not seen, garbage.
    Lanes that fill an entry up are 0."""
    starts, stops, lengths = (np.array(x) for x in self[3:])
    (rows, group), (p, s) = lengths.shape, self.slots
    rng = np.random.default_rng(0)
    q = rng.normal(size=(rows, group, self.heads, self.layout.key_width))
    prefix = rng.normal(size=(LAYERS, rows, p, self.layout.width))
    suffix = rng.normal(size=(LAYERS, rows, group, s, self.layout.width))
    place = np.arange(p)
    outside = (place < starts[:, None]) | (place >= stops[:, None])
    prefix[:, outside] = garbage
    suffix[:, np.arange(s) >= lengths[:, :, None]] = garbage
    for cache in (prefix, suffix):
      cache[[n for n in range(LAYERS) if n != LAYER]] = GARBAGE
      if self.layout.kv_heads == 1 and self.layout.value_start == 0:
        cache[..., self.layout.key_width :] = 0
    return [jnp.asarray(x, dtype) for x in (q, prefix, suffix)]

  def call(self, arrays, implementation):
    how = dict(layout=self.layout, scale=self.scale, implementation=implementation)
    return decode(*arrays, jnp.asarray(LAYER), *self.seen, **how)


decode = jax.jit(
  ops.decode_attention,
  static_argnames=("layout", "scale", "implementation"),
  compiler_options=QUICK,
)


# The definition.

# Rows: all that there is; from a start on; no prefix; nothing at all, and a stop before
# a start.
SEEN = (
  [0, 3, 0, 0, 5],
  [7, 6, 0, 0, 2],
  [[5, 1, 0], [3, 0, 2], [1, 5, 4], [0, 0, 0], [2, 1, 1]],
)
SMALL = {
  "MLA": (Case(ops.Layout.mla(12, 4), 3, (7, 5), *SEEN), dict(latent=12)),
  "MLA, filled up": (Case(ops.Layout.mla(130, 6), 2, (7, 5), *SEEN), dict(latent=130)),
  "GQA": (Case(ops.Layout.gqa(2, 6), 6, (7, 5), *SEEN), dict(key_heads=2)),
  "MQA": (Case(ops.Layout.gqa(1, 6), 3, (7, 5), *SEEN), dict(key_heads=1)),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_definition_is_attention_over_the_slots_that_are_seen(name):
  case, how = SMALL[name]
  arrays = case.arrays("float32")
  got = case.call(arrays, "xla")
  want = oracle(*arrays, *map(np.array, case[3:]), case.scale, **how)
  near(got, want.astype(np.float32), 1e-6)
  assert not np.asarray(got[3]).any() and np.asarray(got[2]).all()


def test_a_layout_says_where_keys_and_values_lie():
  v3, small = ops.Layout.mla(512, 64), ops.Layout.mla(32, 16)
  assert (v3.width, small.width, ops.Layout.mla(112, 16).width) == (640, 48, 128)
  assert (v3.kv_heads, v3.key_width, v3.value_width, v3.value_start) == (1, 576, 512, 0)
  gqa = ops.Layout.gqa(4, 128)
  assert (gqa.width, gqa.stride, gqa.value_start, gqa.value_width) == (
    *(1024, 256),
    *(128, 128),
  )
  assert gqa.cut(2) == ops.Layout.gqa(2, 128)


# The kernels.

CASES = {
  # 128 heads: three of the six samples of a group read the prefix together.
  "MLA, folded": Case(
    *(ops.Layout.mla(512, 64), 128, (384, 128), [3, 130], [384, 200]),
    [[1, 128, 0, 77, 16, 127], [5, 0, 128, 33, 2, 64]],
  ),
  "MLA, many slots of a row": Case(
    *(ops.Layout.mla(512, 64), 5, (128, 2560), [9, 0], [128, 0]),
    [[2560, 513], [2049, 0]],
  ),
  "GQA 64": Case(
    *(ops.Layout.gqa(2, 64), 14, (384, 128), [0, 5, 0, 0], [384, 381, 0, 0]),
    [[128, 1, 0], [3, 60, 128], [1, 99, 128], [17, 0, 0]],
  ),
  "GQA 128, many slots of the prefix": Case(
    *(ops.Layout.gqa(2, 128), 14, (2048, 384), [0, 1000, 600], [2048, 2047, 1200]),
    [[384, 1], [129, 256], [0, 300]],
  ),
  "MQA 64, two blocks of 2048": Case(
    *(ops.Layout.gqa(1, 64), 7, (4096, 128), [2050, 100, 0], [4090, 4096, 1]),
    [[1], [0], [128]],
  ),
}


@functools.cache
def result(name, dtype, implementation):
  return CASES[name].call(CASES[name].arrays(dtype), implementation)


class TestKernels:
  @pytest.mark.parametrize("implementation", KERNELS)
  @pytest.mark.parametrize("dtype", REL)
  @pytest.mark.parametrize("name", CASES)
  def test_output_equals_the_definition(self, name, dtype, implementation):
    got, want = (result(name, dtype, x) for x in (implementation, "xla"))
    near(got, want, REL[dtype])
    blind = np.array(CASES[name].stops) <= np.array(CASES[name].starts)
    blind = blind[:, None] & (np.array(CASES[name].lengths) == 0)
    assert not np.asarray(got, np.float32)[blind].any()
    assert np.asarray(got, np.float32)[~blind].any(axis=(1, 2)).all()

  @pytest.mark.parametrize("implementation", KERNELS)
  @pytest.mark.parametrize(
    "layout, heads", [(ops.Layout.mla(512, 64), 16), (ops.Layout.gqa(2, 64), 14)]
  )
  def test_blocks_outside_a_row_are_not_read(self, layout, heads, implementation):
    """768 slots are blocks of 256 and less: what is NaN lies in others than what is
    seen."""
    case = Case(
      *(layout, heads, (768, 768), [256, 512, 0], [512, 768, 0]),
      [[256, 0], [0, 512], [768, 256]],
    )
    want = case.call(case.arrays("float32"), "xla")
    near(case.call(case.arrays("float32", np.nan), implementation), want, 1e-5)


part_of = jax.jit(
  decode_attention.part,
  static_argnames=("layout", "scale", "body", "interpret"),
  compiler_options=QUICK,
)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
  "starts, stops, lengths",
  [
    ([0, 0], [300, 128], [[500, 1], [128, 129]]),
    ([-50, -1], [128, 9], [[-1, 1], [1, -300]]),
    ([200, 129], [128, 500], [[1, 0], [0, -7]]),
  ],
  ids=["stops", "starts", "outside"],
)
def test_what_lies_outside_the_cache_is_not_seen(
  starts, stops, lengths, implementation
):
  """Where lengths are wrong and nobody knows, as the program is traced."""
  case = Case(ops.Layout.gqa(2, 64), 4, (128, 128), starts, stops, lengths)
  arrays = case.arrays("float32")
  near(case.call(arrays, implementation), case.call(arrays, "xla"), REL["float32"])


def part(case, q, cache, rows, starts, stops, body):
  rows, starts, stops = (jnp.asarray(x, jnp.int32) for x in (rows, starts, stops))
  q = jnp.asarray(q, jnp.float32)
  how = dict(layout=case.layout, scale=case.scale, body=body, interpret=True)
  return part_of(q, cache, jnp.asarray(LAYER), rows, starts, stops, **how)


@pytest.mark.parametrize("name", ["MLA, folded", "GQA 64"])
def test_a_full_cache_may_be_read_without_looking(name):
  case = CASES[name]
  cache = case.arrays("float32")[1][:, :, :256]
  rng = np.random.default_rng(1)
  q = rng.normal(size=(3, case.heads, case.layout.key_width)).astype(np.float32)
  seen = [jnp.asarray(x, jnp.int32) for x in ([LAYER], [1, 0, 1], [0] * 3, [256] * 3)]

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(q, cache):
    how = dict(layout=case.layout, scale=case.scale, interpret=True)
    return [
      decode_attention_mosaic.decode(q, cache, *seen, **how, full=full)
      for full in (True, False)
    ]

  for got, want in zip(*both(q, cache), strict=True):
    assert got.dtype == jnp.float32
    near(got, want, 1e-6)


@pytest.mark.parametrize("body", KERNELS)
def test_a_query_reads_the_row_that_it_names_and_says_its_log_sum_exp(body):
  case = CASES["GQA 64"]
  rng = np.random.default_rng(1)
  q = rng.normal(size=(4, 14, 64)).astype(np.float32)
  cache = np.full((LAYERS, 3, 128, 256), GARBAGE, np.float32)
  cache[LAYER] = rng.normal(size=(3, 128, 256))
  rows, starts, stops = [2, 0, 2, 1], [0, 7, 40, 9], [128, 31, 41, 9]
  out, lse = part(case, q, jnp.asarray(cache), rows, starts, stops, body)
  want, want_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
  for r, h in np.ndindex(4, 14):
    entries = np.float64(cache[LAYER, rows[r], starts[r] : stops[r]])
    keys, values = entries.reshape(-1, 2, 2, 64)[:, h // 7].swapaxes(0, 1)
    if len(keys):
      weights = np.exp(case.scale * keys @ q[r, h])
      want[r, h] = weights @ values / weights.sum()
      want_lse[r, h] = np.log(weights.sum())
  near(out, want.astype(np.float32), 1e-5)
  near(lse, want_lse.astype(np.float32), 1e-5)


# Cut over devices.


@pytest.mark.parametrize(
  "layout, heads, rows, cut",
  [
    (ops.Layout.mla(512, 64), 4, 4, (True, None, "tensor")),
    (ops.Layout.gqa(2, 64), 14, 4, (True, "tensor", "tensor")),
    (ops.Layout.gqa(1, 64), 14, 3, (False, None, "tensor")),
    (ops.Layout.gqa(3, 64), 6, 4, (True, None, None)),
  ],
  ids=["MLA", "GQA", "rows that do not divide", "key heads that do not divide"],
)
def test_decoding_is_invariant_to_the_mesh(layout, heads, rows, cut):
  seen = [3, 0, 9, 100][:rows], [128, 0, 77, 90][:rows], 17 * np.arange(2 * rows)
  case = Case(layout, heads, (128, 128), *seen[:2], seen[2].reshape(rows, 2).tolist())
  q, prefix, suffix = arrays = case.arrays("float32")
  want = case.call(arrays, "xla")
  mesh = mesh_of((2, 2, 2))
  batch, keys, queries = sharding.BATCH if cut[0] else None, *cut[1:]
  with jax.set_mesh(mesh):

    def put(x, *spec):
      return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    arrays = (
      put(q, batch, None, queries),
      put(prefix, None, batch, None, keys),
      put(suffix, None, batch, None, None, keys),
    )
    got = case.call(arrays, "mosaic")
  near(got, want, REL["float32"])
  shard = got.addressable_shards[0].data.shape
  assert shard[0] == rows // (4 if batch else 1)
  assert shard[2] == heads // (2 if queries else 1)
