"""pass@1, pass@k and cons@N over samples of the same problems (R1, supplement D.1)."""

from collections import defaultdict
from collections.abc import Sequence
import math

import numpy as np

from r1jax.rewards import reading


def pass_at_1(correct: np.ndarray) -> float:
  """(1/k) sum_i p_i, averaged over problems. Args: correct [problems, k] bool."""
  return float(np.mean(correct))


def pass_at_k(correct: np.ndarray, k: int) -> float:
  """1 - C(n - c, k) / C(n, k), averaged over problems (arXiv 2107.03374, Eq. 1).

  Args and errors: as `pass_at_k_of_each`.
  """
  return float(np.mean(pass_at_k_of_each(correct, k)))


def pass_at_k_of_each(correct: np.ndarray, k: int) -> np.ndarray:
  """[problems], of each problem.

  Args:
    correct: [problems, n] bool, n samples each.
    k: at most n.

  Raises:
    ValueError: k is not in 1..n.
  """
  n = correct.shape[1]
  if not 1 <= k <= n:
    raise ValueError(f"pass@{k} needs {k} samples a problem and there are {n}.")
  return np.array(
    [1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]
  )


def cons_at_n(answers: Sequence[Sequence[str | None]], correct: np.ndarray) -> float:
  """Share of problems whose majority answer is right; without a problem NaN.

  Args:
    answers: [problems][n] extracted answers.
    correct: [problems, n] bool, the verdict on each.
  """
  shares = [consensus(*pair) for pair in zip(answers, correct, strict=True)]
  return float(np.mean(shares)) if shares else math.nan


def consensus(answers: Sequence[str | None], correct: np.ndarray) -> float:
  """What the majority of a problem's answers is worth.

  Answers that are equal as numbers vote together (`1/2` with `0.5`), and are right if
  one of them was found right. A missing answer (None) has no vote. Tied answers share
  the problem: a right one among two pays 1/2.

  Args:
    answers: [n] extracted answers.
    correct: [n] bool, the verdict on each.
  """
  votes, verdict = defaultdict(int), defaultdict(bool)
  for answer, ok in zip(answers, correct, strict=True):
    if answer is not None:
      votes[equivalence_class(answer)] += 1
      verdict[equivalence_class(answer)] |= bool(ok)
  most = max(votes.values(), default=0)
  best = [verdict[a] for a, n in votes.items() if n == most]
  return float(np.mean(best)) if best else 0.0


def equivalence_class(answer: str) -> str:
  """The number an answer denotes, or its own text."""
  said = reading.parse(answer)
  if said is None or said.kind != "number":
    return answer.strip()
  return str(said.value / 100 if said.percent else said.value)
