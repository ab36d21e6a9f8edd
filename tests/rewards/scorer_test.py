"""The pool of workers: order, laziness, sums, failures of ours, and what is left over.

Numbers and "exact" where algebra does not matter, for then no process starts.
"""

import collections
import gc
import importlib.util
import itertools
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from r1jax.data.problem import Problem, Tests
from r1jax.errors import UserError
from r1jax.rewards import maths
from r1jax.rewards.code import CodeReward
from r1jax.rewards.maths import MathsError, MathsWorker
from r1jax.rewards.program import Limits
from r1jax.rewards.rules import checked
from r1jax.rewards.sandbox import UNSAFE
from r1jax.rewards.scorer import Scorer, ScorerConfig
from r1jax.rewards.verdict import Verdict

SEVEN = Problem("2 + 5?", ("7",))
ALGEBRA = Problem("Add 1 to x.", ("x+1",))
ADD = Problem(
  "Add them.",
  (),
  "code",
  Tests("call", (([1, 2], 3), ([-1, 1], 0)), entry_point="add"),
)
ECHO = Problem("Print it.", (), "code", Tests("stdin", (("a\n", "a"), ("b\n", "b"))))
needs_maths = pytest.mark.skipif(
  not importlib.util.find_spec("math_verify"),
  reason="math-verify is not installed",
)


def done(answer, thought="I add."):
  return f"<think>{thought}</think><answer>{answer}</answer>"


def program(source):
  return done(f"```python\n{textwrap.dedent(source).strip()}\n```")


def opened(*problems, rules=None, **options):
  options = {"maths": "exact", "workers": 2, "sandbox": UNSAFE, **options}
  return Scorer(ScorerConfig(**options), problems, rules)


def number_of(completion, problem):
  """A rule: the last number of the completion."""
  return float((re.findall(r"\d+", completion) or ["0"])[-1])


def processes():
  """pid -> (parent, command line), the dead ones aside."""
  found = {}
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
      line = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has just ended
      continue
    if state != "Z":
      found[int(stat.parent.name)] = int(parent), line
  return found


def descendants():
  running, found, more = processes(), set(), {os.getpid()}
  while more:
    more = {pid for pid, (parent, _) in running.items() if parent in more}
    found |= more
  return found


def maths_workers():
  ours = os.getpid()
  return [
    pid
    for pid, (parent, line) in processes().items()
    if parent == ours and "maths_worker" in line
  ]


