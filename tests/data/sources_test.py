"""Sources: every benchmark's fields, every way a file can be broken, no code run."""

import base64
import csv
import dataclasses
import gzip
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zlib

import pytest

from r1jax.data import gym, livecodebench, sources
from r1jax.data.problem import Problem
from r1jax.data.problem import Tests as Cases
from r1jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
FILES = {path.stem: path for path in FIXTURES.iterdir()}
GOOD = '{"problem": "p", "answer": "1"}'
P = Problem("p", ("1",))
DEEP = "[" * 100_000 + "]" * 100_000


def write(tmp_path, name, content):
  path = tmp_path / name
  data = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  return path


def rows(source):
  """The fixture's rows as the reader decodes them."""
  text = FILES[source].read_text()
  if FILES[source].suffix == ".csv":
    return list(csv.DictReader(io.StringIO(text, newline="")))
  if FILES[source].suffix == ".json":
    return json.loads(text)
  return [json.loads(line) for line in text.splitlines()]


def code(row):
  return sources.SOURCES["jsonl"]({"problem": "p", **row}).tests


# -- what each source reads ------------------------------------------------------------


def test_there_is_a_fixture_of_three_rows_for_every_source():
  assert FILES.keys() == sources.SOURCES.keys()
  for source, path in FILES.items():
    assert len(sources.read(source, path)) == 3


def test_our_own_rows_are_answers_choices_and_code():
  assert sources.read("jsonl", FILES["jsonl"]) == [
    Problem("Wieviel ist 7 × 6?", ("42",)),
    Problem(rows("jsonl")[1]["question"], ("B",), "choice"),
    Problem(
      "Write `twice`, which doubles its argument.",
      (),
      "code",
      Cases("call", (([4], 8), (["ab"], "abab")), "twice"),
    ),
  ]


def test_our_own_code_is_of_three_styles():
  stdin = {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "", "output": ""}]}
  assert code(stdin) == Cases("stdin", (("1\n", "2\n"), ("", "")))
  call = {"entry_point": "Solution().f", "tests": [{"args": [], "expected": None}]}
  assert code(call) == Cases("call", (([], None),), "Solution().f")
  check = {"entry_point": "f", "test": "def check(candidate):\n  assert candidate()\n"}
  assert code(check) == Cases("check", (), "f", "", check["test"])
  assert code({**check, "prompt": "import os\n"}).preamble == "import os\n"


def test_a_kind_that_is_named_wins():
  row = {"problem": "p", "answer": "1", "tests": [], "kind": "answer"}
  assert sources.SOURCES["jsonl"](row) == P


def test_gsm8k_keeps_what_follows_the_marks_and_drops_the_commas_of_thousands():
  problems = sources.read("gsm8k", FILES["gsm8k"])
  assert [p.answers for p in problems] == [("72",), ("1240", "1,240"), ("-5",)]
  assert problems[0].problem == rows("gsm8k")[0]["question"]


def test_math500_keeps_the_latex():
  answers = [p.answers for p in sources.read("math500", FILES["math500"])]
  assert answers == [(r"\frac{3}{4}",), ("(-3,3)",), ("2",)]


def test_aime_reads_every_spelling_of_its_fields_as_an_integer():
  problems = sources.read("aime", FILES["aime"])
  assert [p.answers for p in problems] == [("25",), ("50",), ("288",)]
  assert problems[2].problem.startswith("An arc is")
  row = {"Question": "q", "Answer": " 007 "}
  assert sources.SOURCES["aime"](row) == Problem("q", ("7",))


@pytest.mark.parametrize("answer", [0, "0", "000", 999, "5°", r"5^{\circ}"])
def test_aime_takes_what_the_contest_allows(answer):
  (said,) = sources.SOURCES["aime"]({"problem": "p", "answer": answer}).answers
  assert 0 <= int(said) <= 999


@pytest.mark.parametrize(
  "answer", [-1, 1000, "1000", "2.5", 25.0, "x", "", None, True, [25], "٢٥"]
)
def test_aime_refuses_what_it_does_not(answer):
  with pytest.raises(ValueError):
    sources.SOURCES["aime"]({"problem": "p", "answer": answer})


