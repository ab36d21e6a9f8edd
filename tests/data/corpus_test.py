"""The corpus: pages about given problems alone, and rows that keep every page whole."""

import random

import numpy as np
import pytest

from r1jax import prompts
from r1jax.data import corpus
from r1jax.data.chain import Chain
from r1jax.data.puzzle import Puzzle
from r1jax.data.tokenizer import Tokenizer

MIX = {"facts": 0.2, "bare": 0.2, "guess": 0.2, "working": 0.2, "checked": 0.2}


def make(task, given, count=300, seed=0, mix=MIX, template="short"):
  return corpus.pages(
    task, given, count, mix=mix, template=template, facts_a_page=3, seed=seed
  )


@pytest.mark.parametrize("task", [Chain(), Puzzle()], ids=["chain", "puzzle"])
@pytest.mark.parametrize("template", ["short", "r1_zero"])
def test_pages_are_about_the_given_problems_alone(task, template):
  rng = random.Random(0)
  given = [task.problem(rng) for _ in range(7)]
  rows = make(task, given, template=template)
  assert len(rows) == 300
  allowed = {
    prompts.render(template, p.problem, prefill_think=False): p.problem for p in given
  }
  seen = set()
  for prompt, page in rows:
    if prompt:
      seen.add(allowed[prompt])
    assert page
  assert seen == {p.problem for p in given}
  assert 30 < sum(not prompt for prompt, _ in rows) < 90  # pages of facts


def test_a_page_of_facts_holds_as_many_as_asked():
  rows = make(Chain(), [], count=20, mix={"facts": 1.0})  # and needs no problem
  assert all(prompt == "" and page.count(" = ") == 3 for prompt, page in rows)


def test_the_corpus_is_a_function_of_its_seed_and_grows_at_its_end():
  given = [Chain().problem(random.Random(i)) for i in range(9)]
  assert make(Chain(), given) == make(Chain(), given) != make(Chain(), given, seed=1)


def test_a_kind_of_weight_zero_never_appears():
  given = [Chain().problem(random.Random(i)) for i in range(9)]
  rows = make(Chain(), given, mix={"checked": 0.0, "guess": 1.0})
  assert all("I guess" in page for _, page in rows)


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train([f"{i} + 7 = 12, wait" for i in range(40)], vocab=300)


def packed(*args):
  pages = corpus.pack(*args)
  assert (pages.targets <= (pages.segments > 0)).all()
  return pages.tokens, pages.segments


def unpack(tokens, segments):
  return [
    row[s == n].tolist()
    for row, s in zip(tokens, segments, strict=True)
    for n in range(1, s.max() + 1)
  ]


@pytest.mark.parametrize("width", [6, 11, 30])
def test_packing_keeps_every_page_that_fits_whole(tokenizer, width):
  rng = random.Random(width)
  texts = ["7" * rng.randint(1, 9) for _ in range(80)]
  tokens, segments = packed(texts, tokenizer, width)
  want = [
    [tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id]
    for t in texts
    if len(tokenizer.encode(t)) + 2 <= width
  ]
  assert sorted(unpack(tokens, segments)) == sorted(want)
  assert tokens.shape == segments.shape and tokens.shape[1] == width
  assert tokens.dtype == segments.dtype == np.int32


def test_padding_is_segment_0_and_stands_at_the_end(tokenizer):
  tokens, segments = packed(["7", "77", "777777"], tokenizer, 10)
  assert (tokens[segments == 0] == tokenizer.pad_id).all()
  for row in segments:
    used = row[row > 0]
    assert (row[: len(used)] == used).all()
    assert (np.diff(used) >= 0).all() and used[0] == 1


def test_rows_are_filled_well(tokenizer):
  texts = ["7" * (1 + i % 8) for i in range(400)]
  _, segments = packed(texts, tokenizer, 20)
  assert (segments > 0).mean() > 0.95


def test_pages_that_exactly_fill_a_row_get_one_each(tokenizer):
  tokens, segments = packed(["7777"] * 3, tokenizer, 6)
  assert tokens.shape == (3, 6) and (segments == 1).all()


def test_a_page_longer_than_a_row_is_left_out(tokenizer):
  tokens, _ = packed(["7" * 9, "7"], tokenizer, 5)
  assert tokens.shape == (1, 5)
