"""The tokenizer: same bytes every time, every text comes back, tags in one piece."""

import pytest

from r1jax.data.tokenizer import SYMBOLS, Tokenizer

TEXTS = [
  f"<think>{i} + 7 = {i + 7}, wait no</think><answer>{i}</answer>" for i in range(60)
]
SPACED = (" + ", ", wait ", "I guess")


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train(TEXTS, vocab=330, symbols=SPACED)


def test_the_same_texts_give_the_same_bytes(tokenizer):
  again = Tokenizer.train(iter(TEXTS), vocab=330, symbols=SPACED)
  assert again.model == tokenizer.model
  assert again.model == tokenizer.model
  other = Tokenizer.train(TEXTS[1:], vocab=330, symbols=SPACED)
  assert other.model != tokenizer.model


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "t.model")
  loaded = Tokenizer.load(tmp_path / "t.model")
  assert loaded.model == tokenizer.model
  assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


@pytest.mark.parametrize("symbol", [*SYMBOLS, *SPACED])
def test_tags_and_symbols_are_single_tokens_wherever_they_stand(tokenizer, symbol):
  ids = tokenizer.encode(symbol)
  assert len(ids) == 1
  assert tokenizer.decode(ids) == symbol
  assert ids[0] in tokenizer.encode(f"9{symbol}9")
  if " " not in symbol:
    assert tokenizer.id(symbol) == ids[0]


@pytest.mark.parametrize(
  "text",
  [
    *TEXTS[:3],
    "",
    " ",
    "   three spaces",
    "trailing ",
    "a  b",
    "a\tb\r\nc\n\n",
    "\u00e9\u6f22\u5b57",
    "e\u0301",  # combining accent: not composed
    "\ufb01\uff21\u2460",  # not folded to fi, A, 1
    "\U0001f642\U0001f1e9\U0001f1ea",
    "\u00a0\u3000\u2028",
    "\u200d\ufeff",
    "\ufffd\U0010ffff\x7f\x01",
    "</s><s><pad><unk><0x0A>",
    "< think> <th ink> <|user|>",
    "1234567890",
  ],
)
def test_every_text_comes_back(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_loss_the_mark_for_a_space_comes_back_as_a_space(tokenizer):
  """SentencePiece writes spaces as U+2581 inside and cannot tell the two apart."""
  assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_unseen_characters_become_bytes_and_never_the_unknown(tokenizer):
  ids = tokenizer.encode("\u6f22\U0001f642 q")
  assert tokenizer.unk_id not in ids
  assert len(ids) >= 3 + 4


def test_digits_stand_alone(tokenizer):
  for text in ("42", "1007", "a12b"):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
    assert all(not any(c.isdigit() for c in p) or len(p) == 1 for p in pieces)


def test_encode_adds_neither_bos_nor_eos_and_decode_drops_them(tokenizer):
  ids = tokenizer.encode("7 no")
  assert min(ids) > tokenizer.eos_id
  wrapped = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]
  assert tokenizer.decode(wrapped) == "7 no"


def test_a_batch_is_encoded_as_its_rows(tokenizer):
  assert tokenizer.encode_batch(TEXTS[:5]) == [tokenizer.encode(t) for t in TEXTS[:5]]


def test_special_ids_are_where_the_class_says(tokenizer):
  for name, piece in [
    ("pad", "<pad>"),
    ("unk", "<unk>"),
    ("bos", "<s>"),
    ("eos", "</s>"),
  ]:
    assert tokenizer.id(piece) == getattr(tokenizer, f"{name}_id")


def test_spaces_are_the_pieces_of_white_space_alone(tokenizer):
  spaces = tokenizer.spaces()
  assert spaces.shape == (tokenizer.vocab,)
  assert spaces[tokenizer.id("\n")] and spaces[tokenizer.encode(" ")].all()
  assert spaces[tokenizer.encode("\t")].all()
  assert not spaces[: tokenizer.eos_id + 1].any()
  for text in ("7", "<think>", "wait", " + ", "\u00e9"):
    assert not spaces[tokenizer.encode(text)].any()


def test_the_vocabulary_stays_within_its_bound(tokenizer):
  assert 256 + 4 + len(SYMBOLS) < tokenizer.vocab <= 330
  few = Tokenizer.train(["a b"], vocab=5000)  # an upper bound, not a demand
  assert few.vocab < 300
  assert few.decode(few.encode("anything else")) == "anything else"
