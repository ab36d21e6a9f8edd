"""Intervals of means over problems."""

import numpy as np
import pytest

from r1jax.evals.interval import METHODS, figure, interval, paired, students


def coverage(draw, truth, n, **how):
  """How often the interval of n drawn values holds the truth."""
  covered, trials = 0, 1000
  for trial in range(trials):
    values = draw(np.random.default_rng(trial), n)
    low, high = interval(values, **how)
    assert low <= values.mean() <= high
    covered += low <= truth <= high
  return covered / trials


def yes_or_no(rng, n):
  """Problems are of different difficulty: 1/2 on average."""
  return (rng.random(n) < rng.beta(2, 2, n)).astype(float)


def samples_of_8(rng, n):
  return rng.binomial(8, rng.beta(2, 2, n)) / 8


def paired_gaps(rng, n):
  chance = rng.beta(2, 2, n)
  return (rng.binomial(8, 0.5 + chance / 2) - rng.binomial(8, chance)) / 8


@pytest.mark.parametrize("size", [30, 64, 200])
@pytest.mark.parametrize(
  "draw, truth, how",
  [
    (yes_or_no, 0.5, {"shares": True, "draws": 400}),
    (yes_or_no, 0.5, {"shares": True, "method": "wilson"}),
    (samples_of_8, 0.5, {"shares": True, "draws": 400}),
    (samples_of_8, 0.5, {"shares": True, "method": "wilson"}),
    (paired_gaps, 0.25, {"draws": 400}),
  ],
)
def test_an_interval_covers_the_truth_nineteen_times_in_twenty(draw, truth, how, size):
  assert 0.93 <= coverage(draw, truth, size, **how) <= 0.97


def mostly_missed(rng, n):
  """64 samples of problems most of which are never solved."""
  return rng.binomial(64, rng.beta(0.1, 1.9, n)) / 64


def mostly_solved(rng, n):
  return (rng.random(n) < 0.95).astype(float)


@pytest.mark.parametrize(
  "draw, truth, size, bootstrap, wilson",
  [
    (mostly_missed, 0.05, 30, 0.84, 0.88),
    (mostly_missed, 0.05, 64, 0.88, 0.91),
    (mostly_solved, 0.95, 30, 0.93, 0.92),
    (mostly_solved, 0.95, 64, 0.86, 0.93),
  ],
)
def test_near_the_ends_it_covers_the_truth_less_often(
  draw, truth, size, bootstrap, wilson
):
  """A bootstrap more so: what was not drawn, that does not know of."""
  resampled = coverage(draw, truth, size, shares=True, draws=400)
  scored = coverage(draw, truth, size, shares=True, method="wilson")
  assert bootstrap <= resampled and wilson <= scored
  assert size == 30 or scored > resampled + 0.02


@pytest.mark.parametrize("n", [1, 4, 5])
def test_few_problems_have_no_interval(n):
  values = np.linspace(0.1, 0.9, n)
  for shares in (False, True):
    found = figure(values, shares=shares)
    assert found["value"] == pytest.approx(values.mean())
    assert (found["low"] is None, found["high"] is None) == (n < 5, n < 5)
  assert (paired(values, 0.5 * values).low is None) == (n < 5)


def test_an_interval_of_shares_stays_within_0_and_1():
  rng = np.random.default_rng(0)
  for values in [rng.random(n) ** k for n in (1, 2, 5, 30) for k in (0.01, 1, 100)]:
    for method in METHODS:
      low, high = interval(values, shares=True, method=method)
      assert 0 <= low <= values.mean() <= high <= 1
  for method in METHODS:
    found = interval(np.full(9, 0.25), shares=True, method=method)
    assert found == pytest.approx((0.25, 0.25))


def test_wilson_is_the_score_interval_of_yes_or_no():
  """Three of ten, by the formula with t of 9 degrees of freedom in place of z."""
  values = np.array([1.0] * 3 + [0.0] * 7)
  z = 2.262157**2 / 10
  middle, half = 0.3 + z / 2, (z * 0.21 + z * z / 4) ** 0.5
  expected = (middle - half) / (1 + z), (middle + half) / (1 + z)
  found = interval(values, shares=True, method="wilson")
  assert found == pytest.approx(expected, abs=1e-3)


def test_an_interval_is_as_wide_as_the_normal_one():
  values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
  low, high = interval(values)
  half = 1.96 * values.std() / 4000**0.5
  assert (high - low) / 2 == pytest.approx(half, rel=0.08)
  assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.2 * half)


def test_an_interval_of_equal_values_is_a_point_and_a_function_of_its_seed():
  assert interval(np.full(9, 0.25)) == (0.25, 0.25)
  values = np.random.default_rng(2).random(50)
  assert interval(values) == interval(values) != interval(values, seed=1)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_none_right_says_how_much_it_may_be(n):
  """Clopper and Pearson: as many failures in a row have 2.5 % at the upper end."""
  low, high = interval(np.zeros(n), shares=True)
  assert low == 0.0 and (1 - high) ** n == pytest.approx(0.025)
  assert interval(np.ones(n), shares=True) == pytest.approx((1 - high, 1.0))


def test_a_difference_of_two_policies_is_of_the_same_problems():
  """The problems differ far more than the policies do."""
  rng = np.random.default_rng(3)
  hard = rng.random(80)
  first, second = hard, np.clip(hard + rng.normal(0.05, 0.05, 80), 0, 1)
  found = paired(first, second)
  assert found.mean == pytest.approx((second - first).mean())
  assert 0 < found.low < found.mean < found.high and found.p < 0.001
  assert paired(second, first).mean == -found.mean


def test_p_of_a_few_problems_counts_all_signs():
  """All six up: 2 of 2^6 ways are as far."""
  zeros = np.zeros(6)
  assert paired(zeros, np.full(6, 0.5)).p == pytest.approx(2 / 64)
  assert paired(zeros, zeros).p == 1.0
  with pytest.raises(ValueError, match="6 and 5"):
    paired(zeros, zeros[:5])


def test_p_is_even_where_neither_is_better():
  rng = np.random.default_rng(4)
  found = [paired(*rng.random((2, 20)), draws=500).p for _ in range(300)]
  assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_a_mean_over_seeds_has_students_interval():
  half = 4.302653 * 0.1 / 3**0.5  # t of two degrees of freedom
  expected = (0.6 - half, 0.6 + half)
  assert students([0.5, 0.6, 0.7]) == pytest.approx(expected, abs=1e-6)
