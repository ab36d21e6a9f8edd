"""Stop strings against looking for them in the text after every token."""

import functools
import itertools

import grpo_golden as golden
import jax
import numpy as np
import pytest
from quick import QUICK

from r1jax import rollout
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.stopping import StopStrings

TEXTS = [
  "the answer is 42, wait: héllo wörld €5 and 日本語 text\nsecond line the the",
  "<answer>12</answer> the end. END!! Käse, naïve — 日本 日 €€ 3.14 abcabcab aaaa",
]


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train(TEXTS * 20, vocab=360)


class Stub:
  """A tokenizer of these pieces, in bytes."""

  def __init__(self, *pieces):
    self.pieces, self.vocab = pieces, len(pieces)

  def bytes_of(self, token):
    return self.pieces[token]


def first_by_hand(tokens, strings, tokenizer):
  """How many tokens it takes until the text holds one of the strings; None: never."""
  text = b""
  for n, token in enumerate(tokens):
    text += tokenizer.bytes_of(int(token))
    if any(text.find(s.encode()) >= 0 for s in strings):
      return n + 1
  return None


def first_by_table(tokens, stop):
  state = 0
  for n, token in enumerate(tokens):
    state = int(stop.table[state, token])
    if state == stop.found:
      return n + 1
  return None


def sequences(tokenizer, n, length, seed):
  """Half of pieces of texts cut anywhere, half of any tokens, and bytes of texts."""
  rng = np.random.default_rng(seed)
  text = tokenizer.encode("".join(TEXTS))
  raw = [tokenizer.id(f"<0x{b:02X}>") for b in "".join(TEXTS).encode()]
  for i in range(n):
    source = (text, raw, list(range(tokenizer.vocab)))[i % 3]
    if i % 2:
      start = int(rng.integers(len(source)))
      yield (source[start:] + source[:start])[:length]
    else:
      yield rng.choice(source, length).tolist()


def test_bytes_of_tokens_join_to_the_text(tokenizer):
  texts = [*TEXTS, " leading and trailing ", "  two  spaces", "🙂 unseen ß \t", "\n\n"]
  for text in texts:
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.bytes_of, ids)) == text.encode()
    whole = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]
    assert b"".join(map(tokenizer.bytes_of, whole)).decode() == tokenizer.decode(whole)
  assert tokenizer.bytes_of(tokenizer.id("<answer>")) == b"<answer>"
  assert tokenizer.bytes_of(tokenizer.id("<0xE2>")) == b"\xe2"


SETS = [
  ["the"],
  ["\n"],
  ["e"],
  [" wait", "wait:", "t: h"],
  ["he", "she", "hers", "his", "answer", "swer"],
  ["aaa", "aab"],
  ["abcabcab", "bca"],
  ["é", "日本語", "本", "€5"],
  ["ö", "wö"],
  ["</answer>", "r></", "> t"],
  ["42, wait: héllo wörld €5 and 日本語"],
  ["the the", "e the t", "zzzz", "�", "END"],
  ["x"] * 2 + ["Käse, n"],
]


@pytest.mark.parametrize("strings", SETS, ids=repr)
def test_the_table_finds_what_looking_into_the_text_finds(strings, tokenizer):
  stop = StopStrings.of(strings, tokenizer)
  assert stop.table.shape[1] == tokenizer.vocab and stop.found == len(stop.table) - 1
  assert stop.table.min() >= 0 and stop.table.max() <= stop.found
  assert (stop.table[stop.found] == stop.found).all()
  found = 0
  for tokens in sequences(tokenizer, 300, 60, seed=len(strings[0])):
    want = first_by_hand(tokens, strings, tokenizer)
    assert first_by_table(tokens, stop) == want
    found += want is not None
  assert found > 5 or strings[0].startswith(("42", "x"))


def test_random_strings_over_few_letters_are_found_where_they_lie():
  """Every overlap there is: pieces of one to three of two letters."""
  pieces = [b"", *(p.encode() for p in "a b ab ba aa bb aab bab abb".split())]
  stub, rng = Stub(*pieces), np.random.default_rng(0)
  for _ in range(150):
    strings = [
      "".join(rng.choice(list("ab"), rng.integers(1, 7)))
      for _ in range(rng.integers(1, 5))
    ]
    stop = StopStrings.of(strings, stub)
    for _ in range(15):
      tokens = rng.integers(0, stub.vocab, 14)
      assert first_by_table(tokens, stop) == first_by_hand(tokens, strings, stub)


def test_a_string_may_begin_inside_one_token_and_end_inside_another():
  stub = Stub(b"", b"xxab", b"cdyy", b"c", b"\xe6\x97", b"\xa5z")
  assert first_by_table([1, 2], StopStrings.of(["bcd"], stub)) == 2
  assert first_by_table([1, 0, 3, 2], StopStrings.of(["abcc"], stub)) == 4
  assert first_by_table([4, 5], StopStrings.of(["日"], stub)) == 2
  assert first_by_table([1, 1, 2], StopStrings.of(["xabx"], stub)) == 2
  assert first_by_table([2], StopStrings.of(["d"], stub)) == 1
  assert first_by_table([1, 3, 5], StopStrings.of(["bcd"], stub)) is None


