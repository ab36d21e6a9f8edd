"""Accuracy, AUC, calibration: by hand, and against counting every pair."""

import itertools
import math

import numpy as np
import pytest

from r1jax.evals.calibration import (
  Bin,
  auc,
  brier_score,
  expected_calibration_error,
  pairwise_accuracy,
  reliability,
)

P = np.array([0.0, 0.05, 0.3, 0.3, 0.35, 0.9, 1.0])
Y = np.array([0, 1, 0, 1, 1, 1, 1], bool)


def test_a_tied_pair_is_half_right():
  assert pairwise_accuracy([2.0, 1.0, 0.0, -1.0], [1.0, 1.0, 1.0, -3.0]) == 2.5 / 4
  assert pairwise_accuracy([0.0] * 3, [0.0] * 3) == 0.5
  assert pairwise_accuracy(np.array([np.inf]), np.array([0.0])) == 1.0


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_counts_every_positive_against_every_negative(levels):
  for seed in range(5):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, levels, 60) / 7, rng.random(60) < 0.3
    duels = itertools.product(scores[positive], scores[~positive])
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in duels]
    np.testing.assert_allclose(auc(scores, positive), np.mean(wins), atol=1e-12)
    np.testing.assert_allclose(auc(-scores, positive), 1 - np.mean(wins), atol=1e-12)


def test_auc_at_its_ends_and_without_two_classes():
  positive = np.array([0, 0, 1, 1], bool)
  assert auc([1, 2, 3, 4], positive) == 1.0
  assert auc([4, 3, 2, 1], positive) == 0.0
  assert auc([5, 5, 5, 5], positive) == 0.5
  assert auc([1, 2, 3, 4], 1 - positive) == 0.0  # numbers 0 and 1 are labels too
  assert math.isnan(auc([1.0, 2.0], [True, True]))
  assert math.isnan(auc([], []))


def test_the_reliability_table_by_hand():
  """The edge 0.3 opens a bin, and 1 is in the last one."""
  table = reliability(P, Y)
  assert table == [
    Bin(0, 2, 0.025, 0.5),
    Bin(3, 3, pytest.approx(0.95 / 3), pytest.approx(2 / 3)),
    Bin(9, 2, 0.95, 1.0),
  ]
  assert reliability(P, Y, bins=1) == [(0, 7, pytest.approx(P.mean()), 5 / 7)]


@pytest.mark.parametrize("bins", [1, 7, 10, 49, 100])
def test_a_bins_lower_edge_belongs_to_it(bins):
  edges = np.arange(bins) / bins
  assert [row.bin for row in reliability(edges, edges > 2, bins)] == list(range(bins))


def test_calibration_error_and_brier_score_by_hand():
  want = (2 * abs(0.025 - 0.5) + 3 * abs(0.95 / 3 - 2 / 3) + 2 * 0.05) / 7
  np.testing.assert_allclose(expected_calibration_error(P, Y), want, atol=1e-15)
  squares = [0, 0.95**2, 0.3**2, 0.7**2, 0.65**2, 0.1**2, 0]
  np.testing.assert_allclose(brier_score(P, Y), np.mean(squares), atol=1e-15)


def test_a_calibrated_forecast_has_no_error_and_its_variance_for_a_brier_score():
  rng = np.random.default_rng(0)
  p = rng.uniform(size=200_000)
  y = rng.uniform(size=p.size) < p
  assert expected_calibration_error(p, y) < 0.01
  np.testing.assert_allclose(brier_score(p, y), (p * (1 - p)).mean(), atol=2e-3)
  assert expected_calibration_error(p**3, y) > 0.2  # the wrong sureness shows


def test_a_certain_forecast():
  y = np.array([True, False])
  for p, wrong in ((y, 0.0), (~y, 1.0)):
    assert expected_calibration_error(p, y) == brier_score(p, y) == wrong


def test_what_is_no_number_is_refused_and_not_counted_as_lost():
  for function in (lambda x: pairwise_accuracy(x, [0, 0]), lambda x: auc(x, [0, 1])):
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
      function([np.nan, 1.0])
  for p in (1.5, -0.1, np.nan):
    for function in (reliability, brier_score, expected_calibration_error):
      with pytest.raises(ValueError, match=rf"{p} is no probability"):
        function([0.5, p], [True, False])
