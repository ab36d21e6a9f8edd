"""How far a mean over problems may be off, if other problems had been drawn; and
whether two policies differ on the same ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEAST = 5  # problems; from fewer no interval is told
METHODS = ("bootstrap", "wilson")


def figure(
  values: np.ndarray, *, shares: bool = False, method: str = "bootstrap"
) -> dict[str, float | None]:
  """{"value": the mean over problems, "low", "high"}, None for the bounds of fewer than
  LEAST problems. Args: as `interval`."""
  low = high = None
  if len(values) >= LEAST:
    low, high = interval(values, shares=shares, method=method)
  return {"value": float(values.mean()), "low": low, "high": high}


def interval(
  values: np.ndarray,
  *,
  shares: bool = False,
  method: str = "bootstrap",
  draws: int = 2000,
  seed: int = 0,
) -> tuple[float, float]:
  """The 95 % interval of a mean over problems.

  Samples of one problem are no independent draws: average them first. It is a bootstrap
  over the problems, whose percentiles are moved outwards so that few problems do not
  give too short an interval (the expanded percentile interval; Hesterberg, arXiv
  1411.5279, section 3.3).

  Args:
    values: [problems], means over the samples of each; or paired differences of them.
    shares: the values lie in 0..1. Where all are 0, or all 1, resampling knows nothing,
      and the interval is Clopper's and Pearson's for as many problems.
    method: of METHODS; "wilson" is for shares (`wilson`), others are bootstrapped.
    draws: resamples.
    seed: of them.

  Returns:
    (low, high).
  """
  n, tail = len(values), 0.025
  if shares and values.mean() in (0.0, 1.0):
    far = 0.025 ** (1 / n)
    return (0.0, 1 - far) if values[0] == 0 else (far, 1.0)
  if shares and method == "wilson":
    return wilson(values)
  if n > 1:
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))
  rng = np.random.default_rng(seed)
  picks = rng.integers(0, n, (draws, n))
  low, high = np.quantile(values[picks].mean(axis=1), [tail, 1 - tail])
  return float(low), float(high)


def wilson(values: np.ndarray) -> tuple[float, float]:
  """Wilson's score interval for as many yes-or-no problems as would vary like these
  (Franco, Little, Louis and Slud, J. Surv. Stat. Methodol. 7, 2019). Near 0 and 1,
  where few problems are solved or few are missed, it holds the truth more often than a
  bootstrap does.

  Args:
    values: [problems], in 0..1, neither all 0 nor all 1.

  Returns:
    (low, high), in 0..1.
  """
  n, p = len(values), float(values.mean())
  if n == 1:
    return 0.0, 1.0
  spread = min(float(values.var(ddof=1)) / (p * (1 - p)), 1.0)  # over that of yes or no
  z = spread / n * stats.t.ppf(0.975, n - 1) ** 2
  half = np.sqrt(z * p * (1 - p) + z * z / 4)
  low, high = ((p + z / 2 + side) / (1 + z) for side in (-half, half))
  return float(min(low, p)), float(max(high, p))


def students(values: Sequence[float]) -> tuple[float, float]:
  """Student's 95 % interval of a mean over seeds, mean -+ t s / sqrt n. Args: values:
  [seeds], two or more."""
  n, mean = len(values), float(np.mean(values))
  half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1)) / n**0.5
  return mean - half, mean + half


class Difference(NamedTuple):
  """Of two policies on the same problems: the second less the first."""

  mean: float
  low: float | None  # of its 95 % interval; None: fewer problems than LEAST
  high: float | None
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
  found = figure(gaps)
  return Difference(found["value"], found["low"], found["high"], float(p))
