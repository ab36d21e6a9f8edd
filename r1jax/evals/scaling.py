"""Test-time scaling: accuracy against the number of samples that vote, and against the
tokens that a sample may take (R1, Table 2 and supplement D.1)."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from r1jax.evals.interval import figure
from r1jax.evals.pass_at_k import consensus

SUBSETS = 200  # of m of the n samples, where there are more


def majority(
  votes: np.ndarray, correct: np.ndarray, seed: int = 0, *, method: str = "bootstrap"
) -> list[dict]:
  """cons@m for m = 1, 2, 4, ... and n, each the mean over subsets of the n samples.

  Args:
    votes: [problems, n] int, the classes of answers, as `pass_at_k.consensus` takes
      them.
    correct: [problems, n] bool.
    seed: of the subsets.
    method: of the intervals.

  Returns:
    Rows {"samples", "value", "low", "high"}, as `interval.figure`.
  """
  n = correct.shape[1]
  sizes = [m for m in (2**i for i in range(32)) if m < n] + [n]
  rng, rows = np.random.default_rng(seed), []
  for m in sizes:
    picks = np.array([np.arange(n)] if m == n else subsets(n, m, rng))
    pairs = zip(votes, correct, strict=True)
    shares = np.array([consensus(v[picks], c[picks]).mean() for v, c in pairs])
    rows.append({"samples": m, **figure(shares, shares=True, method=method)})
  return rows


def subsets(n: int, m: int, rng: np.random.Generator) -> list[np.ndarray]:
  """Ways to choose m of n: each one alone, or random ones."""
  if m == 1:
    return [np.array([i]) for i in range(n)]
  return [rng.choice(n, m, replace=False) for _ in range(SUBSETS)]


def budgets(
  lengths: np.ndarray,
  correct: np.ndarray,
  points: int = 8,
  *,
  method: str = "bootstrap",
) -> list[dict]:
  """pass@1 if a sample is stopped after so many tokens: it is right if it had ended by
  then and was right.

  Args:
    lengths: [problems, n] tokens.
    correct: [problems, n] bool.
    points: budgets, by halves from the longest sample down.
    method: of the intervals.

  Returns:
    Rows {"tokens", "value", "low", "high"} in rising order.
  """
  longest, rows = int(lengths.max()), []
  for tokens in sorted({max(longest >> i, 1) for i in range(points)}):
    shares = (correct & (lengths <= tokens)).mean(axis=1)
    rows.append({"tokens": tokens, **figure(shares, shares=True, method=method)})
  return rows


def plot(path: pathlib.Path, votes: list[dict], within: list[dict], title: str) -> None:
  """Both curves, with their intervals. Args: path: of the PNG."""
  drawn, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  panels = [(votes, "samples", "samples that vote"), (within, "tokens", "tokens")]
  for axis, (rows, key, label) in zip(axes, panels, strict=True):
    if rows:
      x, y, low, high = (
        np.array([row[k] for row in rows], float) for k in (key, "value", "low", "high")
      )
      axis.plot(x, y, marker="o", ms=4)
      axis.fill_between(x, low, high, alpha=0.2)
      axis.set_xscale("log", base=2)
    axis.set_xlabel(label)
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("accuracy")
  axes[0].set_title("majority vote")
  axes[1].set_title("one sample, stopped after")
  drawn.suptitle(title)
  drawn.tight_layout()
  drawn.savefig(path, dpi=120)
  plt.close(drawn)
