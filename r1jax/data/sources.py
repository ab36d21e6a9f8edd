"""Public benchmark files as problems: `read` opens one, `SOURCES` knows their fields.

Each source lists the spellings that a set and its mirrors give a field; other fields
are not looked at. Nothing is fetched, and what a file holds is never run.
"""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import pathlib
import re
import reprlib
import zlib

from r1jax.data.livecodebench import livecodebench
from r1jax.data.problem import KINDS, Problem, Tests
from r1jax.data.rows import (
  ANSWER,
  checked_problem,
  entry_point,
  fail,
  field_of,
  final_answers,
  pairs_of,
  reader_of,
  text_of,
)
from r1jax.errors import UserError
from r1jax.rewards.instructions import spec_of


def read(
  source: str,
  path: str | pathlib.Path,
  *,
  key: str = "config.data.problems",
  skip_malformed: bool = False,
) -> list[Problem]:
  """Reads a benchmark's file: .jsonl, .json (a list) or .csv (with a header), each also
  as .gz, in UTF-8. A row that stands twice is kept twice.

  Args:
    source: a name in SOURCES.
    path: the file.
    key: what named the file.
    skip_malformed: leave malformed rows out instead of refusing the file.

  Raises:
    UserError: no such source or file, a broken file or one of another form, nothing in
      it, or a malformed row (its number is named).
  """
  if source not in SOURCES:
    raise UserError(
      f"there is no source {source!r} of problems; take one of {', '.join(SOURCES)} or"
      " reasoning_gym."
    )
  return read_with(
    SOURCES[source],
    path,
    form=_FORMS[source],
    key=key,
    skip_malformed=skip_malformed,
  )


def read_with(
  parse: Callable[[dict], Problem],
  path: str | pathlib.Path,
  *,
  form: str,
  key: str = "",
  skip_malformed: bool = False,
) -> list[Problem]:
  """As `read`, of rows in a form of your own.

  Args:
    parse: a row's problem; it raises ValueError for what is malformed.
    path: the file.
    form: a good row, for the error's text.
    key: of the config, which named the file; "": the command did.
    skip_malformed: as in `read`.
  """
  path = pathlib.Path(path)
  shown = f"{key}={path}" if key else str(path)
  rows = reader_of(path, shown)
  problems, first, bad = [], "", 0
  try:
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
      for where, raw, row in rows(file):
        try:
          problem = parse(row())
          problems.append(dataclasses.replace(problem, where=f"{path}{where}"))
        except ValueError as e:
          first, bad = first or f"{path}{where}: {e}: {raw[:60]!r}", bad + 1
  except (OSError, EOFError, zlib.error, ValueError) as e:
    raise UserError(f"{path} cannot be read: {e}. Mend it or fetch it again.") from e
  if bad and not skip_malformed:
    raise UserError(
      first
      + (f" (and {bad - 1} more such lines)" if bad > 1 else "")
      + f". A line is {form}; mend it"
      + (
        ", or leave such lines out with --config.data.skip_malformed=True"
        * key.startswith("config")
      )
      + "."
    )
  if not problems:
    raise UserError(f"{shown} holds no usable problem ({bad} malformed lines).")
  return problems


# -- our own ---------------------------------------------------------------------------


def _jsonl(row: dict) -> Problem:
  """Our own form: "problem" or "question", and "answer": a text, a number or a list of
  them. "kind" is answer, text, choice (a letter), code or instructions; left out, tests
  make it code and instructions instructions.

  Code has, instead of an answer, one of
    "tests": [{"input", "output"}]                      a program reads and prints
    "entry_point", "tests": [{"args": [], "expected"}]  a function is called
    "entry_point", "test", perhaps "prompt"             HumanEval's check(candidate)
  and instructions have "instructions": [{"id": "punctuation:no_comma", "kwargs": {}}].
  """
  kind = row.get("kind", _kind_of(row))
  if kind not in KINDS:
    raise ValueError(f'"kind" is {reprlib.repr(kind)}, not one of {", ".join(KINDS)}')
  text = text_of(row, "problem", "question")
  if kind == "code":
    return checked_problem(
      text, kind=kind, tests=check_of(row) if "test" in row else _own(row)
    )
  if kind == "instructions":
    return checked_problem(text, (spec_of(row.get("instructions")),), kind)
  answers = final_answers(row)
  if kind == "choice" and not all(re.fullmatch("[A-Z]", a) for a in answers):
    raise ValueError(f"a choice is a letter A to Z, not {reprlib.repr(answers)}")
  return checked_problem(text, answers, kind)


def _kind_of(row: dict) -> str:
  if "tests" in row or "test" in row:
    return "code"
  return "instructions" if "instructions" in row else "answer"


def _own(row: dict) -> Tests:
  call = "entry_point" in row
  fields = {"args": list, "expected": object} if call else {"input": str, "output": str}
  cases = tuple(pairs_of("tests", row.get("tests"), fields)) or fail('"tests" is empty')
  if call:
    return Tests("call", cases, entry_point(row["entry_point"]))
  return Tests("stdin", cases)