def test_gpqa_letters_its_options_and_answers_with_the_letter():
  for problem, row in zip(
    sources.read("gpqa", FILES["gpqa"]), rows("gpqa"), strict=True
  ):
    text, _, options = problem.problem.rpartition("\n\n")
    assert text == row["Question"] and problem.kind == "choice"
    shown = dict(line.split(") ", 1) for line in options.splitlines())
    assert sorted(shown) == list("ABCD")
    fields = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    assert sorted(shown.values()) == sorted(row[f].strip() for f in fields)
    (letter,) = problem.answers
    assert shown[letter] == row["Correct Answer"].strip()


def test_gpqa_shuffles_by_the_question_alone_and_evenly():
  def row(i, first):
    wrong = ["x", "y", "z"][first:] + ["x", "y", "z"][:first]
    fields = {f"Incorrect Answer {n + 1}": w for n, w in enumerate(wrong)}
    return {"Question": f"q{i}", "Correct Answer": "right", **fields}

  letters = []
  for i in range(400):
    problem = sources.SOURCES["gpqa"](row(i, 0))
    assert problem == sources.SOURCES["gpqa"](row(i, 1))
    letters += problem.answers
  assert all(70 < letters.count(x) < 130 for x in "ABCD")


def test_livecodebench_counts_public_and_private_tests():
  stdin, method, function = sources.read("livecodebench", FILES["livecodebench"])
  assert stdin.tests.style == "stdin" and stdin.kind == "code"
  assert stdin.tests.cases == (("1 2\n", "3\n"), ("5 -5\n", "0\n"), ("10 20\n", "30\n"))
  assert method.tests.entry_point == "Solution().shift"
  assert method.tests.cases == (
    *(([[1, 2], 3], [4, 5]), ([[], 7], [])),
    ([[0], -1], [-1]),
  )
  assert function.tests.entry_point == "greet"
  assert function.tests.cases == ((["Ada"], "hello, Ada"),)


def test_livecodebench_shows_the_starter_or_asks_for_a_program():
  stdin, method, _ = sources.read("livecodebench", FILES["livecodebench"])
  assert "stdin" in stdin.problem and stdin.problem.startswith("Two integers")
  starter = rows("livecodebench")[1]["starter_code"].rstrip()
  assert f"```python\n{starter}\n```" in method.problem


def test_livecodebench_mirrors_may_have_decoded_their_fields():
  row = rows("livecodebench")[2]
  decoded = {
    **row,
    "metadata": json.loads(row["metadata"]),
    "public_test_cases": json.loads(row["public_test_cases"]),
    "private_test_cases": [],
  }
  source = sources.SOURCES["livecodebench"]
  assert source(decoded) == source(row)


def test_the_entry_point_and_the_preamble_run_a_starter_that_is_filled_in():
  tests = sources.read("livecodebench", FILES["livecodebench"])[1].tests
  starter = rows("livecodebench")[1]["starter_code"]
  program = f"{tests.preamble}{starter}return [n + k for n in nums]\n"
  program += f"for args, want in {tests.cases!r}:\n"
  program += f"  assert ({tests.entry_point})(*args) == want\n"
  subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_humaneval_asks_for_the_function_and_checks_it():
  problem, *_ = sources.read("humaneval", FILES["humaneval"])
  row = rows("humaneval")[0]
  assert row["prompt"].strip() in problem.problem and problem.kind == "code"
  assert row["canonical_solution"] not in problem.problem
  want = Cases("check", (), "halve", row["prompt"], row["test"])
  assert problem.tests == want


@pytest.mark.parametrize("row", rows("humaneval"), ids=lambda r: r["task_id"])
def test_humaneval_canonical_solutions_pass_their_check(row):
  tests = sources.SOURCES["humaneval"](row).tests
  space = {}
  exec(tests.preamble + row["canonical_solution"] + tests.check, space)
  space["check"](space[tests.entry_point])


def test_ifeval_asks_its_prompt_and_keeps_what_is_asked_of_the_reply():
  for problem, row in zip(
    sources.read("ifeval", FILES["ifeval"]), rows("ifeval"), strict=True
  ):
    assert problem.problem == row["prompt"] and problem.kind == "instructions"
    (spec,) = problem.answers
    asked = json.loads(spec)
    assert [one["id"] for one in asked] == row["instruction_id_list"]
    for one, kwargs in zip(asked, row["kwargs"], strict=True):
      given = {name: value for name, value in kwargs.items() if value is not None}
      assert one["kwargs"] == given


