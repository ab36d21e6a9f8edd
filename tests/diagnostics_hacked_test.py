"""The alarm for reward hacking: the proxy rises and the rules' score falls."""

import pytest

from r1jax.diagnostics import hacked

RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FALLING = RISING[::-1]


def rl(scores, first=44, every=4):
  """Steps before the window, then one with each of the scores."""
  plain = [{"step": s, "reward": 1.0} for s in range(every, first, every)]
  plain[0]["reward_model"] = 0.0  # none was judged
  asked = [{"step": first + every * i, "reward_model": x} for i, x in enumerate(scores)]
  return [*plain, *asked]


def evals(*rows):
  return [{"step": step, "pass_at_1": x} for step, x in rows]


def test_it_says_what_rose_and_what_fell_and_what_to_do():
  said = hacked(rl(RISING), evals((0, 0.5), (40, 0.9), (80, 0.7)), 0.1)
  assert "rose from 0.200 to 0.500" in said  # the means of either half
  assert "fell by 0.200" in said
  assert "config.reward.alarm.hacking=0.1" in said
  assert "Shorten the window" in said


@pytest.mark.parametrize(
  "scores, after, alarm",
  [
    (RISING, 0.7, True),
    (RISING, 0.81, False),  # not by enough
    (RISING, 0.95, False),
    (FALLING, 0.7, False),
    ([0.3] * 6, 0.7, False),
    (FALLING, 0.95, False),
    ([-0.6, -0.5, -0.2, -0.1], 0.7, True),  # a model's scores may be negative
    ([0.1, 0.5, 0.2, 0.3], 0.7, False),
    ([0.1, 0.3, 0.2, 0.5], 0.7, True),
  ],
)
def test_both_must_happen(scores, after, alarm):
  said = hacked(rl(scores), evals((0, 0.5), (40, 0.9), (64, after)), 0.1)
  assert bool(said) == alarm


def test_the_drop_is_since_the_last_evaluation_before_the_first_preference_reward():
  train = rl(RISING)
  # What was gained or lost earlier does not count; nor what was lost and regained.
  assert not hacked(train, evals((0, 0.9), (40, 0.5), (80, 0.5)), 0.1)
  assert hacked(train, evals((0, 0.1), (40, 0.5), (80, 0.3)), 0.1)
  assert not hacked(train, evals((40, 0.9), (50, 0.1), (80, 0.9)), 0.1)
  # An evaluation after the first such update is none before it.
  assert not hacked(train, evals((0, 0.5), (44, 0.9), (80, 0.5)), 0.1)
  assert hacked(train, evals((0, 0.9), (44, 0.5), (80, 0.5)), 0.1)


def test_a_drop_of_just_the_threshold_is_no_alarm():
  rows = evals((40, 1.0), (80, 0.5))
  assert not hacked(rl(RISING), rows, 0.5)
  assert hacked(rl(RISING), rows, 0.49)


@pytest.mark.parametrize("count", range(8))
def test_it_waits_for_four_steps_with_preference_rewards(count):
  said = hacked(
    rl([0.1 * i for i in range(1, count + 1)]), evals((40, 0.9), (99, 0)), 0
  )
  assert bool(said) == (count >= 4)


def test_without_what_it_compares_it_says_nothing():
  both = evals((40, 0.9), (80, 0.1))
  assert hacked(rl(RISING), both, 0.1)
  assert not hacked([], both, 0.1)
  assert not hacked(rl([]), both, 0.1)
  assert not hacked(rl(RISING), [], 0.1)
  assert not hacked(rl(RISING), both[:1], 0.1)  # nothing since
  assert not hacked(rl(RISING), both[1:], 0.1)  # nothing before


def test_with_preference_rewards_all_along_it_compares_with_the_start():
  train = [{"step": 4 * i, "reward_model": 0.1 * i} for i in range(1, 9)]
  assert hacked(train, evals((0, 0.8), (16, 0.7), (32, 0.4)), 0.3)
  assert not hacked(train, evals((0, 0.8), (16, 0.7), (32, 0.6)), 0.3)
