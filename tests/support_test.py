"""Truncated supports against sorting in NumPy, and the masks that are kept of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import support
from r1jax.errors import UserError

VOCAB = 13


def kept_by_hand(logits, top_k, top_p):
  """One row: down the ranks until k, then until the nucleus is full; then ties."""
  logits = logits.astype(np.float64)
  ranked = sorted(logits, reverse=True)
  least = ranked[top_k - 1] if 0 < top_k <= len(ranked) else -np.inf
  left = [x for x in ranked if x >= least]
  if top_p < 1:
    total = sum(np.exp(x) for x in left)
    mass = 0.0
    for x in left:
      if mass / total >= top_p:
        break
      # A sum within rounding of the bound would let either side be right.
      assert mass == 0 or abs(mass / total - top_p) > 1e-5, "choose another seed"
      mass, least = mass + np.exp(x), x
    assert abs(mass / total - top_p) > 1e-5, "choose another seed"
  return np.array([x >= least for x in logits])


def rows(kind):
  rng = np.random.default_rng(0)
  if kind == "ties":  # quarters: equal logits are frequent
    return (rng.integers(-6, 7, (150, VOCAB)) / 4).astype(np.float32)
  return (2 * rng.normal(size=(150, VOCAB))).astype(np.float32)


BOUNDS = [(k, p) for k in (0, 1, 3, 12, 13, 50) for p in (0.05, 0.43, 0.7, 0.97, 1.0)]


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("top_k, top_p", BOUNDS)
def test_the_support_equals_sorting_by_hand(top_k, top_p, kind):
  logits = rows(kind)
  got = support.support(
    jnp.asarray(logits.reshape(10, 15, VOCAB)), top_k=top_k, top_p=top_p
  )
  want = np.array([kept_by_hand(row, top_k, top_p) for row in logits])
  np.testing.assert_array_equal(np.reshape(got, (-1, VOCAB)), want)


def kept(probabilities, **bounds):
  bounds = {"top_k": 0, "top_p": 1.0, **bounds}
  logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
  return np.flatnonzero(support.support(logits, **bounds)).tolist()


def test_the_nucleus_is_of_what_top_k_left():
  p = [0.4, 0.1, 0.3, 0.2]
  assert kept(p, top_k=2) == [0, 2]
  assert kept(p, top_p=0.55) == [0, 2]
  # Of the two that are left, the first has 4/7 > 0.55.
  assert kept(p, top_k=2, top_p=0.55) == [0]
  assert kept(p, top_k=3, top_p=0.8) == [0, 2, 3]  # 7/9 of three is not enough
  assert kept(p, top_k=3, top_p=0.75) == [0, 2]


def test_the_token_that_crosses_the_bound_is_in_and_the_next_is_out():
  p = [0.5, 0.3, 0.15, 0.05]
  assert kept(p, top_p=0.49) == [0]
  assert kept(p, top_p=0.51) == [0, 1]
  assert kept(p, top_p=0.79) == [0, 1]
  assert kept(p, top_p=0.81) == [0, 1, 2]
  assert kept(p, top_p=0.96) == [0, 1, 2, 3]


def test_tokens_tied_with_the_last_one_kept_are_kept():
  p = [0.2, 0.2, 0.5, 0.05, 0.05]
  assert kept(p, top_k=2) == [0, 1, 2]
  assert kept(p, top_p=0.6) == [0, 1, 2]
  assert kept(p, top_k=4, top_p=0.99) == [0, 1, 2, 3, 4]
  assert kept([0.25] * 4, top_k=1) == [0, 1, 2, 3]
  assert kept([0.25] * 4, top_p=0.1) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1e-3, 1e-9, 1e-30])
def test_a_tiny_nucleus_keeps_the_most_likely_token(top_p, top_k):
  logits = rows("distinct")
  got = support.support(jnp.asarray(logits), top_k=top_k, top_p=top_p)
  want = np.arange(VOCAB)[None] == logits.argmax(1)[:, None]
  np.testing.assert_array_equal(got, want)


def test_extreme_logits_keep_one_token_and_no_more_than_there_are():
  logits = jnp.asarray([[1e4, 0.0, -1e4], [-1e4, -1e4, 0.0]], jnp.float32)
  got = support.support(logits, top_k=2, top_p=0.999)
  np.testing.assert_array_equal(got, [[True, False, False], [False, False, True]])


def test_without_bounds_logits_stay_as_they_are():
  logits = jnp.asarray(rows("ties"))
  assert not support.truncates(0, 1.0)
  assert support.restrict(logits, None) is logits
  for top_k in (0, VOCAB, VOCAB + 1):
    everything = support.support(logits, top_k=top_k, top_p=1.0)
    assert everything.all()
    again = support.restrict(logits, support.pack(everything))
    np.testing.assert_array_equal(again, logits)
  assert support.truncates(1, 1.0) and support.truncates(0, 0.999)


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 13, 16, 130])
def test_a_packed_support_comes_back_whatever_the_vocabulary(vocab):
  rng = np.random.default_rng(vocab)
  keep = rng.random((3, 4, vocab)) < 0.4
  logits = rng.normal(size=keep.shape).astype(np.float32)
  packed = support.pack(jnp.asarray(keep))
  assert packed.dtype == jnp.uint8
  assert packed.shape == (3, 4, -(-vocab // 8))
  # Token v is bit 7 - v % 8 of byte v // 8.
  bits = [np.asarray(packed)[..., v // 8] >> (7 - v % 8) & 1 for v in range(vocab)]
  np.testing.assert_array_equal(np.stack(bits, axis=-1), keep)
  got = support.restrict(jnp.asarray(logits), packed)
  np.testing.assert_array_equal(got, np.where(keep, logits, np.float32(-1e30)))


@pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.7), (4, 0.6)])
def test_the_restricted_distribution_is_the_whole_one_renormalised(top_k, top_p):
  logits = jnp.asarray(rows("distinct"))
  keep = support.support(logits, top_k=top_k, top_p=top_p)
  logp = jax.nn.log_softmax(support.restrict(logits, support.pack(keep)), axis=-1)
  p, keep = np.exp(np.asarray(logp, np.float64)), np.asarray(keep)
  np.testing.assert_allclose(np.where(keep, p, 0).sum(1), np.ones(len(p)), rtol=1e-5)
  assert not p[~keep].any()
  whole = np.exp(np.asarray(logits, np.float64)) * keep
  want = whole / whole.sum(1, keepdims=True)
  np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-9)


def test_a_restricted_token_has_a_gradient_inside_its_support_only():
  logits = jnp.asarray(rows("distinct")[:20])
  keep = support.support(logits, top_k=4, top_p=1.0)
  best = jnp.argmax(logits, axis=-1)

  def logprob(logits):
    left = support.restrict(logits, support.pack(keep))
    logp = jax.nn.log_softmax(left, axis=-1)
    return jnp.take_along_axis(logp, best[:, None], axis=-1).sum()

  grads = np.asarray(jax.grad(logprob)(logits))
  assert np.isfinite(grads).all()
  np.testing.assert_array_equal(grads != 0, keep)


def test_a_row_that_keeps_nothing_gives_numbers():
  """Padding after a row's end: no bit was ever written there."""
  left = support.restrict(jnp.zeros((1, VOCAB)), jnp.zeros((1, 2), jnp.uint8))
  logp = jax.nn.log_softmax(left, axis=-1)
  assert np.isfinite(logp).all()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (50, 0.001), (0, 1)])
def test_bounds_that_keep_something_pass(top_k, top_p):
  support.check(top_k, top_p)


@pytest.mark.parametrize(
  "top_k, top_p",
  [(-1, 1.0), (0, 0.0), (0, 0), (5, -0.1), (0, 1.001), (0, float("nan"))],
)
def test_bounds_that_keep_nothing_or_mean_nothing_are_refused(top_k, top_p):
  with pytest.raises(UserError, match=f"top_k={top_k} .*top_p={top_p} "):
    support.check(top_k, top_p)


@pytest.mark.parametrize("top_p", [1e-30, 1e-38, 1e-45])
def test_a_top_p_that_rounds_to_nothing_keeps_the_likeliest_token(top_p):
  keep = support.support(jnp.asarray([[1.0, 2.0, 3.0]]), top_k=0, top_p=top_p)
  assert keep.tolist() == [[False, False, True]]
