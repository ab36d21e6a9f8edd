"""The final answer is found where it must stand and compared as text or as a number."""

import time

import pytest

from r1jax.rewards.accuracy import accuracy, answered
from r1jax.rewards.extraction import extract_answer


@pytest.mark.parametrize(
  "completion, answer",
  [
    ("<answer>7</answer>", "7"),
    ("<think>x</think><answer> 7 \n</answer>", "7"),
    ("<answer>7</answer><answer>8</answer>", "8"),  # the last block
    ("<answer>7<answer>8</answer>", "8"),
    ("<answer>7</answer>8</answer>", "7"),  # the next closing tag
    ("<think><answer>7</answer></think>", None),  # thought, not answered
    ("<think><answer>7</answer>", None),  # thinks to the end
    (r"<answer>\boxed{7}</answer>", "7"),
    (r"<answer>so \boxed{7}, no: \boxed{8}.</answer>", "8"),
    (r"<answer>\boxed{7</answer>", None),  # its braces do not match
    (r"It is \boxed{7}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"<think>\boxed{7}</think>", None),
    (r"<think>\boxed{7}</think>\boxed{8}", "8"),
    ("<think>a</think><think>b<answer>7</answer>", None),
    (r"\boxed{7} <answer>8", None),  # a block that is opened must be closed
    (r"\boxed{}", None),
    ("<think>a<answer>1</answer></think><answer>2</answer>", "2"),
    ("<answer>two words</answer>", "two words"),
    ("<answer>a < b</answer>", "a < b"),
    ("</answer><answer>7</answer>", "7"),
    ("", None),
    ("7", None),
    ("<answer>7", None),
    ("7</answer>", None),
    ("</answer>7<answer>", None),
    ("<answer></answer>", None),
    ("<answer> \n\t</answer>", None),
    ("<answer>7</answer><answer>8", None),  # the last block is not closed
    ("<answer>7</answer><answer></answer>", None),
    ("< answer>7</ answer>", None),
    ("<ANSWER>7</ANSWER>", None),
  ],
)
def test_the_answer_is_what_the_last_block_holds(completion, answer):
  assert extract_answer(completion) == answer


@pytest.mark.parametrize(
  "said, accepted, right",
  [
    ("7", ["7"], True),
    (" 7 ", ["7"], True),
    ("7", [" 7 "], True),
    ("07", ["7"], True),
    ("7.0", ["7"], True),
    ("+7", ["7"], True),
    ("-7", ["7"], False),
    ("1/2", ["0.5"], True),
    ("0.5", ["1/2"], True),
    ("2/4", ["1/2"], True),
    ("5e-1", ["1/2"], True),
    ("0.3333", ["1/3"], False),
    ("8", ["7"], False),
    ("8", ["7", "8"], True),
    ("7", ["9", "8", "7"], True),
    ("+-", ["+-", "*+"], True),
    ("*+", ["+-", "*+"], True),
    ("-+", ["+-", "*+"], False),
    ("yes", ["yes"], True),
    ("Yes", ["yes"], True),
    ("7 apples", ["7"], True),
    ("4 2", ["42"], False),
    ("4 2", ["8"], False),
    ("1/0", ["1/0"], True),  # as text
    ("1/0", ["0"], False),
    ("nan", ["nan"], True),
    ("inf", ["7"], False),
    ("7", [], False),
    ("7", [""], False),
    ("7", ["seven"], False),
    ("seven", ["7"], False),
  ],
)
def test_an_answer_is_right_as_text_or_as_a_number(said, accepted, right):
  assert accuracy(f"<think>t</think><answer>{said}</answer>", accepted) == float(right)


@pytest.mark.parametrize("completion", ["", "7", "<answer>7", "<answer></answer>"])
def test_no_answer_is_wrong_even_where_nothing_is_accepted(completion):
  assert accuracy(completion, ["7"]) == 0.0
  assert accuracy(completion, [""]) == 0.0


def test_the_reward_is_a_float():
  assert isinstance(accuracy("<answer>7</answer>", ["7"]), float)
  assert isinstance(accuracy("", ["7"]), float)


@pytest.mark.parametrize("said", ["1e2000000", "1e-2000000"])
def test_a_huge_exponent_costs_no_time(said):
  """A policy can write `1e999999999`, and an evaluation must not hang on it."""
  begin = time.monotonic()
  assert accuracy(f"<answer>{said}</answer>", ["7"]) == 0.0
  assert time.monotonic() - begin < 0.1


@pytest.mark.parametrize(
  "text",
  [
    *(
      r"x \in",
      "(1, .)",
      r"\{.\}",
      "{.}",
      "[[.]]",
      r"\pm \cup ",
      "()",
      "[,]",
      ",",
      "=",
    ),
    *("", " ", ".", "$", "$$", "**", "`", r"\(", r"\boxed{}", "{}", "{,}", r"\frac"),
    *(
      r"\begin{pmatrix}\end{pmatrix}",
      "<",
      "1<",
      "<1",
      "1 <x<",
      "%",
      "-",
      "1/0",
      "0/0",
    ),
    *("9" * 401, "(" * 200 + ")" * 200, "{" * 100, r"\left(" * 50, "½", "²", "٣", "１"),
  ],
)
def test_no_answer_is_too_odd_to_be_read(text):
  """It is read or it is not; it never raises, and it is not 5."""
  for gold in ("5", text, r"\{1,2\}"):
    verdict = answered(f"<answer>{text}</answer>", [gold])
    assert verdict.outcome in ("correct", "wrong", "unparsable")
  assert answered(f"<answer>{text}</answer>", ["5"]).outcome != "correct"


@pytest.mark.parametrize(
  "said, chosen",
  [
    *((t, "B") for t in ("B", "(B)", "b", "B.", "B) 12 m", "B: the ratio is 2")),
    *((t, "B") for t in ("B) both of them", "B - 12 m", "Option B", "answer: (B)")),
    *((t, "B") for t in ("**B**", r"\text{B}", r"\boxed{B}", "B. It rises and falls")),
    *((t, None) for t in ("A or B", "B or A", "AB", "B, C", "not B", "B is wrong", "")),
    *((t, None) for t in ("B. Or maybe C.", "B. C. D.", "(B) and (C)", "Bad", "12 m")),
  ],
)
def test_a_choice_is_one_letter(said, chosen):
  verdict = answered(f"<answer>{said}</answer>", ["B"], kind="choice")
  assert verdict.outcome == ("correct" if chosen else "unparsable")
  if chosen:
    verdict = answered(f"<answer>{said}</answer>", ["C"], kind="choice")
    assert verdict.outcome == "wrong"


def test_text_is_compared_but_for_white_space():
  for said, right in (
    ("1 2\n3", True),
    ("1  2 3", True),
    ("123", False),
    ("1 2", False),
  ):
    verdict = answered(f"<answer>{said}</answer>", ["1 2 3"], kind="text")
    assert (verdict.outcome == "correct") == right
