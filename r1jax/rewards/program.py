"""One program in a sandbox, from its start to its end: bytes, deadlines, outcomes."""

import contextlib
import dataclasses
import fcntl
import os
import re
import select
import signal
import subprocess
import time

from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one program."""

  seconds: float = 6.0  # by the clock: of a run on one input, or of one call
  total_seconds: float = 60.0  # of all its inputs or calls together
  cpu_seconds: int = 5  # of a run; all calls together have the total
  memory_mib: int = 512  # address space
  disk_mib: int = 16  # /tmp
  output_kib: int = 1024  # of each of stdout and stderr, and of a returned value
  threads: int = 32  # where the slot has a uid of its own

  def __post_init__(self):
    """Raises UserError: what came and what is allowed."""
    if not (0 < self.seconds <= 3600 and 1 <= self.cpu_seconds <= 3600):
      raise UserError(
        f"a program's seconds={self.seconds} must be above 0 and its cpu_seconds="
        f"{self.cpu_seconds} at least 1; both at most 3600 (config.reward.code_seconds,"
        " config.reward.code_cpu_seconds)."
      )
    if not self.seconds <= self.total_seconds <= 86_400:
      raise UserError(
        f"a program's total_seconds={self.total_seconds} must be at least its seconds="
        f"{self.seconds} and at most 86400 (config.reward.code_total_seconds)."
      )
    if self.memory_mib < 32 or min(self.disk_mib, self.output_kib, self.threads) < 1:
      raise UserError(
        f"a program's memory_mib={self.memory_mib} must be at least 32, which Python"
        f" itself needs, and disk_mib={self.disk_mib}, output_kib={self.output_kib} and"
        f" threads={self.threads} at least 1 (config.reward.code_memory_mib)."
      )


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a program ended; `outcome` is "" where it ran to its end."""

  outcome: str
  detail: str
  stdout: bytes


class Program:
  """A running Python. A context: leaving it kills all that it started.

  What it writes is kept up to the limits and the rest stops it; nothing it does raises.
  """

  def __init__(
    self,
    process: subprocess.Popen,
    pipes: "Pipes",
    limits: Limits,
    *,
    until: float,
    bare: bool,
  ):
    """Takes over a process.

    Args:
      process: with stdout and stderr as pipes.
      pipes: its status, and its requests and replies where it is to be called.
      limits: of its output.
      until: its deadline on the monotonic clock.
      bare: not inside bubblewrap, which turns a signal into an exit code.
    """
    self._process, self._limits, self._until, self._bare = process, limits, until, bare
    self._pipes, self._outcome, self._outgoing = pipes, "", b""
    out, err = process.stdout.fileno(), process.stderr.fileno()
    self._held = {out: b"", err: b"", **{fd: b"" for fd in pipes.readable}}
    self._open = set(self._held)
    self._out, self._err = out, err
    for fd in (*self._held, *pipes.writable):
      os.set_blocking(fd, False)

  def __enter__(self) -> "Program":
    return self

  def __exit__(self, *_: object) -> None:
    self.kill()

  def allow(self, until: float) -> None:
    """Moves the deadline, on the monotonic clock."""
    self._until = until

  def ask(self, line: bytes) -> bytes | None:
    """Sends a line (b"": nothing) and waits for one; None if none will come."""
    self._outgoing = line
    replies = self._pipes.replies
    while not self._outcome:
      reply, found, rest = self._held[replies].partition(b"\n")
      if found:
        self._held[replies] = rest
        return reply
      if replies not in self._open:
        return None
      self._pump()
    return None

  def end(self) -> Ended:
    """Waits for its end and says how it was."""
    while not self._outcome and self._open - {self._pipes.replies}:
      self._pump()
    if not self._outcome:
      try:
        self._process.wait(max(self._until - time.monotonic(), 0.01))
      except subprocess.TimeoutExpired:
        self._outcome = "timeout"
    stopped = self._outcome
    self.kill()
    outcome = stopped or self._how_it_ended()
    detail = self._last_line().decode("utf-8", "replace")[:300]
    if stopped == "forbidden":
      detail = f"it wrote more than {self._limits.output_kib} KiB"
    return Ended(outcome, detail or outcome, self._held[self._out])

  def kill(self) -> None:
    """Ends it and all that it started; again is harmless."""
    if self._process.returncode is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
    self._process.stdout.close()
    self._process.stderr.close()
    self._pipes.close()
    self._open = set()

  def _pump(self) -> None:
    """Moves bytes until something has happened or the deadline has passed."""
    left = self._until - time.monotonic()
    if left <= 0:
      self._outcome = "timeout"
      return
    poll = select.poll()
    for fd in self._open:
      poll.register(fd, select.POLLIN)
    if self._outgoing:
      poll.register(self._pipes.requests, select.POLLOUT)
    for fd, _ in poll.poll(min(left, 1.0) * 1000):
      if fd == self._pipes.requests:
        self._send()
      else:
        self._receive(fd)

  def _send(self) -> None:
    try:
      sent = os.write(self._pipes.requests, self._outgoing)
      self._outgoing = self._outgoing[sent:]
    except BlockingIOError:
      pass
    except BrokenPipeError:
      self._outgoing = b""

  def _receive(self, fd: int) -> None:
    data = os.read(fd, 1 << 16)
    if not data:
      self._open.discard(fd)
    self._held[fd] += data
    if len(self._held[fd]) > self._limits.output_kib << 10:
      self._outcome = "forbidden"

  def _last_line(self) -> bytes:
    return self._held[self._err].strip().rpartition(b"\n")[2]

  def _how_it_ended(self) -> str:
    """The outcome, from what was said before the program began, the exit code and, for
    the kind of a failure alone, the last line of the program's own errors."""
    code, status = self._process.returncode, self._held[self._pipes.status]
    if self._bare and code < 0:
      code = 128 - code
    if b"L" not in status or code < 0:
      return "infrastructure"
    last = self._last_line()
    if b"C" not in status:
      return "memory" if last.startswith(b"MemoryError") else "unparsable"
    if code - 128 in _SIGNALS:
      return _SIGNALS[code - 128]
    if code:
      return next((o for start, o in _ERRORS if re.match(start, last)), "crash")
    return ""


