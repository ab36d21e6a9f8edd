"""Intervals of means over problems."""

import numpy as np
import pytest

from r1jax.evals.interval import interval


@pytest.mark.parametrize("kind", ["yes or no", "samples of 8", "paired gaps"])
def test_an_interval_covers_the_truth_nineteen_times_in_twenty(kind):
  rng, covered, trials, n = np.random.default_rng(0), 0, 400, 120
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
  # 0.95 less what a bootstrap of 120 loses; three standard deviations of the count.
  assert 0.91 < covered / trials < 0.98


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
