"""How far a mean over problems may be off, if other problems had been drawn; and
whether two policies differ on the same ones."""

from typing import NamedTuple

import numpy as np
from scipy import stats


def interval(
  values: np.ndarray, *, draws: int = 2000, seed: int = 0, shares: bool = False
) -> tuple[float, float]:
  """The 95 % interval of a mean over problems, by bootstrap over the problems.

  Samples of one problem are no independent draws: average them first. The percentiles
  are moved outwards so that few problems do not give too short an interval (the
  expanded percentile interval; Hesterberg, arXiv 1411.5279, section 3.3).

  Args:
    values: [problems], means over the samples of each; or paired differences of them.
    draws: resamples.
    seed: of them.
    shares: the values lie in 0..1; where all are 0, or all 1, resampling knows nothing,
      and the interval is Clopper's and Pearson's for as many problems.

  Returns:
    (low, high).
  """
  n = len(values)
  if shares and np.isin(values, (0, 1)).all() and len(set(values)) == 1:
    far = 0.025 ** (1 / n)
    return (0.0, 1 - far) if values[0] == 0 else (far, 1.0)
  tail = 0.025
  if n > 1:
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))
  rng = np.random.default_rng(seed)
  picks = rng.integers(0, n, (draws, n))
  low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
  return float(low), float(high)


class Difference(NamedTuple):
  """Of two policies on the same problems: the second less the first."""

  mean: float
  low: float  # of its 95 % interval
  high: float
  p: float  # two-sided, of as large a difference if neither is better


def paired(first: np.ndarray, second: np.ndarray, *, draws: int = 10_000) -> Difference:
  """Compares two policies by their means on each problem.

  p is a permutation test's: on every problem the two could as well be exchanged, so the
  differences could have the other sign (all 2^n ways up to 2^12, else random ones).

  Args:
    first, second: [problems], of the same problems in the same order.
    draws: of signs.

  Raises:
    ValueError: different numbers of problems.
  """
  if len(first) != len(second):
    raise ValueError(f"{len(first)} and {len(second)} problems are not the same ones.")
  gaps = np.asarray(second, float) - np.asarray(first, float)
  n = len(gaps)
  if n <= 12:
    bits = np.arange(2**n)[:, None] >> np.arange(n)
    means = (np.where(bits & 1, 1, -1) * gaps).mean(axis=1)
    extra = 0
  else:
    signs = np.random.default_rng(0).choice((-1, 1), (draws, n))
    means, extra = (signs * gaps).mean(axis=1), 1
  as_large = (np.abs(means) >= abs(gaps.mean()) - 1e-12).sum()
  p = (as_large + extra) / (len(means) + extra)
  return Difference(float(gaps.mean()), *interval(gaps), float(p))
