"""How far a mean over problems may be off, if other problems had been drawn."""

import numpy as np


def interval(
  values: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """The 95 % interval of a mean over problems, by bootstrap over the problems.

  Samples of one problem are no independent draws: average them first.

  Args:
    values: [problems], means over the samples of each; or paired differences of them.
    draws: resamples.
    seed: of them.

  Returns:
    (low, high).
  """
  rng = np.random.default_rng(seed)
  picks = rng.integers(0, len(values), (draws, len(values)))
  low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
  return float(low), float(high)
