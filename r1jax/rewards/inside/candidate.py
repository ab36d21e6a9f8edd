"""Runs one program: to its end, or call by call. Follows start.py, and literals.py
where calls are asked for, in one source.

The status says, before the program has run at all, that it compiles ("C"), and is
closed when it begins. All that comes later is the program's own word.
"""

import builtins
import os
import sys
import types


def run(options):
  with os.fdopen(options["program"], "rb") as file:
    source = file.read()
  try:
    program = compile(source, "<program>", "exec", dont_inherit=True)
  except (SyntaxError, ValueError, RecursionError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  os.write(options["status"], b"C")
  os.close(options["status"])
  if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(50_000)
  builtins.exit = builtins.quit = sys.exit  # as in any program; -S leaves them out
  calls = "requests" in options
  name = "candidate" if calls else "__main__"
  module = types.ModuleType(name)
  sys.modules[name] = module
  sys.argv = [name]
  if not calls:
    exec(program, module.__dict__)
    return
  requests = os.fdopen(options["requests"], "rb")
  replies = os.fdopen(options["replies"], "wb")
  exec(program, module.__dict__)
  function = eval(options["entry_point"], module.__dict__)

  def reply(line):
    replies.write(line.encode() + b"\n")
    replies.flush()

  reply("ready")
  for request in requests:
    try:
      args, kwargs = load(request)  # noqa: F821, of literals.py
      answer = dump(function(*args, **kwargs))  # noqa: F821
    except Exception as error:
      answer = "!" + dump([type(error).__name__, str(error)[:200]])  # noqa: F821
    reply(answer)


if __name__ == "__main__":
  run(start())  # noqa: F821
