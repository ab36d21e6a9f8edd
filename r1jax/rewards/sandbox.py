"""Where generated programs run. The only room that starts a process for their code.

On Linux: bubblewrap (own user, pid, mount, network, ipc and uts namespaces, no
capabilities), a seccomp filter, and resource limits. Inside there is Python, its
standard library, the system's shared libraries and a small /tmp; no network, no other
file of the host, no environment, no way to start a process. A slot has a real uid of
its own where we may choose one (as root).

What it does not protect against: a hole in the kernel; timing and other side channels;
a program that uses its whole share of processor time and memory, which is why the
number of slots is yours; and what the tests of a problem do, which run in a sandbox of
the same kind (they may start processes) but are believed. In a container whose first
process does not wait for orphans (`docker run` without `--init`) bubblewrap leaves a
zombie a program.
"""

from collections.abc import Sequence
import dataclasses
import errno
import functools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from r1jax.errors import UserError
from r1jax.rewards.program import Ended, Limits, Pipes, Program

UNSAFE = "UNSAFE_model_code_runs_with_my_rights"
BACKENDS = ("bubblewrap", UNSAFE)
MAX_SLOTS = 256

_INSIDE = pathlib.Path(__file__).parent / "inside"
_FIRST_UID = 65_000  # Debian keeps 65000-65533 free; slot n runs as 65000 + n
_ADVICE = (
  "On Debian or Ubuntu: apt install bubblewrap, and pip install 'r1jax[code]'. It needs"
  " Linux with unprivileged user namespaces, which some containers and notebooks"
  " forbid: config.reward.sandbox=wasi, with pip install 'r1jax[wasi]', does without."
  f" config.reward.sandbox={UNSAFE} runs programs without any protection: only for a"
  " machine that may be lost."
)

# What no program has any business with: the process is killed at the call.
_KILLED = (
  *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "mount"),
  *("umount2", "pivot_root", "chroot", "fsopen", "fsmount", "fspick", "move_mount"),
  *("open_tree", "mount_setattr", "unshare", "setns", "bpf", "perf_event_open"),
  *("userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "add_key"),
  *("request_key", "keyctl", "kexec_load", "kexec_file_load", "init_module"),
  *("finit_module", "delete_module", "reboot", "swapon", "swapoff", "acct", "quotactl"),
  *("open_by_handle_at", "name_to_handle_at"),
)
# What libraries may try: it fails with "not permitted".
_REFUSED = (
  *("socket", "connect", "bind", "listen", "accept", "accept4", "vfork"),
  *("memfd_create", "memfd_secret", "personality", "move_pages", "mbind", "seccomp"),
  *("set_mempolicy", "migrate_pages", "syslog", "setpriority", "sched_setscheduler"),
  *("sched_setattr", "pidfd_open", "shmget", "msgget", "semget", "mq_open"),
  *("io_setup", "inotify_init", "inotify_init1", "fanotify_init"),
)


class SandboxError(UserError):
  """No sandbox: what is missing and what to install."""


