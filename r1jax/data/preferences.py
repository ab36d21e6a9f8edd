"""What reward models learn from: judged pairs of responses, and safety labels.

R1 (arXiv 2501.12948, B.2) lets a judge compare two responses four times, in random
order, and keeps the pairs that it is sure of, |delta| > 1; over the set, the chosen
ones are about as long as the rejected ones.
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib
import random
import reprlib

from r1jax.data.rows import fail, read_rows, text_of
from r1jax.errors import UserError

# Of arena-hard's judge, first response against second. The paper does not print its
# numbers; on these, |delta| > 1 says more than "slightly better" on average.
GRADES = {"A>>B": 2, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -2}
SURE, MOST = 1, max(GRADES.values())  # a pair is kept with |delta| above SURE

Judge = Callable[[str, str, str], str]  # (prompt, first, second) -> a grade in GRADES


@dataclasses.dataclass(frozen=True)
class Comparison:
  prompt: str
  a: str
  b: str


@dataclasses.dataclass(frozen=True)
class Preference:
  prompt: str
  chosen: str
  rejected: str
  delta: float  # mean grade in favour of the chosen one, in (SURE, MOST]


@dataclasses.dataclass(frozen=True)
class SafetyLabel:
  prompt: str
  response: str
  safe: bool


@dataclasses.dataclass(frozen=True)
class Counts:
  """What became of the pairs."""

  kept: int
  equal: int  # dropped: both responses are the same text
  unsure: int  # dropped: |delta| <= SURE


# -- judging ---------------------------------------------------------------------------


def judged(
  comparisons: Sequence[Comparison], judge: Judge, *, judgments: int = 4, seed: int
) -> tuple[list[Preference], Counts]:
  """The pairs that the judge is sure of.

  Each is judged `judgments` times, half of them with b shown first, in random order,
  so that a judge's taste for the first place cancels. delta is the mean of
  +2, +1, 0, -1, -2 for a much better .. b much better.

  Args:
    comparisons: pairs of samples.
    judge: asked once a judgment; pairs of equal texts are not shown to it.
    judgments: a pair, an even number.
    seed: of the orders.

  Raises:
    ValueError: the judgments cannot be halved, or a grade is none.
  """
  if judgments < 2 or judgments % 2:
    raise ValueError(
      f"judgments={judgments} must be an even number, 2 or more: half of them show the"
      " responses swapped. R1 takes 4."
    )
  rng = random.Random(seed)
  kept, equal = [], 0
  for pair in comparisons:
    if pair.a == pair.b:
      equal += 1
      continue
    swaps = [False, True] * (judgments // 2)
    rng.shuffle(swaps)
    grades = [
      -_grade(judge(pair.prompt, pair.b, pair.a))
      if swap
      else _grade(judge(pair.prompt, pair.a, pair.b))
      for swap in swaps
    ]
    kept += _preference(pair, sum(grades) / judgments)
  return kept, Counts(len(kept), equal, len(comparisons) - equal - len(kept))


def _grade(said: str) -> int:
  if said not in GRADES:
    raise ValueError(
      f"the judge said {reprlib.repr(said)}, which is none of {', '.join(GRADES)}. Let"
      " it return the grade alone."
    )
  return GRADES[said]


def _preference(pair: Comparison, delta: float) -> list[Preference]:
  """One, or none where the judge is unsure."""
  if abs(delta) <= SURE:
    return []
  chosen, rejected = (pair.a, pair.b) if delta > 0 else (pair.b, pair.a)
  return [Preference(pair.prompt, chosen, rejected, abs(delta))]


# -- lengths ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Of a set of preferences, in the unit of `length`."""

  pairs: int
  chosen: float  # mean; 0 without pairs
  rejected: float

  @classmethod
  def of(
    cls, preferences: Sequence[Preference], length: Callable[[str], int]
  ) -> "Lengths":
    n = len(preferences)
    chosen = sum(length(p.chosen) for p in preferences) / max(n, 1)
    return cls(n, chosen, sum(length(p.rejected) for p in preferences) / max(n, 1))


def balanced(
  preferences: Sequence[Preference], length: Callable[[str], int], seed: int
) -> tuple[list[Preference], Lengths, Lengths]:
  """Drops pairs until chosen and rejected responses are equally long on average.

  With d = length of chosen - length of rejected, in a set whose sum of d is above 0:

   1. Every pair with d < 0, in random order, claims the pair with d > 0 whose size is
      nearest to its own and that is not claimed yet.
   2. Pairs with d > 0 are dropped, first the unclaimed ones and then the others, each
      in random order, as long as the sum does not fall below 0.
   3. The least d that is left is dropped too, if that brings the sum nearer to 0.

  (Below 0, with the sides swapped.) So no pair of the side that is behind is lost,
  long and short answers keep partners of their kind, and |sum of d| ends at no more
  than half the least d on the side that was ahead.

  Args:
    preferences: the set.
    length: of a text, in characters or tokens.
    seed: of the random order.

  Returns:
    (those kept, in their order, lengths before, lengths after).

  Raises:
    UserError: nothing is left, because all of a set lean one way.
  """
  d = [length(p.chosen) - length(p.rejected) for p in preferences]
  ahead = 1 if sum(d) > 0 else -1
  order = random.Random(seed).sample(range(len(d)), len(d))
  long = [i for i in order if ahead * d[i] > 0]
  short = [i for i in order if ahead * d[i] < 0]

  free = sorted((abs(d[i]), i) for i in long)
  for i in short[: len(long)]:
    at = bisect.bisect(free, (abs(d[i]), -1))
    near = [k for k in (at - 1, at) if 0 <= k < len(free)]
    free.pop(min(near, key=lambda k: abs(free[k][0] - abs(d[i]))))
  unclaimed = {i for _, i in free}

  excess, dropped = abs(sum(d)), set()
  for i in sorted(long, key=lambda i: i not in unclaimed):
    if abs(d[i]) <= excess:
      excess -= abs(d[i])
      dropped.add(i)
  least = min(
    (i for i in long if i not in dropped), key=lambda i: abs(d[i]), default=-1
  )
  if least >= 0 and abs(d[least]) < 2 * excess:
    dropped.add(least)

  kept = [p for i, p in enumerate(preferences) if i not in dropped]
  before = Lengths.of(preferences, length)
  if preferences and not kept:
    raise UserError(
      f"in all {len(d)} pairs the {'chosen' if ahead > 0 else 'rejected'} response is"
      f" the longer one (means {before.chosen:.0f} chosen, {before.rejected:.0f}"
      " rejected), so no balanced set is left. Add pairs of the other kind, or train"
      " without balancing."
    )
  return kept, before, Lengths.of(kept, length)


