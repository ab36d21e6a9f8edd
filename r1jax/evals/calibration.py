"""How well scores order responses, and how far probabilities can be believed.

Everything here takes NumPy arrays [N]; a score that is NaN is refused, because it would
be counted as one that lost, or won.
"""

from typing import NamedTuple

import numpy as np


class Bin(NamedTuple):
  """Probabilities in [bin / bins, (bin + 1) / bins), the last one with its end."""

  bin: int
  n: int
  predicted: float  # their mean
  fraction: float  # of positives among them


def pairwise_accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
  """Share of pairs in which the chosen response has the higher score; a tie is 1/2.

  Args:
    chosen, rejected: [N] scores, N > 0.
  """
  chosen, rejected = _numbers(chosen), _numbers(rejected)
  return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
  """P(score of a positive > score of a negative) + P(equal) / 2, the area under the ROC
  curve, from the mean ranks of equal scores (Mann and Whitney's U over n+ n-).

  Args:
    scores: [N].
    positive: [N] bool.

  Returns:
    NaN without both positives and negatives.
  """
  positive = np.asarray(positive, bool)
  _, which, counts = np.unique(
    _numbers(scores), return_inverse=True, return_counts=True
  )
  ranks = (np.cumsum(counts) - 0.5 * (counts - 1))[which]
  n = int(positive.sum())
  pairs = n * (len(positive) - n)
  u = ranks[positive].sum() - n * (n + 1) / 2
  return float(u / pairs) if pairs else float("nan")


def reliability(
  probabilities: np.ndarray, positive: np.ndarray, bins: int = 10
) -> list[Bin]:
  """The reliability table over bins of equal width; empty bins are left out.

  Args:
    probabilities: [N] in [0, 1], of being positive.
    positive: [N] bool.
    bins: how many.
  """
  p, y = _probabilities(probabilities), np.asarray(positive, bool)
  edges = np.arange(1, bins) / bins
  place = np.searchsorted(edges, p, side="right")
  return [
    Bin(int(b), int(here.sum()), float(p[here].mean()), float(y[here].mean()))
    for b in np.unique(place)
    for here in [place == b]
  ]


def expected_calibration_error(
  probabilities: np.ndarray, positive: np.ndarray, bins: int = 10
) -> float:
  """sum_b n_b / N |mean predicted - fraction| over `reliability`'s table
  (arXiv 1706.04599, Eq. 5, of the positive class)."""
  table = reliability(probabilities, positive, bins)
  gaps = sum(row.n * abs(row.predicted - row.fraction) for row in table)
  return gaps / len(probabilities)


def brier_score(probabilities: np.ndarray, positive: np.ndarray) -> float:
  """Mean of (p - [positive])^2."""
  p, y = _probabilities(probabilities), np.asarray(positive, bool)
  return float(np.mean(np.square(p - y)))


def _numbers(scores: np.ndarray) -> np.ndarray:
  scores = np.asarray(scores, np.float64)
  bad = int(np.isnan(scores).sum())
  if bad:
    raise ValueError(
      f"{bad} of {scores.size} scores are NaN and cannot be ordered. Look at the"
      " training run's loss, or lower its learning rate."
    )
  return scores


def _probabilities(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  bad = values[~((values >= 0) & (values <= 1))]
  if bad.size:
    raise ValueError(
      f"{bad[0]} is no probability: it must lie in 0..1. A sigmoid makes one of"
      " a score."
    )
  return values
