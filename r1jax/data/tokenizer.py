"""A SentencePiece tokenizer: BPE with byte fallback, single digits, tags as symbols."""

from collections.abc import Iterable, Sequence
import io
import pathlib

import numpy as np
import sentencepiece

SYMBOLS = (
  "<think>",
  "</think>",
  "<answer>",
  "</answer>",
  "<|User|>",
  "<|Assistant|>",
  "\n",
)


class Tokenizer:
  """Text <-> ids. Padding 0, unknown 1 (unused: bytes), BOS 2, EOS 3."""

  pad_id, unk_id, bos_id, eos_id = 0, 1, 2, 3

  def __init__(self, model: bytes):
    self.model = model
    self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab = self._sp.vocab_size()

  @classmethod
  def train(
    cls, texts: Iterable[str], *, vocab: int, symbols: Sequence[str] = ()
  ) -> "Tokenizer":
    """Learns pieces from `texts`; the same texts give the same bytes.

    Args:
      texts: the corpus.
      vocab: an upper bound on the pieces, the 256 bytes included.
      symbols: pieces that are always one token, besides the tags.
    """
    model = io.BytesIO()
    spaced = [s.replace(" ", "\u2581") for s in symbols]
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab,
      hard_vocab_limit=False,
      byte_fallback=True,
      character_coverage=1.0,
      split_digits=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      pad_id=cls.pad_id,
      unk_id=cls.unk_id,
      bos_id=cls.bos_id,
      eos_id=cls.eos_id,
      user_defined_symbols=[*SYMBOLS, *spaced],
      num_threads=1,  # more threads give other bytes
      minloglevel=2,
    )
    return cls(model.getvalue())

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Tokenizer":
    return cls(pathlib.Path(path).read_bytes())

  def save(self, path: str | pathlib.Path) -> None:
    pathlib.Path(path).write_bytes(self.model)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return (self.eos_id,)

  def encode(self, text: str) -> list[int]:
    """Ids without BOS or EOS."""
    return self._sp.encode(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return self._sp.encode(texts)

  def decode(self, ids: Sequence[int]) -> str:
    """Text; padding, BOS and EOS vanish."""
    return self._sp.decode([int(i) for i in ids])

  def piece(self, token: int) -> str:
    """The name of a token, also where it has no text, such as `</s>`."""
    return self._sp.id_to_piece(token)

  def bytes_of(self, token: int) -> bytes:
    """What a token adds to a text; nothing for padding, BOS and EOS."""
    if self._sp.is_control(token) or self._sp.is_unknown(token) or token == self.pad_id:
      return b""
    piece = self._sp.id_to_piece(token)
    if self._sp.is_byte(token):
      return bytes([int(piece[1:-1], 16)])
    return piece.replace("\u2581", " ").encode()

  def id(self, piece: str) -> int:
    """The id of a symbol such as `<think>`."""
    return self._sp.piece_to_id(piece)

  def spaces(self) -> np.ndarray:
    """[V] bool: the pieces that are white space and nothing else."""
    texts = [
      "" if i <= self.eos_id else self._sp.decode([i]) for i in range(self.vocab)
    ]
    return np.array([bool(t) and t.isspace() for t in texts])
