"""Packing: best fit against the definition tried on every open row, and rows that hold
every example whole, once and in order."""

import numpy as np
import pytest

from r1jax.data import corpus, packing
from r1jax.data.packing import Example
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError

PAD = 99


def some_lengths(seed, count=60, most=20):
  return np.random.default_rng(seed).integers(1, most + 1, count).tolist()


def some_examples(lengths):
  """Every token of every example is another number, so that none can be mistaken."""
  ends = np.cumsum(lengths) + PAD
  return [
    Example(list(range(end - n + 1, end + 1)), prompt=1 + i % n)
    for i, (n, end) in enumerate(zip(lengths, ends.tolist(), strict=True))
  ]


# -- which rows ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [20, 33, 64])
def test_each_goes_into_the_open_row_with_the_least_room_that_still_fits(width, seed):
  """R1, supplement B.1. Which of several equally full rows is left open."""
  lengths = some_lengths(seed)
  rows = packing.best_fit(lengths, width)
  row_of = {i: r for r, row in enumerate(rows) for i in row}
  assert sorted(row_of) == list(range(len(lengths)))
  rooms: dict[int, int] = {}
  for i, length in enumerate(lengths):
    fitting = [room for room in rooms.values() if room >= length]
    row = row_of[i]
    if fitting:
      assert rooms.get(row) == min(fitting)
    else:
      assert row not in rooms
      rooms[row] = width
    rooms[row] -= length
  assert min(rooms.values()) >= 0


def test_best_fit_is_neither_first_fit_nor_next_fit():
  # First fit would put 4 beside 5, the row that was opened first.
  assert packing.best_fit([5, 6, 4, 5], 10) == [[0, 3], [1, 2]]
  # Next fit would put 1 beside 5, the row that was opened last.
  assert packing.best_fit([3, 6, 5, 1, 4], 10) == [[0, 1, 3], [2, 4]]


def test_the_rows_are_numbered_as_they_were_opened():
  assert packing.best_fit([7, 8, 9], 10) == [[0], [1], [2]]
  assert packing.best_fit([], 10) == []


@pytest.mark.parametrize("length", [11, 0, -1])
def test_a_length_that_no_row_holds_is_refused(length):
  with pytest.raises(ValueError, match=rf"{length} tokens.* 10"):
    packing.best_fit([3, length], 10)


# -- what stands in them ---------------------------------------------------------------


@pytest.mark.parametrize("longest_first", [True, False])
@pytest.mark.parametrize("width", [5, 20, 47])
def test_every_example_that_fits_stands_whole_in_one_place(width, longest_first):
  examples = some_examples(some_lengths(width))
  packed = packing.pack(examples, width, pad_id=PAD, longest_first=longest_first)
  tokens, segments, targets = (
    packed.pages.tokens,
    packed.pages.segments,
    packed.pages.targets,
  )
  assert tokens.shape == segments.shape == targets.shape == (len(packed.rows), width)
  assert (tokens.dtype, segments.dtype, targets.dtype) == (np.int32, np.int32, bool)
  fitting = [i for i, e in enumerate(examples) if len(e.tokens) <= width]
  assert sorted(i for row in packed.rows for i in row) == fitting
  assert packed.too_long == len(examples) - len(fitting)
  assert (packed.too_long > 0) == (width == 5)
  for r, row in enumerate(packed.rows):
    said = [t for i in row for t in examples[i].tokens]
    left = width - len(said)
    assert tokens[r].tolist() == said + [PAD] * left
    numbers = [n for n, i in enumerate(row, 1) for _ in examples[i].tokens]
    assert segments[r].tolist() == numbers + [0] * left
    learned = [
      at >= examples[i].prompt for i in row for at in range(len(examples[i].tokens))
    ]
    assert targets[r].tolist() == learned + [False] * left


def test_longest_first_packs_them_in_falling_length_and_else_they_keep_their_order():
  examples = some_examples(some_lengths(3))
  falling = packing.pack(examples, 64, pad_id=PAD)
  for row in falling.rows:
    lengths = [len(examples[i].tokens) for i in row]
    assert lengths == sorted(lengths, reverse=True)
  given = packing.pack(examples, 64, pad_id=PAD, longest_first=False)
  lengths = [len(e.tokens) for e in examples]
  assert given.rows == packing.best_fit(lengths, 64)
  assert all(row == sorted(row) for row in given.rows)


@pytest.mark.parametrize("most", [128, 40, 300])
def test_longest_first_fills_rows_of_random_lengths_to_95_percent(most):
  examples = [Example([1] * n, prompt=1) for n in some_lengths(most, 600, most)]
  pages = packing.pack(examples, max(most, 128), pad_id=0).pages
  assert (pages.segments > 0).mean() >= 0.95


def test_longest_first_needs_no_more_rows_than_the_order_given():
  """On these, that is; it is no theorem."""
  for seed in range(10):
    examples = some_examples(some_lengths(seed, 200, 50))
    rows = [
      len(packing.pack(examples, 50, pad_id=PAD, longest_first=first).rows)
      for first in (True, False)
    ]
    assert rows[0] <= rows[1]


def test_padding_is_known_by_its_segment_and_not_by_its_token():
  example = Example([7, PAD, PAD], prompt=1)
  pages = packing.pack([example], 5, pad_id=PAD).pages
  assert pages.segments.tolist() == [[1, 1, 1, 0, 0]]
  assert pages.targets.tolist() == [[False, True, True, False, False]]


def test_an_example_as_long_as_a_row_fits_and_one_longer_does_not():
  examples = some_examples([6, 7, 6])
  packed = packing.pack(examples, 6, pad_id=PAD)
  assert sorted(packed.rows) == [[0], [2]] and packed.too_long == 1


def test_where_nothing_fits_the_user_hears_of_the_shortest():
  with pytest.raises(UserError, match=r"none of 2 examples.* 5 tokens.* 7\."):
    packing.pack(some_examples([7, 9]), 5, pad_id=PAD)
  with pytest.raises(UserError, match="none of 0 examples"):
    packing.pack([], 5, pad_id=PAD)


# -- the corpus's pages ----------------------------------------------------------------


def test_a_page_of_the_corpus_learns_all_but_its_bos_and_pages_keep_their_order():
  tokenizer = Tokenizer.train([f"{i} + 7 = 12, wait" for i in range(40)], vocab=300)
  texts = [f"{i} + " * (1 + i % 5) for i in range(30)]
  pages = corpus.pack(texts, tokenizer, 24)
  first = np.diff(pages.segments, axis=1, prepend=0) > 0
  real = pages.segments > 0
  np.testing.assert_array_equal(pages.targets, real & ~first)
  assert (pages.tokens[first] == tokenizer.bos_id).all()
  last = real & (np.diff(pages.segments, axis=1, append=0) != 0)
  assert (pages.tokens[last] == tokenizer.eos_id).all()
  found = [
    tokenizer.decode(row[segment == n])
    for row, segment in zip(pages.tokens, pages.segments, strict=True)
    for n in range(1, segment.max() + 1)
  ]
  assert sorted(found) == sorted(texts)
  lengths = [len(tokenizer.encode(t)) + 2 for t in texts]
  rows = packing.best_fit(lengths, 24)
  assert found == [texts[i] for row in rows for i in row]
  with pytest.raises(UserError, match="none of 30 examples"):
    corpus.pack(texts, tokenizer, 3)
