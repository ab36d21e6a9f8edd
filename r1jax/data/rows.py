"""Rows of a file and their fields, checked: JSON lines, a JSON list, a CSV table."""

from collections.abc import Callable, Iterator
import csv
import functools
import gzip
import io
import json
import math
import pathlib
import re
import reprlib
from typing import Any, BinaryIO, TypeVar
import zlib

from r1jax.data.problem import Problem, Tests
from r1jax.errors import UserError

_Row = TypeVar("_Row")
Rows = Iterator[tuple[str, bytes | str, Callable[[], dict]]]
ANSWER = "Answer with the whole of it in one ```python block."


# -- files -----------------------------------------------------------------------------


def reader_of(path: pathlib.Path, shown: str) -> Callable[[BinaryIO], Rows]:
  if not path.is_file():
    raise UserError(f"{shown}: there is no such file.")
  suffix = pathlib.PurePath(path.name.lower().removesuffix(".gz")).suffix
  if suffix == ".parquet":
    raise UserError(
      f"{shown}: Parquet is not read. Convert it once: python -c"
      f' \'import pandas; pandas.read_parquet("{path}")'
      f'.to_json("{path.with_suffix(".jsonl")}", orient="records", lines=True)\''
    )
  if suffix not in _READERS:
    raise UserError(
      f"{shown} ends in none of {', '.join(_READERS)}, nor in one"
      " of them and .gz. Convert or rename it."
    )
  return _READERS[suffix]


def read_rows(path: pathlib.Path, parse: Callable[[dict], _Row], form: str) -> list:
  """All rows of a file, parsed.

  Args:
    path: .jsonl, or .json with a list, or .csv; also .gz.
    parse: (object) -> row; raises ValueError.
    form: what a row looks like, for the error.

  Raises:
    UserError: no such file, or a malformed row (the first is named, all are counted).
  """
  rows = reader_of(path, str(path))
  parsed, first, bad = [], "", 0
  try:
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
      for where, raw, row in rows(file):
        try:
          parsed.append(parse(row()))
        except ValueError as e:
          shown = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
          first, bad = first or f"{path}{where}: {e}: {shown[:60]!r}", bad + 1
  except (OSError, EOFError, zlib.error, ValueError) as e:
    raise UserError(f"{path} cannot be read: {e}. Mend it or fetch it again.") from e
  if bad:
    more = f" (and {bad - 1} more such rows)" if bad > 1 else ""
    raise UserError(f"{first}{more}. A row is {form}; mend it or take it out.")
  return parsed


def _lines(file: BinaryIO) -> Rows:
  for number, line in enumerate(file, 1):
    line = line.rstrip(b"\r\n")
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    if line.strip():
      yield f":{number}", line, lambda line=line: an_object(read_json(line))


def _list(file: BinaryIO) -> Rows:
  rows = read_json(file.read().removeprefix(b"\xef\xbb\xbf"))
  if not isinstance(rows, list):
    raise ValueError("it is no JSON list (a file of one object a line ends in .jsonl)")
  for number, row in enumerate(rows, 1):
    yield f" row {number}", reprlib.repr(row), functools.partial(an_object, row)


def _table(file: BinaryIO) -> Rows:
  text = file.read().decode("utf-8-sig", "surrogateescape")
  reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
  try:
    for number, row in enumerate(reader, 1):
      raw = ",".join(value for value in row.values() if isinstance(value, str))
      yield f" row {number}", raw, functools.partial(_record, row)
  except csv.Error as e:
    raise ValueError(f"line {reader.line_num} is not CSV ({e})") from e


_READERS = {".jsonl": _lines, ".json": _list, ".csv": _table}


def _record(row: dict) -> dict:
  if None in row or None in row.values():
    raise ValueError("not as many fields as the header has")
  if any("\udc80" <= c <= "\udcff" for value in row.values() for c in value):
    raise ValueError("not UTF-8")
  return row


def an_object(row: Any) -> dict:
  return row if isinstance(row, dict) else fail("not a JSON object")


def read_json(text: bytes | str) -> Any:
  """Reads JSON of the standard: no NaN, and no number that would become infinite."""
  try:
    text = text.decode() if isinstance(text, bytes) else text
    return json.loads(text, parse_constant=fail, parse_float=_finite)
  except UnicodeDecodeError as e:
    raise ValueError("not UTF-8") from e
  except RecursionError as e:
    raise ValueError("nested too deeply") from e
  except ValueError as e:
    where = f" at character {e.pos}" if isinstance(e, json.JSONDecodeError) else ""
    raise ValueError(f"not JSON ({getattr(e, 'msg', e)}{where})") from e


def _finite(text: str) -> float:
  value = float(text)
  return value if math.isfinite(value) else fail(f"{text[:20]} is too large a number")


def fail(reason: str) -> Any:
  raise ValueError(reason)


# -- fields ----------------------------------------------------------------------------


def checked_problem(
  text: str,
  answers: tuple[str, ...] = (),
  kind: str = "answer",
  tests: Tests | None = None,
) -> Problem:
  """Refuses what could not be written to a file or sent to a program."""
  code = (tests.cases, tests.entry_point, tests.preamble, tests.check) if tests else ()
  try:
    json.dumps([text, answers, code], ensure_ascii=False).encode()
  except UnicodeEncodeError as e:
    raise ValueError("half a surrogate pair") from e
  except RecursionError as e:
    raise ValueError("nested too deeply") from e
  return Problem(text.strip(), answers, kind, tests)


def field_of(row: dict, *names: str) -> Any:
  return next((row[name] for name in names if name in row), None)


def text_of(row: dict, *names: str) -> str:
  value = field_of(row, *names)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'no text under "{names[0]}"')
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f'half a surrogate pair in "{names[0]}"') from e
  return value


def final_answers(row: dict) -> tuple[str, ...]:
  """The answers; of one that shows its work, what follows the last "####"."""
  answers = row.get("answer")
  answers = answers if isinstance(answers, list) else [answers]
  if not answers or not all(
    isinstance(a, str | int | float) and not isinstance(a, bool) and str(a).strip()
    for a in answers
  ):
    raise ValueError('no text or number under "answer"')
  final = tuple(str(a).rpartition("####")[2].strip() for a in answers)
  return final if all(final) else fail('nothing follows "####"')


def entry_point(value: Any) -> str:
  pattern = r"([^\W\d]\w*(\(\))?\.)*[^\W\d]\w*"
  if isinstance(value, str) and re.fullmatch(pattern, value):
    return value
  shown = reprlib.repr(value)
  raise ValueError(f"entry point {shown} is no name like solve or Solution().solve")


def pairs_of(name: str, cases: Any, fields: dict[str, type]) -> list[tuple[Any, ...]]:
  """The fields of every test of a list, checked."""
  if not isinstance(cases, list):
    raise ValueError(f'"{name}" is no list of tests')
  for i, case in enumerate(cases):
    if not isinstance(case, dict):
      raise ValueError(f"{name}[{i}] is no object")
    for field, wanted in fields.items():
      if field not in case:
        raise ValueError(f'{name}[{i}] has no "{field}"')
      if not isinstance(case[field], wanted):
        raise ValueError(f'"{field}" of {name}[{i}] is no {wanted.__name__}')
  return [tuple(case[field] for field in fields) for case in cases]
