"""A problem, and what says whether an answer to it is right."""

import dataclasses
from typing import Any

KINDS = ("answer", "text", "choice", "code", "instructions")
# What judges a reply: rules, or the reward model of its set (R1, section 3.1).
DOMAINS = ("reasoning", "helpful", "safety")
STYLES = ("stdin", "call", "check")


@dataclasses.dataclass(frozen=True)
class Tests:
  """What a program must pass, all of it.

  Three styles: `stdin`, a program that reads each input and prints the output; `call`,
  a function that returns each expected value; `check`, the source of a function
  `check(candidate)` asserts what it likes (HumanEval).
  """

  __test__ = False  # not one of pytest's

  style: str  # one of STYLES
  # stdin: (input text, output text); call: (list of arguments, expected value)
  cases: tuple[tuple[Any, Any], ...] = ()
  entry_point: str = ""  # call, check: an expression for the function, mostly its name
  preamble: str = ""  # code that stands before the answer, such as HumanEval's prompt
  check: str = ""  # check: the source


@dataclasses.dataclass(frozen=True)
class Problem:
  problem: str
  # Every accepted answer, the first one canonical; of instructions, one JSON list.
  answers: tuple[str, ...]
  # One of KINDS: what it says is compared, or its text, or a letter; or it is run; or
  # the whole reply is held to instructions.
  kind: str = "answer"
  tests: Tests | None = None  # code alone
  language: str = ""  # that it is asked in, a code such as "en"; "": not said
  domain: str = "reasoning"  # one of DOMAINS
  where: str = dataclasses.field(default="", compare=False)  # FILE:line