def until_true(condition, seconds=5.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


@pytest.fixture(autouse=True)
def nothing_left_over():
  """After each test: no process, and no open file."""
  before = descendants()
  yield
  gc.collect()
  assert until_true(lambda: not descendants() - before)


# -- order -----------------------------------------------------------------------------


def test_results_stand_where_their_samples_stood():
  """The first sample is the last to end."""

  def slow(completion, problem):
    number = number_of(completion, problem)
    time.sleep({0: 0.2, 1: 0.05, 2: 0.0}[number % 3])
    return number

  with opened(SEVEN, rules={"slow": (1.0, slow)}, workers=4) as scorer:
    said = scorer.score([(done(i), SEVEN) for i in range(24)])
    assert [s.parts["slow"] for s in said] == list(range(24))
    assert [s.outcome == "correct" for s in said] == [i == 7 for i in range(24)]


def test_a_slow_sample_does_not_hold_the_others():
  """The rest is scored while the first still waits for the last of them."""
  last = threading.Event()

  def rule(completion, problem):
    if "99" in completion:
      return float(last.wait(20))
    if "14" in completion:
      last.set()
    return 1.0

  with opened(SEVEN, rules={"rule": (1.0, rule)}, workers=2) as scorer:
    samples = [(done(99), SEVEN), *((done(i), SEVEN) for i in range(15))]
    assert [s.parts["rule"] for s in scorer.score(samples)] == [1.0] * 16


def test_no_samples_are_no_results():
  with opened(SEVEN) as scorer:
    assert scorer.score([]) == []
    assert scorer.verdicts([]) == []


def test_many_threads_get_their_own_results():
  got = {}
  with opened(SEVEN, rules={"own": (1.0, number_of)}, workers=3) as scorer:

    def ask(name):
      samples = [(done(100 * name + i), SEVEN) for i in range(20)]
      got[name] = [s.parts["own"] for s in scorer.score(samples)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 9)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(30)
  assert got == {n: [100.0 * n + i for i in range(20)] for n in range(1, 9)}


@needs_maths
def test_many_threads_share_the_maths_workers():
  got = {}
  with opened(ALGEBRA, maths="math-verify", maths_seconds=20.0) as scorer:

    def ask(n):
      samples = [(done(f"{i}+x-{i - 1}"), ALGEBRA) for i in range(2, 6)]
      samples += [(done(f"{n}+2x"), ALGEBRA)]
      got[n] = [s.outcome for s in scorer.score(samples)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
    assert len(maths_workers()) <= 2
  assert got == {n: ["correct"] * 4 + ["wrong"] for n in range(4)}


# -- stream ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_stream_takes_a_bounded_number_ahead(workers):
  taken = 0

  def endless():
    nonlocal taken
    for i in itertools.count():
      taken = i + 1
      yield done(i), SEVEN

  bound = 32 * workers
  with opened(SEVEN, rules={"own": (1.0, number_of)}, workers=workers) as scorer:
    stream = scorer.stream(endless())
    for i in range(200):
      assert next(stream).parts["own"] == i
      assert taken <= i + 1 + bound
    before = taken
    time.sleep(0.05)
    assert taken == before  # nobody asks, nothing is taken
    stream.close()


def test_stream_takes_nothing_before_it_is_asked():
  def never():
    raise AssertionError("taken")
    yield

  with opened(SEVEN) as scorer:
    stream = scorer.stream(never())
    with pytest.raises(AssertionError, match="taken"):
      next(stream)


def test_an_abandoned_stream_leaves_the_scorer_whole():
  with opened(SEVEN) as scorer:
    stream = scorer.stream((done(7), SEVEN) for _ in range(100))
    assert next(stream).outcome == "correct"
    del stream
    assert [s.outcome for s in scorer.score([(done(8), SEVEN)])] == ["wrong"]


# -- sums ------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_the_named_parts():
  """`add` and 好 are the words of the chain, for `I` is a variable: language is 1/2."""
  rules = {"own": (3.0, number_of), "less": (-1.0, lambda c, p: 0.25)}
  weights = dict(accuracy_weight=2.0, format_weight=0.5, language_weight=0.25)
  with opened(SEVEN, rules=rules, **weights) as scorer:
    (said,) = scorer.score([(done(7, "I add 好"), SEVEN)])
  expected = dict(accuracy=1.0, format=1.0, language=0.5, own=7.0, less=0.25)
  assert said.parts == expected
  assert said.total == pytest.approx(2.0 + 0.5 + 0.125 + 21.0 - 0.25)
  assert said.outcome == "correct"


@pytest.mark.parametrize(
  "text, parts",
  [
    (done(7), dict(accuracy=1.0, format=1.0)),
    ("<answer>7</answer>", dict(accuracy=1.0, format=0.0)),
    (done(8), dict(accuracy=0.0, format=1.0)),
    ("", dict(accuracy=0.0, format=0.0)),
  ],
)
def test_without_a_language_weight_there_is_accuracy_and_format(text, parts):
  with opened(SEVEN) as scorer:
    (said,) = scorer.score([(text, SEVEN)])
  assert said.parts == parts and said.total == sum(parts.values())


def test_a_weight_of_0_keeps_the_part_out_of_the_total():
  rules = {"own": (0.0, number_of)}
  with opened(SEVEN, rules=rules, accuracy_weight=0.0) as scorer:
    (said,) = scorer.score([(done(7), SEVEN)])
  assert said.parts == dict(accuracy=1.0, format=1.0, own=7.0) and said.total == 1.0


def test_the_language_is_the_config_s():
  options = dict(language_weight=1.0, language="zh")
  with opened(SEVEN, **options) as scorer:
    (said,) = scorer.score([(done(7, "我们加 and stop"), SEVEN)])
  assert said.parts["language"] == pytest.approx(3 / 5)


def test_a_prefilled_think_tag_is_everyone_s():
  with opened(SEVEN, prefill_think=True, language_weight=1.0) as scorer:
    samples = [("We add.</think><answer>7</answer>", SEVEN), ("We add 7", SEVEN)]
    first, second = scorer.score(samples)
  assert first.parts == dict(accuracy=1.0, format=1.0, language=1.0)
  assert second.parts == dict(accuracy=0.0, format=0.0, language=1.0)


# -- outcomes --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "problem, answer, outcome",
  [
    (SEVEN, "7.0", "correct"),
    (SEVEN, "8", "wrong"),
    (SEVEN, "", "unparsable"),
    (SEVEN, "(7", "unparsable"),
    (Problem("?", ("7", "8")), "8", "correct"),
    (Problem("?", ("a b",), "text"), "a  b", "correct"),
    (Problem("?", ("1/2",), "text"), "0.5", "wrong"),
    (Problem("?", ("B",), "choice"), "(b)", "correct"),
    (Problem("?", ("B",), "choice"), "C", "wrong"),
    (Problem("?", ("B",), "choice"), "twelve", "unparsable"),
    (ALGEBRA, "x+1", "correct"),
    (ALGEBRA, "1+x", "wrong"),  # exact: no algebra
  ],
)
def test_outcomes_of_answers(problem, answer, outcome):
  with opened(problem) as scorer:
    (said,) = scorer.score([(done(answer), problem)])
    (verdict,) = scorer.verdicts([(done(answer), problem)])
  assert said.outcome == outcome == verdict.outcome
  assert said.parts["accuracy"] == float(outcome == "correct")


PROGRAMS = [
  (ECHO, "print(input())", "correct"),
  (ECHO, "print('a')", "wrong"),
  (ECHO, "1 / 0", "crash"),
  (ECHO, "while True: pass", "timeout"),
  (ADD, "def add(a, b): return a + b", "correct"),
  (ADD, "def add(a, b): return a - b", "wrong"),
  (ADD, "def plus(a, b): return a + b", "crash"),
  (ADD, "def add(a, b):\n  while True: pass", "timeout"),
]


def test_outcomes_of_programs_and_answers_in_one_batch():
  """Twice over, so that a slot is used again after each of them."""
  limits = Limits(seconds=1.0)
  samples = [(program(source), problem) for problem, source, _ in PROGRAMS]
  samples += [("no program", ADD), (done(7), SEVEN)]
  expected = [outcome for *_, outcome in PROGRAMS] + ["unparsable", "correct"]
  with opened(SEVEN, ADD, ECHO, limits=limits) as scorer:
    for _ in range(2):
      said = scorer.score(samples)
      assert [s.outcome for s in said] == expected
      assert all(s.parts["accuracy"] == (s.outcome == "correct") for s in said)
    assert expected == [v.outcome for v in scorer.verdicts(samples)]


@needs_maths
def test_outcomes_of_algebra():
  samples = [("1+x", "correct"), ("2+x", "wrong"), ("9^{9^{9^9}}", "timeout")]
  options = dict(maths="math-verify", maths_seconds=1.0, workers=1)
  with opened(ALGEBRA, **options) as scorer:
    said = scorer.score([(done(answer), ALGEBRA) for answer, _ in samples * 2])
  assert [s.outcome for s in said] == [outcome for _, outcome in samples * 2]


def test_hostile_texts_have_outcomes():
  texts = ["", "\x00", "\ud800", "<think>", "</answer>", "<answer>" * 10**4]
  texts += [done("7\ud800"), done("(" * 10**5), done("$" * 10**5), done("9" * 10**5)]
  texts += [done(r"{\over 1" * 10**4), done("\\boxed{" * 10**4)]
  choice = Problem("?", ("B",), "choice")
  with opened(SEVEN, choice, language_weight=1.0) as scorer:
    said = scorer.score([(text, p) for text in texts for p in (SEVEN, choice)])
  assert {s.outcome for s in said} <= {"wrong", "unparsable"}
  assert all(math.isfinite(s.total) for s in said)


@pytest.mark.parametrize("unit", ["\\n", " \\n", "\\n async "])
def test_a_program_of_white_space_does_not_hang(unit):
  """The regular expression that looks for `def` again; in a process of its own, for
  nothing else stops one."""
  source = f"""
    from r1jax.data.problem import Tests
    from r1jax.rewards.code import assembled
    assembled("{unit}" * 10**5, Tests("check", (), "f", "def f():", ""))
  """
  command = [sys.executable, "-c", textwrap.dedent(source)]
  try:
    assert subprocess.run(command, timeout=3).returncode == 0
  except subprocess.TimeoutExpired:
    pytest.fail("it hangs")


# -- rules that fail -------------------------------------------------------------------


def only_small(completion, problem):
  number = number_of(completion, problem)
  if number > 50:
    raise ValueError("too large")
  return number


SMALL = {"small": (1.0, checked(only_small, "small"))}


def test_a_rule_that_raises_later_ends_that_score_and_no_other():
  with opened(SEVEN, rules=SMALL) as scorer:
    for _ in range(2):
      with pytest.raises(UserError, match=r"small") as caught:
        scorer.score([(done(i), SEVEN) for i in range(100)])
      assert "too large" in str(caught.value)
    said = scorer.score([(done(7), SEVEN)] * 40)
    assert [s.total for s in said] == [1 + 1 + 7.0] * 40


def test_stream_gives_what_stood_before_the_sample_that_failed():
  got = []
  with opened(SEVEN, rules=SMALL) as scorer, pytest.raises(UserError):
    for said in scorer.stream((done(i), SEVEN) for i in range(100)):
      got.append(said.parts["small"])
  assert got == list(range(51))


def test_a_rule_that_fails_on_a_trial_text_fails_at_once():
  def nan(completion, problem):
    return math.nan

  before = descendants()
  with pytest.raises(UserError, match="'mine'"):
    opened(SEVEN, ADD, rules={"mine": (1.0, checked(nan, "mine"))})
  assert until_true(lambda: descendants() == before)


@pytest.mark.parametrize("said", [math.nan, None], ids=str)
def test_a_plain_function_is_held_to_the_same(said):
  """One that load_rules has not wrapped."""
  with pytest.raises(UserError, match="mine"):
    opened(SEVEN, rules={"mine": (1.0, lambda completion, problem: said)}).close()


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("gold", ["", " ", "\\frac{1}{", "(1, 2", "7" * 1000])
def test_a_gold_that_cannot_be_read_is_named_with_its_place(gold):
  for problem, where in (
    (Problem("2 + 5?", (gold,), where="set.jsonl:3"), "set.jsonl:3"),
    (Problem("2 + 5?", (gold,)), "2 + 5?"),
    (Problem("2 + 5?", ("7", gold)), "2 + 5?"),
  ):
    with pytest.raises(UserError) as caught:
      opened(SEVEN, problem)
    assert where in str(caught.value) and repr(gold[:60]) in str(caught.value)


def test_bad_golds_are_counted():
  bad = [Problem("?", ("(1",), where=f"set.jsonl:{i}") for i in range(1, 6)]
  with pytest.raises(UserError, match=r"set\.jsonl:1.*4 more"):
    opened(SEVEN, *bad)


def test_a_text_gold_may_be_anything():
  problem = Problem("?", ("(1" * 300,), "text")
  with opened(problem) as scorer:
    assert scorer.score([(done("(1" * 300), problem)])[0].outcome == "correct"


@pytest.mark.parametrize("gold", ["7", "BC", "yes", "", "B or C"])
def test_a_choice_that_is_no_letter_is_refused(gold):
  with pytest.raises(UserError, match="letter") as caught:
    opened(Problem("?", (gold,), "choice", where="set.jsonl:3"))
  assert "set.jsonl:3" in str(caught.value)


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(maths="sympy"), ["maths='sympy'", "math-verify", "exact"]),
    (dict(language="tlh"), ["language='tlh'", "en", "zh"]),
    (dict(workers=-1), ["workers=-1", "0.."]),
    (dict(workers=10**6), ["workers=1000000", "0.."]),
    (dict(maths_seconds=0.0), ["maths_seconds=0"]),
    (dict(maths_seconds=-1.0), ["maths_seconds=-1"]),
    (dict(maths_seconds=math.nan), ["maths_seconds=nan"]),
    (dict(maths_seconds=math.inf), ["maths_seconds=inf"]),
  ],
)
def test_a_config_that_cannot_be_is_refused(options, words):
  with pytest.raises(UserError) as caught:
    ScorerConfig(**options)
  assert all(word in str(caught.value) for word in words)


