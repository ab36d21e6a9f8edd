"""Levels of a cache: every token has one place, the budget holds, and the least one
that an error names works."""

import re

import numpy as np
import pytest

from r1jax import levels
from r1jax.errors import UserError


def sizes(n=400, seed=0):
  """(rows, tokens, first) at random, and where a last level is short."""
  rng = np.random.default_rng(seed)
  some = [(4, 66, 32), (8, 33, 32), (3, 129, 32), (5, 4200, 32), (1, 1, 32), (2, 9, 4)]
  some += [(7, 1024, 512), (6, 24, 4), (1, 10_000, 1)]
  for _ in range(n):
    tokens = int(np.exp(rng.uniform(0, 10)))
    some.append((int(rng.integers(1, 300)), tokens, int(rng.choice([1, 3, 32, 128]))))
  return some


def tokens_of(plan):
  return sum(lv.size * lv.seats for lv in plan)


def least_of(rows, tokens, first):
  """What the error for a budget of one token says."""
  with pytest.raises(UserError, match="cache_tokens=1 is too small") as error:
    levels.plan(rows, tokens, budget=1, first=first)
  return int(re.search(r"need (\d+) at least", str(error.value)).group(1))


def check(plan, rows, tokens):
  """Tokens 0 .. T - 1 lie in one level each, and rows climb through fewer seats."""
  places = [p for lv in plan for p in range(lv.start, lv.start + lv.size)]
  assert places == list(range(tokens))
  seats = [lv.seats for lv in plan]
  assert seats[0] == rows and min(seats) >= 1
  assert seats == sorted(seats, reverse=True)


def test_levels_cover_every_token_once_and_without_a_budget_seat_all():
  for rows, tokens, first in sizes():
    plan = levels.plan(rows, tokens, first=first)
    check(plan, rows, tokens)
    assert {lv.seats for lv in plan} == {rows}
    # Each level but the last is as long as all before it.
    assert plan[0].size == min(first, tokens)
    assert all(lv.size == lv.start for lv in plan[1:-1])
    assert all(lv.size <= lv.start for lv in plan[1:])


def test_seats_stay_within_the_budget_whatever_it_is():
  rng = np.random.default_rng(1)
  bounded = 0
  for rows, tokens, first in sizes():
    if rows * tokens == 1:
      continue  # the least budget is 1, and no budget is too small
    least = least_of(rows, tokens, first)
    for budget in (least, *rng.integers(least, rows * tokens + 1, 5)):
      plan = levels.plan(rows, tokens, budget=int(budget), first=first)
      check(plan, rows, tokens)
      assert tokens_of(plan) <= budget
      bounded += plan[-1].seats < rows
  assert bounded > 500


def test_the_least_budget_works_and_one_token_less_does_not():
  for rows, tokens, first in sizes():
    if rows * tokens == 1:
      continue
    least = least_of(rows, tokens, first)
    # Every row's first level, and the rest of one row.
    assert least == rows * min(first, tokens) + max(0, tokens - first)
    plan = levels.plan(rows, tokens, budget=least, first=first)
    assert tokens_of(plan) == least
    if least > 1:
      with pytest.raises(UserError, match=f"cache_tokens={least - 1} .* {least} at"):
        levels.plan(rows, tokens, budget=least - 1, first=first)


def test_a_budget_for_every_token_of_every_row_seats_all():
  """So says the error: with it no row can run short."""
  for rows, tokens, first in sizes():
    for more in (0, 1, 10_000):
      plan = levels.plan(rows, tokens, budget=rows * tokens + more, first=first)
      assert {lv.seats for lv in plan} == {rows}, (rows, tokens, first)


def test_a_larger_budget_is_used():
  """What is left over would not seat a row more at the level that has fewest."""
  rng = np.random.default_rng(2)
  for rows, tokens, first in sizes(100, seed=3):
    if rows * tokens == 1:
      continue
    least = least_of(rows, tokens, first)
    budget = int(rng.integers(least, rows * tokens + 1))
    plan = levels.plan(rows, tokens, budget=budget, first=first)
    left = budget - tokens_of(plan)
    last = plan[-1]
    assert last.seats == plan[-2].seats if left >= last.size else True


def test_an_error_says_what_came_what_is_needed_and_what_to_do():
  with pytest.raises(UserError) as error:
    levels.plan(6, 24, budget=40, first=4)
  said = str(error.value)
  for part in ("cache_tokens=40", "6 slots", "max_tokens=24", " 44 ", " 144 ", "0 for"):
    assert part in said, part
