"""Attention over a cache in levels: against keys and values that are gathered one token
at a time, however the cache is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from r1jax import ops
from r1jax.levels import Level
from r1jax.models import cache as caches

LAYERS, LAYER = 2, 1
GARBAGE = 50.0
# Small ones for plain XLA; such as kernels serve, whose slots are blocks of 128.
LAYOUTS = {
  "MLA": (ops.Layout.mla(12, 4), 3),
  "GQA": (ops.Layout.gqa(2, 6), 4),
  "wide GQA": (ops.Layout.gqa(2, 64), 4),
  "wide MLA": (ops.Layout.mla(512, 64), 2),
}
HELD = {"split": "xla", "stacked": "xla", "mosaic": "mosaic", "triton": "triton"}


def keys_and_values(entries, layout, head):
  """Of one key head, from entries [..., L]."""
  at = head * layout.width // layout.kv_heads
  keys = entries[..., at : at + layout.key_width]
  at += layout.value_start
  return keys, entries[..., at : at + layout.value_width]


def softmax_attention(q, keys, values, scale):
  scores = scale * keys @ q
  weights = np.exp(scores - scores.max())
  return weights @ values / weights.sum()


class Scene:
  """Rows at various lengths; what each has written, and where it lies."""

  def __init__(self, layout, heads, sizes, seats, group, new, wide, seed=0):
    rng = self.rng = np.random.default_rng(seed)
    self.layout, self.heads, self.new = layout, heads, new
    self.b, self.rows = 3, 3 * group
    unit = 128 if wide else 1
    self.window = 128 if wide else 7
    starts = np.cumsum([0, *sizes[:-1]]) * unit
    few = [self.rows if n is None else n for n in seats]
    self.levels = tuple(map(Level, map(int, starts), (s * unit for s in sizes), few))
    total = sum(sizes) * unit
    # Who has a seat where: the first rows reach the last level.
    order = rng.permutation(self.rows)
    self.lengths = np.zeros(self.rows, int)
    self.seats = [np.full(self.rows, -1) for _ in self.levels]
    for rank, row in enumerate(order):
      deepest = max(i for i, lv in enumerate(self.levels) if rank < lv.seats)
      lv = self.levels[deepest]
      # The new tokens may cross into the deepest level, and must not leave it.
      low = max(0, lv.start - new + 1) if rank % 2 else lv.start
      high = lv.start + lv.size - new
      self.lengths[row] = rng.integers(low, high + 1)
      if rank == 0:
        self.lengths[row] = total - new
    for i, lv in enumerate(self.levels):
      there = np.flatnonzero(self.lengths + new > lv.start)
      self.seats[i][there] = rng.permutation(lv.seats)[: len(there)]
      if seats[i] is None:
        self.seats[i] = np.arange(self.rows)
    self.given = tuple(
      None if n is None else jnp.asarray(x, jnp.int32)
      for n, x in zip(seats, self.seats, strict=True)
    )
    self.writes = np.ones(self.rows, bool)
    self.writes[order[[1, -1]]] = False
    self.lengths[order[2]] = 0  # nothing of its own yet
    self.prompts = np.repeat(np.arange(3), group)
    self.starts = np.array([0, 2, self.window - 1])

  def entries(self, *shape):
    x = self.rng.normal(size=(*shape, self.layout.width))
    if self.layout.value_start == 0:  # lanes that fill an entry up
      x[..., self.layout.key_width :] = 0
    return x.astype(np.float32)

  def fill(self, grouped):
    if not grouped:
      self.prompts = self.rng.permutation(self.prompts)
    layout, n = self.layout, self.new
    self.before = self.entries(LAYERS, self.b, self.window)
    self.before[: LAYERS - 1] = GARBAGE
    for b, start in enumerate(self.starts):
      self.before[:, b, :start] = GARBAGE
    places = max(self.lengths) + n
    self.mine = self.entries(self.rows, places)
    self.held = [
      np.full((LAYERS, lv.seats, lv.size, layout.width), GARBAGE, np.float32)
      for lv in self.levels
    ]
    for row in range(self.rows):
      for place in range(self.lengths[row]):
        self.put(self.held, row, place)
    self.after = [x.copy() for x in self.held]
    for row in np.flatnonzero(self.writes):
      for place in range(self.lengths[row], self.lengths[row] + n):
        self.put(self.after, row, place)
    if self.layout.value_start == 0:
      for x in (*self.held, *self.after, self.before):
        x[..., layout.key_width :] = 0
    self.q = self.rng.normal(size=(self.rows, n, self.heads, layout.key_width))
    self.q = self.q.astype(np.float32)
    self.entry = np.stack(
      [self.mine[r, at : at + n] for r, at in enumerate(self.lengths)]
    )
    self.at = caches.DecodeStep(
      positions=jnp.zeros((self.rows, n), jnp.int32),
      lengths=jnp.asarray(self.lengths, jnp.int32),
      writes=jnp.asarray(self.writes),
      prompts=jnp.asarray(self.prompts, jnp.int32),
      prompt_starts=jnp.asarray(self.starts, jnp.int32),
      seats=self.given,
      levels=self.levels,
      grouped=grouped,
    )
    self.scale = layout.key_width**-0.5
    return self

  def put(self, held, row, place):
    for lv, x, seats in zip(self.levels, held, self.seats, strict=True):
      if lv.start <= place < lv.start + lv.size:
        assert seats[row] >= 0
        x[LAYER, seats[row], place - lv.start] = self.mine[row, place]

  def want(self):
    """[S, Q, H, dv] in float64."""
    out = np.zeros((self.rows, self.new, self.heads, self.layout.value_width))
    for row, j, head in np.ndindex(*out.shape[:3]):
      b = self.prompts[row]
      seen = [self.before[LAYER, b, p] for p in range(self.starts[b], self.window)]
      seen += [self.mine[row, p] for p in range(self.lengths[row] + j + 1)]
      kv = head // (self.heads // self.layout.kv_heads)
      keys, values = keys_and_values(np.stack(seen).astype(float), self.layout, kv)
      q = self.q[row, j, head].astype(float)
      out[row, j, head] = softmax_attention(q, keys, values, self.scale)
    return out

  def split(self, entries):
    """[M, slots, L] -> (keys [M, Hk, d, slots], values [M, Hk, slots, dv])."""
    heads = [
      keys_and_values(entries, self.layout, h) for h in range(self.layout.kv_heads)
    ]
    keys = np.stack([k for k, _ in heads], axis=1).swapaxes(2, 3)
    return keys, np.stack([v for _, v in heads], axis=1)

  def cache(self, held):
    """(prompts, own, layer) as `attend` takes them."""
    if held != "split":
      own = tuple(map(jnp.asarray, self.held))
      return jnp.asarray(self.before), own, jnp.asarray(LAYER)
    own = tuple(self.split(x[LAYER]) for x in self.held)
    return *jax.tree.map(jnp.asarray, (self.split(self.before[LAYER]), own)), None


@functools.partial(
  jax.jit,
  static_argnames=("layout", "scale", "implementation"),
  compiler_options=QUICK,
)
def attend(*args, **how):
  return caches.attend(*args, **how)


def check(scene, held):
  prompts, own, layer = scene.cache(held)
  how = dict(layout=scene.layout, scale=scene.scale, implementation=HELD[held])
  out, own = attend(
    scene.at, jnp.asarray(scene.q), jnp.asarray(scene.entry), prompts, own, layer, **how
  )
  want, writes = scene.want(), scene.writes
  assert out.shape == want.shape and np.isfinite(np.asarray(out)).all()
  np.testing.assert_allclose(np.asarray(out)[writes], want[writes], rtol=0, atol=2e-5)
  # What was written, where it lies, and nothing else.
  for got, after in zip(own, scene.after, strict=True):
    parts = scene.split(after[LAYER]) if held == "split" else (after,)
    for x, y in zip(jax.tree.leaves(got), parts, strict=True):
      np.testing.assert_array_equal(x, y)


# (sizes of levels, seats of each: None for a seat a row)
SHAPES = {
  "one level": ([6], [None]),
  "two levels": ([3, 4], [None, None]),
  "few seats": ([3, 3, 5], [None, 4, 2]),
  "one seat": ([2, 4], [None, 1]),
}


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "any rows"])
@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("held", ["split", "stacked"])
@pytest.mark.parametrize("name", ["MLA", "GQA"])
def test_attention_is_that_over_gathered_tokens(name, held, shape, new, grouped):
  scene = Scene(*LAYOUTS[name], *SHAPES[shape], 2, new, wide=False)
  check(scene.fill(grouped), held)


WIDE = [
  ("wide GQA", "mosaic", "one level", 1, True),
  ("wide GQA", "mosaic", "few", 2, False),
  ("wide GQA", "mosaic", "few", 1, True),
  ("wide MLA", "mosaic", "few", 1, False),
  ("wide GQA", "triton", "few", 2, False),
]


@pytest.mark.parametrize("name, held, shape, new, grouped", WIDE)
def test_kernels_attend_to_the_same_tokens(name, held, shape, new, grouped):
  sizes = ([1], [None]) if shape == "one level" else ([1, 1], [None, 2])
  scene = Scene(*LAYOUTS[name], *sizes, 2, new, wide=True)
  check(scene.fill(grouped), held)


@pytest.mark.parametrize("split", [True, False], ids=["split", "stacked"])
@pytest.mark.parametrize("name", ["MLA", "GQA"])
def test_an_empty_cache_holds_the_prompts_and_room_for_the_rows(name, split):
  layout, _ = LAYOUTS[name]
  levels = Level(0, 3, 5), Level(3, 4, 2)
  entries = np.random.default_rng(0).normal(size=(2, 3, 7, layout.width))
  cache = caches.empty(jnp.asarray(entries), levels, layout, split)
  assert cache.split == split and cache.window == (7 if split else 128)
  for n in range(2):
    if split:
      for head in range(layout.kv_heads):
        keys, values = keys_and_values(entries[n], layout, head)
        got = cache.prompts[n]
        np.testing.assert_allclose(got[0][:, head].swapaxes(1, 2), keys, rtol=1e-6)
        np.testing.assert_allclose(got[1][:, head], values, rtol=1e-6)
      for lv, (k, v) in zip(levels, cache.own[n], strict=True):
        assert k.shape == (lv.seats, layout.kv_heads, layout.key_width, lv.size)
        assert v.shape == (lv.seats, layout.kv_heads, lv.size, layout.value_width)
    else:  # a window ends with its prompt: padding goes before it
      np.testing.assert_allclose(cache.prompts[n][:, -7:], entries[n], rtol=1e-6)
      assert not cache.prompts[n][:, :-7].any()
      shapes = [x.shape[1:3] for x in cache.own]
      assert shapes == [(lv.seats, lv.size) for lv in levels]


# -- ops.cache_attention ---------------------------------------------------------------

ROWS = [2, 0, 0, 1, 2, 1, 0]
SEEN = {  # starts, stops of slots; the last rows see nothing
  False: ([0, 3, 0, 2, 5, 4, 0], [7, 4, 7, 6, 7, 4, 0]),
  True: ([0, 3, 0, 130, 255, 4, 200], [256, 4, 128, 250, 256, 4, 100]),
}
PARTS = [("MLA", "xla"), ("GQA", "xla"), ("wide GQA", "xla"), ("wide MLA", "xla")]
PARTS += [("wide GQA", "mosaic"), ("wide MLA", "mosaic"), ("wide GQA", "triton")]

part = jax.jit(
  ops.cache_attention,
  static_argnames=("layout", "scale", "implementation"),
  compiler_options=QUICK,
)


@pytest.mark.parametrize("name, implementation", PARTS)
def test_a_part_of_the_context_is_attended_to_with_its_log_sum_exp(
  name, implementation
):
  (layout, heads), wide = LAYOUTS[name], name.startswith("wide")
  starts, stops = SEEN[wide]
  rng, r = np.random.default_rng(1), len(ROWS)
  cache = rng.normal(size=(LAYERS, 3, 256 if wide else 7, layout.width))
  cache[: LAYERS - 1] = GARBAGE
  if layout.value_start == 0:
    cache[..., layout.key_width :] = 0
  q = rng.normal(size=(r, heads, layout.key_width))
  scale = layout.key_width**-0.5
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, cache)]
  ints = [jnp.asarray(x, jnp.int32) for x in (LAYER, ROWS, starts, stops)]
  how = dict(layout=layout, scale=scale, implementation=implementation)
  out, lse = part(*arrays, *ints, **how)
  assert out.shape == (r, heads, layout.value_width) and lse.shape == (r, heads)
  assert out.dtype == lse.dtype == jnp.float32
  for n, head in np.ndindex(r, heads):
    if stops[n] <= starts[n]:
      assert not out[n, head].any() and lse[n, head] == -np.inf
      continue
    seen = cache[LAYER, ROWS[n], starts[n] : stops[n]]
    keys, values = keys_and_values(seen, layout, head * layout.kv_heads // heads)
    want = softmax_attention(q[n, head], keys, values, scale)
    np.testing.assert_allclose(out[n, head], want, rtol=0, atol=2e-5)
    total = np.log(np.exp(scale * keys @ q[n, head]).sum())
    np.testing.assert_allclose(lse[n, head], total, rtol=1e-5, atol=1e-5)
