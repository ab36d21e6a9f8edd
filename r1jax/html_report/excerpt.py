"""As much of a run's files as a page has room for, and a sentence on what is left out.

Long files are read line by line. What is shown is the first, the last and evenly spaced
ones between them.
"""

from collections.abc import Callable, Iterator, Sequence
import itertools
import json
import pathlib
from typing import Any, BinaryIO

GROUPS = 60, 1_500_000  # of traced tokens: groups, and bytes of JSON
SAMPLES = 100, 1_000_000  # evaluations, and bytes
TEXTS, CHARACTERS = 16, 8_000  # outputs of a problem, and of each
POINTS = 1_000  # of a curve
NUMBERS = ("logprob", "ratio", "advantage", "kl")  # of a token


def json_object(path: pathlib.Path) -> dict:
  """What a file of JSON holds; {} where there is none, or it holds something else."""
  try:
    value = json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def lines(file: BinaryIO) -> Iterator[tuple[int, dict]]:
  """(offset, row) of every whole line; half of one, which a killed run left, is passed
  over."""
  offset = 0
  for line in file:
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if isinstance(row, dict):
      yield offset, row
    offset += len(line)


def number(value: Any, digits: int = 5) -> float | int | None:
  """A finite number of so many digits, 0: as it is; or None."""
  if type(value) not in (int, float) or not -1e300 < value < 1e300:
    return None
  if isinstance(value, int) and abs(value) < 2**53:
    return value
  return float(f"{value:.{digits}g}") if digits else float(value)


def cut(text: Any, most: int, whole: int = 0) -> str:
  """At most so many characters, with a word on the rest. Args: whole: characters of a
  text of which this is the beginning."""
  text = text if isinstance(text, str) else str(text)
  whole = max(whole, len(text))
  return text if whole <= most else f"{text[:most]} … (of {whole:,} characters)"


def size(value: Any) -> int:
  """Bytes in the page: JSON, where <, > and & take six."""
  text = json.dumps(value, separators=(",", ":"))
  return len(text) + 5 * sum(text.count(c) for c in "<>&")


