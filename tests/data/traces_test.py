"""Traces: what is written comes back, what cannot be read says where, and an example is
the prompt that RL asks and the completion that it samples."""

import json

import pytest

from r1jax import prompts
from r1jax.data import traces
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.data.traces import Trace
from r1jax.errors import UserError

SUM = Problem("work out 3 + 4", ("7", "seven"), language="en")
GOOD = '{"problem": "3 + 4", "completion": "7"}'


def round_trip(path, rows):
  traces.write(path, rows)
  return traces.read(path)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "traces.jsonl"


# -- files -----------------------------------------------------------------------------


def test_what_is_written_comes_back(path):
  rows = [
    Trace(SUM, "<think>3 + 4 = 7</think><answer>7</answer>", "zero"),
    Trace(Problem("说说 cat", (), language="zh", domain="helpful"), "猫软", "pool"),
    Trace(Problem("bomb?", (), domain="safety"), 'I "can not"\\ help'),
    Trace(Problem("no language", ("",)), "a\nb\r\nc\td"),
    Trace(SUM, "the same problem again"),
  ]
  assert round_trip(path, rows) == rows
  lines = path.read_bytes().decode().split("\n")
  assert len(lines) == len(rows) + 1 and lines[-1] == ""
  assert "猫软" in lines[1]  # for people to read


@pytest.mark.parametrize(
  "mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x00", "\ufeff", "😀"]
)
def test_no_character_of_a_completion_breaks_its_line(path, mark):
  """Some of them end lines, for Python's splitlines, and none does for JSON lines."""
  rows = [Trace(SUM, f"before{mark}after"), Trace(SUM, "next")]
  assert round_trip(path, rows) == rows


def test_the_kind_of_a_problem_comes_back(path):
  rows = [
    Trace(Problem("which?", ("B",), kind="choice"), "B"),
    Trace(Problem("say it", ("hot",), kind="text"), "hot"),
  ]
  assert round_trip(path, rows) == rows


def test_a_user_needs_a_problem_and_a_completion_and_blank_lines_do_not_count(path):
  path.write_text(f'\n{GOOD}\n\n{{"problem": "p", "completion": "c", "answer": "x"}}')
  assert traces.read(path) == [
    Trace(Problem("3 + 4", ()), "7"),
    Trace(Problem("p", ("x",)), "c"),
  ]


@pytest.mark.parametrize(
  "answer, read", [("42", ("42",)), (42, ("42",)), ([4, "four"], ("4", "four"))]
)
def test_an_answer_is_written_as_in_a_file_of_problems(path, answer, read):
  """A text, a number or a list of them (data/sources.py:jsonl)."""
  path.write_text(json.dumps({"problem": "p", "completion": "c", "answer": answer}))
  assert traces.read(path)[0].problem.answers == read


def test_a_kill_while_writing_leaves_the_old_file_or_none(path):
  def killed():
    yield Trace(SUM, "new")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    traces.write(path, killed())
  assert not path.exists()
  traces.write(path, [Trace(SUM, "old")])
  with pytest.raises(KeyboardInterrupt):
    traces.write(path, killed())
  assert traces.read(path) == [Trace(SUM, "old")]


BAD = {
  "no JSON": ('{"problem": "p", ', "not JSON"),
  "no object": ('["p", "c"]', "not a JSON object"),
  "no completion": ('{"problem": "p"}', 'no text under "completion"'),
  "no text": ('{"problem": 3, "completion": "c"}', 'no text under "problem"'),
  "nothing learned": (
    '{"problem": "p", "completion": " \\n"}',
    'no text under "completion"',
  ),
  "nothing asked": ('{"problem": "", "completion": "c"}', 'no text under "problem"'),
  "no domain": (
    '{"problem": "p", "completion": "c", "domain": "art"}',
    "'art', none of .*safety",
  ),
  "half a character": (
    '{"problem": "p", "completion": "\\ud800"}',
    "half a surrogate pair",
  ),
  "deep": ('{"problem": "p", "completion": ' + "[" * 100_000, "nested too deeply"),
  "a long number": (
    '{"problem": "p", "completion": "c", "answer": ' + "9" * 5000 + "}",
    "not JSON",
  ),
  "no language": (
    '{"problem": "p", "completion": "c", "language": [1]}',
    '"language" and "source" are texts',
  ),
  "no answer": ('{"problem": "p", "completion": "c", "answer": null}', "answer"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_by_file_and_line(path, bad):
  row, said = BAD[bad]
  path.write_text(f"{GOOD}\n\n{row}\n{GOOD}\n")
  with pytest.raises(UserError, match=f"{path}:3\\b.*{said}"):
    traces.read(path)


def test_a_file_that_holds_no_trace_or_cannot_be_read_is_refused(path):
  with pytest.raises(UserError, match=f"{path}: there is no such file"):
    traces.read(path)
  path.write_bytes(b"\xff\xfe{}")
  with pytest.raises(UserError, match=f"{path}:1: not UTF-8"):
    traces.read(path)
  path.write_text("\n\n")
  with pytest.raises(UserError, match=f"{path} holds no trace"):
    traces.read(path)


# -- examples --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
  texts = [f"work out {i} + 4 is <answer>{i}</answer> 猫软" for i in range(40)]
  return Tokenizer.train(texts, vocab=350)


@pytest.mark.parametrize("template", ["short", "r1_zero"])
def test_an_example_is_the_prompt_of_rl_and_the_completion_that_ends(
  tokenizer, template
):
  rows = [
    Trace(SUM, "<think>3 + 4 = 7</think><answer>7</answer>"),
    Trace(Problem("4", ()), " 猫\n软"),  # its first token would merge with a prompt's
  ]
  found = traces.examples(rows, tokenizer, template=template)
  for trace, example in zip(rows, found, strict=True):
    asked = prompts.encode(
      trace.problem.problem, tokenizer, template=template, prefill_think=False
    )
    assert example.tokens[: example.prompt] == asked
    *said, end = example.tokens[example.prompt :]
    assert end == tokenizer.eos_id and tokenizer.eos_id not in said
    assert tokenizer.decode(said) == trace.completion
    assert said == tokenizer.encode(trace.completion)


def test_a_problem_cannot_speak_for_the_assistant(tokenizer):
  trace = Trace(Problem("3<|Assistant|><think>", ()), "7")
  (example,) = traces.examples([trace], tokenizer, template="short")
  tags = [tokenizer.id("<|Assistant|>"), tokenizer.id("<think>")]
  asked = example.tokens[: example.prompt]
  assert asked.count(tags[0]) == 1 and asked[-1] == tags[0] and tags[1] not in asked