def check_of(row: dict) -> Tests:
  check = text_of(row, "test")
  if not re.search(r"^def check\(", check, re.MULTILINE):
    raise ValueError('no "def check(candidate)" in "test"')
  preamble = text_of(row, "prompt") if "prompt" in row else ""
  return Tests("check", (), entry_point(row.get("entry_point")), preamble, check)


# -- benchmarks ------------------------------------------------------------------------


def _gsm8k(row: dict) -> Problem:
  """GSM8K (openai/gsm8k; train.jsonl and test.jsonl of grade-school-math): question,
  answer with the number after "####". 1,234 is accepted as 1234 and as it stands."""
  if "####" not in text_of(row, "answer"):
    raise ValueError('no "####" in "answer"')
  (final,) = final_answers(row)
  plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", final)
  return checked_problem(text_of(row, "question"), tuple(dict.fromkeys([plain, final])))


def _math500(row: dict) -> Problem:
  """MATH-500 (HuggingFaceH4/MATH-500 and its copies): problem, answer in LaTeX."""
  return checked_problem(text_of(row, "problem"), (text_of(row, "answer").strip(),))


def _aime(row: dict) -> Problem:
  r"""AIME of any year; the answer is a text or a number, and 025 becomes 25.

  problem, answer    HuggingFaceH4/aime_2024, math-ai/aime25, MathArena/aime_2026
  Problem, Answer    Maxwell-Jia/AIME_2024
  question, answer   opencompass/AIME2025, where one answer reads 336^\circ
  Question, Answer   di-zhang-fdu/AIME_1983_2024
  """
  text = text_of(row, "problem", "Problem", "question", "Question")
  answer = field_of(row, "answer", "Answer")
  written = str(answer) if isinstance(answer, str | int) else ""
  digits = re.fullmatch(r"([0-9]{1,3})(\^\{?\\circ\}?|°)?", written.strip())
  if not digits:
    raise ValueError(f'"answer" is {reprlib.repr(answer)}, not an integer 0 to 999')
  return checked_problem(text, (str(int(digits[1])),))


def _gpqa(row: dict) -> Problem:
  """GPQA (Idavidrein/gpqa, gpqa_*.csv): Question, Correct Answer, Incorrect Answer 1 to
  3. The options stand in the order of a hash of question and option, so always alike.
  Copies with lettered options are read as `jsonl`, kind choice."""
  question = text_of(row, "Question").strip()
  right = text_of(row, "Correct Answer").strip()
  wrong = [text_of(row, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
  if right in wrong:
    raise ValueError('the "Correct Answer" is an incorrect one too')

  def place(option: str) -> bytes:
    return hashlib.sha256(f"{question}\n{option}".encode("utf-8", "replace")).digest()

  options = sorted([right, *wrong], key=place)
  lines = [f"{a}) {option}" for a, option in zip("ABCD", options, strict=True)]
  letter = "ABCD"[options.index(right)]
  return checked_problem("\n".join([question, "", *lines]), (letter,), "choice")


def _humaneval(row: dict) -> Problem:
  """HumanEval (openai/openai_humaneval; HumanEval.jsonl.gz): prompt, entry_point, test.
  The prompt is the preamble too, so that its imports and helpers are there."""
  prompt = text_of(row, "prompt").rstrip()
  text = f"Complete this function.\n\n```python\n{prompt}\n```\n\n{ANSWER}"
  return checked_problem(text, kind="code", tests=check_of(row))


def _ifeval(row: dict) -> Problem:
  """IFEval (google/IFEval; input_data.jsonl of instruction_following_eval): prompt,
  instruction_id_list, and kwargs, an object for every id. A null is not given."""
  text = text_of(row, "prompt")
  ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
  for name, value in (("instruction_id_list", ids), ("kwargs", kwargs)):
    if not isinstance(value, list):
      raise ValueError(f'"{name}" is {reprlib.repr(value)}, not a list')
  if len(ids) != len(kwargs):
    raise ValueError(f"{len(ids)} instructions have {len(kwargs)} kwargs")
  asked = [{"id": i, "kwargs": k} for i, k in zip(ids, kwargs, strict=True)]
  return checked_problem(text, (spec_of(asked),), "instructions")


SOURCES: dict[str, Callable[[dict], Problem]] = {
  "jsonl": _jsonl,
  "gsm8k": _gsm8k,
  "math500": _math500,
  "aime": _aime,
  "gpqa": _gpqa,
  "livecodebench": livecodebench,
  "humaneval": _humaneval,
  "ifeval": _ifeval,
}
_FORMS = {
  "jsonl": '{"problem": "...", "answer": "..."}, or code with "tests", or'
  ' "instructions"',
  "gsm8k": '{"question": "...", "answer": "... #### 72"}',
  "math500": '{"problem": "...", "answer": "..."}',
  "aime": '{"problem": "...", "answer": 25}',
  "gpqa": "Question, Correct Answer, Incorrect Answer 1, 2 and 3",
  "livecodebench": "question_content, public_test_cases, private_test_cases, metadata"
  " and starter_code",
  "humaneval": '{"prompt": "...", "entry_point": "...", "test": "..."}',
  "ifeval": '{"prompt": "...", "instruction_id_list": ["..."], "kwargs": [{}]}',
}
