"""A process that does algebra with math-verify, and can be killed; run as a script.

It reads {"gold", "answer", "seconds"} a line and answers with an outcome a line: equal,
different, timeout, memory or crash; without an answer it says whether the gold is an
expression at all. The algebra runs in a child of its own, forked
after the slow imports, with a memory limit; one that takes too long is killed and the
next is forked in its place, so that the worker is ready again at once.
"""

import json
import os
import re
import resource
import select
import signal
import sys

_LONE_I = re.compile(r"(?<![\\a-zA-Z])i(?![a-zA-Z])")  # the imaginary unit
MEMORY = 2 << 30  # bytes of address space, the imports' included


def main() -> None:
  import math_verify  # noqa: F401, before the fork
  import sympy  # noqa: F401

  print("ready", flush=True)
  child = None
  while request := sys.stdin.buffer.readline():
    child = child or Child()
    said = child.ask(request, json.loads(request)["seconds"])
    if said not in ("equal", "different"):
      child = child.end()
    print(said, flush=True)
  if child:
    child.end()


class Child:
  """Answers requests until one of them is too much for it."""

  def __init__(self):
    ours, theirs = os.pipe(), os.pipe()  # (read, write) of requests and of answers
    self.pid = os.fork()
    if not self.pid:
      os.close(ours[1])
      os.close(theirs[0])
      serve(ours[0], theirs[1])
    os.close(ours[0])
    os.close(theirs[1])
    self.requests, self.answers = ours[1], theirs[0]

  def ask(self, request: bytes, seconds: float) -> str:
    os.write(self.requests, request)
    ready, _, _ = select.select([self.answers], [], [], seconds)
    if not ready:
      return "timeout"
    return os.read(self.answers, 100).decode() or "crash"

  def end(self) -> None:
    os.kill(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    os.close(self.requests)
    os.close(self.answers)


def serve(requests: int, answers: int) -> None:
  """The child's whole life."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(null, fd)
  with os.fdopen(requests, "rb") as lines:
    for line in lines:
      try:
        asked = json.loads(line)
        gold, answer = asked["gold"], asked["answer"]
        good = reads(gold) if answer is None else equal(gold, answer)
        said = "equal" if good else "different"
      except MemoryError:
        said = "memory"
      except Exception:
        said = "crash"
      os.write(answers, said.encode())
  os._exit(0)


def equal(gold: str, answer: str) -> bool:
  """Whether two LaTeX expressions are equal; the gold goes first, for verify is not
  symmetric."""
  import math_verify

  if not re.search(r"\\(sum|prod)", gold + answer):
    gold, answer = (_LONE_I.sub("(I)", text) for text in (gold, answer))
  parsed = [parse(text) for text in (gold, answer)]
  return all(parsed) and math_verify.verify(*parsed, timeout_seconds=None)


def reads(text: str) -> bool:
  """Whether it is an expression: what the library cannot read it keeps as text."""
  return any(not isinstance(said, str) for said in parse(text))


def parse(text: str) -> list:
  import math_verify

  config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
  return math_verify.parse(rf"\boxed{{{text}}}", config, parsing_timeout=None)


if __name__ == "__main__":
  main()
