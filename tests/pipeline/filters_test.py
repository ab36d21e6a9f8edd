"""Filters of traces, each on traces made by hand; and functions that users bring."""

import hashlib
import re

import pytest

from r1jax.data.problem import Problem
from r1jax.data.traces import Trace
from r1jax.errors import UserError
from r1jax.pipeline import filters, hooks
from r1jax.rewards import rules


def trace(completion, answers=("7",), language="en", **more):
  return Trace(
    Problem("work out 3 + 4", answers, language=language, **more), completion
  )


def thought(text):
  return trace(f"<think>{text}</think>the answer is <answer>7</answer>")


# -- each of them ----------------------------------------------------------------------


@pytest.mark.parametrize(
  "said, right",
  [
    ("<think>3 + 4 = 7</think><answer>7</answer>", True),
    ("<think>3 + 4 = 7</think><answer> 7.0 </answer>", True),
    ("<think>it is 7</think><answer>8</answer>", False),
    ("<think>it is <answer>7</answer></think>I do not know", False),
    ("<think><answer>7</answer>", False),
    ("7", False),
    ("", False),
  ],
)
def test_correct_is_an_accepted_answer_after_the_thinking(said, right):
  assert filters.correct(trace(said)) is right


def test_correct_goes_by_the_kind_of_the_problem_and_by_any_of_its_answers():
  said = "<think>x</think><answer>7.0</answer>"
  assert filters.correct(trace(said, answers=("9", "7")))
  assert not filters.correct(trace(said, kind="text"))
  letter = "<think>x</think><answer>(B)</answer>"
  assert filters.correct(trace(letter, answers=("B",), kind="choice"))
  assert not filters.correct(trace(letter, answers=("C",), kind="choice"))


def test_formatted_is_by_the_style():
  tags, chat = filters.formatted("tags"), filters.formatted("chat")
  plain = trace("<think>3 + 4</think><answer>7</answer>")
  words = trace("<think>3 + 4</think>the answer is <answer>7</answer>")
  assert tags(plain) and chat(plain) and chat(words) and not tags(words)
  for bad in (
    "7",
    "<think>3 + 4</think>",
    "<think>3 + 4 <answer>7</answer>",
    "7<think>",
  ):
    assert not tags(trace(bad)) and not chat(trace(bad))


def seen_before(words, n):
  """The definition, window by window."""
  windows = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
  again = sum(w in windows[:i] for i, w in enumerate(windows))
  return again / len(windows) if windows else 0.0


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(
  "text",
  [
    "wait 3 + 4 = 7 , so 7 - 2 = 5",
    "let me think " * 20,
    "one two three four five six seven eight nine ten " * 2,
    "1 2 3",
    "",
  ],
)
def test_repetition_is_the_share_of_windows_that_stood_before(text, n):
  assert filters.repetition(text, n) == pytest.approx(seen_before(text.split(), n))


def test_repetition_knows_marks_from_words_and_no_white_space():
  assert filters.repetition("a+b a + b", 3) == pytest.approx(1 / 4)
  assert filters.repetition("a,\n\n b", 1) == 0.0


def test_repetition_is_seen_in_any_language():
  """A Han character is a word, as in rewards/language.py: nothing stands between."""
  loop, plain = "我再想一想这道题吧" * 30, "我先算三加四得七再减二得五所以答案是五"
  assert filters.repetition(loop) > 0.9
  assert filters.repetition(plain) == 0.0


def test_unrepeated_keeps_up_to_the_share():
  text = "a b c d e f g h i j a b c d e f g h"  # 11 windows of 8, one twice
  share = filters.repetition(text)
  assert share == pytest.approx(1 / 11)
  assert filters.unrepeated(share)(trace(text))
  assert not filters.unrepeated(share - 1e-6)(trace(text))
  assert filters.unrepeated(0.0)(trace("short"))


def test_in_one_language_goes_by_the_thinking_and_by_the_problems_language():
  half = "<think>so we have 算算算</think><answer>7</answer>"  # 3 words and 3
  assert filters.in_one_language(0.5)(trace(half))
  assert not filters.in_one_language(0.51)(trace(half))
  assert not filters.in_one_language(0.51)(trace(half, language="zh"))
  assert filters.in_one_language(1.0)(trace(half, language=""))  # nothing is asked
  summary = "<think>so we have</think>答案是<answer>7</answer>"
  assert filters.in_one_language(1.0)(trace(summary))
  assert not filters.in_one_language(0.1)(trace("7"))  # no thinking at all


def test_short_paragraphs_measures_the_thinking_alone():
  keeps = filters.short_paragraphs(10)
  assert keeps(thought("0123456789"))
  assert not keeps(thought("0123456789X"))
  assert keeps(thought("0123456789\n\n0123456789"))
  assert not keeps(thought("01234\n6789X"))  # a line is no paragraph
  assert keeps(trace("<think>short</think>" + "a long summary " * 20))
  assert keeps(trace("no thinking, and long"))


