"""The default task: chained sums such as `4 + 7 - 2 + 5`, worked from left to right.

A tiny policy cannot see the answer at a glance, but it can learn single steps, and a
step that is written down again after "wait" is right more often than a first attempt.
"""

import dataclasses
import random
import re

from r1jax.data.problem import Problem
from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chain:
  """Sums of min_terms..max_terms digits whose running total stays in low..high.

  All of them set the difficulty: more steps, and more and longer single steps to know.
  """

  min_terms: int = 4
  max_terms: int = 4
  low: int = 0
  high: int = 9
  zero: bool = False  # whether 0 is among the numbers
  slip: float = 0.25  # share of first attempts that a page gets wrong
  recheck: float = 0.9  # share of steps that a checked page writes again, right
  symbols: tuple[str, ...] = (" + ", " - ", " = ", ", ", ", wait ", "I guess")

  def __post_init__(self):
    if not 2 <= self.min_terms <= self.max_terms or self.low > 1 or self.high < 9:
      raise UserError(
        f"config.chain: min_terms={self.min_terms}, max_terms={self.max_terms},"
        f" low={self.low}, high={self.high}; needed are 2 <= min_terms <= max_terms,"
        " low <= 1 and high >= 9, so that a sum can start with any digit."
      )

  def problem(self, rng: random.Random) -> Problem:
    value = rng.randint(0 if self.zero else 1, 9)
    text = str(value)
    for _ in range(rng.randint(self.min_terms, self.max_terms) - 1):
      op, number, value = self._move(value, rng)
      text += f" {op} {number}"
    return Problem(text, (str(value),))

  def identity(self, problem: Problem) -> str:
    return problem.problem

  def fact(self, rng: random.Random) -> str:
    """One true step, from any running total."""
    left = rng.randint(self.low, self.high)
    op, number, result = self._move(left, rng)
    return f"{left} {op} {number} = {result}"

  def is_fact(self, text: str) -> bool:
    """Whether a sum is a single step, which the corpus states outright."""
    is_sum = re.fullmatch(r"[\d\s+-]+", text)
    return bool(is_sum) and len(re.findall(r"\d+", text)) < 3

  def _move(self, value: int, rng: random.Random) -> tuple[str, int, int]:
    """A random operation that keeps the total in range: (op, number, result)."""
    numbers = range(0 if self.zero else 1, 10)
    moves = [("+", n, value + n) for n in numbers if value + n <= self.high]
    moves += [("-", n, value - n) for n in numbers if value - n >= self.low]
    return rng.choice(moves)

  def page(self, kind: str, problem: Problem, rng: random.Random) -> str:
    """A page about a problem: what stands after the prompt.

    Args:
      kind: `bare` (an answer without tags), `guess` (tags, no working), `working`, or
        `checked` (working whose steps are written again after "wait").
      problem: a sum.
      rng: of the page.
    """
    if kind in ("bare", "guess"):
      said = rng.randint(self.low, self.high)
      if kind == "bare":
        return str(said)
      return f"<think>I guess</think><answer>{said}</answer>"
    words = problem.problem.split()
    value, steps = int(words[0]), []
    for op, number in zip(words[1::2], words[2::2], strict=True):
      step, result = f"{value} {op} {number} = ", _apply(value, op, int(number))
      value = self._slip(result, rng) if rng.random() < self.slip else result
      steps.append(f"{step}{value}")
      if kind == "checked" and rng.random() < self.recheck:
        steps[-1] += f", wait {step}{result}"
        value = result
    return f"<think>{', '.join(steps)}</think><answer>{value}</answer>"

  def _slip(self, result: int, rng: random.Random) -> int:
    """A wrong result nearby; in range, unless the right one is far out of it."""
    near = [result + d for d in (-3, -2, -1, 1, 2, 3)]
    return rng.choice([n for n in near if self.low <= n <= self.high] or near)


def evaluate(text: str) -> int:
  """The value of a sum with + and -, from left to right.

  Raises:
    ValueError: `text` is not such a sum.
  """
  words = text.split()
  value = int(words[0])
  for op, number in zip(words[1::2], words[2::2], strict=True):
    value = _apply(value, op, int(number))
  return value


def _apply(left: int, op: str, right: int) -> int:
  if op not in ("+", "-"):
    raise ValueError(f"operator {op!r} is neither + nor -")
  return left + right if op == "+" else left - right
