"""Chained sums: problems in range, pages that read as they should, rechecks that are
right."""

import random
import re

import pytest

from r1jax.data.chain import Chain, evaluate
from r1jax.data.problem import Problem
from r1jax.errors import UserError

STEP = re.compile(r"(wait )?(-?\d+) ([+-]) (\d+) = (-?\d+)")
PAGE = re.compile(r"<think>(.*)</think><answer>(-?\d+)</answer>", re.DOTALL)


def running_totals(text):
  words = text.split()
  return [evaluate(" ".join(words[: i + 1])) for i in range(0, len(words), 2)]


def made(task, count=300, seed=0):
  rng = random.Random(seed)
  return [task.problem(rng) for _ in range(count)]


@pytest.mark.parametrize(
  "task",
  [
    Chain(),
    Chain(min_terms=2, max_terms=2),
    Chain(min_terms=5, max_terms=7, high=20),
    Chain(low=-5, high=12, zero=True),
  ],
)
def test_problems_stay_in_range_and_their_answers_are_right(task):
  for p in made(task):
    totals = running_totals(p.problem)
    assert task.min_terms <= len(totals) <= task.max_terms
    assert all(task.low <= t <= task.high for t in totals)
    least = 0 if task.zero else 1
    assert all(least <= int(n) <= 9 for n in p.problem.split()[0::2])
    assert p.answers == (str(eval(p.problem)),)


@pytest.mark.parametrize("task", [Chain(), Chain(low=-5, high=12)])
def test_facts_are_true_and_in_range(task):
  rng = random.Random(0)
  for _ in range(200):
    _, left, op, right, result = STEP.fullmatch(task.fact(rng)).groups()
    assert int(result) == evaluate(f"{left} {op} {right}")
    assert task.low <= int(left) <= task.high and task.low <= int(result) <= task.high


def pages(kind, task=None, count=300):
  task, rng = task or Chain(), random.Random(1)
  return [(p, task.page(kind, p, rng)) for p in made(task, count)]


def answers_right(rows):
  said = [PAGE.fullmatch(page).group(2) for _, page in rows]
  return sum(s in p.answers for s, (p, _) in zip(said, rows, strict=True)) / len(rows)


def test_checked_pages_are_mostly_right_and_more_often_than_the_others():
  checked, working, guess = (
    answers_right(pages(k)) for k in ("checked", "working", "guess")
  )
  assert checked > 0.85
  assert guess < 0.25
  assert guess < working < checked


def test_without_slips_every_working_is_right():
  task = Chain(slip=0.0)
  assert answers_right(pages("working", task)) == 1.0
  assert answers_right(pages("checked", task)) == 1.0


def test_with_every_step_rechecked_every_page_is_right():
  assert answers_right(pages("checked", Chain(slip=1.0, recheck=1.0))) == 1.0


@pytest.mark.parametrize("kind", ["working", "checked"])
def test_a_working_follows_the_problem_and_its_answer_is_its_last_result(kind):
  for p, page in pages(kind):
    thought, answer = PAGE.fullmatch(page).groups()
    words = p.problem.split()
    value, at, last = words[0], 1, None
    for part in thought.split(", "):
      wait, left, op, right, result = STEP.fullmatch(part).groups()
      if wait:  # the same step again
        assert (left, op, right) == last
      else:
        assert (left, op, right) == (value, words[at], words[at + 1])
        last, at = (left, op, right), at + 2
      value = result
    assert at == len(words)
    assert answer == value


def test_every_step_after_wait_is_right_given_its_left_side():
  found = 0
  for _, page in pages("checked", Chain(slip=0.6)):
    for wait, left, op, right, result in STEP.findall(page):
      if wait:
        found += 1
        assert int(result) == evaluate(f"{left} {op} {right}")
  assert found > 500


def test_first_attempts_slip_about_as_often_as_said():
  steps = [s for _, page in pages("working") for s in STEP.findall(page)]
  slips = sum(int(s[4]) != evaluate(" ".join(s[1:4])) for s in steps)
  assert 0.2 < slips / len(steps) < 0.3
  assert not [page for _, page in pages("working") if "wait" in page]


def test_guesses_show_no_working():
  for _, page in pages("guess"):
    assert re.fullmatch(r"<think>I guess</think><answer>\d</answer>", page)
  for _, page in pages("bare"):
    assert re.fullmatch(r"\d", page)


def test_difficulty_knobs_change_the_problems():
  base, more = made(Chain()), made(Chain(min_terms=3, max_terms=6))
  wide = made(Chain(low=-9, high=40, zero=True))
  assert {len(p.problem.split()) for p in base} == {7}
  assert {len(p.problem.split()) for p in more} == {5, 7, 9, 11}
  assert not [p for p in base if "0" in p.problem]
  assert [p for p in wide if "0" in p.problem.split()]
  values = [int(p.answers[0]) for p in wide]
  assert min(values) < 0 and max(values) > 9


def test_a_generator_is_a_function_of_its_rng():
  assert made(Chain(), seed=5) == made(Chain(), seed=5) != made(Chain(), seed=6)


@pytest.mark.parametrize(
  "options", [{"min_terms": 1}, {"max_terms": 3}, {"low": 2}, {"high": 8}]
)
def test_a_chain_that_cannot_start_is_refused(options):
  ((key, value),) = options.items()
  with pytest.raises(UserError, match=rf"config\.chain.*{key}={value}.*needed"):
    Chain(**options)


@pytest.mark.parametrize("text", ["4 * 2", "4 +", "x + 1", "4 plus 2"])
def test_evaluate_refuses_what_is_no_sum(text):
  with pytest.raises(ValueError):
    evaluate(text)


def test_pages_fit_a_problem_from_a_file_too():
  page = Chain().page("checked", Problem("9 + 9 + 9", ("27",)), random.Random(0))
  assert PAGE.fullmatch(page)
