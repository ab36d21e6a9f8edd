"""LiveCodeBench: its rows, and its packed private tests."""

import base64
from collections.abc import Iterator
import io
import pickle
import pickletools
import re
from typing import Any
import zlib

from r1jax.data.problem import Problem, Tests
from r1jax.data.rows import (
  ANSWER,
  an_object,
  checked_problem,
  entry_point,
  pairs_of,
  read_json,
  text_of,
)

MAX_HIDDEN = 256 << 20  # bytes of a row's private tests, decompressed


def livecodebench(row: dict) -> Problem:
  """LiveCodeBench (livecodebench/code_generation and _lite, lighteval's copy of it):
  question_content, starter_code, public_test_cases, private_test_cases, metadata. The
  last three are JSON or what it says, private tests also LiveCodeBench's packed form.
  All the tests count.

  A functional test's input has one JSON value a line, the arguments in order. The entry
  point is metadata's func_name, of `Solution()` where the starter has that class. The
  preamble imports what the benchmark's own runner does: starters say List and do not
  import it.
  """
  tests = [t for name in _HIDDEN for t in _decoded(name, row.get(name))]
  styles = {style for style, _ in tests}
  if len(styles) != 1:
    raise ValueError("tests of two types" if tests else "there are no tests")
  content, cases = text_of(row, "question_content"), tuple(case for _, case in tests)
  if "stdin" in styles:
    ask = "Write a Python program that reads its input from stdin and prints to stdout."
    given = Tests("stdin", cases, preamble=PRELUDE)
  else:
    starter = text_of(row, "starter_code").rstrip()
    ask = f"Complete this code; keep its names.\n\n```python\n{starter}\n```"
    metadata = row.get("metadata")
    metadata = an_object(read_json(metadata) if isinstance(metadata, str) else metadata)
    name = entry_point(metadata.get("func_name"))
    method = re.search(r"^class Solution\b", starter, re.MULTILINE)
    given = Tests("call", cases, f"Solution().{name}" if method else name, PRELUDE)
  return checked_problem(f"{content}\n\n{ask}\n\n{ANSWER}", kind="code", tests=given)


_HIDDEN = ("public_test_cases", "private_test_cases")
_MODULES = (
  "string re datetime collections heapq bisect copy math random statistics itertools"
  " functools operator io sys json"
).split()
PRELUDE = "".join(
  [f"from {name} import *\n" for name in [*_MODULES, "builtins", "typing"]]
  + [f"import {name}\n" for name in _MODULES]
  + ["sys.setrecursionlimit(50_000)\n"]
)


def _decoded(name: str, tests: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
  if isinstance(tests, str):
    tests = read_json(tests if tests.lstrip().startswith("[") else _hidden(tests))
  fields = {"input": str, "output": str, "testtype": str}
  for i, (given, wanted, kind) in enumerate(pairs_of(name, tests, fields)):
    if kind not in ("stdin", "functional"):
      raise ValueError(f"{name}[{i}] is of type {kind!r:.20}, not stdin or functional")
    if kind == "stdin":
      yield "stdin", (given, wanted)
      continue
    try:
      arguments = [read_json(line) for line in given.split("\n") if line.strip()]
      yield "call", (arguments, read_json(wanted))
    except ValueError as e:
      raise ValueError(f"{name}[{i}] is {e}") from e


def _hidden(text: str) -> str:
  """The text in base64 of zlib of its pickle. A pickle can run code and claim any
  amount of memory, so one with more in it than a text is not opened, and the rest by an
  unpickler that knows no class."""
  try:
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(text, validate=True), MAX_HIDDEN)
    if not inflate.eof:
      raise ValueError(f"cut short, or more than {MAX_HIDDEN >> 20} MiB")
    if not all(op.name in _OPS for op, _, _ in pickletools.genops(data)):
      raise ValueError("a pickle of more than a text")
    return Unpickler(io.BytesIO(data)).load()
  except Exception as e:  # whatever two decoders find wrong with spoiled bytes
    raise ValueError(f"private tests that do not decode ({e})") from e


_OPS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "STOP"} | {
  *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
}


class Unpickler(pickle.Unpickler):
  """Opens plain values alone: whatever would name a class or an object is refused."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it names {module}.{name}")

  def persistent_load(self, pid: Any) -> Any:
    raise pickle.UnpicklingError("it names an object outside")
