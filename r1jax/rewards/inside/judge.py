"""Holds the tests and the expected values; the program is in another sandbox. Follows
start.py and literals.py in one source.

A job comes as a line; every call of the program goes out as a line `C...` and its
answer comes back as a line; the verdict goes out as a line `V...`. The judge stays for
the next job.
"""

import builtins
import json
import math
import os


class ProgramError(Exception):
  """Marks an exception as the program's."""


def raised(kind, message):
  """The builtin exception of that name, marked; a plain one for any other name."""
  base = getattr(builtins, kind, None)
  if not (isinstance(base, type) and issubclass(base, Exception)):
    base = Exception
  if issubclass(base, (StopIteration, StopAsyncIteration)):
    base = Exception  # a loop of the tests must not take it for its own end
  try:
    return type(kind, (ProgramError, base), {})(message)
  except TypeError:  # some want other arguments
    return type(kind, (ProgramError,), {})(message)


def run(options):
  requests = os.fdopen(options["requests"], "rb")
  replies = os.fdopen(options["replies"], "wb")

  def say(line):
    replies.write(line.encode() + b"\n")
    replies.flush()

  for line in requests:
    if not hasattr(os, "fork"):  # WebAssembly
      say(verdict(json.loads(line), requests, say))
      continue
    # A process a job: what its tests do to Python is gone with it.
    child = os.fork()
    if not child:
      say(verdict(json.loads(line), requests, say))
      os._exit(0)
    if os.waitpid(child, 0)[1]:
      say("V" + json.dumps(["infrastructure", "the tests ended the judge"]))


def verdict(job, requests, say):
  """The line that ends a job."""
  asked = []

  def candidate(*args, **kwargs):
    asked.append(args)
    say("C" + dump([list(args), kwargs]))  # noqa: F821, of literals.py
    line = requests.readline()
    if not line.startswith(b"!"):
      return load(line)  # noqa: F821
    kind, message = load(line[1:])  # noqa: F821
    raise raised(kind, message)

  try:
    judge(job, candidate)
  except ProgramError as error:
    kind = type(error).__name__
    special = {"MemoryError": "memory", "PermissionError": "forbidden"}
    outcome, detail = special.get(kind, "crash"), f"{kind}: {error}"
  except BaseException as error:
    # Without a call, or with a name that is not there, it is the tests that fail.
    theirs = asked and not isinstance(error, (NameError, ImportError, SyntaxError))
    outcome = "wrong" if theirs else "infrastructure"
    detail = f"{type(error).__name__}: {error}"
  else:
    outcome, detail = "correct", ""
  return "V" + json.dumps([outcome, detail[:300]])


def judge(job, candidate):
  """Raises unless the program passes all tests."""
  if job["style"] == "check":
    space = {"__name__": "tests"}
    exec(compile(job["preamble"], "<preamble>", "exec"), space)
    space[job["entry_point"]] = candidate
    exec(compile(job["check"], "<tests>", "exec"), space)
    space["check"](candidate)
    return
  for i, (arguments, expected) in enumerate(load(job["cases"])):  # noqa: F821
    said = candidate(*arguments)
    if not same(said, expected, job["tolerance"]):
      raise AssertionError(f"case {i}: {said!r:.100} is not {expected!r:.100}")


def same(said, expected, tolerance):
  """Equal values: a tuple is as good as a list, 1 as good as 1.0 but not as True, and
  floats may differ by a relative or absolute `tolerance`."""
  if isinstance(said, (list, tuple)) and isinstance(expected, (list, tuple)):
    return len(said) == len(expected) and all(
      same(a, b, tolerance) for a, b in zip(said, expected, strict=True)
    )
  if isinstance(said, dict) and isinstance(expected, dict):
    return said.keys() == expected.keys() and all(
      same(said[k], expected[k], tolerance) for k in expected
    )
  if isinstance(said, bool) or isinstance(expected, bool):
    return said is expected
  if isinstance(said, float) or isinstance(expected, float):
    if not (isinstance(said, (float, int)) and isinstance(expected, (float, int))):
      return False
    return said == expected or math.isclose(
      said, expected, rel_tol=tolerance, abs_tol=tolerance
    )
  return said == expected


if __name__ == "__main__":
  run(start())  # noqa: F821
