"""Does the program pass all tests? (R1, section 2.2: the compiler's feedback.)

The verdict is made outside the program's process. For an input it is made here, from
the text that the program printed. For a function it is made by a judge in a second
sandbox: the judge holds the tests and the expected values, asks for one call after the
other, and gets plain values back; so nothing the program does to its own Python, its
`==`, its frames or its output can reach what it is judged by.

Choices: a test passes or the program fails, no partial credit (the paper is silent);
printed text is compared line by line, numbers by value; floats of returned values may
differ by 1e-9; a tuple is as good as a list.
"""

from decimal import Decimal
import json
import re
import time

from r1jax.data.problem import Problem, Tests
from r1jax.rewards.extraction import extract_program
from r1jax.rewards.inside.literals import dump
from r1jax.rewards.program import Program
from r1jax.rewards.sandbox import Sandbox
from r1jax.rewards.verdict import OUTCOMES, Verdict
from r1jax.rewards.wasi import Wasi

FLOAT_TOLERANCE = 1e-9
_DECIMAL = re.compile(r"[+-]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100})", re.ASCII)


class CodeReward:
  """Runs programs in one slot of a sandbox, one at a time; keeps a judge for it."""

  def __init__(
    self, sandbox: Sandbox | Wasi, *, slot: int = 0, prefill_think: bool = False
  ):
    self._sandbox, self._slot, self._prefill = sandbox, slot, prefill_think
    self._judge: Program | None = None

  def __call__(self, completion: str, problem: Problem) -> Verdict:
    """The verdict on a completion's program.

    Args:
      completion: the model's text.
      problem: one with tests.
    """
    code = extract_program(completion, prefill_think=self._prefill)
    if code is None:
      return Verdict("unparsable", "no block of Python")
    tests = problem.tests
    program = assembled(code, tests)
    limits = self._sandbox.limits
    until = time.monotonic() + limits.total_seconds
    if tests.style == "stdin":
      return self._printed(program, tests, until)
    return self._called(program, tests, until)

  def close(self) -> None:
    if self._judge:
      self._judge.kill()
      self._judge = None

  def _printed(self, program: str, tests: Tests, until: float) -> Verdict:
    for i, (given, expected) in enumerate(tests.cases):
      running = self._sandbox.start(
        program, stdin=given, slot=self._slot, seconds=self._left(until)
      )
      with running:
        ended = running.end()
      if ended.outcome:
        return Verdict(ended.outcome, f"test {i}: {ended.detail}")
      said = ended.stdout.decode("utf-8", "replace")
      if not same_output(said, expected):
        return Verdict("wrong", f"test {i}: printed {said[:60]!r}")
    return Verdict("correct")

  def _called(self, program: str, tests: Tests, until: float) -> Verdict:
    running = self._sandbox.start(
      program,
      entry_point=tests.entry_point,
      slot=self._slot,
      seconds=self._left(until),
    )
    with running:
      if running.ask(b"") is None:
        return _stopped(running)
      line = self._ask_judge(_job(tests), until)
      while line[:1] == b"C":
        running.allow(time.monotonic() + self._left(until))
        reply = running.ask(line[1:] + b"\n")
        if reply is None:
          self.close()  # it waits for an answer that will not come
          return _stopped(running)
        line = self._ask_judge(reply, until)
    if line[:1] != b"V":
      return Verdict(line.decode() or "infrastructure", "in the tests")
    outcome, detail = json.loads(line[1:])
    if outcome not in OUTCOMES:
      return Verdict("infrastructure", f"the tests say {outcome!r:.60}")
    return Verdict(outcome, detail)

  def _left(self, until: float) -> float:
    """Seconds for the next run or call."""
    return min(self._sandbox.limits.seconds, until - time.monotonic())

  def _ask_judge(self, line: bytes, until: float) -> bytes:
    """The judge's next line; b"timeout", or b"" if it was lost, after closing it."""
    if self._judge is None:
      self._judge = self._sandbox.judge(slot=self._slot)
    until = time.monotonic() + self._left(until)
    self._judge.allow(until)
    said = self._judge.ask(line + b"\n")
    if said is None:
      late = time.monotonic() >= until
      self.close()
      return b"timeout" if late else b""
    return said


def _stopped(running: Program) -> Verdict:
  """Of a program that ended when it should have answered."""
  ended = running.end()
  return Verdict(ended.outcome or "crash", ended.detail or "it ended before its tests")


def _job(tests: Tests) -> bytes:
  """What the judge is told, as a line."""
  told = {
    "style": tests.style,
    "preamble": tests.preamble,
    "entry_point": tests.entry_point,
    "check": tests.check,
    "cases": dump(tests.cases),
    "tolerance": FLOAT_TOLERANCE,
  }
  return json.dumps(told).encode()


def assembled(code: str, tests: Tests) -> str:
  """The whole program: the preamble, and the answer after it. An answer that does not
  define the function again is the preamble's body, as HumanEval's are."""
  if not tests.preamble:
    return code
  name = re.escape(tests.entry_point)
  again = re.search(rf"^[ \t]*(?:async )?def[ \t]+{name}\b", code, re.MULTILINE)
  return tests.preamble + ("\n" if again else "") + code


def same_output(said: str, expected: str) -> bool:
  """Whether two printed texts are the same: line by line without white space at their
  ends and at the text's; where a line differs, word by word, as text or as decimal
  numbers (LiveCodeBench's rule: 0.50 is 0.5)."""
  ours, theirs = lines(said), lines(expected)
  return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(said: str, expected: str) -> bool:
  if said == expected:
    return True
  ours, theirs = said.split(), expected.split()
  return len(ours) == len(theirs) and all(
    a == b or _decimal(a) == _decimal(b) is not None
    for a, b in zip(ours, theirs, strict=True)
  )


def _decimal(word: str) -> Decimal | None:
  return Decimal(word) if _DECIMAL.fullmatch(word) else None


def lines(text: str) -> list[str]:
  """Lines without the white space at their ends, up to the last that holds anything."""
  return [line.rstrip() for line in text.rstrip().split("\n")]
