"""What the host's rewards said before a kill is said again after it."""

import itertools

import numpy as np

from r1jax.data.problem import Problem
from r1jax.host_reward import HostReward
from r1jax.rewards.journal import KEPT, Journal
from r1jax.rewards.total import Breakdown

PROBLEMS = [Problem(str(i), ("1",)) for i in range(4)]


class Letters:
  def decode(self, ids):
    return "".join(chr(97 + int(i)) for i in ids)


class Moody:
  """A scorer that never says the same twice, as if by timeouts."""

  def __init__(self):
    self.weights = {"accuracy": 1.0}
    self.turn, self.asked = itertools.count(), 0

  def score(self, samples):
    self.asked += len(samples)
    said = [0.1 + 1 / (3 + next(self.turn)) for _ in samples]
    return [Breakdown(x, {"accuracy": x}, "timeout", f"{x} s") for x in said]


def host(folder, scorer, step):
  journal = Journal(folder)
  journal.resume(step)
  return HostReward(scorer, PROBLEMS, Letters(), journal)


def score(reward, ids, outputs):
  tokens = np.array(outputs, np.int32)
  shape = (len(ids), len(outputs) // len(ids), tokens.shape[1])
  return reward._on_host(shape, ids, tokens.reshape(-1))


ROWS = [[1, 2, 3], [4, 5, -1], [1, 2, 3], [7, -1, -1]]


def test_a_rollout_that_is_drawn_again_gets_the_same_to_the_last_bit(tmp_path):
  first = score(host(tmp_path, Moody(), 4), [0, 1], ROWS)
  scorer = Moody()
  next(scorer.turn)  # another mood than before
  again = host(tmp_path, scorer, 4)
  for x, y in zip(score(again, [0, 1], ROWS), first, strict=True):
    np.testing.assert_array_equal(x, y)
  assert scorer.asked == 0
  score(again, [0, 1], ROWS)  # the next time it is drawn, it is scored
  assert scorer.asked == len(ROWS)


def test_after_two_kills_too_and_on_to_what_was_never_scored(tmp_path):
  first = score(host(tmp_path, Moody(), 4), [0, 1], ROWS)
  score(host(tmp_path, Moody(), 4), [0, 1], ROWS)  # killed while it did it again
  scorer = Moody()
  third = host(tmp_path, scorer, 4)
  np.testing.assert_array_equal(score(third, [0, 1], ROWS)[0], first[0])
  score(third, [2, 3], ROWS)
  assert scorer.asked == len(ROWS)


def test_the_same_text_to_another_problem_is_another_sample(tmp_path):
  score(host(tmp_path, Moody(), 0), [0], ROWS[:1])
  scorer = Moody()
  score(host(tmp_path, scorer, 0), [1], ROWS[:1])
  assert scorer.asked == 1


def test_what_was_begun_ahead_is_remembered(tmp_path):
  reward = host(tmp_path, Moody(), 0)
  reward.ahead([0], [np.array([1, 2, 3])])
  first = score(reward, [0], ROWS[:1])
  scorer = Moody()
  next(scorer.turn)
  again = host(tmp_path, scorer, 0)
  again.ahead([0], [np.array([1, 2, 3])])
  np.testing.assert_array_equal(score(again, [0], ROWS[:1])[0], first[0])
  assert scorer.asked == 0


def test_steps_before_the_checkpoint_count_no_more(tmp_path):
  reward = host(tmp_path, Moody(), 0)
  score(reward, [0, 1], ROWS)
  reward.journal.begin(2)
  scorer = Moody()
  score(host(tmp_path, scorer, 2), [0, 1], ROWS)
  assert scorer.asked == len(ROWS)


def test_an_older_checkpoint_finds_what_followed_it(tmp_path):
  """As where the newest one is damaged."""
  reward = host(tmp_path, Moody(), 0)
  first = score(reward, [0, 1], ROWS)
  reward.journal.begin(2)
  second = score(reward, [2, 3], ROWS)
  again = host(tmp_path, Moody(), 0)
  np.testing.assert_array_equal(score(again, [0, 1], ROWS)[0], first[0])
  again.journal.begin(2)
  np.testing.assert_array_equal(score(again, [2, 3], ROWS)[0], second[0])


def test_half_a_line_hides_nothing_else(tmp_path):
  score(host(tmp_path, Moody(), 0), [0, 1], ROWS)
  (path,) = tmp_path.iterdir()
  path.write_text(path.read_text()[:-30])
  scorer = Moody()
  score(host(tmp_path, scorer, 0), [0, 1], ROWS)
  assert scorer.asked == 1
  scorer = Moody()
  score(host(tmp_path, scorer, 0), [0, 1], ROWS)
  assert scorer.asked == 0


def test_as_many_files_stay_as_there_are_checkpoints_to_go_back_to(tmp_path):
  journal, other = Journal(tmp_path), Journal(tmp_path, process=1)
  other.resume(0)
  for step in range(0, 40, 2):
    journal.begin(step)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"0-1.jsonl", *(f"{step}-0.jsonl" for step in (32, 34, 36, 38))}
  assert KEPT == 4