def spread(count: int, most: int) -> list[int]:
  """The first, the last and evenly spaced places between them."""
  if count <= most:
    return list(range(count))
  return [round(i * (count - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def fitting(items: Sequence[Any], budget: int) -> list[Any]:
  """As many of them, evenly spaced, as fit into so many bytes of JSON."""
  sizes = [size(item) + 1 for item in items]
  count = len(items)
  while count > 1 and sum(sizes[i] for i in spread(len(items), count)) > budget:
    count -= 1
  return [items[i] for i in spread(len(items), count)]


def thinned(values: Sequence[float], most: int = POINTS) -> list[int]:
  """Places of the first, the last, and every stretch's least and largest value."""
  count = len(values)
  if count <= most:
    return list(range(count))
  kept, stretches = {0, count - 1}, max(most // 2 - 1, 1)
  edges = [round(i * count / stretches) for i in range(stretches + 1)]
  for low, high in itertools.pairwise(edges):
    kept.add(min(range(low, high), key=values.__getitem__))
    kept.add(max(range(low, high), key=values.__getitem__))
  return sorted(kept)


def _smaller(
  make: Callable[[int, int], dict], length: int, count: int, budget: int
) -> dict:
  """make(length, count) with the largest of both that fits, length going first."""
  while (bytes_ := size(found := make(length, count))) > budget:
    if length > 16:
      length = max(int(0.95 * length * budget / bytes_), 16)
    elif count > 1:
      count //= 2
    else:
      break
  return found


# -- groups --------------------------------------------------------------------


def groups(path: pathlib.Path) -> dict:
  """{"list": groups of traced outputs, "note": what is left out}."""
  most, budget = GROUPS
  places: dict[tuple, list[int]] = {}
  found = []
  if path.exists():
    with path.open("rb") as file:
      for offset, row in lines(file):
        if isinstance(row.get("tokens"), list):
          key = number(row.get("step")), number(row.get("group"))
          places.setdefault(key, []).append(offset)
      keys = list(places)
      for key in (keys[i] for i in spread(len(keys), most)):
        found.append(_group(key, _rows_at(file, places[key]), budget // 4))
  if not found:
    return {"list": [], "note": f"{path.name} has no traced groups."}
  found = fitting(found, budget)
  note = f"Every traced group of {path.name}."
  if len(found) < len(places):
    note = (
      f"{len(found)} of {len(places):,} traced groups: the first, the last and evenly"
      f" spaced ones. All are in {path.name}."
    )
  return {"list": found, "note": note}


def _rows_at(file: BinaryIO, offsets: list[int]) -> list[dict]:
  """The rows there; of two of one sample the later."""
  found = {}
  for offset in offsets:
    file.seek(offset)
    row = json.loads(file.readline())
    sample = number(row.get("sample"))
    found[("at", offset) if sample is None else sample] = row
  return list(found.values())


def _group(key: tuple, rows: list[dict], budget: int) -> dict:
  """A group's outputs, the first tokens of each where all are too many."""

  def make(length: int, count: int) -> dict:
    return {
      "step": key[0],
      "group": key[1],
      "problem": cut(rows[0].get("problem") or "", 2_000),
      "answers": _answers(rows[0]),
      "outputs": [_output(row, length) for row in rows[:count]],
      "whole": len(rows),
    }

  longest = max(len(row["tokens"]) for row in rows)
  return _smaller(make, min(longest, 4_000), min(len(rows), 64), budget)


def _answers(row: dict) -> list[str]:
  answers = row.get("answers")
  answers = answers if isinstance(answers, list) else []
  return [cut(answer, 200) for answer in answers[:10]]


def _output(row: dict, length: int) -> dict:
  """One output; `whole` counts all of its tokens."""
  found: dict[str, Any] = {
    "sample": number(row.get("sample")),
    "tokens": [cut(token, 100) for token in row["tokens"][:length]],
    "whole": len(row["tokens"]),
    "reward": number(row.get("reward"), 4),
    "outcome": cut(row.get("outcome") or "", 100),
  }
  parts = row.get("parts")
  if isinstance(parts, dict):
    some = list(parts.items())[:30]
    found["parts"] = [[cut(name, 60), number(value, 4)] for name, value in some]
  for name in NUMBERS:
    if isinstance(row.get(name), list):
      found[name] = [number(value, 0) for value in row[name][:length]]
  if isinstance(row.get("clipped"), list):
    found["clipped"] = [cut(side, 10) for side in row["clipped"][:length]]
  return found


# -- samples -------------------------------------------------------------------


def samples(path: pathlib.Path) -> dict:
  """{"rows": held-out problems with outputs, "note": what is left out}."""
  by_step: dict[Any, list[dict]] = {}
  if path.exists():
    with path.open("rb") as file:
      for _, row in lines(file):
        if isinstance(row.get("texts"), list):
          by_step.setdefault(number(row.get("step")), []).append(_sample(row))
  if not by_step:
    return {"rows": [], "note": f"{path.name} has no outputs."}
  most, budget = SAMPLES
  evaluations = list(by_step.values())
  chosen = [evaluations[i] for i in spread(len(evaluations), most)]
  found = fitting([_evaluation(rows, budget // 4) for rows in chosen], budget)
  kept = sum(row["kept"] for rows in evaluations for row in rows)
  shown = sum(len(row["texts"]) for part in found for row in part["rows"])
  note = f"Every output that {path.name} keeps; it has the marks of all problems."
  if shown < kept:
    note = (
      f"{shown:,} of the {kept:,} outputs that {path.name} keeps, of {len(found)} of"
      f" {len(evaluations):,} evaluations: the first, the last and evenly spaced ones,"
      f" with at most {TEXTS} outputs of a problem."
    )
  return {"rows": [row for part in found for row in part["rows"]], "note": note}


def _evaluation(rows: list[dict], budget: int) -> dict:
  def make(length: int, count: int) -> dict:
    short = [_shorter(row, length) for row in rows[:count]]
    return {"rows": short}

  longest = max((n for row in rows for n in row["lengths"]), default=0)
  return _smaller(make, min(longest, CHARACTERS), len(rows), budget)


def _shorter(row: dict, length: int) -> dict:
  pairs = zip(row["texts"], row["lengths"], strict=True)
  found = {k: v for k, v in row.items() if k not in ("lengths", "kept")}
  return found | {"texts": [cut(text, length, whole) for text, whole in pairs]}


def _sample(row: dict) -> dict:
  """A problem's first outputs, of `kept`, and their lengths; `right` of `drawn` are
  correct, also those without a text."""
  texts = [x if isinstance(x, str) else str(x) for x in row["texts"][:TEXTS]]
  correct = row.get("correct") if isinstance(row.get("correct"), list) else []
  form = row.get("format") if isinstance(row.get("format"), list) else []
  return {
    "step": number(row.get("step")),
    "problem": cut(row.get("problem") or "", 2_000),
    "answers": _answers(row),
    "texts": [text[:CHARACTERS] for text in texts],
    "lengths": [len(text) for text in texts],
    "kept": len(row["texts"]),
    "correct": [bool(mark) for mark in correct[: len(texts)]],
    "format": [number(mark, 3) for mark in form[: len(texts)]],
    "right": sum(map(bool, correct)),
    "drawn": len(correct),
  }
