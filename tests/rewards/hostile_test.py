"""Hostile completions: contained in time, never rewarded, and nothing is left."""

import os
import pathlib
import shutil
import time

from hostile_answers import ANSWERS
from hostile_programs import PROGRAMS
import pytest

from r1jax.data.problem import Problem, Tests
from r1jax.rewards.code import CodeReward
from r1jax.rewards.program import Limits
from r1jax.rewards.sandbox import _FIRST_UID, open_sandbox
from r1jax.rewards.scorer import Scorer, ScorerConfig

LIMITS = Limits(
  seconds=3.0,
  total_seconds=3.0,
  cpu_seconds=2,
  memory_mib=256,
  output_kib=64,
)
PREAMBLE = 'def add(a, b):\n  """Adds."""\n'
CHECK = """def check(candidate):
  assert candidate(1, 2) == 3
  assert candidate(3, 4) == 7
  assert candidate(-5, 5) == 0
"""
PROBLEMS = {
  "call": Tests("call", (([1, 2], 3), ([3, 4], 7), ([-5, 5], 0)), entry_point="add"),
  "stdin": Tests("stdin", (("1 2\n", "3\n"), ("10 20\n", "30\n"))),
  "check": Tests("check", entry_point="add", preamble=PREAMBLE, check=CHECK),
}
HONEST = {
  "call": "def add(a, b):\n  return a + b",
  "stdin": "a, b = map(int, input().split())\nprint(a + b)",
  "check": "def add(a, b):\n  return a + b",
}
# A sample of every kind runs by default, all of them with -m slow.
EVERY = 8


def problem(style):
  return Problem("Add two integers.", (), "code", PROBLEMS[style])


def fenced(code):
  return f"<think>Now.</think>\n```python\n{code}\n```"


def state():
  """What a program could leave behind: processes of the slots, files, descriptors."""
  processes = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      owner, fields = stat.stat().st_uid, stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if _FIRST_UID <= owner < _FIRST_UID + 256 and fields[0] != "Z":
      processes.append(stat.parent.name)
  traces = [
    str(path)
    for folder in ("/tmp", "/dev/shm", "/var/tmp", os.getcwd())
    for path in pathlib.Path(folder).glob("*pwned_r1jax*")
  ]
  return processes, traces, len(os.listdir("/proc/self/fd"))


def attack(names):
  """Runs programs one after the other, each followed by an honest one now and then."""
  reward = CodeReward(open_sandbox("bubblewrap", LIMITS), slot=3)
  rewarded, late, lost = [], [], []
  try:
    before = None
    for i, name in enumerate(names):
      style, code = PROGRAMS[name]
      begun = time.monotonic()
      verdict = reward(fenced(code), problem(style))
      if time.monotonic() - begun > LIMITS.seconds + 1:
        late.append(name)
      if verdict.outcome == "correct":
        rewarded.append(name)
      if verdict.outcome == "infrastructure":
        lost.append((name, verdict.detail))
      if i % 10 == 0 or i + 1 == len(names):
        assert reward(fenced(HONEST[style]), problem(style)).outcome == "correct", name
      before = before or state()[2]
    assert state()[2] <= before + 1, "file descriptors are left open"
  finally:
    reward.close()
  assert not rewarded and not late and not lost, (rewarded, late, lost)
  time.sleep(0.2)
  processes, traces, _ = state()
  assert not processes and not traces


needs_bwrap = pytest.mark.skipif(
  not shutil.which("bwrap"), reason="bubblewrap is not installed (apt install)"
)


@needs_bwrap
def test_a_sample_of_hostile_programs_is_contained_and_never_rewarded():
  attack(sorted(PROGRAMS)[::EVERY])


@needs_bwrap
@pytest.mark.slow
def test_all_hostile_programs_are_contained_and_never_rewarded():
  attack(sorted(PROGRAMS))


def interrogate(names):
  seconds = 1.0
  rewarded, late = [], []
  honest = "<think>a</think><answer>x+1</answer>", Problem("p", ("1+x",))
  config = ScorerConfig(workers=1, maths_seconds=seconds)
  with Scorer(config, [honest[1]]) as scorer:
    for i, name in enumerate(names):
      gold, completion = ANSWERS[name]
      begun = time.monotonic()
      (said,) = scorer.score([(completion, Problem("p", (gold,)))])
      if time.monotonic() - begun > seconds + 1:
        late.append(name)
      if said.parts["accuracy"] or said.outcome == "correct":
        rewarded.append(name)
      assert said.outcome != "infrastructure", name
      if i % 10 == 0:
        assert scorer.score([honest])[0].outcome == "correct", name
  assert not rewarded and not late, (rewarded, late)
  assert not state()[1]


def test_a_sample_of_hostile_answers_is_never_rewarded_and_never_hangs():
  interrogate(sorted(ANSWERS)[:: EVERY // 2])


@pytest.mark.slow
def test_all_hostile_answers_are_never_rewarded_and_never_hang():
  interrogate(sorted(ANSWERS))


def test_the_suites_are_large_enough():
  assert len(PROGRAMS) >= 60 and len(ANSWERS) >= 60
  assert {style for style, _ in PROGRAMS.values()} == set(PROBLEMS)