def test_an_unknown_sandbox_names_the_known_ones():
  with pytest.raises(UserError, match=r"sandbox='chroot'.*bubblewrap"):
    opened(ADD, sandbox="chroot")


@pytest.mark.parametrize("name", ["accuracy", "format", "language"])
@pytest.mark.parametrize("language_weight", [0.0, 1.0])
def test_a_rule_must_not_have_the_name_of_one_of_ours(name, language_weight):
  rules = {name: (1.0, number_of)}
  with pytest.raises(UserError, match=name):
    opened(SEVEN, rules=rules, language_weight=language_weight).close()


def test_no_workers_is_one_a_core():
  with opened(SEVEN, workers=0) as scorer:
    assert scorer.workers == len(os.sched_getaffinity(0))
    assert scorer.score([(done(7), SEVEN)])[0].outcome == "correct"


# -- when our side fails ---------------------------------------------------------------

ERRORS = [MathsError("lost"), OSError("no memory"), BrokenPipeError("gone")]


def failing(monkeypatch, owner, error, times):
  """Makes the first calls of owner() fail. Returns the count of calls."""
  real, calls, lock = owner.__call__, collections.Counter(), threading.Lock()

  def call(self, *args, **kwargs):
    with lock:
      calls["all"] += 1
      fails = calls["all"] <= times
    if not fails:
      return real(self, *args, **kwargs)
    if isinstance(error, Verdict):
      return error
    raise error

  monkeypatch.setattr(owner, "__call__", call)
  return calls


