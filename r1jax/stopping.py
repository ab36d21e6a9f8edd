"""Strings that end an output, found in the graph whatever tokens spell them.

An automaton (Aho and Corasick, 1975) over bytes knows how much of each string the
output ends in. Its step for a whole token is a table [states, vocabulary], so a row
carries one number, and a string that begins inside one token and ends inside another is
seen all the same. The token that completes a string is the output's last.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class StopStrings:
  """The automaton's step for tokens."""

  table: np.ndarray  # states V int16; from state 0; `found` is absorbing
  found: int  # the state in which a string has been seen

  @classmethod
  def of(cls, strings: Sequence[str], tokenizer: Tokenizer) -> "StopStrings | None":
    """None for no strings.

    Raises:
      UserError: a string is empty, or no tokens spell it.
    """
    if not strings:
      return None
    pieces = [tokenizer.bytes_of(i) for i in range(tokenizer.vocab)]
    known = {byte for piece in pieces for byte in piece}
    for string in strings:
      if not isinstance(string, str) or not string:
        raise UserError(f"stop={string!r} must be a text of at least one character.")
      if not known.issuperset(string.encode()):
        raise UserError(
          f"stop={string!r} cannot be written with this tokenizer's"
          f" {tokenizer.vocab} pieces, so it could never be seen. Choose a text whose"
          " characters the tokenizer knows, or stop at a token (stop_ids)."
        )
    step = _automaton([string.encode() for string in strings])
    found = len(step) - 1
    table = np.zeros((len(step), len(pieces)), np.int16)
    for token, piece in enumerate(pieces):
      state = np.arange(len(step))
      for byte in piece:
        state = step[state, byte]
      table[:, token] = state
    return cls(table, found)


def _automaton(strings: list[bytes]) -> np.ndarray:
  """[states, 256]: the next state; a state is the longest beginning of a string that
  the text ends in, and the last state, in which it stays, a string seen."""
  whole = set(strings)
  beginnings = {b""} | {s[:n] for s in strings for n in range(len(s))}
  left = [b for b in beginnings if not _holds(b, whole)]
  beginnings = sorted(left, key=lambda b: (len(b), b))  # the same in every process
  number = {beginning: i for i, beginning in enumerate(beginnings)}
  found = len(beginnings)
  step = np.full((found + 1, 256), found, np.int16)
  for beginning, i in number.items():
    for byte in range(256):
      text = beginning + bytes([byte])
      if not any(text.endswith(s) for s in strings):
        ends = (text[n:] for n in range(len(text) + 1))
        step[i, byte] = next(number[end] for end in ends if end in number)
  return step


def _holds(text: bytes, strings: set[bytes]) -> bool:
  return any(s in text for s in strings)
