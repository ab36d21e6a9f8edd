"""The process around one program in WebAssembly; wasi.py starts it by its path, and it
imports nothing of ours.

The program is computed inside this process and can reach its own memory, the clock,
random numbers, the standard library's zip, stdin, stdout, stderr, and the pipes that it
is told by name. It has no other file, no socket, no environment and no process: there
is no function for them in it. Deadlines are kept from outside, by killing this process.
"""

import os
import resource
import signal
import struct
import sys
import threading

STACK = 256 << 20  # of WebAssembly: used up after Python's own
# Python's own stack: its top, where recursion begins to be an error, where the process
# is ended. It is built to use an eighth of a megabyte, 200 calls through a decorator or
# an operator, of the 16 that there are.
TOP = 16 << 20
BUILT = (TOP, TOP - (112 << 10), TOP - (120 << 10))
WIDER = (TOP, TOP - (4 << 20), TOP - (4 << 20) - (8 << 10))
ARGV0 = "/usr/local/bin/python.wasm"
FRAME = 1 << 16  # bytes of a call of the program to our side
FAULT = -2  # the answer to one that fails


def main() -> None:
  told = eval(sys.argv[1])  # a dict that wasi.py wrote
  sys.path.append(told["packages"])
  if "compile" in told:
    compiled(told["compile"], told["module"])
    print(place_of_limits(told["module"]))
    return
  for name, value in told["limits"].items():
    hard = value + 1 if name == "CPU" else value
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
  threading.stack_size(STACK + (8 << 20))
  ended = []
  thread = threading.Thread(target=lambda: ended.append(run(told)))
  thread.start()
  while thread.is_alive():
    thread.join(1.0)
    if os.getppid() != told["parent"]:  # nobody is left to keep the deadline
      os._exit(1)
  code = ended[0] if ended else 1
  sys.stderr.flush()
  os._exit(code & 0xFF)


def engine():
  import wasmtime

  config = wasmtime.Config()
  # Above the stack of asynchronous calls, which nobody makes, an engine is refused.
  wasmtime._ffi.wasmtime_config_async_stack_size_set(config.ptr(), STACK + (1 << 20))
  config.max_wasm_stack = STACK
  return wasmtime.Engine(config)


def compiled(source: str, to: str) -> None:
  """Makes a file of machine code, unless one that fits this machine is there."""
  import wasmtime

  machine = engine()
  if os.path.exists(to):
    try:
      wasmtime.Module.deserialize_file(machine, to)
      return
    except wasmtime.WasmtimeError:
      pass  # of another kind of processor
  code = wasmtime.Module.from_file(machine, source).serialize()
  unfinished = f"{to}.{os.getpid()}"
  with open(unfinished, "wb") as file:
    file.write(code)
  os.replace(unfinished, to)


def place_of_limits(module: str) -> int:
  """Where the module keeps the limits of Python's stack; -1: in no place or many."""
  import wasmtime

  store = wasmtime.Store(engine())
  memory = started(store, module, wasmtime.WasiConfig(), {})["memory"]
  content = bytes(memory.read(store))
  limits = struct.pack("<3I", *BUILT)
  return content.find(limits) if content.count(limits) == 1 else -1


def run(told: dict) -> int:
  """Runs the program; its exit code."""
  import wasmtime

  store = wasmtime.Store(engine())
  store.set_limits(memory_size=told["memory"])
  wasi = wasmtime.WasiConfig()
  wasi.argv = [ARGV0, "-c", told["source"], repr(told["options"])]
  wasi.inherit_stdin()
  wasi.stdout_custom = lambda data: written(1, data)
  wasi.stderr_custom = lambda data: written(2, data)
  wasi.preopen_dir(told["library"], "/usr/local/lib", False)
  exports = started(store, told["module"], wasi, told["pipes"])
  exports["memory"].write(store, struct.pack("<3I", *WIDER), told["stack"])
  try:
    code = exports["run"](store)
  except wasmtime.ExitTrap as error:
    code = error.code
  except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
    why = str(error).strip().splitlines()[-1].strip()
    written(2, f"\nWebAssembly stopped: {why}\n".encode())
    code = 128 + signal.SIGABRT
  store.close()
  return code


def started(store, module: str, wasi, pipes: dict[str, int]):
  """What a new instance of the module exports."""
  import wasmtime

  store.set_wasi(wasi)
  linker = wasmtime.Linker(store.engine)
  linker.define_wasi()
  i32 = wasmtime.ValType.i32()
  kind = wasmtime.FuncType([i32] * 4, [i32])
  linker.define_func("host", "call", kind, calls(pipes), access_caller=True)
  code = wasmtime.Module.deserialize_file(store.engine, module)
  return linker.instantiate(store, code).exports(store)


def calls(pipes: dict[str, int]):
  """The function lent to the program: it reads, writes and closes pipes by name.

  Args: descriptors; the kernel knows which may be read and which written.
  """

  def call(caller, start: int, length: int, out_start: int, out_length: int) -> int:
    try:
      start, length, *outs = (
        x & 0xFFFFFFFF for x in (start, length, out_start, out_length)
      )
      if length > FRAME:
        return FAULT
      memory = caller["memory"]
      frame = bytes(memory.read(caller, start, start + length))
      answer = answered(pipes, frame)
      room = caller["host_alloc"](caller, len(answer)) & 0xFFFFFFFF
      if not room:
        return FAULT
      memory.write(caller, answer, room)
      for where, number in zip(outs, (room, len(answer)), strict=True):
        memory.write(caller, number.to_bytes(4, "little"), where)
    except (OSError, ValueError, KeyError, IndexError):
      return FAULT
    return 0

  return call


def answered(pipes: dict[str, int], frame: bytes) -> bytes:
  verb, name, rest = frame.split(b" ", 2)
  if verb == b"close":
    os.close(pipes.pop(name.decode()))
    return b""
  fd = pipes[name.decode()]
  if verb == b"read":
    return os.read(fd, min(int(rest), FRAME))
  written(fd, rest)
  return b""


def written(fd: int, data: bytes) -> int:
  left = memoryview(data)
  while left:
    left = left[os.write(fd, left) :]
  return len(data)


if __name__ == "__main__":
  main()
