"""pass@1, pass@k and cons@N over samples of the same problems (R1, supplement D.1)."""

from collections.abc import Collection, Hashable, Sequence
import math

import numpy as np

from r1jax.rewards import choice, reading
from r1jax.rewards.values import SPACE, Value


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


def cons_at_n(votes: np.ndarray, correct: np.ndarray) -> float:
  """Share of problems whose majority answer is right; without a problem NaN.

  Args: as `consensus`, with problems first.
  """
  return float(np.mean(consensus(votes, correct))) if len(votes) else math.nan


def consensus(votes: np.ndarray, correct: np.ndarray) -> np.ndarray:
  """What the majority of n answers is worth.

  A class is right if one of its answers was found right. Tied classes share the
  problem: a right one among two pays 1/2. Without a vote it is worth 0.

  Args:
    votes: [..., n] int, the class of each answer; -1 has no vote.
    correct: [..., n] bool, the verdict on each.

  Returns:
    [...] float.
  """
  cast = votes[..., None] == np.arange(1 + max(votes.max(initial=0), 0))
  counts, right = cast.sum(axis=-2), (cast & correct[..., None]).any(axis=-2)
  best = (counts > 0) & (counts == counts.max(axis=-1, keepdims=True))
  return (best & right).sum(axis=-1) / np.maximum(best.sum(axis=-1), 1)


_RIGHT = object()  # in place of all right meanings


def classes(
  meanings: Sequence[Hashable], right: Collection[Hashable] = ()
) -> list[int]:
  """Numbers 0, 1, ... for the classes of a problem's answers; -1 for None.

  Args:
    meanings: of the answers, as `meaning` gives them.
    right: meanings that are one class, whatever their form.
  """
  shared = [_RIGHT if m in right else m for m in meanings]
  found = dict.fromkeys(m for m in shared if m is not None)
  numbers = {m: i for i, m in enumerate(found)}
  return [numbers.get(m, -1) for m in shared]


def meaning(answer: str) -> Hashable:
  """Equal for answers that say the same: numbers by value, options by their letter,
  words whatever the case, structures by their parts, and expressions by their text
  without white space."""
  if choice.is_option(answer):
    return "option", choice.letter(answer)
  said = reading.parse(answer)
  return ("unread", answer.strip()) if said is None else _of_value(said)


def _of_value(said: Value) -> Hashable:
  if said.kind == "number":
    return said.value / 100 if said.percent else said.value
  if said.items:
    parts = map(_of_value, said.items)
    if said.kind in ("set", "list"):  # one is as good as the other (values.py)
      return "set", frozenset(parts)
    return said.kind, frozenset(parts) if said.kind == "union" else tuple(parts)
  return said.kind, SPACE.sub("", said.text)
