r"""The maths worker: algebra in a process that hangs, dies or is missing, and is right
again after that; and 1422 answers that are known to be right or wrong.
"""

import gc
import json
import os
import pathlib
import resource
import signal
import threading
import time

import pytest

from r1jax.rewards import maths
from r1jax.rewards.accuracy import answered
from r1jax.rewards.maths import MathsError, MathsWorker

pytest.importorskip("math_verify")
PAIRS = pathlib.Path(__file__).with_name("maths_pairs.jsonl")
TOWER = "9^{9^{9^9}}"
SECONDS = 0.5


@pytest.fixture(scope="module")
def worker():
  started = MathsWorker(SECONDS)
  assert started("x", "x", 20.0) == "equal"  # it imports what it needs late
  yield started
  started.close()


@pytest.fixture
def fresh():
  made = MathsWorker(2.0)
  yield made
  made.close()
  gc.collect()  # what it left open is this test's


def verdict(answer, *golds, algebra):
  text = f"<think>I add.</think><answer>{answer}</answer>"
  return answered(text, golds, algebra=algebra)


def children(of):
  """pids whose parent is `of`, the dead ones aside."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      name, _, rest = stat.read_text().rpartition(") ")
    except OSError:  # it has just ended
      continue
    state, parent = rest.split()[:2]
    if int(parent) == of and state != "Z":
      found.append(int(name.split()[0]))
  return found


def of_a_group(leader):
  """pids of a process group, the dead ones aside."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      rest = stat.read_text().rpartition(") ")[2].split()
    except OSError:
      continue
    if int(rest[2]) == leader and rest[0] != "Z":
      found.append(int(stat.parent.name))
  return found


def until_true(condition, seconds=5.0):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


# -- algebra ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  "gold, answer, said",
  [
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", "equal"),
    ("(x+1)^2", "x^2+2x+1", "equal"),
    (r"\sin^2 x + \cos^2 x", "1", "equal"),
    ("(x+1)^2", "x^2+2x+2", "different"),
    (r"\sqrt{2}", "1.41", "different"),
    ("x", "y", "different"),
    (r"2\pi", r"\pi + \pi", "equal"),
    ("-4", "(1+i)^4", "equal"),
    ("-1", r"e^{i\pi}", "equal"),
    ("i", "-i", "different"),
  ],
)
def test_expressions_are_equal_by_algebra(worker, gold, answer, said):
  assert worker(gold, answer, 10.0) == said


@pytest.mark.parametrize(
  "gold, answer, said",
  [
    ("i", "i^2", "different"),
    ("i", "i^{3}", "different"),
    ("1+i", "1+i^3", "different"),
    ("2i", "2i^2", "different"),
    ("i", "i^5", "equal"),
    ("-i", "i^3", "equal"),
    ("-1", "i^2", "equal"),
    ("1", "i^4", "equal"),
  ],
)
def test_powers_of_i_are_powers(worker, gold, answer, said):
  assert worker(gold, answer, 10.0) == said


@pytest.mark.parametrize("text", ["x+1", r"\sqrt{2}", r"\frac{\pi}{2}", "2x^2-1"])
def test_an_expression_reads(worker, text):
  assert worker.reads(text)


@pytest.mark.parametrize("text", ["", "=", "?", ")(", "x+", r"\begin{x}", "^2"])
def test_what_is_no_expression_does_not_read(worker, text):
  assert not worker.reads(text)


@pytest.mark.parametrize(
  "text",
  ['x "\n y', "\x00", "\ud800", "é∑", "}{", "\\", "x\r\nequal\r\n", "x" * 100_000, ""],
  ids=lambda text: ascii(text[:12]),
)
def test_any_text_has_an_outcome_and_the_next_answer_is_right(worker, text):
  assert worker("5", text) in ("equal", "different", "timeout", "memory", "crash")
  assert worker("x+1", text) != "equal"
  assert worker("x+1", "1+x", 10.0) == "equal"
  assert worker("x+1", "2+x", 10.0) == "different"


def test_it_works_in_any_thread(fresh):
  """One after the other: no signal of the main thread is needed."""
  said = []

  def ask():
    said.append(fresh("x+1", "1+x"))
    said.append(fresh("5", TOWER, SECONDS))
    said.append(fresh("x+1", "1+x"))

  for _ in range(2):
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
  assert said == ["equal", "timeout", "equal"] * 2


# -- what is too much ------------------------------------------------------------------


@pytest.mark.parametrize(
  "answer", [TOWER, "(10^9)!", r"2^{10^{10}}", r"9^{9^9}-9^{9^9}"]
)
def test_a_hang_times_out_and_the_next_answer_is_right(worker, answer):
  begin = time.monotonic()
  assert verdict(answer, "5", algebra=worker).outcome == "timeout"
  assert time.monotonic() - begin < SECONDS + 1
  ready = lambda gold, answer: worker(gold, answer, 10.0)  # noqa: E731
  assert verdict("1+x", "x+1", algebra=ready).outcome == "correct"
  assert verdict("2+x", "x+1", algebra=ready).outcome == "wrong"


def test_a_call_s_own_seconds_go_before_the_worker_s(worker):
  begin = time.monotonic()
  assert worker("5", TOWER, 0.1) == "timeout"
  assert time.monotonic() - begin < 0.1 + 2


def test_a_hang_leaves_one_child(worker):
  leader = worker._process.pid
  for _ in range(3):
    assert worker("5", TOWER, 0.1) == "timeout"
  assert worker("x", "x", 10.0) == "equal"
  assert until_true(lambda: len(of_a_group(leader)) == 2)  # the worker and its child


