"""Accuracy against votes and against tokens, on fixtures worked out by hand."""

import itertools

import numpy as np
import pytest

from r1jax.evals import scaling
from r1jax.evals.pass_at_k import cons_at_n, pass_at_1


def random_votes(problems=6, n=5):
  rng = np.random.default_rng(0)
  said = rng.integers(0, 3, (problems, n))
  return said, said == 0


def test_one_vote_is_pass_at_1_and_all_are_cons_at_n():
  votes, correct = random_votes()
  rows = scaling.majority(votes, correct)
  assert [row["samples"] for row in rows] == [1, 2, 4, 5]
  assert rows[0]["value"] == pytest.approx(pass_at_1(correct))
  assert rows[-1]["value"] == pytest.approx(cons_at_n(votes, correct))
  assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_votes_in_between_are_means_over_subsets():
  votes, correct = random_votes()
  exact = np.mean(
    [
      cons_at_n(votes[:, list(c)], correct[:, list(c)])
      for c in itertools.combinations(range(5), 4)
    ]
  )
  assert scaling.majority(votes, correct)[2]["value"] == pytest.approx(exact, abs=0.03)


def test_within_a_budget_counts_what_has_ended_and_is_right():
  lengths = np.array([[10, 40], [20, 40]])
  correct = np.array([[True, False], [True, True]])
  rows = scaling.budgets(lengths, correct, points=3)
  assert [(row["tokens"], row["value"]) for row in rows] == [
    (10, 0.25),
    (20, 0.5),
    (40, 0.75),
  ]


def test_the_longest_budget_is_pass_at_1():
  rng = np.random.default_rng(1)
  lengths, correct = rng.integers(1, 99, (7, 3)), rng.random((7, 3)) < 0.5
  assert scaling.budgets(lengths, correct)[-1]["value"] == pytest.approx(correct.mean())


def test_a_picture_is_drawn_also_without_votes(tmp_path):
  within = scaling.budgets(np.array([[3]]), np.array([[True]]))
  scaling.plot(tmp_path / "a.png", [], within, "title")
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