def test_no_strings_are_no_automaton(tokenizer):
  assert StopStrings.of([], tokenizer) is None


@pytest.mark.parametrize(
  "strings, said",
  [
    ([""], r"stop='' must be a text of at least one character"),
    (["ok", ""], r"stop='' must be"),
    ([7], r"stop=7 must be a text"),
  ],
)
def test_what_is_not_a_text_is_refused(strings, said):
  with pytest.raises(UserError, match=said):
    StopStrings.of(strings, Stub(b"", b"o", b"k"))


def test_a_string_that_no_token_spells_is_refused_with_a_remedy():
  stub = Stub(b"", b"a", b"bc", "é".encode())
  for good in ("a", "abc", "é", "cab"):
    assert StopStrings.of([good], stub) is not None
  for bad in ("d", "abd", "è", "日", "a b"):
    with pytest.raises(UserError, match=rf"stop={bad!r} .*4 pieces.*stop_ids"):
      StopStrings.of(["a", bad], stub)


# -- in a rollout ----------------------------------------------------------------------

VOCAB, PAD = 16, 0
POLICY = golden.tiny_policy()
ROLLOUT = Stub(
  *(b"", b"a", b"b", b"ab", b"ba", b"c", "é".encode(), b"\xc3", b"\xa9", b"bc"),
  *(b" ", b"ca", b"\n", "aé".encode(), b"xy", b""),
)
STRINGS = ["abba", "é", "c\n", "aca", "xyb", " ab"]


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def sample(weights, key, how):
  return rollout.sample(
    POLICY,
    *weights,
    golden.prompt_batch(),
    key,
    group_size=8,
    max_tokens=20,
    pad_id=PAD,
    **dict(how),
  )


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("strings", [STRINGS, STRINGS[:1] + STRINGS[3:]], ids=len)
def test_a_rollout_ends_with_the_token_that_completes_a_string(strings, slots):
  weights, key = golden.weights(POLICY), jax.random.key(5)
  whole = sample(weights, key, ())
  assert (whole.lengths == 20).all() and not whole.ended.any()
  how = ("stop", StopStrings.of(strings, ROLLOUT)), ("slots", slots)
  drawn = sample(weights, key, how)
  ends = [first_by_hand(x, strings, ROLLOUT) for x in whole.tokens.reshape(-1, 20)]
  lengths = np.array([n or 20 for n in ends])
  np.testing.assert_array_equal(drawn.lengths.ravel(), lengths)
  np.testing.assert_array_equal(drawn.ended.ravel(), [n is not None for n in ends])
  np.testing.assert_array_equal(drawn.tokens, np.where(drawn.mask, whole.tokens, PAD))
  assert sum(n is not None for n in ends) > 5 and len(set(ends)) > 4


def test_stop_tokens_and_stop_strings_go_together():
  weights, key = golden.weights(POLICY), jax.random.key(5)
  whole = sample(weights, key, ())
  how = ("stop", StopStrings.of(STRINGS, ROLLOUT)), ("stop_ids", (15, 2))
  drawn = sample(weights, key, how)
  for n, tokens in zip(
    drawn.lengths.ravel(), whole.tokens.reshape(-1, 20), strict=True
  ):
    by_string = first_by_hand(tokens, STRINGS, ROLLOUT) or 20
    by_token = [i + 1 for i, token in enumerate(tokens) if token in (15, 2)]
    assert n == min([by_string, *by_token])


def test_a_policy_of_a_real_tokenizer_stops_at_its_strings(tokenizer):
  """Any byte may be drawn; strings that whole outputs hold, across their tokens."""
  network = golden.Policy(
    golden.sizes.tiny_dense(
      tokenizer.vocab, width=16, layers=1, heads=2, head_dim=4, dense_ffn=16
    )
  )
  weights, batch = golden.weights(network), golden.prompt_batch()

  def run(stop):
    how = dict(group_size=16, max_tokens=16, pad_id=tokenizer.pad_id, stop=stop)
    sample = functools.partial(
      rollout.sample, network, **how, slots=0 if stop is None else 24
    )
    return jax.jit(sample, compiler_options=QUICK)(*weights, batch, jax.random.key(0))

  whole = np.asarray(run(None).tokens).reshape(-1, 16)
  strings = []
  for row in whole[::3]:
    for a, b in itertools.pairwise(row[4:]):
      a, b = tokenizer.bytes_of(int(a)), tokenizer.bytes_of(int(b))
      if a and b and a[-1] < 128 and b[0] < 128 and len(strings) < 12:
        strings.append((a[-1:] + b[:1]).decode())
  assert len(strings) == 12
  strings += ["é", "the"]
  drawn = run(StopStrings.of(strings, tokenizer))
  ends = [first_by_hand(x, strings, tokenizer) for x in whole]
  np.testing.assert_array_equal(drawn.lengths.ravel(), [n or 16 for n in ends])
  np.testing.assert_array_equal(drawn.ended.ravel(), [n is not None for n in ends])
  assert sum(n is not None for n in ends) >= 5
