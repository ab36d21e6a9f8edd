"""Best-fit packing: sequences of many lengths side by side in rows of one width.

A row holds several sequences as segments, and a token sees its own segment only, from
position 0 on, so loss and gradient are those of the sequences one a row (R1, supplement
B.1, packs its rollouts so; V3 its SFT data).
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from r1jax.errors import UserError
from r1jax.sft import Pages


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence to learn from."""

  tokens: list[int]
  prompt: int  # its first tokens, which are not learned; at least 1


@dataclasses.dataclass(frozen=True)
class Packed:
  pages: Pages  # NumPy, [rows, width]
  rows: list[list[int]]  # the examples of each row, by their number, left to right
  too_long: int  # examples that no row can hold; they are left out


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
  """Which sequences share a row: each goes, in the order given, into the fullest row
  that still holds it, or opens a new one. Longest first fills rows best.

  Raises:
    ValueError: a sequence is longer than a row.
  """
  by_room: list[list[int]] = [[] for _ in range(width + 1)]  # open rows by free tokens
  rows: list[list[int]] = []
  for i, length in enumerate(lengths):
    if not 0 < length <= width:
      raise ValueError(f"a sequence of {length} tokens does not fit a row of {width}")
    room = next((r for r in range(length, width) if by_room[r]), width)
    if room == width:
      by_room[width].append(len(rows))
      rows.append([])
    row = by_room[room].pop()
    rows[row].append(i)
    by_room[room - length].append(row)
  return rows


def pack(
  examples: Sequence[Example], width: int, *, pad_id: int, longest_first: bool = True
) -> Packed:
  """Examples as rows for `sft.step`; prompts and padding are no targets.

  Args:
    examples: what to learn.
    width: tokens a row.
    pad_id: fills rows at their end.
    longest_first: packs densest; False keeps neighbours near to each other.

  Raises:
    UserError: nothing fits.
  """
  kept = [i for i, e in enumerate(examples) if len(e.tokens) <= width]
  if not kept:
    raise UserError(
      f"none of {len(examples)} examples fits a row of {width} tokens; the shortest has"
      f" {min((len(e.tokens) for e in examples), default=0)}. Widen the rows, or give"
      " shorter examples."
    )
  if longest_first:
    kept.sort(key=lambda i: -len(examples[i].tokens))
  rows = [
    [kept[j] for j in row]
    for row in best_fit([len(examples[i].tokens) for i in kept], width)
  ]
  shape = len(rows), width
  tokens = np.full(shape, pad_id, np.int32)
  segments, targets = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for r, row in enumerate(rows):
    at = 0
    for n, i in enumerate(row):
      example, end = examples[i], at + len(examples[i].tokens)
      tokens[r, at:end] = example.tokens
      segments[r, at:end] = n + 1
      targets[r, at + example.prompt : end] = True
      at = end
  pages = Pages(tokens, segments, targets)
  return Packed(pages, rows, len(examples) - len(kept))