@pytest.fixture
def algebra(monkeypatch):
  """A scorer whose algebra is done by a stub: nothing starts."""
  golds = {"x+1": ("1+x", "1 + x"), "y+1": ("1+y",)}

  def call(self, gold, answer, *_):
    return "equal" if answer == gold or answer in golds[gold] else "different"

  monkeypatch.setattr(MathsWorker, "__call__", call)
  with opened(ALGEBRA, maths="math-verify") as scorer:
    yield scorer


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_maths_that_fails_once_is_tried_again(algebra, monkeypatch, error):
  calls = failing(monkeypatch, MathsWorker, error, times=1)
  (said,) = algebra.score([(done("1+x"), ALGEBRA)])
  assert said.outcome == "correct" and said.total == 2.0
  assert calls["all"] == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_maths_that_always_fails_is_lost_and_no_score(algebra, monkeypatch, error):
  with monkeypatch.context() as patch:
    calls = failing(patch, MathsWorker, error, times=math.inf)
    samples = [(done(a), ALGEBRA) for a in ("1+x", "2+x", "x+1", "")]
    said = algebra.score(samples)
    assert 2 <= calls["all"] <= 20
  lost, lost_too, same_text, nothing = said
  assert lost.outcome == lost_too.outcome == "infrastructure"
  assert lost.parts["accuracy"] == lost_too.parts["accuracy"] == 0.0
  assert str(error) in lost.detail
  # What needs no algebra is judged all the same.
  assert (same_text.outcome, nothing.outcome) == ("correct", "unparsable")
  # And a loss is not remembered.
  assert [s.outcome for s in algebra.score(samples[:2])] == ["correct", "wrong"]


