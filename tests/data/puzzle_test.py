"""Operator puzzles: every solution is found, and a page that says `is` is right."""

import itertools
import random
import re

import pytest

from r1jax.data.puzzle import OPERATORS, Puzzle, solutions, work_out
from r1jax.errors import UserError


def value_by_eval(digits, operators):
  """The last digit, by Python's own arithmetic with brackets from left to right."""
  text = str(digits[0])
  for op, digit in zip(operators, digits[1:], strict=True):
    text = f"({text} {op} {digit}) % 10"
  return eval(text)


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_solutions_equal_brute_force(numbers):
  rng = random.Random(numbers)
  for _ in range(60):
    digits = [rng.randint(0, 9) for _ in range(numbers)]
    target = rng.randint(0, 9)
    want = {
      "".join(ops)
      for ops in itertools.product(OPERATORS, repeat=numbers - 1)
      if value_by_eval(digits, ops) == target
    }
    found = solutions(digits, target)
    assert set(found) == want and len(found) == len(want)


def test_work_out_gives_the_last_digit_after_each_step():
  assert work_out([7, 5, 4], "+*") == [2, 8]
  assert work_out([3, 5], "-") == [8]  # -2 modulo 10
  with pytest.raises(ValueError):
    work_out([1, 2, 3], "+")


@pytest.mark.parametrize("numbers", [3, 4])
def test_problems_have_a_solution_and_accept_all_of_them(numbers):
  rng = random.Random(0)
  for _ in range(100):
    p = Puzzle(numbers=numbers).problem(rng)
    left, target = p.problem.split(" = ")
    digits = [int(d) for d in left.split(" ? ")]
    assert len(digits) == numbers and 0 <= int(target) <= 9
    assert p.answers and p.answers == solutions(digits, int(target))


def test_facts_are_true():
  rng = random.Random(0)
  kinds = set()
  for _ in range(300):
    words = Puzzle().fact(rng).split()
    kinds.add(words[1])
    if words[1] == "is":
      assert words[0] == words[2]
    elif words[1] == "not":
      assert words[0] != words[2]
    else:
      assert eval(" ".join(words[:3])) % 10 == int(words[4])
  assert kinds == {"is", "not", *OPERATORS}


def pages(kind, **options):
  task, rng = Puzzle(**options), random.Random(2)
  return [(p, task.page(kind, p, rng)) for p in (task.problem(rng) for _ in range(200))]


PAGE = re.compile(r"<think>(.*)</think><answer>([-+*]+)</answer>")


@pytest.mark.parametrize("kind", ["working", "checked"])
@pytest.mark.parametrize("numbers", [3, 4])
def test_a_page_that_says_is_answers_right_and_one_that_says_not_does_not(
  kind, numbers
):
  seen = set()
  for p, page in pages(kind, numbers=numbers):
    thought, answer = PAGE.fullmatch(page).groups()
    *before, last = thought.split(", wait ")
    assert all(" not " in line and " is " not in line for line in before)
    seen.add(" is " in last)
    assert (" is " in last) == (answer in p.answers)
  assert seen == {True, False}


def test_every_line_of_a_page_is_worked_out_right():
  for p, page in pages("checked"):
    left, target = p.problem.split(" = ")
    digits = left.split(" ? ")
    for line in PAGE.fullmatch(page).group(1).split(", wait "):
      *steps, last = line.split(", ")
      step, word, goal = re.fullmatch(r"(.*) (is|not) (\d)", last).groups()
      value = digits[0]
      for text, digit in zip([*steps, step], digits[1:], strict=True):
        a, op, b, equals, result = text.split()
        assert (a, b, equals) == (value, digit, "=")
        assert int(result) == eval(f"{a} {op} {b}") % 10
        value = result
      assert goal == target
      assert (word == "is") == (value == target)


def test_a_page_never_tries_the_same_operators_twice():
  for _, page in pages("checked", retry=1.0):
    lines = PAGE.fullmatch(page).group(1).split(", wait ")
    assert len(set(lines)) == len(lines)


def test_a_patient_search_always_finds_and_a_longer_one_is_better():
  def rate(**options):
    rows = pages("checked", **options)
    return sum(PAGE.fullmatch(page).group(2) in p.answers for p, page in rows) / 200

  assert rate(retry=1.0) == 1.0
  assert rate(retry=0.0) < rate(retry=0.7) < 1.0


def test_working_pages_make_one_try_and_guesses_none():
  assert not [page for _, page in pages("working") if "wait" in page]
  for _, page in pages("guess"):
    assert re.fullmatch(r"<think>I guess</think><answer>[-+*]{2}</answer>", page)
  for _, page in pages("bare"):
    assert re.fullmatch(r"[-+*]{2}", page)


@pytest.mark.parametrize("numbers", [1, 5])
def test_other_sizes_are_refused(numbers):
  with pytest.raises(UserError, match=rf"config\.puzzle\.numbers={numbers}"):
    Puzzle(numbers=numbers)
