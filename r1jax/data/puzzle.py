"""The second task: find the operators of `3 ? 5 ? 2 = 7`, by trying.

Values are worked from left to right and only their last digit counts. There are nine
ways to fill two gaps and no short cut, so a longer search is a better one: a response
proposes, works out, compares, and after "wait" proposes again.
"""

import dataclasses
import itertools
import random

from r1jax.data.problem import Problem
from r1jax.errors import UserError

OPERATORS = "+-*"


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """`numbers` digits with a gap between each two; 3 or 4 set the difficulty."""

  numbers: int = 3
  retry: float = 0.7  # chance that a page goes on after a try that failed
  symbols: tuple[str, ...] = (
    *(" + ", " - ", " * ", " = ", " ? ", ", ", ", wait "),
    *(" is ", " not ", "I guess"),
  )

  def __post_init__(self):
    if self.numbers not in (3, 4):
      raise UserError(f"config.puzzle.numbers={self.numbers} must be 3 or 4.")

  def problem(self, rng: random.Random) -> Problem:
    digits = [rng.randint(1, 9) for _ in range(self.numbers)]
    target = work_out(digits, self._try(rng))[-1]
    text = " ? ".join(map(str, digits)) + f" = {target}"
    return Problem(text, solutions(digits, target))

  def identity(self, problem: Problem) -> str:
    return problem.problem

  def fact(self, rng: random.Random) -> str:
    """One true step, or one true comparison."""
    a, b = rng.randint(0, 9), rng.randint(1, 9)
    if rng.random() < 0.4:
      b = a if rng.random() < 0.4 else rng.choice([d for d in range(10) if d != a])
      return f"{a} is {b}" if a == b else f"{a} not {b}"
    op = rng.choice(OPERATORS)
    return f"{a} {op} {b} = {work_out([a, b], op)[-1]}"

  def is_fact(self, text: str) -> bool:
    """Whether a puzzle is a single step, which the corpus states outright."""
    return set(text) <= set("0123456789 ?=-") and text.count("?") < 2

  def page(self, kind: str, problem: Problem, rng: random.Random) -> str:
    """What stands after a prompt.

    Args:
      kind: `bare` or `guess` (operators at random, without or with tags), `working`
        (one try, right or not), `checked` (tries until one fits or it gives up).
      problem: a puzzle.
      rng: of the page.
    """
    left, _, goal = problem.problem.partition(" = ")
    digits, target = [int(d) for d in left.split(" ? ")], int(goal)
    tries = ["".join(t) for t in itertools.product(OPERATORS, repeat=self.numbers - 1)]
    rng.shuffle(tries)
    if kind == "bare":
      return tries[0]
    if kind == "guess":
      return f"<think>I guess</think><answer>{tries[0]}</answer>"
    lines = []
    for operators in tries:
      values, steps, value = work_out(digits, operators), [], digits[0]
      for op, digit, result in zip(operators, digits[1:], values, strict=True):
        steps.append(f"{value} {op} {digit} = {result}")
        value = result
      found = value == target
      lines.append(", ".join(steps) + (" is " if found else " not ") + str(target))
      if found or kind == "working" or rng.random() > self.retry:
        break
    return f"<think>{', wait '.join(lines)}</think><answer>{operators}</answer>"

  def _try(self, rng: random.Random) -> str:
    return "".join(rng.choice(OPERATORS) for _ in range(self.numbers - 1))


def work_out(digits: list[int], operators: str) -> list[int]:
  """The last digit after each operation, from left to right."""
  values, value = [], digits[0]
  for op, digit in zip(operators, digits[1:], strict=True):
    value = {"+": value + digit, "-": value - digit, "*": value * digit}[op] % 10
    values.append(value)
  return values


def solutions(digits: list[int], target: int) -> tuple[str, ...]:
  """Every string of operators that ends in `target`."""
  tries = itertools.product(OPERATORS, repeat=len(digits) - 1)
  return tuple("".join(t) for t in tries if work_out(digits, "".join(t))[-1] == target)
