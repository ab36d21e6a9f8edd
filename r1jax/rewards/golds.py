"""What can be said of a problem's golds and tests before anything is scored."""

import ast
from collections.abc import Callable
import re

from r1jax.data.problem import Problem, Tests
from r1jax.rewards import choice, instructions, reading


def gold_error(problem: Problem) -> str:
  """What is wrong with a problem's golds or tests, or ""."""
  if problem.kind == "code":
    return tests_error(problem.tests)
  if problem.kind == "instructions":
    return _instructions_error(problem.answers)
  for gold in problem.answers:
    if problem.kind == "choice" and choice.letter(gold) is None:
      return f"the gold {gold[:60]!r} is not a letter"
    if problem.kind == "answer" and reading.parse(gold) is None:
      return f"the gold {gold[:60]!r} cannot be read"
  return ""


def gold_note(problem: Problem, is_expression: Callable[[str], bool]) -> str:
  """What is odd about a problem's golds, or "".

  Args:
    problem: without an error.
    is_expression: whether algebra can read a text in LaTeX.
  """
  if problem.kind != "answer":
    return ""
  for gold in problem.answers:
    meant = reading.parse(gold)
    asked = meant.kind == "expression" and re.search(r"\w", meant.text)
    if asked and not is_expression(meant.text):
      return f"the gold {gold[:60]!r} is not an expression"
  return ""


def tests_error(tests: Tests) -> str:
  """What can be seen to be wrong with tests before they run, or ""."""
  if tests.style != "check":
    return ""
  for name, source in (("prompt", tests.preamble), ("test", tests.check)):
    try:
      ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
      return f"its {name} is not Python ({error})"
  return ""


def _instructions_error(answers: tuple[str, ...]) -> str:
  if len(answers) != 1:
    return f"instructions are one JSON list, not {len(answers)}"
  try:
    instructions.read_spec(answers[0])
  except ValueError as error:
    return str(error)
  return ""


def place(problem: Problem) -> str:
  """Where a problem stands: its file and line, or its first words."""
  return problem.where or f"the problem {problem.problem[:60]!r}"