def test_a_list_of_hangs_costs_one(worker):
  many = ", ".join(f"{n}^{{9^{{9^9}}}}" for n in range(2, 12))
  begin = time.monotonic()
  assert verdict(many, r"\sqrt{2}, \pi", algebra=worker).outcome == "timeout"
  assert time.monotonic() - begin < SECONDS + 2


def test_its_child_has_a_memory_limit(worker):
  assert worker("x", "x", 10.0) == "equal"
  (child,) = children(worker._process.pid)
  limits = pathlib.Path(f"/proc/{child}/limits").read_text()
  (line,) = [line for line in limits.splitlines() if "address space" in line]
  assert int(line.split()[3]) <= 4 << 30


@pytest.mark.parametrize(
  "said, outcome",
  [
    ("memory", "memory"),
    ("timeout", "timeout"),
    ("crash", "wrong"),
    ("different", "wrong"),
    ("equal", "correct"),
  ],
)
def test_what_the_worker_says_is_the_outcome(said, outcome):
  assert verdict("1+x", "x+1", algebra=lambda *_: said).outcome == outcome


@pytest.mark.parametrize("said", ["memory", "timeout"])
def test_one_gold_that_is_too_much_does_not_undo_another_that_is_met(said):
  algebra = lambda gold, answer: said if "y" in gold else "equal"  # noqa: E731
  assert verdict("1+x", "x+1", "y+1", algebra=algebra).outcome == "correct"


def test_memory_of_the_process_comes_through(fresh, tmp_path, monkeypatch):
  """Of a worker that says so once and then recovers."""
  script = tmp_path / "stub.py"
  script.write_text(
    "import sys\nprint('ready', flush=True)\n"
    "for line in sys.stdin:\n"
    "  print('memory' if '9^9' in line else 'equal', flush=True)\n"
  )
  monkeypatch.setattr(maths, "_SCRIPT", script)
  assert verdict("9^9+x", "x+1", algebra=fresh).outcome == "memory"
  assert verdict("1+x", "x+1", algebra=fresh).outcome == "correct"


# -- the process -----------------------------------------------------------------------


def test_close_ends_all_and_again_is_harmless():
  worker = MathsWorker()
  worker.close()  # it has not started
  assert worker("x+1", "1+x", 20.0) == "equal"
  leader = worker._process.pid
  assert len(of_a_group(leader)) == 2
  worker.close()
  worker.close()
  assert until_true(lambda: not of_a_group(leader))
  assert worker("x+1", "1+x", 20.0) == "equal"  # it starts again
  worker.close()


def test_a_killed_worker_is_a_maths_error_and_then_replaced(fresh):
  """As the docstring says; an OSError would be of the pipe, not of the worker."""
  assert fresh("x+1", "1+x", 20.0) == "equal"
  os.kill(fresh._process.pid, signal.SIGKILL)
  pid = fresh._process.pid
  assert until_true(lambda: pid not in children(os.getpid()))
  with pytest.raises(MathsError, match="lost"):
    fresh("x+1", "1+x")
  assert fresh("x+1", "1+x", 20.0) == "equal"


def test_a_worker_killed_at_work_is_a_maths_error_and_then_replaced(fresh):
  assert fresh("x+1", "1+x", 20.0) == "equal"
  pid = fresh._process.pid
  timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
  timer.start()
  with pytest.raises(MathsError, match="lost"):
    fresh("5", TOWER, 10.0)
  timer.join()
  assert until_true(lambda: not of_a_group(pid))
  assert fresh("x+1", "1+x", 20.0) == "equal"


@pytest.mark.parametrize(
  "source",
  ["import no_such_module_r1jax", "raise SystemExit(1)", ""],
  ids=["import", "exit", "end"],
)
def test_without_math_verify_the_error_says_what_to_install(
  fresh, tmp_path, monkeypatch, source
):
  real, script = maths._SCRIPT, tmp_path / "missing.py"
  script.write_text(source)
  monkeypatch.setattr(maths, "_SCRIPT", script)
  for _ in range(2):
    with pytest.raises(MathsError, match="pip install 'r1jax"):
      fresh("x+1", "1+x")
  monkeypatch.setattr(maths, "_SCRIPT", real)
  assert fresh("x+1", "1+x", 20.0) == "equal"


def test_a_python_that_does_not_start_is_a_maths_error(fresh, monkeypatch):
  monkeypatch.setattr(maths.sys, "executable", "/bin/false")
  with pytest.raises(MathsError):
    fresh("x+1", "1+x")


def test_it_works_with_more_than_a_thousand_open_files(fresh):
  """select() cannot; a run with many workers has as many."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if hard != resource.RLIM_INFINITY and hard < 2100:
    pytest.skip(f"no more than {hard} open files are allowed here")
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2100), hard))
  opened = []
  try:
    opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(1100))
    assert fresh("x+1", "1+x", 20.0) == "equal"
  finally:
    for fd in opened:
      os.close(fd)
    fresh.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- all together ----------------------------------------------------------------------


def test_99_of_100_known_answers_are_judged_rightly():
  rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
  worker, misses = MathsWorker(2.0), []
  try:
    for row in rows:
      said = verdict(row["answer"], row["gold"], algebra=worker)
      if (said.outcome == "correct") != row["right"]:
        misses.append((row["gold"], row["answer"], row["right"], said.outcome))
  finally:
    worker.close()
  agreement = 1 - len(misses) / len(rows)
  shown = "\n".join(map(repr, misses))
  assert len(rows) > 1000 and agreement >= 0.99, f"{agreement:.4f}\n{shown}"
