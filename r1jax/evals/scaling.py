"""Test-time scaling: accuracy against the number of samples that vote, and against the
tokens that a sample may take (R1, Table 2 and supplement D.1)."""

from collections.abc import Sequence
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from r1jax.evals.interval import interval
from r1jax.evals.pass_at_k import consensus

SUBSETS = 200  # of m of the n samples, where there are more


def majority(
  answers: Sequence[Sequence[str | None]], correct: np.ndarray, seed: int = 0
) -> list[dict]:
  """cons@m for m = 1, 2, 4, ... and n, each the mean over subsets of the n samples.

  Args:
    answers: [problems][n] extracted answers, as `pass_at_k.cons_at_n` takes them.
    correct: [problems, n] bool.
    seed: of the subsets.

  Returns:
    Rows {"samples", "value", "low", "high"}, with 95 % intervals over problems.
  """
  n = correct.shape[1]
  sizes = [m for m in (2**i for i in range(32)) if m < n] + [n]
  rng, rows = np.random.default_rng(seed), []
  for m in sizes:
    picks = [np.arange(n)] if m == n else subsets(n, m, rng)
    shares = np.array(
      [
        np.mean([consensus([said[i] for i in p], right[p]) for p in picks])
        for said, right in zip(answers, correct, strict=True)
      ]
    )
    low, high = interval(shares, shares=True)
    rows.append({"samples": m, "value": float(shares.mean()), "low": low, "high": high})
  return rows


def subsets(n: int, m: int, rng: np.random.Generator) -> list[np.ndarray]:
  """Ways to choose m of n: each one alone, or random ones."""
  if m == 1:
    return [np.array([i]) for i in range(n)]
  return [rng.choice(n, m, replace=False) for _ in range(SUBSETS)]


def budgets(lengths: np.ndarray, correct: np.ndarray, points: int = 8) -> list[dict]:
  """pass@1 if a sample is stopped after so many tokens: it is right if it had ended by
  then and was right.

  Args:
    lengths: [problems, n] tokens.
    correct: [problems, n] bool.
    points: budgets, by halves from the longest sample down.

  Returns:
    Rows {"tokens", "value", "low", "high"} in rising order.
  """
  longest, rows = int(lengths.max()), []
  for tokens in sorted({max(longest >> i, 1) for i in range(points)}):
    shares = (correct & (lengths <= tokens)).mean(axis=1)
    low, high = interval(shares, shares=True)
    rows.append(
      {"tokens": tokens, "value": float(shares.mean()), "low": low, "high": high}
    )
  return rows


def plot(path: pathlib.Path, votes: list[dict], within: list[dict], title: str) -> None:
  """Both curves, with their intervals. Args: path: of the PNG."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  panels = [(votes, "samples", "samples that vote"), (within, "tokens", "tokens")]
  for axis, (rows, key, label) in zip(axes, panels, strict=True):
    if rows:
      x, y, low, high = (
        [row[k] for row in rows] for k in (key, "value", "low", "high")
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
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