# -- files -----------------------------------------------------------------------------


def write(path: str | pathlib.Path, rows: Sequence[Preference | SafetyLabel]) -> None:
  """One JSON object a line, as `read_preferences` and `read_safety` take them."""
  lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in rows)
  pathlib.Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def read_preferences(
  path: str | pathlib.Path, *, judgments: int = 4
) -> tuple[list[Preference], Counts]:
  """Reads a user's file (.jsonl, or .json with a list; also .gz). A row is one of

    {"prompt", "chosen", "rejected", "delta"}       delta in (1, 2]
    {"prompt", "a", "b", "scores": [1, 2, 2, 1]}    grades in favour of a, -2 to 2

  of which the second kind is judged here: a row whose mean grade lies within -1..1 is
  left out and counted.

  Args:
    path: the file.
    judgments: how many scores a row of the second kind has.

  Raises:
    UserError: no such file, a malformed row (it is named), or nothing is left.
  """
  found = read_rows(
    pathlib.Path(path),
    lambda row: _preferences(row, judgments),
    '{"prompt": "...", "chosen": "...", "rejected": "...", "delta": 1.5}, or'
    f' {{"prompt": "...", "a": "...", "b": "...", "scores": [{judgments} grades]}}',
  )
  kept = [p for row in found for p in row]
  counts = Counts(len(kept), equal=0, unsure=len(found) - len(kept))
  if not kept:
    raise UserError(
      f"{path} holds no preference: {len(found)} rows, {counts.unsure} of them with a"
      f" mean grade within -{SURE}..{SURE}. Add pairs that the judge is sure of."
    )
  return kept, counts


def read_safety(path: str | pathlib.Path) -> list[SafetyLabel]:
  """Reads a user's file of {"prompt", "response", "safe"} rows.

  Raises:
    UserError: as `read_preferences`, or there are not both kinds of labels.
  """
  form = '{"prompt": "...", "response": "...", "safe": true}'
  labels = read_rows(pathlib.Path(path), _safety, form)
  safe = sum(label.safe for label in labels)
  if not 0 < safe < len(labels):
    raise UserError(
      f"{path} holds {safe} safe and {len(labels) - safe} unsafe responses; a safety"
      " model needs both. Add the missing kind."
    )
  return labels


def _preferences(row: dict, judgments: int) -> list[Preference]:
  prompt = text_of(row, "prompt")
  if "scores" in row or "a" in row:
    pair = Comparison(prompt, *_two_texts(row, "a", "b"))
    return _preference(pair, _mean_score(row.get("scores"), judgments))
  chosen, rejected = _two_texts(row, "chosen", "rejected")
  delta = _number(row.get("delta"), "delta")
  if not SURE < delta <= MOST:
    fail(f'"delta" is {reprlib.repr(delta)}, not above {SURE} and at most {MOST}')
  return [Preference(prompt, chosen, rejected, delta)]


def _safety(row: dict) -> SafetyLabel:
  safe = row.get("safe")
  if not isinstance(safe, bool):
    fail(f'"safe" is {reprlib.repr(safe)}, not true or false')
  return SafetyLabel(text_of(row, "prompt"), text_of(row, "response"), safe)


def _two_texts(row: dict, first: str, second: str) -> tuple[str, str]:
  texts = text_of(row, first), text_of(row, second)
  return fail(f'"{first}" and "{second}" are equal') if texts[0] == texts[1] else texts


def _number(value: object, name: str) -> int | float:
  if not isinstance(value, int | float) or isinstance(value, bool):
    fail(f'no number under "{name}", but {reprlib.repr(value)}')
  return value


def _mean_score(scores: object, judgments: int) -> float:
  if not isinstance(scores, list) or len(scores) != judgments:
    fail(f'"scores" is {reprlib.repr(scores)}, not a list of {judgments} grades')
  grades = [_number(score, "scores") for score in scores]
  if max(map(abs, grades)) > MOST:
    fail(f'"scores" is {reprlib.repr(scores)}, with a grade outside -{MOST}..{MOST}')
  return sum(grades) / judgments
