"""The default task: chained sums such as `4 + 7 - 2 + 5`, worked from left to right.

A tiny policy cannot see the answer at a glance, but it can learn single steps, and a
step that is written down again after "wait" is right more often than a first attempt.
"""

import dataclasses
import random

from r1jax.data.problems import Problem


@dataclasses.dataclass(frozen=True)
class Chain:
  """Sums of `terms` numbers from 1 to `high`; both set the difficulty."""

  terms: int = 4
  high: int = 9
  slip: float = 0.25  # share of first attempts that a page gets wrong
  recheck: float = 0.9  # share of steps that a checked page writes again, right
  symbols: tuple[str, ...] = (" + ", " - ", " = ", ", ", ", wait ", "I guess")

  def problem(self, rng: random.Random) -> Problem:
    numbers = [str(rng.randint(1, self.high)) for _ in range(self.terms)]
    text = numbers[0] + "".join(f" {rng.choice('+-')} {n}" for n in numbers[1:])
    return Problem(text, (str(evaluate(text)),))

  def fact(self, rng: random.Random) -> str:
    """One true step, over the values that running totals take."""
    reach = self.high * (self.terms - 1)
    left = max(-reach, min(reach, round(rng.gauss(self.high / 2, reach / 2.2))))
    return _step(left, rng.choice("+-"), rng.randint(1, self.high))[0]

  def page(self, kind: str, problem: Problem, rng: random.Random) -> str:
    """A page about a problem: what stands after the prompt.

    Args:
      kind: `bare` (an answer without tags), `guess` (tags, no working), `working`, or
        `checked` (working whose steps are written again after "wait").
      problem: a sum.
      rng: of the page.
    """
    total = evaluate(problem.problem)
    if kind in ("bare", "guess"):
      said = total if rng.random() < 0.05 else self._glance(rng)
      if kind == "bare":
        return str(said)
      return f"<think>I guess</think><answer>{said}</answer>"
    words = problem.problem.split(" ")
    value, steps = int(words[0]), []
    for op, number in zip(words[1::2], words[2::2]):
      right, result = _step(value, op, int(number))
      slipped = result + rng.choice((-3, -2, -1, 1, 2, 3))
      value = slipped if rng.random() < self.slip else result
      steps.append(right.rpartition(" ")[0] + f" {value}")
      if kind == "checked" and rng.random() < self.recheck:
        steps[-1] += f", wait {right}"
        value = result
    return f"<think>{', '.join(steps)}</think><answer>{value}</answer>"

  def _glance(self, rng: random.Random) -> int:
    return round(rng.gauss(self.high / 2, self.high / 1.6 * self.terms**0.5))


def evaluate(text: str) -> int:
  """The value of a sum with + and -, from left to right.

  Raises:
    ValueError: `text` is not such a sum.
  """
  words = text.split()
  value = int(words[0])
  for op, number in zip(words[1::2], words[2::2], strict=True):
    value = _step(value, op, int(number))[1]
  return value


def _step(left: int, op: str, right: int) -> tuple[str, int]:
  if op not in "+-":
    raise ValueError(f"operator {op!r} is neither + nor -")
  result = left + right if op == "+" else left - right
  return f"{left} {op} {right} = {result}", result
