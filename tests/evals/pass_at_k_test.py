"""pass@1, pass@k and cons@N on fixtures worked out by hand."""

import itertools

import numpy as np
import pytest

from r1jax.evals.pass_at_k import (
  classes,
  cons_at_n,
  consensus,
  meaning,
  pass_at_1,
  pass_at_k,
)


def test_pass_at_1_is_the_mean_over_samples_and_problems():
  correct = np.array([[True, False, False, False], [True, True, True, False]])
  assert pass_at_1(correct) == 0.5


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_equals_every_choice_of_k_samples(n):
  rng = np.random.default_rng(n)
  correct = rng.random((5, n)) < 0.4
  for k in range(1, n + 1):
    hits = [
      np.mean([any(row[list(c)]) for c in itertools.combinations(range(n), k)])
      for row in correct
    ]
    np.testing.assert_allclose(pass_at_k(correct, k), np.mean(hits), atol=1e-12)


def test_pass_at_k_lies_between_its_ends():
  correct = np.array([[True, False, False], [False, False, False]])
  assert pass_at_k(correct, 1) == pytest.approx(pass_at_1(correct))
  assert pass_at_k(correct, 3) == pytest.approx(0.5)
  assert pass_at_k(np.zeros((2, 4), bool), 4) == 0.0
  assert pass_at_k(np.ones((2, 4), bool), 1) == 1.0


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_refuses_k_outside_the_samples(k):
  with pytest.raises(ValueError, match=f"pass@{k}.*4"):
    pass_at_k(np.zeros((2, 4), bool), k)


def votes_of(*rows):
  meant = [[None if a is None else meaning(a) for a in row] for row in rows]
  return np.array([classes(row) for row in meant])


def vote(answers, right):
  return cons_at_n(votes_of(answers), np.array([[a in right for a in answers]]))


def test_answers_that_cannot_be_read_have_no_vote():
  """Six unreadable, five right, five wrong that all differ: the right one wins."""
  answers = [None] * 6 + ["7"] * 5 + ["1", "2", "3", "4", "5"]
  assert vote(answers, {"7"}) == 1.0


def test_a_tie_is_shared_whatever_the_order():
  answers = ["7"] * 5 + ["8"] * 5
  assert vote(answers, {"7"}) == 0.5
  assert vote(answers[::-1], {"7"}) == 0.5
  assert vote(["7", "8", "9"], {"7"}) == pytest.approx(1 / 3)


def test_equal_numbers_vote_together():
  answers = ["1/2", "0.5", "2/4", "3", "3"]
  assert vote(answers, {"1/2", "0.5", "2/4"}) == 1.0
  assert vote(["7", "07", " 7.0", "8", "8"], {"7", "07", " 7.0"}) == 1.0


@pytest.mark.parametrize(
  "answers, right, share",
  [
    (["7", "7", "8"], {"7"}, 1.0),
    (["7", "8", "8"], {"7"}, 0.0),
    ([None, None, None], {"7"}, 0.0),
    ([None, None, "7"], {"7"}, 1.0),
    ([None, None, "8"], {"7"}, 0.0),
    (["x", "y", "x"], {"x"}, 1.0),
    (["+-", "+-", "*+", "*+"], {"+-", "*+"}, 1.0),  # two accepted answers tie
  ],
)
def test_the_majority_decides(answers, right, share):
  assert vote(answers, right) == share


def test_cons_is_averaged_over_problems():
  answers = [["7", "7"], ["8", "8"], ["7", "8"]]
  correct = np.array([[a == "7" for a in row] for row in answers])
  found = cons_at_n(votes_of(*answers), correct)
  assert found == pytest.approx((1 + 0 + 0.5) / 3)


SAME = [
  ("1/2", "0.5", "50%"),
  ("07", "7", " 7.0 "),
  ("-0", "0"),
  (r"(3,\frac{\pi}{2})", r"\left(3, \frac{\pi}{2}\right)"),
  ("1,2", "1, 2", r"\{2, 1\}"),
  ("Yes", "yes", r"\text{Yes}"),
  ("(C)", "C", " C "),
  ("x+1", "x + 1", " x+ 1"),
  ("[1,2)", r"1 \le x < 2"),
  ("x",),
  ("X",),
  ("8",),
  ("1/0",),
  ("(1,2)", "(1, 2)"),
  ("(2,1)",),
  ("1 2x",),
  ("12x", "12 x"),
  ("No",),
  ("(1", " (1"),  # cannot be read
]


def test_answers_that_say_the_same_are_one_class_and_no_others():
  flat = [(i, answer) for i, group in enumerate(SAME) for answer in group]
  for (i, a), (j, b) in itertools.product(flat, flat):
    assert (meaning(a) == meaning(b)) == (i == j), (a, b)


def test_right_meanings_are_one_class():
  assert classes(["a", "b", None, "c", "a"]) == [0, 1, -1, 2, 0]
  assert classes(["a", "b", None, "c", "a"], {"b", "a"}) == [0, 0, -1, 1, 0]


def test_a_consensus_of_many_is_that_of_each():
  rng = np.random.default_rng(0)
  votes, correct = rng.integers(-1, 4, (50, 6)), rng.random((50, 6)) < 0.3
  one_by_one = [consensus(*pair) for pair in zip(votes, correct, strict=True)]
  np.testing.assert_array_equal(consensus(votes, correct), one_by_one)
