"""The sandbox: what a program sees, what it may do, how it ends, what is left of it."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from r1jax.errors import UserError
from r1jax.rewards import sandbox as sandboxes
from r1jax.rewards.inside import literals
from r1jax.rewards.program import Limits
from r1jax.rewards.sandbox import SandboxError, open_sandbox

pytestmark = pytest.mark.skipif(
  not shutil.which("bwrap"), reason="bubblewrap is not installed (apt install)"
)
LIMITS = Limits(seconds=3.0, cpu_seconds=2, memory_mib=256, disk_mib=8, output_kib=64)


@pytest.fixture(scope="module")
def sandbox():
  return open_sandbox("bubblewrap", LIMITS)


def call(*args, **kwargs):
  return literals.dump([list(args), kwargs]).encode() + b"\n"


def said(sandbox, program, stdin=""):
  ended = sandbox.run(textwrap.dedent(program), stdin)
  assert not ended.outcome, ended
  return ended.stdout.decode().split()


def test_a_program_reads_its_input_and_prints(sandbox):
  for read in ("input()", "__import__('sys').stdin.read().strip()", "open(0).read()"):
    assert said(sandbox, f"print({read})", "4\n") == ["4"]


def test_ordinary_programs_run(sandbox):
  """Dataclasses, threads, asyncio, big recursion and scratch files."""
  assert said(
    sandbox,
    """
    from __future__ import annotations
    import asyncio, collections, dataclasses, heapq, math, re, sys, threading
    @dataclasses.dataclass
    class Point:
      x: int
    found = []
    worker = threading.Thread(target=found.append, args=(Point(3).x,))
    worker.start(); worker.join()
    async def four(): return 4
    found.append(asyncio.run(four()))
    sys.setrecursionlimit(5000)
    def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
    found.append(depth(2000))
    with open("/tmp/a", "w") as file: file.write("6")
    found.append(int(open("/tmp/a").read()))
    print(*found, __name__)
    """,
  ) == ["3", "4", "2000", "6", "__main__"]


def test_nothing_of_the_host_is_inside(sandbox):
  here = os.getcwd()
  secret = pathlib.Path(here) / "setup.py"
  program = f"""
  import os
  print(os.getuid() != 0 and os.geteuid() != 0)
  print(set(os.listdir("/")) <= {{"dev", "lib", "lib64", "proc", "tmp", "usr"}})
  print(*(os.path.exists(p) for p in ({str(secret)!r}, "/etc", "/home")))
  print(sorted(os.environ))
  print(len([p for p in os.listdir("/proc") if p.isdigit()]))
  print(os.listdir("/usr/bin"))
  """
  os.environ["R1JAX_SECRET"] = "x"
  try:
    found = sandbox.run(textwrap.dedent(program)).stdout.decode().splitlines()
  finally:
    del os.environ["R1JAX_SECRET"]
  assert found[0] == "True" and found[1] == "True"
  assert found[2] == "False False False"
  assert "R1JAX_SECRET" not in found[3]
  assert found[4] == "2"  # bubblewrap's own first process, and the program
  assert len(eval(found[5])) == 1  # the interpreter, and no shell


def test_no_two_programs_share_a_uid_or_a_file(sandbox):
  outer = """
  import os, time
  print(open("/tmp/a", "a+").tell(), flush=True)
  time.sleep(0.3)
  """
  uids = {}

  def run(slot):
    with sandbox.start(textwrap.dedent(outer), slot=slot) as running:
      time.sleep(0.15)
      stat = os.stat(f"/proc/{running._process.pid}")
      uids[slot] = stat.st_uid, running.end().stdout

  threads = [threading.Thread(target=run, args=(slot,)) for slot in range(3)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert all(out == b"0\n" for _, out in uids.values())
  if os.getuid() == 0:
    assert len({uid for uid, _ in uids.values()}) == 3
    assert 0 not in {uid for uid, _ in uids.values()}


@pytest.mark.parametrize(
  "program, outcome",
  [
    ("while True: pass", "timeout"),
    ("import time; time.sleep(60)", "timeout"),
    ("x = [0] * 10**9", "memory"),
    ("open('/tmp/a', 'wb').write(b'0' * 10**8)", "memory"),
    ("1 / 0", "crash"),
    ("raise SystemExit(3)", "crash"),
    ("import os; os.abort()", "crash"),
    ("def f(:", "unparsable"),
    ("a\0b", "unparsable"),
    ("x = '\ud800'", "unparsable"),
    ("import os; os.fork()", "forbidden"),
    ("import socket; socket.socket()", "forbidden"),
    ("import os; os.unshare(1)", "crash"),  # no such function before Python 3.12
    ("import ctypes; ctypes.CDLL(None).unshare(0x10000000)", "forbidden"),
    ("open('/usr/a', 'w')", "forbidden"),
    ("print('x' * 10**6)", "forbidden"),  # more than the output's limit
    ("import sys; sys.stderr.write('x' * 10**6)", "forbidden"),
    ("import os; os._exit(0)", ""),
    ("exit()", ""),
    ("quit(0)", ""),
    ("exit(1)", "crash"),
    ("", ""),
  ],
)
def test_how_a_program_ends_is_told_apart(sandbox, program, outcome):
  begun = time.monotonic()
  ended = sandbox.run(program)
  if "os.unshare" in program and ended.outcome == "forbidden":
    return
  assert ended.outcome == outcome, ended
  assert time.monotonic() - begun < LIMITS.seconds + 1
  assert len(ended.stdout) <= (LIMITS.output_kib << 10) + (1 << 16)


def test_a_failure_of_ours_is_infrastructure_and_no_crash(sandbox, monkeypatch):
  monkeypatch.setattr(sandboxes, "_piece", lambda name: "raise SystemExit(3)")
  assert sandbox.run("print(1)").outcome == "infrastructure"


def test_a_bubblewrap_that_cannot_start_is_infrastructure(sandbox, monkeypatch):
  broken = ("bwrap", "--no-such-option")
  monkeypatch.setattr(sandboxes, "_bubblewrap", lambda *_: broken)
  assert sandbox.run("print(1)").outcome == "infrastructure"


def test_calls_are_answered_one_by_one(sandbox):
  program = "def f(x):\n  return x * 2 if x else x / 0\n"
  with sandbox.start(program, entry_point="f") as running:
    assert running.ask(b"") == b"ready"
    assert running.ask(call(4)) == b"8"
    assert running.ask(call([1, "a"])) == b'[1, "a", 1, "a"]'
    assert running.ask(call(0)).startswith(b'!["ZeroDivisionError"')
    assert running.ask(call(x=0.5)) == b"1.0"


def test_a_long_argument_passes(sandbox):
  with sandbox.start("def f(x):\n  return len(x)\n", entry_point="f") as running:
    running.ask(b"")
    assert running.ask(call("a" * 10**6)) == b"1000000"


def test_nothing_is_left_when_a_program_is_killed(sandbox):
  program = """
  import signal, threading, time
  for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
  for _ in range(5): threading.Thread(target=time.sleep, args=(100,)).start()
  """
  files = len(os.listdir("/proc/self/fd"))
  running = sandbox.start(textwrap.dedent(program), slot=7)
  time.sleep(0.3)
  running.kill()
  running.kill()  # again is harmless
  time.sleep(0.2)
  assert not processes_of(sandboxes._FIRST_UID + 7)
  assert len(os.listdir("/proc/self/fd")) == files


def test_programs_die_with_their_trainer(tmp_path):
  """kill -9 of the process that started one leaves nothing."""
  trainer = """
  import time
  from r1jax.rewards.program import Limits
  from r1jax.rewards.sandbox import open_sandbox
  sandbox = open_sandbox("bubblewrap", Limits(seconds=60))
  running = sandbox.start("while True: pass", slot=9)
  print("begun", flush=True)
  time.sleep(60)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(trainer)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "begun\n"
  time.sleep(0.3)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  time.sleep(0.5)
  assert not processes_of(sandboxes._FIRST_UID + 9)