def test_our_own_rows_may_be_instructions():
  asked = [{"id": "startend:end_checker", "kwargs": {"end_phrase": "Ende."}}]
  row = {"problem": "p", "instructions": [*asked, {"id": "punctuation:no_comma"}]}
  problem = sources.SOURCES["jsonl"](row)
  assert problem == sources.SOURCES["jsonl"]({**row, "kind": "instructions"})
  assert problem.problem == "p" and problem.kind == "instructions"
  (spec,) = problem.answers
  assert json.loads(spec) == [*asked, {"id": "punctuation:no_comma", "kwargs": {}}]


COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
BAD_INSTRUCTIONS = [
  ({"instruction_id_list": COMMA}, f"\"instruction_id_list\" is '{COMMA}', not a list"),
  ({"kwargs": {}}, '"kwargs" is {}, not a list'),
  ({"kwargs": []}, "1 instructions have 0 kwargs"),
  ({"kwargs": [{}, {}]}, "1 instructions have 2 kwargs"),
  ({"instruction_id_list": [], "kwargs": []}, "not []"),
  ({"instruction_id_list": ["punctuation:no_coma"]}, COMMA),
  ({"instruction_id_list": [7]}, '"id" that is a text'),
  ({"kwargs": [[]]}, f'"kwargs" of {COMMA} is [], not an object'),
  ({"kwargs": [{"num_words": 7}]}, f"{COMMA} takes nothing, not 'num_words'"),
  ({"instruction_id_list": [WORDS]}, f'{WORDS} has no "num_words"'),
  ({"prompt": ""}, 'no text under "prompt"'),
]


@pytest.mark.parametrize(
  "fields, why", BAD_INSTRUCTIONS, ids=[why for _, why in BAD_INSTRUCTIONS]
)
def test_ifeval_refuses_what_cannot_be_checked(tmp_path, fields, why):
  row = {"prompt": "p", "instruction_id_list": [COMMA], "kwargs": [{}]}
  path = write(tmp_path, "a.jsonl", json.dumps(row) + "\n" + json.dumps(row | fields))
  with pytest.raises(UserError) as error:
    sources.read("ifeval", path)
  assert str(error.value).startswith(f"{path}:2: ") and why in str(error.value)
  assert len(sources.read("ifeval", path, skip_malformed=True)) == 1


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
  "name, content",
  [
    ("a.jsonl", f"{GOOD}\r\n\n  \n{GOOD}"),
    ("a.json", f"[{GOOD},\n{GOOD}]\n"),
    ("a.csv", "problem,answer,more\np,1,\np,1,x\n"),
    ("A.CSV", 'answer,problem\r\n1,"p"\r\n\r\n1,p\r\n'),
  ],
)
def test_every_form_is_read_and_rows_that_repeat_are_kept(
  tmp_path, name, content, bom, suffix
):
  data = bom + content.encode()
  path = tmp_path / (name + suffix)
  path.write_bytes(gzip.compress(data) if suffix else data)
  assert sources.read("jsonl", str(path)) == [P, P]


def test_a_field_of_a_table_may_have_lines_commas_and_quotes(tmp_path):
  path = write(tmp_path, "a.csv", 'problem,answer\n"a\nb, ""c""",1\np,1\n')
  assert sources.read("jsonl", path) == [Problem('a\nb, "c"', ("1",)), P]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a"])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, name):
  with pytest.raises(UserError, match=r"config\.data\.problems=.*no such file"):
    sources.read("jsonl", tmp_path / name)
  with pytest.raises(UserError, match="no such file"):
    sources.read("jsonl", tmp_path)


def test_an_unknown_source_is_told_the_known_ones(tmp_path):
  with pytest.raises(UserError, match=r"'gsm9k'.*gsm8k.*humaneval"):
    sources.read("gsm9k", write(tmp_path, "a.jsonl", GOOD))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.jsonl.zip", "jsonl"])
def test_another_suffix_is_told_the_allowed_ones(tmp_path, name):
  with pytest.raises(UserError, match=r"\.jsonl, \.json, \.csv.*\.gz"):
    sources.read("jsonl", write(tmp_path, name, GOOD))


def test_parquet_is_told_how_to_convert(tmp_path):
  path = write(tmp_path, "a.parquet", b"PAR1")
  with pytest.raises(UserError) as error:
    sources.read("jsonl", path)
  command = str(error.value).partition("python -c '")[2].removesuffix("'")
  compile(command, "the command", "exec")
  assert str(path) in command and "a.jsonl" in command and "lines=True" in command


