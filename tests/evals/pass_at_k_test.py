"""pass@1, pass@k and cons@N on fixtures worked out by hand."""

import itertools

import numpy as np
import pytest

from r1jax.evals.pass_at_k import cons_at_n, equivalence_class, pass_at_1, pass_at_k


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


def vote(answers, right):
  return cons_at_n([answers], np.array([[a in right for a in answers]]))


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
  assert cons_at_n(answers, correct) == pytest.approx((1 + 0 + 0.5) / 3)


@pytest.mark.parametrize(
  "a, b, same",
  [
    ("1/2", "0.5", True),
    ("07", "7", True),
    (" 7", "7 ", True),
    ("-0", "0", True),
    ("1/0", "0", False),
    ("x", " x ", True),
    ("x", "X", False),
    ("7", "8", False),
  ],
)
def test_equivalence_is_of_numbers_and_else_of_text(a, b, same):
  assert (equivalence_class(a) == equivalence_class(b)) == same