class Sandbox:
  """A way to start sandboxed Pythons. `open_sandbox` makes one that has been tried."""

  def __init__(self, backend: str, python: str, limits: Limits):
    self.backend, self.python, self.limits = backend, python, limits

  def run(self, program: str, stdin: str = "", *, slot: int = 0) -> Ended:
    """Runs a program to its end on an input. Never raises for what the program does."""
    with self.start(program, stdin=stdin, slot=slot) as running:
      return running.end()

  def start(
    self,
    program: str,
    *,
    stdin: str = "",
    entry_point: str = "",
    slot: int = 0,
    seconds: float | None = None,
  ) -> Program:
    """A program that has begun: on an input or, with an entry point, to be called.

    Args:
      program: source.
      stdin: its whole input.
      entry_point: an expression for its function.
      slot: whose uid; no two programs at a time in a slot.
      seconds: until it must have ended; None: the limits'.
    """
    files = {"program": _encoded(program), "stdin": _encoded(stdin)}
    until = time.monotonic() + (self.limits.seconds if seconds is None else seconds)
    if not entry_point:
      return self._start(("start", "candidate"), files, {}, slot, until)
    limits = dataclasses.replace(
      self.limits, cpu_seconds=math.ceil(self.limits.total_seconds)
    )
    options = {"entry_point": entry_point}
    pieces = ("start", "literals", "candidate")
    return self._start(pieces, files, options, slot, until, limits)

  def judge(self, *, slot: int = 0) -> Program:
    """A judge (inside/judge.py), asked again and again: no clock runs on it, and what
    it asks may be long."""
    pieces = ("start", "literals", "judge")
    limits = dataclasses.replace(self.limits, output_kib=1 << 18)
    return self._start(pieces, {"stdin": b""}, {}, slot, float("inf"), limits)

  def _start(
    self,
    pieces: Sequence[str],
    files: dict[str, bytes],
    options: dict,
    slot: int,
    until: float,
    limits: Limits | None = None,
  ) -> Program:
    limits, bare = limits or self.limits, self.backend == UNSAFE
    calls, believed = "literals" in pieces, "judge" in pieces
    rules = {} if bare else {"filter": _filter(may_fork=believed)}
    pipes = Pipes({**files, **rules}, calls=calls)
    told = {**options, **pipes.given, "limits": _resources(limits, believed)}
    source = "\n".join(_piece(name) for name in pieces)
    command = [] if bare else self._confined(slot, pipes.given["filter"])
    try:
      process = subprocess.Popen(
        [*command, self.python, "-I", "-S", "-c", source, repr(told)],
        stdin=pipes.given["stdin"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=list(pipes.given.values()),
        start_new_session=True,
        env={"PATH": os.defpath},
        cwd="/",
      )
    except BaseException:
      pipes.close()
      raise
    pipes.started()
    return Program(process, pipes, limits, until=until, bare=bare)

  def _confined(self, slot: int, filter_fd: int) -> list[str]:
    """What stands before the Python that is confined."""
    change_user = []
    if os.getuid() == 0:
      uid = _FIRST_UID + slot
      change_user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
      change_user += ["--no-new-privs", "--"]
    inside = _bubblewrap(self.python, self.limits.disk_mib)
    return [*change_user, *inside, "--seccomp", str(filter_fd), "--"]


def open_sandbox(backend: str, limits: Limits, python: str = "") -> Sandbox:
  """A sandbox that has held in a trial.

  Args:
    backend: one of BACKENDS.
    limits: of a program.
    python: the interpreter inside; "": /usr/bin/python3, or else the one that runs now.

  Raises:
    SandboxError: there is none on this machine; what is missing and what to install.
  """
  if backend not in BACKENDS:
    raise SandboxError(
      f"config.reward.sandbox={backend!r} is not one of {', '.join(BACKENDS)} and wasi."
    )
  if backend == UNSAFE:
    return Sandbox(backend, os.path.realpath(python or sys.executable), limits)
  missing = _missing()
  if missing:
    raise SandboxError(f"programs need a sandbox, and {missing}. {_ADVICE}")
  usual = [p for p in ("/usr/bin/python3", sys._base_executable) if os.path.exists(p)]
  found = ""
  for path in [python] if python else usual:
    path = os.path.realpath(path)
    wrong = _tried(Sandbox(backend, path, Limits()))
    if not wrong:
      return Sandbox(backend, path, limits)
    found = found or wrong
  raise SandboxError(f"the sandbox does not hold on this machine: {found}. {_ADVICE}")


def _tried(sandbox: Sandbox) -> str:
  """What is wrong with it, or ""."""
  said = sandbox.run(_TRIAL)
  if said.outcome or said.stdout != b"contained\n":
    return said.stdout.decode("utf-8", "replace").strip() or said.detail
  return ""


def _missing() -> str:
  """What the sandbox lacks, or ""."""
  if sys.platform != "linux":
    return f"there is one for Linux alone; this is {sys.platform}"
  for tool in ("bwrap", *(["setpriv"] if os.getuid() == 0 else [])):
    if not shutil.which(tool, path=os.defpath):
      return f"{tool} is not installed"
  try:
    _filter()
  except (ImportError, RuntimeError, OSError) as error:
    return f"the filter of system calls cannot be made ({error})"
  return ""


# Prints what it could do and should not have been able to.
_TRIAL = """
import os, socket, sys
found = []
def try_to(name, do):
  try:
    do()
    found.append(name)
  except Exception:
    pass
try_to("read /etc/passwd", lambda: open("/etc/passwd").read())
try_to("open a socket", socket.socket)
try_to("start a process", os.fork)
try_to("write to /", lambda: open("/written", "w"))
try_to("see the home folders", lambda: os.listdir("/home"))
if os.getuid() == 0:
  found.append("be root")
if sys.version_info < (3, 10):
  found.append("be an older Python than 3.10")
if set(os.environ) - {"PATH", "HOME", "PWD", "PYTHONHASHSEED", "LC_CTYPE"}:
  found.append("see the environment")
print("it can " + ", ".join(found) if found else "contained")
"""


def _resources(limits: Limits, believed: bool) -> dict[str, int]:
  """Names of resource.RLIMIT_*, and their values."""
  limited = {
    "AS": limits.memory_mib << 20,
    "CPU": limits.cpu_seconds,
    "FSIZE": limits.disk_mib << 20,
    "NOFILE": 64,
    "CORE": 0,
    "STACK": 8 << 20,
    "MEMLOCK": 0,
    "MSGQUEUE": 0,
    "NPROC": limits.threads,
  }
  if believed:
    del limited["CPU"]
  if os.getuid() != 0:
    del limited["NPROC"]  # it would count all processes of our user
  return limited


@functools.cache
def _piece(name: str) -> str:
  return (_INSIDE / f"{name}.py").read_text()


def _encoded(text: str) -> bytes:
  return text.encode("utf-8", "surrogatepass")


@functools.cache
def _bubblewrap(python: str, disk_mib: int) -> tuple[str, ...]:
  """The command up to its filter. Args: a real path, MiB of /tmp."""
  shown = ["--ro-bind", python, python]
  for folder in ("/lib", "/lib64"):
    if os.path.islink(folder):
      shown += ["--symlink", os.readlink(folder), folder]
    elif os.path.isdir(folder):
      shown += ["--ro-bind", folder, folder]
  for folder in _libraries(python):
    shown += ["--ro-bind", folder, folder]
    for packages in ("site-packages", "dist-packages"):
      if os.path.isdir(f"{folder}/{packages}"):
        shown += ["--tmpfs", f"{folder}/{packages}"]
  devices = []
  for name in ("/dev/null", "/dev/zero", "/dev/urandom"):
    devices += ["--dev-bind", name, name]
  return (
    "bwrap",
    *("--unshare-user", "--unshare-all", "--disable-userns", "--die-with-parent"),
    *("--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"),
    *("--uid", "65534", "--gid", "65534"),
    *shown,
    *("--proc", "/proc", "--tmpfs", "/dev", *devices, "--remount-ro", "/dev"),
    *("--size", str(disk_mib << 20), "--tmpfs", "/tmp", "--remount-ro", "/"),
    *("--setenv", "PATH", "/nowhere", "--setenv", "HOME", "/tmp"),
    *("--setenv", "PYTHONHASHSEED", "0", "--chdir", "/tmp"),
  )


def _libraries(python: str) -> list[str]:
  """Its standard library, and where its shared libraries lie."""
  show = (
    "import sysconfig as s; print(s.get_path('stdlib'), s.get_path('platstdlib'),"
    " s.get_config_var('MULTIARCH') or '', sep='\\n')"
  )
  done = subprocess.run(
    [python, "-I", "-S", "-c", show], capture_output=True, text=True, cwd="/"
  )
  if done.returncode:
    raise SandboxError(f"{python} does not start: {done.stderr.strip()[-200:]}")
  standard, platform, multiarch = done.stdout.split("\n")[:3]
  prefix = str(pathlib.Path(python).parents[1])
  found = [standard, platform]
  system = ("/usr/lib64", *([f"/usr/lib/{multiarch}"] if multiarch else []))
  found += [folder for folder in system if os.path.isdir(folder)]
  if prefix != "/usr":  # libpython and its kin stand beside its standard library
    found += [str(path) for path in pathlib.Path(prefix, "lib").glob("*.so*")]
  return list(dict.fromkeys(found))


@functools.cache
def _filter(may_fork: bool = False) -> bytes:
  """The seccomp program, for this machine's architecture."""
  import pyseccomp

  rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
  refuse = pyseccomp.ERRNO(errno.EPERM)
  for names, action in ((_KILLED, pyseccomp.KILL_PROCESS), (_REFUSED, refuse)):
    for name in names:
      try:
        rules.add_rule(action, name)
      except OSError:  # not a call of this architecture, or too new for the library
        continue
  thread = 0x10000  # CLONE_THREAD: threads may start, processes may not
  if not may_fork:
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, thread, 0))
    rules.add_rule(refuse, "fork")
  rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")  # the C library uses clone
  type_into_terminal = 0x5412
  rules.add_rule(refuse, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, type_into_terminal))
  with tempfile.TemporaryFile() as file:
    rules.export_bpf(file)
    file.seek(0)
    return file.read()
