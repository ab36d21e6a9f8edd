"""How a token is drawn: against exact probabilities, NumPy and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from r1jax import sampling, support
from r1jax.errors import UserError

LAST = float(np.nextafter(np.float32(1), np.float32(0)))  # the largest below 1
MASKED = -1e30


def jitted(function, *static):
  return jax.jit(function, static_argnums=static, compiler_options=QUICK)


pick = jitted(sampling.pick)
uniforms = jitted(sampling.uniforms, 2)
row_keys = jitted(sampling.row_keys)
tempered = jitted(sampling.tempered, 1)


def settings(**more):
  return sampling.Sampler(**(dict(group_size=1, max_tokens=1, pad_id=0) | more))


# -- pick ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 5, 16, 17, 300])
def test_frequencies_are_the_probabilities(vocab):
  """Chi-square, and every token within five standard deviations."""
  rng, n = np.random.default_rng(vocab), 200_000
  logits = rng.normal(size=vocab).astype(np.float32) * 1.5
  logits[rng.random(vocab) < 0.2] = MASKED
  logits[0] = 0.0
  both = jnp.asarray(rng.random((n, 2)), jnp.float32)
  both = jnp.minimum(both, LAST)
  drawn = pick(jnp.broadcast_to(jnp.asarray(logits)[None], (n, vocab)), both)
  assert drawn.dtype == jnp.int32
  counts = np.bincount(np.asarray(drawn), minlength=vocab)
  assert len(counts) == vocab
  p = np.exp(logits.astype(np.float64))
  want = n * p / p.sum()
  assert not counts[logits == MASKED].any()
  spread = 5 * np.sqrt(want * (1 - want / n)) + 2
  assert (np.abs(counts - want) <= spread).all()
  common = want >= 5
  cells = common.sum()
  chi_square = ((counts - want)[common] ** 2 / want[common]).sum()
  assert abs(chi_square - cells) < 5 * np.sqrt(2 * cells) + 1


@pytest.mark.parametrize("vocab", [5, 16, 300])
def test_numbers_on_a_grid_draw_each_token_in_its_share(vocab):
  """No chance at all: the inverse of the cumulative sum on a fine grid, in order."""
  rng, n = np.random.default_rng(vocab), 400
  logits = rng.normal(size=vocab).astype(np.float32)
  grid = (np.arange(n) + 0.5) / n
  both = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
  both = jnp.asarray(both, jnp.float32)
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (len(both), vocab))
  drawn = np.asarray(pick(rows, both)).reshape(n, n)
  p = np.exp(logits.astype(np.float64))
  share = np.bincount(drawn.reshape(-1), minlength=vocab) / n**2
  np.testing.assert_allclose(share, p / p.sum(), atol=1.5 / n)
  assert (np.diff(drawn, axis=1) >= 0).all(), "a larger second number, a later token"
  assert (np.diff(drawn[:, 0]) >= 0).all() and drawn[0, 0] == 0
  assert drawn[-1, -1] == vocab - 1


EDGES = [0.0, float(np.float32(2**-24)), 0.5, LAST]


@pytest.mark.parametrize("vocab", [1, 2, 5, 16, 17, 300, 1000])
def test_a_masked_token_is_never_drawn_at_the_edges(vocab):
  rng = np.random.default_rng(vocab)
  logits = 3 * rng.normal(size=(200, vocab)).astype(np.float32)
  masked = rng.random(logits.shape) < rng.uniform(0.1, 0.95, (200, 1))
  masked[:, 0] |= np.arange(200) % 2 == 0
  masked[:, -1] |= np.arange(200) % 3 == 0
  keep = rng.integers(vocab, size=200)
  masked[np.arange(200), keep] = False
  logits[masked] = MASKED
  for a in EDGES:
    for b in EDGES:
      both = jnp.broadcast_to(jnp.asarray([a, b], jnp.float32)[None], (200, 2))
      drawn = np.asarray(pick(jnp.asarray(logits), both))
      assert (drawn >= 0).all() and (drawn < vocab).all()
      assert not masked[np.arange(200), drawn].any(), (a, b)


def test_a_masked_token_is_not_drawn_where_sums_of_its_neighbours_round_apart():
  """A parallel cumulative sum need neither stay level at a mass of 0, nor rise: what
  falls between two such sums must not draw a token without mass. As many tokens as a
  real vocabulary has, in one block of 512, by its own number."""
  rng, rows, vocab = np.random.default_rng(0), 16, 151_936
  logits = rng.normal(size=(rows, 512)).astype(np.float32)
  masked = rng.random(logits.shape) < 0.5
  masked[:, 0] = False
  logits[masked] = MASKED
  p = np.where(masked, 0, np.exp(logits - logits.max(1, keepdims=True)))
  sums = np.asarray(jitted(jnp.cumsum, 1)(jnp.asarray(p), 1))
  # Tokens without mass whose sum is not that of the one before; else, any.
  apart = masked & (np.diff(sums, axis=1, prepend=0) != 0)
  columns = [
    np.flatnonzero(a if a.any() else m) for a, m in zip(apart, masked, strict=True)
  ]
  whole = np.full((rows, vocab), MASKED, np.float32)
  whole[:, :512] = logits
  row, wrong = np.arange(rows), []
  for n in range(4):
    at = np.array([c[n % len(c)] for c in columns])
    for place in (at - 1, at):
      share = np.round(sums[row, place] / sums[:, -1] * 2.0**23)
      for near in (-1, 0, 1):  # steps of jax.random.uniform
        number = np.clip((share + near) / 2**23, 0, LAST)
        both = np.stack([np.full(rows, 0.5), number], axis=1)
        drawn = np.asarray(pick(jnp.asarray(whole), jnp.asarray(both, jnp.float32)))
        wrong += drawn[whole[row, drawn] == MASKED].tolist()
  assert not wrong, f"{len(wrong)} draws of tokens without mass: {wrong}"


def test_a_point_mass_is_drawn_whatever_the_numbers():
  vocab = 300
  logits = np.full((vocab, vocab), MASKED, np.float32)
  np.fill_diagonal(logits, -7.0)
  for a in EDGES:
    for b in EDGES:
      both = jnp.broadcast_to(jnp.asarray([a, b], jnp.float32)[None], (vocab, 2))
      np.testing.assert_array_equal(pick(jnp.asarray(logits), both), np.arange(vocab))


def test_large_logits_do_not_overflow():
  logits = jnp.asarray([[3e4, 3e4, -3e4], [-3e4, -2e4, -3e4]], jnp.float32)
  both = jnp.asarray([[0.2, 0.9], [0.2, 0.9]], jnp.float32)
  drawn = np.asarray(pick(logits, both))
  assert drawn[0] in (0, 1) and drawn[1] == 1


# -- settings --------------------------------------------------------------------------


def test_temperature_0_takes_the_most_likely_token_surely():
  logits = np.random.default_rng(0).normal(size=(40, 33)).astype(np.float32)
  logits[3, [4, 7]] = 9.0  # the first of two
  best = logits.argmax(1)
  for more in ({}, dict(top_k=3), dict(top_p=0.5), dict(min_p=0.1)):
    got, packed = tempered(jnp.asarray(logits), settings(temperature=0.0, **more))
    assert (packed is None) == (not more)
    for a in EDGES:
      both = jnp.full((40, 2), a, jnp.float32)
      np.testing.assert_array_equal(pick(got, both), best)
    logprob, entropy = sampling.statistics(got, jnp.asarray(best))
    assert not np.asarray(logprob).any() and not np.asarray(entropy).any()
    if more:
      keep = np.unpackbits(np.asarray(packed), axis=-1, count=33)
      np.testing.assert_array_equal(keep.argmax(1), best)
      assert (keep.sum(1) == 1).all()


def test_the_temperature_divides_the_logits():
  logits = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32)
  got, packed = tempered(jnp.asarray(logits), settings(temperature=0.5))
  assert packed is None
  np.testing.assert_allclose(got, logits / 0.5, rtol=1e-6)


BOUNDS = [
  dict(min_p=0.1),
  dict(min_p=1.0),
  dict(top_k=4, min_p=0.3),
  dict(top_p=0.8, min_p=0.2),
  dict(top_k=6, top_p=0.7, min_p=0.15),
  dict(top_k=2, top_p=0.9, min_p=0.01),
]


def kept_by_hand(row, top_k=0, top_p=1.0, min_p=0.0):
  """One row in float64, top-k first, the nucleus of its rest, then min-p."""
  row = row.astype(np.float64)
  order = np.argsort(-row)[: top_k or len(row)]
  if top_p < 1:
    p = np.exp(row[order]) / np.exp(row[order]).sum()
    order = order[np.cumsum(p) - p < top_p]
  p = np.exp(row[order] - row.max())
  assert (np.abs(p - min_p) > 1e-6).all() or min_p == 1.0, "choose another seed"
  return set(order[p >= min_p].tolist())


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bounds_keep_what_numpy_keeps_and_renormalise(bounds, temperature):
  logits = 2 * np.random.default_rng(2).normal(size=(100, 21)).astype(np.float32)
  how = settings(temperature=temperature, **bounds)
  got, packed = tempered(jnp.asarray(logits), how)
  keep = np.unpackbits(np.asarray(packed), axis=-1, count=21).astype(bool)
  scaled = logits.astype(np.float64) / temperature
  for row, kept in zip(scaled, keep, strict=True):
    assert set(np.flatnonzero(kept).tolist()) == kept_by_hand(row, **bounds)
  p = np.exp(scaled) * keep
  p /= p.sum(1, keepdims=True)
  token = np.array([np.flatnonzero(kept)[-1] for kept in keep])
  logprob, entropy = sampling.statistics(got, jnp.asarray(token))
  np.testing.assert_allclose(logprob, np.log(p[np.arange(100), token]), atol=1e-5)
  want = -np.where(keep, p * np.log(np.where(keep, p, 1)), 0).sum(1)
  np.testing.assert_allclose(entropy, want, atol=1e-5)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_bounds_keep_what_transformers_keeps(bounds):
  torch = pytest.importorskip("torch")
  warpers = pytest.importorskip("transformers.generation.logits_process")
  logits = 2 * np.random.default_rng(3).normal(size=(100, 21)).astype(np.float32)
  theirs = torch.tensor(logits)
  if "top_k" in bounds:
    theirs = warpers.TopKLogitsWarper(bounds["top_k"])(None, theirs)
  if "top_p" in bounds:
    theirs = warpers.TopPLogitsWarper(bounds["top_p"])(None, theirs)
  theirs = warpers.MinPLogitsWarper(bounds["min_p"])(None, theirs)
  how = dict(top_k=0, top_p=1.0) | bounds
  ours = support.support(jnp.asarray(logits), **how)
  np.testing.assert_array_equal(ours, torch.isfinite(theirs).numpy())


def test_min_p_keeps_ties_with_the_most_likely_token():
  logits = jnp.log(jnp.asarray([[0.4, 0.4, 0.19, 0.01]]))
  kept = support.support(logits, top_k=0, top_p=1.0, min_p=1.0)
  assert kept.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
  "bounds",
  [{}, dict(top_k=3), dict(top_p=0.7), dict(min_p=0.1), dict(temperature=0.0)],
  ids=str,
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_noticed_under_any_settings(bad, bounds):
  """One number or all of a row: its statistics are not finite, and the others' are."""
  logits = np.random.default_rng(4).normal(size=(3, 8)).astype(np.float32)
  logits[1, 5] = bad
  logits[2] = np.nan
  got, _ = tempered(jnp.asarray(logits), settings(**bounds))
  token = pick(got, jnp.full((3, 2), 0.5))
  logprob, entropy = sampling.statistics(got, token)
  finite = np.isfinite(np.asarray(logprob) + np.asarray(entropy))
  assert finite.tolist() == [True, False, False]