@pytest.mark.parametrize(
  "name, content",
  [
    ("a.jsonl", ""),
    ("a.jsonl", "\n \r\n"),
    ("a.jsonl.gz", ""),
    ("a.json", "[]"),
    ("a.csv", ""),
    ("a.csv", "problem,answer\n"),
  ],
)
def test_a_file_without_a_row_is_refused(tmp_path, name, content):
  with pytest.raises(UserError, match=r"no usable problem \(0 malformed"):
    sources.read("jsonl", write(tmp_path, name, content), skip_malformed=True)


BROKEN = {
  "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-9]),
  "no gzip": ("a.jsonl.gz", GOOD.encode()),
  "empty gzip": ("a.json.gz", b"\x1f\x8b"),
  "spoiled gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-12] + bytes(12)),
  "lines as a list": ("a.json", f"{GOOD}\n{GOOD}".encode()),
  "an object": ("a.json", GOOD.encode()),
  "cut list": ("a.json", f"[{GOOD}".encode()),
  "list with NaN": ("a.json", b'[{"problem": "p", "answer": NaN}]'),
  "latin list": ("a.json", b'["\xff"]'),
  "deep list": ("a.json", DEEP.encode()),
  "open quote": ("a.csv", b'problem,answer\np,"1\np,1\n'),
  "stray quote": ("a.csv", b'problem,answer\n"p"x,1\n'),
  "stray quote in the header": ("a.csv", b'"p"x,answer\np,1\n'),
  "huge field": ("a.csv", b"problem,answer\n" + b"p" * 200_000 + b",1\n"),
}