@pytest.mark.parametrize(
  "error",
  [OSError("no memory"), Verdict("infrastructure", "the judge was lost")],
  ids=["raises", "says so"],
)
def test_programs_that_we_fail_to_run_are_tried_again_and_then_lost(monkeypatch, error):
  sample = program("def add(a, b): return a + b"), ADD
  with opened(ADD) as scorer:
    with monkeypatch.context() as patch:
      failing(patch, CodeReward, error, times=1)
      assert scorer.score([sample])[0].outcome == "correct"
    with monkeypatch.context() as patch:
      failing(patch, CodeReward, error, times=math.inf)
      (said,) = scorer.score([sample])
      assert said.outcome == "infrastructure" and said.parts["accuracy"] == 0.0
      assert scorer.verdicts([sample])[0].outcome == "infrastructure"
    assert scorer.score([sample])[0].outcome == "correct"


def test_a_pair_is_asked_once(algebra, monkeypatch):
  calls = failing(monkeypatch, MathsWorker, None, times=0)
  for _ in range(3):
    said = algebra.score([(done("1+x"), ALGEBRA)])
    assert said[0].outcome == "correct"
  algebra.score([(done("2+x"), ALGEBRA)])
  assert calls["all"] == 2


def test_what_was_scored_before_changes_no_verdict(monkeypatch):
  """Two golds share an answer's time; alone, the second has all of it."""

  def call(self, gold, answer, seconds=None):
    needed = 0.4 if "y" in gold and gold != answer else 0.0
    needed = 0.7 if "z" in gold and gold != answer else needed
    time.sleep(min(needed, seconds or 1.0))
    if needed > (seconds or 1.0):
      return "timeout"
    return "equal" if "y" in gold or gold == answer else "different"

  monkeypatch.setattr(MathsWorker, "__call__", call)
  both, alone = Problem("?", ("z+1", "y+1")), Problem("?", ("y+1",))
  options = dict(maths="math-verify", maths_seconds=1.0, workers=1)
  with opened(both, alone, **options) as scorer:
    assert scorer.score([(done("1+y"), both)])[0].outcome in ("correct", "timeout")
    assert scorer.score([(done("1+y"), alone)])[0].outcome == "correct"


