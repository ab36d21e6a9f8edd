"""Intervals of means over problems."""

import numpy as np
import pytest

from r1jax.evals.interval import interval, paired


@pytest.mark.parametrize("size", [30, 64, 200])
@pytest.mark.parametrize("kind", ["yes or no", "samples of 8", "paired gaps"])
def test_an_interval_covers_the_truth_nineteen_times_in_twenty(kind, size):
  rng, covered, trials, n = np.random.default_rng(0), 0, 1000, size
  for trial in range(trials):
    chance = rng.beta(2, 2, n)  # problems are of different difficulty: 1/2 on average
    if kind == "yes or no":
      values, truth = (rng.random(n) < chance).astype(float), 0.5
    elif kind == "samples of 8":
      values, truth = rng.binomial(8, chance) / 8, 0.5
    else:
      better = rng.binomial(8, 0.5 + chance / 2) / 8
      values, truth = better - rng.binomial(8, chance) / 8, 0.25
    low, high = interval(values, draws=400, seed=trial)
    assert low <= values.mean() <= high
    covered += low <= truth <= high
  assert 0.93 <= covered / trials <= 0.97


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