@pytest.mark.parametrize("name, data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_even_where_rows_may_be_left_out(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(UserError) as error:
    sources.read("jsonl", path, skip_malformed=True)
  assert f"{path} cannot be read: " in str(error.value)
  assert "Mend it or fetch it again" in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
  path = write(tmp_path, "a.jsonl", GOOD)
  path.chmod(0)
  with pytest.raises(UserError, match="Permission denied"):
    sources.read("jsonl", path)


# -- malformed rows --------------------------------------------------------------------

BAD_LINES = {
  "no JSON": (b"{", "not JSON"),
  "two values": (f"{GOOD} x".encode(), "not JSON"),
  "a list": (b"[1, 2]", "not a JSON object"),
  "null": (b"null", "not a JSON object"),
  "latin": (b'{"problem": "\xff", "answer": "1"}', "not UTF-8"),
  "bom inside": (b"\xef\xbb\xbf" + GOOD.encode(), "not JSON"),
  "NaN": (b'{"problem": "p", "answer": NaN}', "NaN"),
  "NaN elsewhere": (b'{"problem": "p", "answer": 1, "x": [-Infinity]}', "-Infinity"),
  "infinite": (b'{"problem": "p", "answer": 1e999}', "too large"),
  "many digits": (b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
  "deep": (f'{{"problem": "p", "answer": {DEEP}}}'.encode(), "nested too deeply"),
  "deep unread": (f'{{"problem": "p", "x": {DEEP}}}'.encode(), "nested too deeply"),
  "surrogate": (b'{"problem": "\\ud800", "answer": "1"}', "half a surrogate pair"),
  "surrogate answer": (b'{"problem": "p", "answer": ["1", "\\udc00"]}', "half a surr"),
  "no problem": (b'{"answer": "1"}', 'no text under "problem"'),
  "blank problem": (b'{"problem": " ", "answer": "1"}', 'no text under "problem"'),
  "no answer": (b'{"problem": "p"}', 'under "answer"'),
  "true": (b'{"problem": "p", "answer": true}', 'under "answer"'),
  "empty list": (b'{"problem": "p", "answer": []}', 'under "answer"'),
  "only marks": (b'{"problem": "p", "answer": "2 ####"}', 'follows "####"'),
}


@pytest.mark.parametrize("line, why", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_its_number_start_and_remedies(tmp_path, line, why):
  path = write(tmp_path, "a.jsonl", b"\n".join([GOOD.encode(), b"", line, b"{", b""]))
  with pytest.raises(UserError) as error:
    sources.read("jsonl", path)
  said = str(error.value)
  assert said.startswith(f"{path}:3: ") and why in said
  assert repr(line[:60]) in said and "(and 1 more such lines)" in said
  assert '{"problem": "...", "answer": "..."}' in said
  assert "--config.data.skip_malformed=True" in said and len(said) < 600
  assert sources.read("jsonl", path, skip_malformed=True) == [P]


@pytest.mark.parametrize(
  "name, content, why",
  [
    ("a.json", f'[{GOOD}, 7, {{"problem": "p"}}]', "not a JSON object: '7'"),
    ("a.csv", "problem,answer\np,1\np\np,,\n", "not as many fields"),
    ("a.csv", "problem,answer\np,1\np,1,2\n,\n", "not as many fields"),
    ("a.csv", b"problem,answer,x\np,1,\np,1,\xff\n,,\n", "not UTF-8"),
    ("a.csv", "problem,answer\np,1\np,\n,1\n", 'no text or number under "a'),
  ],
)
def test_a_bad_row_is_named_with_its_number(tmp_path, name, content, why):
  path = write(tmp_path, name, content)
  with pytest.raises(UserError) as error:
    sources.read("jsonl", path)
  assert str(error.value).startswith(f"{path} row 2: {why}")
  assert "(and 1 more such lines)" in str(error.value)
  assert sources.read("jsonl", path, skip_malformed=True) == [P]


def test_a_file_of_bad_rows_is_refused_even_where_they_may_be_left_out(tmp_path):
  path = write(tmp_path, "a.jsonl", "{\n{\n")
  with pytest.raises(UserError, match=r"no usable problem \(2 malformed"):
    sources.read("jsonl", path, skip_malformed=True)


@pytest.mark.parametrize("source", sources.SOURCES)
def test_the_error_says_what_a_row_of_the_source_holds(tmp_path, source):
  with pytest.raises(UserError) as error:
    sources.read(source, write(tmp_path, "a.jsonl", "{}"))
  used = {"aime": "problem", "gpqa": "Correct Answer", "humaneval": "entry_point"}
  used["ifeval"] = "instruction_id_list"
  assert used.get(source, "answer") in str(error.value) or source == "livecodebench"
  assert ":1: no text under" in str(error.value) or source == "livecodebench"


def nested(depth):
  value = []
  for _ in range(depth):
    value = [value]
  return value


WRONG = [None, 7, 0.5, True, "", " ", "x", "[", "{}", [], [7], [{}], {}, {"a": 1}]
WRONG += [
  "\ud800",
  "[NaN]",
  DEEP,
  nested(5000),
  ["\ud800"],
  b"x",
  "####",
  "[[]]",
  10**5000,
]


@pytest.mark.parametrize("source", sources.SOURCES)
def test_a_field_of_any_wrong_kind_is_malformed_or_harmless(source):
  for row in rows(source):
    for field in row:
      for wrong in WRONG:
        try:
          problem = sources.SOURCES[source]({**row, field: wrong})
        except ValueError as e:
          assert len(str(e)) < 300
        else:
          assert isinstance(problem, Problem)
          problem.problem.encode()


@pytest.mark.parametrize("source", sources.SOURCES)
def test_a_row_without_one_of_its_fields_is_malformed(source):
  unused = {
    *("solution", "Solution", "subject", "level", "unique_id", "ID", "id", "year"),
    *("Record ID", "Explanation", "task_id", "canonical_solution", "question_title"),
    *("platform", "question_id", "difficulty", "kind", "entry_point", "starter_code"),
    *("metadata", "key"),
  }
  for row in rows(source):
    for field in row.keys() - unused:
      with pytest.raises(ValueError):
        sources.SOURCES[source]({k: v for k, v in row.items() if k != field})


BAD_CODE = [
  ({"tests": []}, '"tests" is empty'),
  ({"tests": {"input": "", "output": ""}}, '"tests" is no list'),
  ({"kind": "code"}, '"tests" is no list'),
  ({"tests": ["1"]}, "tests[0] is no object"),
  (
    {"tests": [{"input": "", "output": ""}] * 2 + [{"input": ""}]},
    'tests[2] has no "o',
  ),
  ({"tests": [{"output": "1"}]}, 'tests[0] has no "input"'),
  ({"tests": [{"input": 1, "output": "1"}]}, '"input" of tests[0] is no str'),
  ({"tests": [{"input": "1", "output": None}]}, '"output" of tests[0] is no str'),
  ({"tests": [{"args": []}], "entry_point": "f"}, 'tests[0] has no "expected"'),
  ({"tests": [{"input": "", "output": ""}], "entry_point": "f"}, 'has no "args"'),
  ({"tests": [{"args": 1, "expected": 1}], "entry_point": "f"}, "is no list"),
  ({"tests": [{"args": [], "expected": 1}], "entry_point": "f(1)"}, "entry point"),
  ({"tests": [{"args": [], "expected": 1}], "entry_point": "f\n"}, "entry point"),
  ({"tests": [{"args": [], "expected": 1}], "entry_point": None}, "entry point"),
  ({"tests": [{"args": [nested(5000)], "expected": 1}], "entry_point": "f"}, "deeply"),
  ({"tests": [{"input": "\ud800", "output": ""}]}, "surrogate"),
  ({"test": "def check(candidate): pass"}, "entry point"),
  ({"test": "assert f()", "entry_point": "f"}, "def check"),
  ({"test": "  def check(c): pass", "entry_point": "f"}, "def check"),
  ({"test": "def check(c): 1", "entry_point": "f", "prompt": 7}, '"prompt"'),
  ({"kind": "essay", "answer": "1"}, "'essay', not one of answer, text, choice, code"),
  ({"kind": ["code"], "answer": "1"}, "not one of answer"),
  ({"kind": "choice", "answer": "AB"}, "a letter A to Z"),
  ({"kind": "choice", "answer": ["A", "b"]}, "a letter A to Z"),
  ({"kind": "choice", "answer": 1}, "a letter A to Z"),
  ({"kind": "instructions", "answer": "1"}, 'a list of {"id", "kwargs"}, not None'),
  ({"instructions": [{"kwargs": {}}]}, '"id"'),
  ({"instructions": [{"id": "\ud800"}]}, "there is no instruction"),
]


@pytest.mark.parametrize("row, why", BAD_CODE, ids=[why for _, why in BAD_CODE])
def test_bad_tests_of_our_own_are_named(row, why):
  with pytest.raises(ValueError) as error:
    code(row)
  assert why in str(error.value)


def test_gpqa_refuses_a_right_answer_that_is_a_wrong_one_too():
  row = {**rows("gpqa")[0], "Incorrect Answer 3": " Its stress\n"}
  with pytest.raises(ValueError, match="incorrect one too"):
    sources.SOURCES["gpqa"](row)


def test_gsm8k_wants_its_marks():
  with pytest.raises(ValueError, match="####"):
    sources.SOURCES["gsm8k"]({"question": "q", "answer": "72"})


# -- LiveCodeBench's private tests -----------------------------------------------------


def packed(value, protocol=None):
  data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol)
  return base64.b64encode(zlib.compress(data)).decode()


def lcb(**fields):
  return sources.SOURCES["livecodebench"]({**rows("livecodebench")[1], **fields})


FUNCTIONAL = {"input": "[1]\n2", "output": "[3]", "testtype": "functional"}
STDIN = {"input": "1", "output": "2", "testtype": "stdin"}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("count", [1, 5000])  # a text of one frame, and a large one
def test_a_packed_text_is_read_in_every_protocol(protocol, count):
  text = json.dumps([FUNCTIONAL] * count)
  problem = lcb(private_test_cases=packed(text, protocol))
  assert problem.tests.cases[1:] == (([[1], 2], [3]),) * count


class Malicious:
  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return pathlib.Path.touch, (self.marker,)


def malicious(marker):
  found = [pickle.dumps(Malicious(marker), protocol=p) for p in range(6)]
  by_hand = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
  keeper = io.BytesIO()
  pickler = pickle.Pickler(keeper)
  pickler.persistent_id = lambda value: "id" if value == "x" else None
  pickler.dump(["x"])
  return [*found, by_hand, b"\x80\x04" + by_hand, keeper.getvalue()]


def test_a_malicious_pickle_runs_nothing_and_is_malformed(tmp_path):
  for attack in malicious(tmp_path / "ran"):
    with pytest.raises(ValueError, match="do not decode"):
      lcb(private_test_cases=packed(attack))
    with pytest.raises(pickle.UnpicklingError):
      livecodebench.Unpickler(io.BytesIO(attack)).load()
  assert not (tmp_path / "ran").exists()
  pickle.loads(malicious(tmp_path / "ran")[4])
  assert (tmp_path / "ran").exists()  # else the attack would prove nothing


PACKED = {
  "bytes": pickle.dumps(b"[]"),
  "a list": pickle.dumps([FUNCTIONAL]),
  "a number": pickle.dumps(7),
  "a cut pickle": pickle.dumps("[]" * 99)[:-9],
  "no pickle": b"[]",
  "nothing": b"",
  "a claim of 16 GiB of memo": b"\x80\x04\x8c\x02[]r\xff\xff\xff\x7f.",
  "a claim of a long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f[].",
  "an empty stack": b"\x80\x04.",
  "a later protocol": b"\x80\x63\x8c\x02[].",
  "half a surrogate pair": b"\x80\x04\x8c\x03\xed\xa0\x80.",
  "no JSON": pickle.dumps("["),
  "JSON, but no list": pickle.dumps('{"input": 1}'),
}


@pytest.mark.parametrize("data", PACKED.values(), ids=PACKED)
def test_what_is_no_packed_text_of_tests_is_malformed(data):
  with pytest.raises(ValueError):
    lcb(private_test_cases=packed(data))


@pytest.mark.parametrize("text", ["", "====", "é", "AAAA", "[", packed("[]")[:-8]])
def test_what_is_not_packed_is_malformed(text):
  with pytest.raises(ValueError):
    lcb(private_test_cases=text)


def test_spoiled_bytes_never_raise_anything_else():
  good = packed(json.dumps([FUNCTIONAL] * 9))
  plain = zlib.decompress(base64.b64decode(good))
  refused = 0
  for i in range(len(plain)):
    for flip in (0x01, 0x80):
      spoiled = bytes([*plain[:i], plain[i] ^ flip, *plain[i + 1 :]])
      try:
        lcb(private_test_cases=packed(spoiled))
      except ValueError:
        refused += 1
  assert refused > len(plain) / 2


def test_a_bomb_is_refused_before_it_fills_the_memory(monkeypatch):
  monkeypatch.setattr(livecodebench, "MAX_HIDDEN", 1 << 20)
  bomb = zlib.compress(bytes(64 << 20))
  assert len(bomb) < 1 << 17
  with pytest.raises(ValueError, match="more than 1 MiB"):
    lcb(private_test_cases=base64.b64encode(bomb).decode())


def test_the_cap_leaves_room_for_the_largest_rows():
  assert livecodebench.MAX_HIDDEN == 256 << 20


@pytest.mark.parametrize(
  "fields, why",
  [
    ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no tests"),
    ({"private_test_cases": json.dumps([STDIN])}, "two types"),
    ({"private_test_cases": None}, '"private_test_cases" is no list'),
    ({"public_test_cases": '[{"input": "1"}]'}, 'public_test_cases[0] has no "output"'),
    ({"public_test_cases": [{**STDIN, "testtype": "file"}]}, "'file', not stdin"),
    ({"public_test_cases": [{**STDIN, "testtype": ["stdin"]}]}, "is no str"),
    ({"public_test_cases": [{**FUNCTIONAL, "input": "[1"}]}, "[0] is not JSON"),
    ({"public_test_cases": [{**FUNCTIONAL, "output": "NaN"}]}, "[0] is not JSON (NaN"),
    ({"public_test_cases": [{**FUNCTIONAL, "output": DEEP}]}, "nested too deeply"),
    ({"metadata": "{}"}, "entry point None"),
    ({"metadata": "[]"}, "not a JSON object"),
    ({"metadata": None}, "not a JSON object"),
    ({"metadata": '{"func_name": "f; import os"}'}, "entry point"),
    ({"starter_code": ""}, 'no text under "starter_code"'),
    ({"question_content": 7}, 'no text under "question_content"'),
  ],
)
def test_bad_fields_of_livecodebench_are_named(fields, why):
  with pytest.raises(ValueError) as error:
    lcb(**fields)
  assert why in str(error.value)


# -- reasoning-gym ---------------------------------------------------------------------


@dataclasses.dataclass
class Config:
  low: int = 0
  seed: int | None = None
  size: int = 500


def fake(item):
  """A module with one task whose items are `item(seed, index)`."""

  class Data:
    def __init__(self, seed, size, low=0):
      if low > 9:
        raise AssertionError("low is too high")
      self.seed = seed

    def __getitem__(self, i):
      print("noise")
      return item(self.seed, i)

    def score_answer(self, *_):
      raise AssertionError("its scorers are never called")

  return types.SimpleNamespace(
    create_dataset=lambda task, **options: Data(**options),
    factory=types.SimpleNamespace(DATASETS={"chain_sum": (Data, Config)}),
  )


@pytest.fixture
def gym_of(monkeypatch):
  def use(item):
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake(item))
    return lambda count=3, seed=0, **options: gym.generate(
      "chain_sum", count, seed=seed, options=options
    )

  return use


def asked(seed, i):
  return {"question": f" {seed} + {i} ", "answer": f"{seed + i} "}


def test_a_generated_item_is_a_problem_with_its_one_answer(gym_of, capsys):
  problems = gym_of(asked)()
  assert len(problems) == 3 and capsys.readouterr().out == ""
  for p in problems:
    first, _, second = p.problem.partition(" + ")
    assert p == Problem(p.problem, (str(int(first) + int(second)),))


def test_items_without_an_answer_are_passed_over_and_repeats_kept(gym_of):
  answers = ["1", None, "", "1", 7, "1"]
  made = gym_of(lambda seed, i: {"question": "q", "answer": answers[i % 6]})()
  assert made == [Problem("q", ("1",))] * 3


def test_a_task_that_never_answers_is_refused(gym_of):
  with pytest.raises(UserError, match="gave 0 of 3"):
    gym_of(lambda seed, i: {"question": "q", "answer": None})()


def test_neighbouring_seeds_share_no_item(gym_of):
  """An item of reasoning-gym is a function of seed + index alone."""
  generate = gym_of(lambda seed, i: {"question": str(seed + i), "answer": "1"})
  seen = [{p.problem for p in generate(1000, seed)} for seed in range(20)]
  assert len(set().union(*seen)) == 20_000
  assert seen[3] == {p.problem for p in generate(1000, 3)}


@pytest.mark.parametrize(
  "options, why",
  [
    ({"high": 1}, "high.*Its options are low"),
    ({"low": 10}, "low is too high.*Its options are low"),
    ({"size": 3}, "name size; give the seed and the count"),
  ],
)
def test_options_that_the_task_does_not_take_are_refused(gym_of, options, why):
  with pytest.raises(UserError, match=why):
    gym_of(asked)(**options)


@pytest.mark.parametrize("count", [0, -1])
def test_no_problems_are_refused(gym_of, count):
  with pytest.raises(UserError, match="at least one"):
    gym_of(asked)(count)


def test_without_reasoning_gym_the_command_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  with pytest.raises(UserError, match=r"pip install reasoning-gym==0\.1\.25"):
    gym.generate("gcd", 1, seed=0, options={})


@pytest.mark.parametrize("task", sorted(gym.REFUSED))
def test_a_task_without_one_right_answer_is_refused_with_the_reason(task):
  with pytest.raises(UserError) as error:
    gym.generate(task, 1, seed=0, options={})
  assert f"{task} is not used: {gym.REFUSED[task]}." in str(error.value)


@pytest.mark.parametrize(
  "task, near",
  [("chain_sums", "chain_sum"), ("countdow", "countdown"), ("qqq", "Take one of ab")],
)
def test_an_unknown_task_is_told_its_neighbours(task, near):
  with pytest.raises(UserError, match=rf"no task '{task}'.*{near}"):
    gym.generate(task, 1, seed=0, options={})


def test_every_task_of_reasoning_gym_is_used_or_refused():
  factory = pytest.importorskip("reasoning_gym.factory")
  assert {*gym.TASKS, *gym.REFUSED} == factory.DATASETS.keys()
  assert not {*gym.TASKS} & gym.REFUSED.keys()


def test_real_items_are_the_same_in_every_process():
  pytest.importorskip("reasoning_gym")
  program = (
    "from r1jax.data import gym\n"
    "for t in gym.TASKS: print(gym.generate(t, 3, seed=5, options={}))"
  )
  said = [
    subprocess.run(
      [sys.executable, "-c", program],
      env={**os.environ, "PYTHONHASHSEED": str(seed)},
      check=True,
      capture_output=True,
    ).stdout
    for seed in (1, 2)
  ]
  assert said[0] == said[1] and said[0].count(b"Problem(") == 3 * len(gym.TASKS)


def test_real_options_reach_the_task_and_wrong_ones_are_told_the_right_ones():
  pytest.importorskip("reasoning_gym")
  options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
  for p in gym.generate("chain_sum", 20, seed=0, options=options):
    a, sign, b = p.problem.rstrip(" =").split()[-3:]
    assert p.answers == (str(int(a) + int(sign + b)),)
  with pytest.raises(UserError, match=r"Its options are.*min_terms"):
    gym.generate("chain_sum", 1, seed=0, options={"min_term": 2})
