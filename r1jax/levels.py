"""How a rollout's cache is cut: levels, planned from a budget of tokens.

Level k holds tokens start .. start + size - 1 of the rows that have come so far, in one
seat each. Levels grow with the length, so that a step works on the tokens that live and
not on the longest that could, and few long rows need few seats at the far levels. The
prompts' tokens lie beside, once a group, and are not counted here.
"""

import dataclasses
import itertools

from r1jax.errors import UserError

FIRST = 32  # tokens of the first level and of the second; then each is twice as long


@dataclasses.dataclass(frozen=True)
class Level:
  start: int  # the first of a row's tokens that lies here
  size: int  # tokens of a seat
  seats: int  # rows that can stand here at once


def plan(
  rows: int, tokens: int, *, budget: int = 0, first: int = FIRST, shards: int = 1
) -> tuple[Level, ...]:
  """Levels for rows of up to so many tokens.

  Args:
    rows: that decode at once, a multiple of shards; all have a seat in the first level.
    tokens: of a row at most, T.
    budget: tokens that the seats may hold in all; 0: as many as all rows can have. What
      the first level leaves is shared out evenly: twice as long a seat, half as many.
    first: tokens of the first level.
    shards: data shards, which share rows and budget evenly; seats count all of theirs.

  Raises:
    UserError: the budget does not hold one row of T tokens and the others' beginnings.
  """
  cuts = [0]
  while cuts[-1] < tokens:
    cuts.append(min(tokens, max(first, 2 * cuts[-1])))
  sizes = [end - start for start, end in itertools.pairwise(cuts)]
  least = shards * (rows // shards * sizes[0] + sum(sizes[1:]))
  if budget and budget < least:
    of_mesh = f" on each of {shards} data shards" if shards > 1 else ""
    raise UserError(
      f"cache_tokens={budget} is too small a budget: {rows} slots and max_tokens="
      f"{tokens} need {least} at least ({sizes[0]} for each slot, and one row of full"
      f" length{of_mesh}), {rows * tokens} so that no row can run short. Raise it, take"
      " fewer slots, or 0 for no bound."
    )
  if not budget or budget >= rows * tokens:
    seats = [rows] * len(sizes)
  else:
    seats = [
      shards * count for count in _seats(rows // shards, sizes, budget // shards)
    ]
  return tuple(map(Level, cuts, sizes, seats))


def _seats(rows: int, sizes: list[int], budget: int) -> list[int]:
  seats, left = [rows], budget - rows * sizes[0]
  for i, size in enumerate(sizes[1:], start=1):
    later = sum(sizes[i + 1 :])
    share = max(left // (len(sizes) - i), size)
    seats.append(min(seats[-1], share // size, (left - later) // size))
    left -= seats[-1] * size
  return seats
