"""Samples are read as text: reflection words are counted and figures summed up."""

import numpy as np
import pytest

from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.evals.generate import (
  Samples,
  ballots,
  mark,
  reflections,
  summarise,
  texts_of,
)
from r1jax.rollout import Rollout


@pytest.mark.parametrize(
  "text, count",
  [
    ("", 0),
    ("4 + 7 = 1, wait 4 + 7 = 2", 1),
    ("Wait, wait. WAIT!", 3),
    ("waiting for awaited waiters", 0),
    ("I verify and check; however this is wrong, but retry", 6),
    ("mistake error evaluate", 3),
    ("checked errors rewrong", 0),
    ("<think>wait</think>", 1),
    ("no,wait;yes", 1),
  ],
)
def test_reflection_words_are_counted_as_whole_words(text, count):
  assert reflections(text) == count


def test_a_rollout_becomes_text_up_to_its_mask():
  tokenizer = Tokenizer.train(["one two three 12"] * 9, vocab=300)
  said = ["one 1", "two 22"]
  ids = [[*tokenizer.encode(s), tokenizer.eos_id] for s in said]
  width = max(map(len, ids)) + 2
  tokens = np.full((1, 2, width), tokenizer.id("<think>"), np.int32)  # beyond the mask
  for i, row in enumerate(ids):
    tokens[0, i, : len(row)] = row
  mask = np.arange(width)[None, None] < np.array([[len(r) for r in ids]])[..., None]
  zeros = np.zeros(mask.shape, np.float32)
  rollout = Rollout(tokens, mask, zeros, zeros, np.ones((1, 2), bool))
  assert texts_of(rollout, tokenizer) == [said]


def samples(texts, answers, lengths, ended):
  problems = [Problem(f"p{i}", tuple(a)) for i, a in enumerate(answers)]
  return Samples(problems, texts, np.array(lengths), np.array(ended))


def summed_up(samples, *, prefill_think=False):
  marks = mark(samples, prefill_think=prefill_think)
  return summarise(samples, marks, prefill_think=prefill_think)


def test_figures_of_samples_made_by_hand():
  good = "<think>so, wait</think><answer>{}</answer>"
  said = samples(
    texts=[
      [good.format("7"), good.format("7.0"), good.format("8"), "no tags, but wait"],
      [good.format("1"), "<answer>3</answer>", good.format("1"), ""],
    ],
    answers=[["7"], ["2", "3"]],
    lengths=[[10, 20, 30, 40], [10, 10, 10, 10]],
    ended=[[True, True, True, False], [True, True, True, False]],
  )
  marks = mark(said, prefill_think=False)
  assert marks.correct.tolist() == [
    [True, True, False, False],
    [False, True, False, False],
  ]
  assert marks.format.tolist() == [[1, 1, 1, 0], [1, 0, 1, 0]]
  assert summed_up(said) == {
    "pass_at_1": pytest.approx(3 / 8),
    "cons_at_4": pytest.approx(0.5),  # 7 has two votes of three; 1 beats 3
    "pass_at_4": pytest.approx(1.0),
    "mean_length": pytest.approx(17.5),
    "reflection_rate": pytest.approx((1 + 1 + 1 + 2 + 1 + 0 + 1 + 0) / 8),
    "format_rate": pytest.approx(5 / 8),
    "truncation_rate": pytest.approx(0.25),
    "lost_rate": 0.0,
  }


@pytest.mark.parametrize("prefill, rate", [(False, 0.5), (True, 0.5)])
def test_the_format_follows_the_prompt(prefill, rate):
  texts = [["<think>a</think><answer>7</answer>", "a</think><answer>7</answer>"]]
  said = samples(texts, [["7"]], [[5, 5]], [[True, True]])
  figures = summed_up(said, prefill_think=prefill)
  assert figures["format_rate"] == rate
  assert figures["pass_at_1"] == 1.0


def test_texts_of_other_problems_are_refused():
  with pytest.raises(ValueError):
    summed_up(samples([["x"]], [["7"], ["8"]], [[1]], [[True]]))


def voted(problem, answers):
  texts = [[f"<think>t</think><answer>{x}</answer>" for x in answers]]
  ones = np.ones((1, len(answers)))
  said = Samples([problem], texts, ones, ones > 0)
  marks = mark(said, prefill_think=False)
  return ballots(said, marks, prefill_think=False)[0].tolist()[0]


def test_what_was_found_right_is_one_class_of_the_vote():
  """Where one answer is accepted."""
  one = Problem("How much?", ("50%",))
  assert voted(one, ["50", "0.5", "50%", "7", "0.5%"]) == [0, 0, 0, 1, 2]
  two = Problem("How much?", ("50", "51"))
  assert voted(two, ["50", "51", "51"]) == [0, 1, 1]


def test_a_vote_is_of_the_problems_kind():
  assert voted(Problem("sort", ("a, b",), kind="text"), ["a, b", "b, a"]) == [0, 1]
  letters = voted(Problem("?", ("B",), kind="choice"), ["(B)", "B) 12 m", "A", "??"])
  assert letters == [0, 0, 1, -1]


def test_a_text_is_evaluated_as_a_text():
  """As a list, `b, a` would be `a, b`."""
  problem = Problem("sort", ("a, b",), kind="text")
  texts = [[f"<think>t</think><answer>{x}</answer>" for x in ("a, b", "b, a")]]
  samples = Samples([problem], texts, np.ones((1, 2)), np.ones((1, 2), bool))
  assert summed_up(samples)["pass_at_1"] == 0.5
