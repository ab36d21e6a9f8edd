"""Rewards of your own: how they are named, loaded, and what they may return."""

from fractions import Fraction
import math
import sys

import numpy as np
import pytest

from r1jax.data.problem import Problem
from r1jax.errors import UserError
from r1jax.rewards.rules import checked, load_rules

PROBLEM = Problem("2 + 5?", ("7",))
SOURCE = """
number = 7

def short(completion, problem):
  return float(len(completion) < 5)

def gold(completion, problem):
  return problem.answers[0] in completion
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(SOURCE)
  return path


def refusal(spec):
  with pytest.raises(UserError) as caught:
    load_rules(spec)
  return str(caught.value)


@pytest.mark.parametrize(
  "end, weight",
  [("", 1.0), ("=0.5", 0.5), ("=-2", -2.0), ("=0", 0.0), ("=1e-3", 1e-3), ("=3", 3.0)],
)
def test_a_rule_has_the_weight_that_follows_it_or_1(file, end, weight):
  rules = load_rules(f"{file}:short{end}")
  assert list(rules) == ["short"]
  assert rules["short"][0] == weight
  assert rules["short"][1]("abc", PROBLEM) == 1.0
  assert rules["short"][1]("abcdef", PROBLEM) == 0.0


def test_several_rules_stand_between_commas(file, tmp_path):
  other = tmp_path / "with space.py"
  other.write_text(
    "class Long:\n  def __call__(self, c, p):\n    return 2\nlong = Long()"
  )
  rules = load_rules(f" {file}:short=2 ,{file}:gold, {other}:long=0.1,")
  assert {name: weight for name, (weight, _) in rules.items()} == {
    "short": 2.0,
    "gold": 1.0,
    "long": 0.1,
  }
  assert [rule("7", PROBLEM) for _, rule in rules.values()] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("spec", ["", " ", ",", " , "])
def test_nothing_is_no_rules(spec):
  assert load_rules(spec) == {}


@pytest.mark.parametrize(
  "end",
  [
    "",
    ":",
    ":short=x",
    ":short=nan",
    ":short=inf",
    ":short=1=2",
    ":a.b",
    ":1a",
    ":a b",
  ],
)
def test_a_bad_form_is_quoted_with_the_good_one(file, end):
  said = refusal(f"{file}{end}")
  assert f"{file}{end}" in said and "FILE.py:function=weight" in said


def test_a_function_without_a_file_is_a_bad_form():
  assert "FILE.py:function" in refusal("short")


def test_a_missing_file_is_named(tmp_path):
  assert str(tmp_path / "no.py") in refusal(f"{tmp_path / 'no.py'}:short")
  assert str(tmp_path) in refusal(f"{tmp_path}:short")  # a folder


@pytest.mark.parametrize("name", ["nothing", "number"])
def test_what_is_no_function_of_the_file_is_named(file, name):
  said = refusal(f"{file}:{name}")
  assert repr(name) in said and str(file) in said


def test_a_text_file_is_no_file_of_rules(tmp_path):
  (tmp_path / "mine.txt").write_text(SOURCE)
  assert "mine.txt" in refusal(f"{tmp_path / 'mine.txt'}:short")


@pytest.mark.parametrize(
  "source, word",
  [
    ("def short(:", "SyntaxError"),
    ("\x00", "null bytes"),  # a ValueError before Python 3.11.4
    ("1 / 0", "ZeroDivisionError"),
    ("import no_such_module_r1jax", "no_such_module_r1jax"),
    ("raise SystemExit(0)", "SystemExit"),
  ],
)
def test_a_file_that_does_not_load_says_why(tmp_path, source, word):
  path = tmp_path / "mine.py"
  path.write_text(source)
  said = refusal(f"{path}:short")
  assert word in said and str(path) in said


def test_a_file_may_hold_dataclasses(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from __future__ import annotations\nimport dataclasses\n"
    "@dataclasses.dataclass\nclass Said:\n  value: float = 2.0\n"
    "def said(completion, problem):\n  return Said().value\n"
  )
  assert load_rules(f"{path}:said")["said"][1]("", PROBLEM) == 2.0


def test_two_rules_of_one_name_are_refused(file, tmp_path):
  other = tmp_path / "other.py"
  other.write_text(SOURCE)
  assert "'short'" in refusal(f"{file}:short,{other}:short")
  assert "'short'" in refusal(f"{file}:short,{file}:short=2")


def test_files_of_one_name_in_two_folders_do_not_mix(file, tmp_path):
  folder = tmp_path / "more"
  folder.mkdir()
  (folder / "mine.py").write_text("def nine(completion, problem):\n  return 9\n")
  rules = load_rules(f"{file}:short,{folder / 'mine.py'}:nine")
  assert [rule("a", PROBLEM) for _, rule in rules.values()] == [1.0, 9.0]


def test_loading_shadows_no_module(tmp_path):
  """A file called json.py is not the json of the rest."""
  import json

  (tmp_path / "json.py").write_text(SOURCE)
  load_rules(f"{tmp_path / 'json.py'}:short")
  assert sys.modules["json"] is json


# -- what a rule returns ---------------------------------------------------------------


@pytest.mark.parametrize(
  "said, number",
  [
    (1, 1.0),
    (-0.5, -0.5),
    (True, 1.0),
    (False, 0.0),
    (Fraction(1, 4), 0.25),
    (np.float32(0.5), 0.5),
    (np.float64(-2), -2.0),
    (np.int64(3), 3.0),
  ],
)
def test_a_finite_number_is_a_float(said, number):
  value = checked(lambda completion, problem: said, "mine")("text", PROBLEM)
  assert type(value) is float and value == number


@pytest.mark.parametrize(
  "said",
  [
    None,
    math.nan,
    math.inf,
    -math.inf,
    np.float32("nan"),
    np.float64("inf"),
    "1",
    "",
    [1.0],
    (1.0,),
    {},
    1j,
    np.array([1.0]),
    np.array([1.0, 2.0]),
    object(),
    10**400,
    Fraction(10**400, 3),
  ],
  ids=lambda said: f"{type(said).__name__} {said!s:.12}",
)
def test_anything_else_is_refused_by_name(said):
  rule = checked(lambda completion, problem: said, "my_rule")
  with pytest.raises(UserError) as caught:
    rule("<think>the beginning", PROBLEM)
  assert "'my_rule'" in str(caught.value)
  assert "<think>the beginning" in str(caught.value)


@pytest.mark.parametrize(
  "error",
  [
    ValueError("no 7"),
    KeyError("a"),
    AssertionError(),
    RecursionError(),
    SystemExit(0),
  ],
  ids=lambda error: type(error).__name__,
)
def test_a_rule_that_raises_is_named(error):
  def function(completion, problem):
    raise error

  with pytest.raises(UserError) as caught:
    checked(function, "my_rule")("<think>the beginning", PROBLEM)
  said = str(caught.value)
  assert "'my_rule'" in said and "<think>the beginning" in said
  assert type(error).__name__ in said and str(error) in said


def test_a_rule_of_another_signature_is_named():
  with pytest.raises(UserError, match=r"'my_rule'.*TypeError"):
    checked(lambda completion: 1.0, "my_rule")("text", PROBLEM)


def test_ctrl_c_in_a_rule_stays_ctrl_c():
  def function(completion, problem):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    checked(function, "my_rule")("text", PROBLEM)


def test_a_message_shows_a_long_completion_s_beginning_alone():
  with pytest.raises(UserError) as caught:
    checked(lambda completion, problem: "x" * 10_000, "mine")("y" * 10_000, PROBLEM)
  assert "y" * 40 in str(caught.value) and len(str(caught.value)) < 400


def test_a_rule_gets_the_completion_and_the_problem():
  got = []
  checked(lambda *arguments: got.append(arguments) or 1, "mine")("text", PROBLEM)
  assert got == [("text", PROBLEM)]