@pytest.mark.parametrize(
  "wrong, said",
  [
    (dict(group_size=0), r"group_size=0 and max_tokens=1 must be at least 1"),
    (dict(max_tokens=0), r"group_size=1 and max_tokens=0 must be at least 1"),
    (dict(temperature=-0.1), r"temperature=-0\.1 must be above 0, or 0 for"),
    (dict(temperature=float("nan")), r"temperature=nan must be above 0"),
    (dict(slots=-1), r"slots=-1 and cache_tokens=0 must be positive, or 0: a slot"),
    (dict(cache_tokens=-5), r"slots=0 and cache_tokens=-5 must be positive, or 0"),
    (dict(top_k=-1), r"top_k=-1 must be 0 \(off\) or more"),
    (dict(top_p=0.0), r"top_p=0\.0 above 0 and at most 1 \(off\)"),
    (dict(top_p=1.5), r"top_p=1\.5 above 0 and at most 1"),
    (dict(min_p=-0.1), r"min_p=-0\.1 from 0 \(off\) to 1"),
    (dict(min_p=1.01), r"min_p=1\.01 from 0 \(off\) to 1"),
    (dict(min_p=float("nan")), r"min_p=nan from 0 \(off\) to 1"),
  ],
  ids=str,
)
def test_settings_that_cannot_work_are_refused_with_the_rule(wrong, said):
  with pytest.raises(UserError, match=said):
    settings(**wrong)