_SIGNALS = {
  signal.SIGXCPU: "timeout",
  signal.SIGKILL: "memory",  # of the kernel, for want of memory
  signal.SIGSYS: "forbidden",  # of the filter of system calls
}
# The last line of a traceback, and what it says of the failure.
_ERRORS = (
  (rb"MemoryError", "memory"),
  (rb"OSError: \[Errno (27|28)\]", "memory"),  # a file too large, no space left
  (rb"PermissionError", "forbidden"),
  (rb"OSError: \[Errno 30\]", "forbidden"),  # a read-only file system
)


class Pipes:
  """The descriptors between us and a program, beside stdout and stderr.

  `given` are its ends, by name; they are closed here once it has started. `status` and
  `replies` are read by us and `requests` written; -1 where there is none.
  """

  def __init__(self, files: dict[str, bytes], *, calls: bool):
    """Args: contents it can read and nobody can change, by name; whether to open the
    pair of requests and replies."""
    self.given, self.readable, self.writable = {}, [], []
    self.requests = self.replies = -1
    try:
      for name, content in files.items():
        self.given[name] = sealed(content)
      self.status, self.given["status"] = os.pipe()
      self.readable.append(self.status)
      if calls:
        self.given["requests"], self.requests = os.pipe()
        self.writable.append(self.requests)
        self.replies, self.given["replies"] = os.pipe()
        self.readable.append(self.replies)
    except BaseException:  # too many open files, say
      self.close()
      raise

  def started(self) -> None:
    for fd in self.given.values():
      os.close(fd)
    self.given = {}

  def close(self) -> None:
    self.started()
    for fd in (*self.readable, *self.writable):
      os.close(fd)
    self.readable, self.writable = [], []


def sealed(content: bytes) -> int:
  """A file descriptor to read `content` from, which nobody can change."""
  fd = os.memfd_create("r1jax", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
  try:
    with os.fdopen(os.dup(fd), "wb") as file:
      file.write(content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
    os.lseek(fd, 0, os.SEEK_SET)
  except BaseException:
    os.close(fd)
    raise
  return fd