@needs_maths
def test_a_worker_s_start_does_not_count_as_the_answer_s_time(monkeypatch):
  """Imports take as long as the machine is busy; the second expression is right too."""
  start = MathsWorker._start

  def slow(self):
    time.sleep(1.0)
    start(self)

  monkeypatch.setattr(MathsWorker, "_start", slow)
  problem = Problem("?", ("(x+1, x+2)",))
  options = dict(maths="math-verify", maths_seconds=1.0, workers=1)
  with opened(problem, **options) as scorer:
    said = scorer.score([(done("(1+x, 2+x)"), problem)])
  assert said[0].outcome == "correct", said[0]


# -- processes -------------------------------------------------------------------------


@needs_maths
@pytest.mark.parametrize("whose", ["worker", "its child"])
def test_a_killed_maths_worker_is_replaced(whose):
  options = dict(maths="math-verify", maths_seconds=10.0, workers=1)
  with opened(ALGEBRA, **options) as scorer:
    assert scorer.score([(done("1+x"), ALGEBRA)])[0].outcome == "correct"
    (pid,) = maths_workers()
    if whose == "its child":
      (pid,) = [p for p, (parent, _) in processes().items() if parent == pid]
    os.kill(pid, signal.SIGKILL)
    assert until_true(lambda: pid not in processes())
    said = scorer.score([(done("2+x-1"), ALGEBRA), (done("2+x"), ALGEBRA)])
    assert [s.outcome for s in said] == ["correct", "wrong"]
    assert len(maths_workers()) == 1


@needs_maths
def test_after_close_no_process_is_left():
  """Maths workers, their children, judges and a program that was under way."""
  before = descendants()
  limits = Limits(seconds=2.0)
  options = dict(maths="math-verify", maths_seconds=1.0, limits=limits)
  scorer = opened(ALGEBRA, ADD, ECHO, **options)
  samples = [(done("1+x"), ALGEBRA), (done("9^{9^{9^9}}"), ALGEBRA)]
  samples += [(program("def add(a, b): return a + b"), ADD)] * 4
  samples += [(program("import time; time.sleep(9)"), ECHO)] * 4
  stream = scorer.stream(samples)
  assert next(stream).outcome == "correct"
  assert descendants() > before
  scorer.close()
  scorer.close()
  stream.close()
  assert until_true(lambda: descendants() == before)


def test_nothing_starts_that_no_problem_needs():
  """One maths worker for answers and no sandbox, neither for choices and texts."""
  before = descendants()
  with opened(SEVEN, sandbox="bubblewrap", maths="math-verify") as scorer:
    scorer.score([(done(7), SEVEN)])
    assert len(descendants() - before) == 1
  assert until_true(lambda: descendants() == before)
  text, choice = Problem("?", ("x",), "text"), Problem("?", ("B",), "choice")
  with opened(text, choice, maths="math-verify") as scorer:
    scorer.score([(done("y+1"), text), (done("C"), choice)])
    assert descendants() == before


def script_that_exits(tmp_path, monkeypatch):
  script = tmp_path / "missing.py"
  script.write_text("import no_such_module_r1jax\n")
  monkeypatch.setattr(maths, "_SCRIPT", script)


def test_a_missing_math_verify_is_said_at_the_start(tmp_path, monkeypatch):
  script_that_exits(tmp_path, monkeypatch)
  with pytest.raises(UserError, match=r"pip install 'r1jax.*maths=exact"):
    opened(ALGEBRA, maths="math-verify")


def test_a_missing_math_verify_is_said_where_golds_are_numbers_too(
  tmp_path, monkeypatch
):
  """An answer of 2+5 needs it: found out later, every such sample is lost."""
  script_that_exits(tmp_path, monkeypatch)
  with pytest.raises(UserError, match="pip install 'r1jax"):
    opened(SEVEN, maths="math-verify").close()