def test_settings_that_mean_something_pass():
  for good in (dict(temperature=0), dict(top_k=1), dict(top_p=1), dict(min_p=1)):
    assert settings(**good).truncates == (
      good not in (dict(temperature=0), {"top_p": 1})
    )
  assert settings(slots=3, cache_tokens=1).slots == 3


# -- keys ------------------------------------------------------------------------------


def test_numbers_are_those_of_the_folded_keys(key):
  """fold_in(fold_in(fold_in(key, id), sample), t), one row at a time."""
  ids, samples = jnp.asarray([7, 0, 123456]), jnp.asarray([[0, 1], [4, 5], [2, 9]])
  keys = row_keys(key, ids, samples)
  assert keys.shape == (3, 2, 2) and keys.dtype == jnp.uint32
  t = jnp.asarray([0, 1, 5, 0, 31, 1000])
  plain, other = (uniforms(keys.reshape(6, 2), t, purpose) for purpose in (0, 3))
  for n, (b, g) in enumerate(np.ndindex(3, 2)):
    one = jax.random.fold_in(jax.random.fold_in(key, ids[b]), samples[b, g])
    one = jax.random.fold_in(one, t[n])
    np.testing.assert_array_equal(plain[n], jax.random.uniform(one, (2,)))
    one = jax.random.fold_in(one, 3)
    np.testing.assert_array_equal(other[n], jax.random.uniform(one, (2,)))


def test_numbers_of_any_two_samples_tokens_and_purposes_differ(key):
  samples = jnp.broadcast_to(jnp.arange(8)[None], (8, 8))
  keys = row_keys(key, jnp.arange(8), samples).reshape(64, 2)
  seen = [
    np.asarray(uniforms(keys, jnp.full(64, t), purpose))
    for t in range(8)
    for purpose in (0, 1)
  ]
  seen = np.concatenate(seen)
  assert len(np.unique(seen, axis=0)) == 64 * 8 * 2
  assert (seen >= 0).all() and (seen < 1).all()
  assert abs(seen.mean() - 0.5) < 0.03 and abs(np.corrcoef(seen.T)[0, 1]) < 0.1


def test_both_numbers_of_a_draw_are_used():
  """Blocks by the first, tokens of a block by the second."""
  logits = jnp.zeros((16, 16))
  grid = jnp.asarray([[a / 4 + 0.1, b / 4 + 0.1] for a in range(4) for b in range(4)])
  np.testing.assert_array_equal(pick(logits, grid), np.arange(16))