def processes_of(uid):
  """As root: the living processes of a slot's uid. Otherwise none can be told apart."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      owner, fields = stat.stat().st_uid, stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if owner == uid and fields[0] != "Z":  # a zombie waits for the system's init
      found.append(stat.parent.name)
  return found


# -- refusals --------------------------------------------------------------------------


def test_an_unknown_backend_is_refused():
  with pytest.raises(UserError, match="bubblewrap, UNSAFE"):
    open_sandbox("docker", LIMITS)


@pytest.mark.parametrize("tool", ["bwrap", "setpriv"])
def test_a_missing_tool_is_named_with_what_to_install(monkeypatch, tool):
  if tool == "setpriv" and os.getuid() != 0:
    pytest.skip("needed by root alone")
  which = shutil.which
  monkeypatch.setattr(
    sandboxes.shutil, "which", lambda t, **how: None if t == tool else which(t, **how)
  )
  with pytest.raises(SandboxError, match=rf"{tool} is not installed.*apt install"):
    open_sandbox("bubblewrap", LIMITS)


def test_a_missing_filter_library_is_named(monkeypatch):
  sandboxes._filter.cache_clear()
  monkeypatch.setitem(sys.modules, "pyseccomp", None)
  with pytest.raises(SandboxError, match=r"filter.*pip install 'r1jax\[code\]'"):
    open_sandbox("bubblewrap", LIMITS)


def test_another_system_is_refused(monkeypatch):
  monkeypatch.setattr(sandboxes.sys, "platform", "darwin")
  with pytest.raises(SandboxError, match="darwin"):
    open_sandbox("bubblewrap", LIMITS)


def test_a_sandbox_with_a_hole_is_refused(monkeypatch):
  """The trial finds what a weaker confinement lets through."""
  whole = sandboxes._bubblewrap

  def leaky(python, disk):
    given = list(whole(python, disk))
    at = given.index("--proc")
    return (*given[:at], "--ro-bind", "/etc", "/etc", *given[at:])

  monkeypatch.setattr(sandboxes, "_bubblewrap", leaky)
  with pytest.raises(SandboxError, match=r"does not hold.*read /etc/passwd"):
    open_sandbox("bubblewrap", LIMITS)


def test_a_sandbox_without_its_filter_is_refused(monkeypatch):
  import pyseccomp

  empty = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
  with tempfile.TemporaryFile() as file:
    empty.export_bpf(file)
    file.seek(0)
    content = file.read()
  monkeypatch.setattr(sandboxes, "_filter", lambda may_fork=False: content)
  with pytest.raises(SandboxError, match=r"does not hold.*start a process"):
    open_sandbox("bubblewrap", LIMITS)


def test_the_unsafe_backend_says_so_by_its_name_and_still_has_limits():
  assert sandboxes.UNSAFE.startswith("UNSAFE_")
  sandbox = open_sandbox(sandboxes.UNSAFE, LIMITS)
  assert sandbox.run("print(input())", "4\n").stdout == b"4\n"
  assert sandbox.run("while True: pass").outcome == "timeout"
  assert sandbox.run("x = [0] * 10**9").outcome == "memory"