def test_without_code_looks_at_the_thinking_alone():
  assert not filters.without_code(thought("run\n```python\nprint(7)\n```"))
  assert filters.without_code(thought("`3 + 4` is 7"))
  assert filters.without_code(trace("<think>x</think>```\n7\n```"))


# -- sift ------------------------------------------------------------------------------

LETTERS = [
  ("no_a", lambda t: "a" not in t.completion),
  ("no_b", lambda t: "b" not in t.completion),
  ("never", lambda t: True),
]


def test_a_trace_counts_for_the_first_filter_that_drops_it():
  said = ["x", "ab", "b", "a", "y", "ba", "x"]
  kept, counts = filters.sift([trace(s) for s in said], LETTERS, of="this")
  assert [t.completion for t in kept] == ["x", "y", "x"]  # in order; none is lost
  assert counts == {"sampled": 7, "no_a": 3, "no_b": 1, "never": 0, "kept": 3}
  assert counts["sampled"] == sum(counts.values()) - counts["sampled"]


def test_a_filter_is_not_asked_about_what_another_dropped():
  asked = []

  def judge(t):
    asked.append(t.completion)
    return True

  rows = [trace(s) for s in ("a", "x", "b")]
  filters.sift(rows, [*LETTERS, ("judge", judge)], of="this")
  assert asked == ["x"]


def test_without_filters_all_is_kept():
  rows = [trace("a")]
  assert filters.sift(rows, [], of="this") == (rows, {"sampled": 1, "kept": 1})


def test_where_nothing_is_left_the_user_hears_of_every_count():
  rows = [trace(s) for s in ("a", "ab", "b")]
  counts = "sampled 3, no_a 2, no_b 1, never 0, kept 0"
  with pytest.raises(UserError, match=rf"cold start: no trace is left.*\({counts}\)"):
    filters.sift(rows, LETTERS, of="cold start")
  with pytest.raises(UserError, match=r"\(sampled 0, no_a 0"):
    filters.sift([], LETTERS, of="cold start")


# -- functions of the user's -----------------------------------------------------------

HOOKS = """
def twice(text, problem):
  return text + text + problem.problem

def fails(text, problem):
  return {}["no key"]

not_a_function = 3
"""
OURS = {"none": None, "upper": str.upper}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(HOOKS)
  return path


def load(spec):
  form = hooks.Form("a text", lambda said: isinstance(said, str))
  return hooks.load(spec, OURS, "cold_start.rewriter", form)


def test_a_hook_is_one_of_ours_or_a_function_of_a_file(file):
  assert load("none") is None
  assert load("upper") is str.upper
  assert load(f"{file}:twice")("a", Problem("p", ())) == "aap"


@pytest.mark.parametrize(
  "spec, said",
  [
    ("assistent", r"config\.cold_start\.rewriter='assistent'.*'none', 'upper'.*FILE"),
    ("", r"config\.cold_start\.rewriter=''.*FILE\.py:function"),
    ("{file}", r"config\.cold_start\.rewriter="),
    ("{file}:twice,{file}:fails", r"config\.cold_start\.rewriter=.*one function"),
    ("{file}:thrice", r"mine\.py has no function 'thrice'"),
    ("{file}:not_a_function", r"mine\.py has no function 'not_a_function'"),
    ("{file}x:twice", r"mine\.pyx: there is no such file"),
    ("{file}:", r"FILE\.py:function"),
  ],
)
def test_a_hook_that_cannot_be_is_refused(file, spec, said):
  with pytest.raises(UserError, match=said):
    load(spec.format(file=file))


def test_a_file_that_does_not_load_is_refused(file):
  file.write_text("import nothing_of_this_name")
  with pytest.raises(UserError, match=r"mine\.py does not load: ModuleNotFoundError"):
    load(f"{file}:twice")


def test_what_a_users_function_raises_is_said_with_its_name(file):
  function = load(f"{file}:fails")
  said = f"{re.escape(str(file))}:fails failed with KeyError: 'no key'"
  with pytest.raises(UserError, match=said) as caught:
    function("a", Problem("p", ()))
  assert isinstance(caught.value.__cause__, KeyError)


def test_the_content_of_named_files_is_part_of_a_stages_config(file):
  before = rules.file_digests("assistant", f"{file}:twice")
  digest = hashlib.sha256(HOOKS.encode()).hexdigest()
  assert before == {f"sha256 of {file}": digest}
  file.write_text(HOOKS + "\n")
  assert rules.file_digests("assistant", f"{file}:twice") != before
  assert rules.file_digests("none", "") == rules.file_digests("gone.py:function") == {}
