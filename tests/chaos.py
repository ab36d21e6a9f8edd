"""A run that is killed again and again ends as one that nothing disturbed.

  python -m tests.chaos --kills=5
  python -m tests.chaos --kills=2 --processes=2
  python -m tests.chaos --broken      negative controls: each must end otherwise

Signals at random moments, or as soon as a save, a start or a compilation is under way:
SIGKILL, SIGTERM, or SIGSTOP, SIGCONT and SIGKILL. What must agree, bit for bit,
is the digest of the state at every save, of pre-training and of RL, and every figure of
metrics.jsonl. Prints JSON; exit code 1 where anything differs.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.chaos_child import BROKEN
from tests.quick import FLAGS

CONFIG = {
  "model.width": 32,
  "model.heads": 2,
  "model.layers": 2,
  "pretrain.steps": 12,
  "pretrain.rows": 8,
  "pretrain.micro_batches": 1,
  "prompts": 8,
  "grpo.group_size": 4,
  "grpo.micro_batches": 1,
  "grpo.reference_refresh": 4,
  "reward.host": True,
  "reward.maths": "exact",
  "eval.problems": 8,
  "eval.samples": 2,
  "eval.every": 6,
  "checkpoint_every": 2,
}
STEPS = 16
MOMENTS = ("any", "start", "save", "compile")
WAYS = ("KILL", "TERM", "STOP")
LONGEST = 400  # seconds that a run may take between two signals


class Run:
  """The processes of a run in a folder."""

  def __init__(
    self,
    folder: pathlib.Path,
    processes: int = 1,
    broken: str = "whole",
    steps: int = STEPS,
  ):
    self.folder = folder
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    flags = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    line = [sys.executable, "-m", "tests.chaos_child", broken, f"--workdir={folder}"]
    line += [f"--config.compilation_cache={folder.parent / 'cache'}", *flags]
    line += [f"--config.steps={steps}"]
    self.started, self.processes = time.monotonic(), []
    folder.mkdir(exist_ok=True)
    self.log = folder.with_suffix(".log").open("a")
    for i in range(processes):
      variables = {"JAX_NUM_CPU_DEVICES": str(2 // processes), "XLA_FLAGS": FLAGS}
      variables["JAX_PLATFORMS"] = "cpu"
      if processes > 1:
        variables["R1JAX_COORDINATOR"] = f"127.0.0.1:{port}"
        variables["R1JAX_PROCESSES"] = str(processes)
        variables["R1JAX_PROCESS_ID"] = str(i)
      how = dict(stdout=self.log, stderr=self.log, env=os.environ | variables)
      self.processes.append(subprocess.Popen(line, **how))

  def until(self, true, seconds: float = LONGEST) -> None:
    end = time.monotonic() + seconds
    while self.alive() and not true() and time.monotonic() < end:
      time.sleep(0.005)

  def alive(self) -> bool:
    return any(process.poll() is None for process in self.processes)

  def end(self) -> list[int]:
    """Waits for it. Raises AssertionError: it takes too long."""
    self.until(lambda: False)
    late = self.alive()
    for process in self.processes:
      process.kill()
      process.wait()
    self.log.close()
    assert not late, f"it hangs: {self.folder}"
    return [process.returncode for process in self.processes]


def reached(run: Run, moment: str, saves: int, seconds: float) -> None:
  """Waits for the moment: a save that is under way, or so many seconds after the
  start, after the first event of this start or after so many saves."""
  size = lines(run.folder / "events.jsonl")
  left = saving(run.folder)  # by those that were killed
  if moment == "save":
    run.until(lambda: saving(run.folder) - left)
    return
  if moment == "compile":
    run.until(lambda: lines(run.folder / "events.jsonl") > size)
  elif moment == "any":
    run.until(lambda: len(digests(run.folder)) >= saves)
  run.until(lambda: False, seconds)


def saving(folder: pathlib.Path) -> set[tuple[str, int]]:
  """The temporary folders of saves, and when each was made."""
  found = set()
  for path in folder.glob("checkpoints/*/*.orbax-checkpoint-tmp"):
    with contextlib.suppress(FileNotFoundError):
      found.add((str(path), path.stat().st_ctime_ns))
  return found


def lines(path: pathlib.Path) -> int:
  return len(path.read_bytes().splitlines()) if path.exists() else 0


def disturb(
  run: Run, moment: str, way: str, saves: int, seconds: float, victim: int
) -> str:
  """One signal to one process. Returns what was done."""
  reached(run, moment, saves, seconds)
  after, process = time.monotonic() - run.started, run.processes[victim]
  if process.poll() is None:
    process.send_signal(getattr(signal, f"SIG{way}"))
    if way == "STOP":
      time.sleep(3)
      process.send_signal(signal.SIGCONT)
      run.until(lambda: False, 1.0)
      process.kill()
  return (
    f"{way} of process {victim} at {after:.1f} s ({moment}), saves:"
    f" {len(digests(run.folder))}"
  )


def told(folder: pathlib.Path) -> str:
  """The last of what the processes of a run printed."""
  return folder.with_suffix(".log").read_text()[-3000:]


def whole(folder: pathlib.Path, processes: int, steps: int = STEPS) -> float:
  """A run that nothing disturbs; its seconds."""
  run = Run(folder, processes, steps=steps)
  codes = run.end()
  assert set(codes) == {0}, f"exit codes {codes}: {told(folder)}"
  return time.monotonic() - run.started


def disturbed(
  folder: pathlib.Path,
  kills: int,
  processes: int,
  saves: int,
  rng: random.Random,
  steps: int = STEPS,
) -> list[str]:
  """A run under so many signals, spread over its saves, and then to its end. Returns
  what was done. Raises AssertionError: it ended before all of them had come."""
  done = []
  for i in range(kills):
    run = Run(folder, processes, steps=steps)
    moment = rng.choice(MOMENTS) if i else "any"
    way = rng.choice(WAYS) if i else "KILL"
    victim = rng.randrange(processes)
    after = (i + rng.random()) * (saves - 2) / kills
    done.append(disturb(run, moment, way, int(after), rng.uniform(0, 4), victim))
    codes = run.end()
    done[-1] += f", exit codes {codes}"
    assert set(codes) != {0}, f"it ended undisturbed: {done}"
    assert not {1, 2, 3} & set(codes), f"{done}: {told(folder)}"
    (folder / "attempts.jsonl").unlink(missing_ok=True)  # the brake has its own tests
  run = Run(folder, processes, steps=steps)
  codes = run.end()
  assert set(codes) == {0}, f"exit codes {codes} in the end: {told(folder)}"
  return done


def digests(folder: pathlib.Path) -> dict[tuple[str, int], set[str]]:
  """(stage, step) -> all digests that were ever saved there."""
  found: dict[tuple[str, int], set[str]] = {}
  for path in sorted(folder.glob("checkpoints/*.digests.jsonl")):
    for row in rows(path):
      key = path.name.split(".")[0], row["step"]
      found.setdefault(key, set()).add(row["digest"])
  return found


def rows(path: pathlib.Path) -> list[dict]:
  """Whole lines; a killed writer leaves half of one."""
  found = []
  for line in path.read_text().splitlines():
    try:
      found.append(json.loads(line))
    except ValueError:
      continue
  return found


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """Where two runs differ: steps by their digests, rows of metrics by their figures."""
  a, b = digests(one), digests(other)
  assert a, f"{one} has no digests"
  found = [
    f"{stage} {step}: digest"
    for stage, step in sorted({*a, *b})  # one more where SIGTERM came
    if len(a.get((stage, step), set()) | b.get((stage, step), {"none"})) > 1
  ]
  mine, theirs = (rows(folder / "metrics.jsonl") for folder in (one, other))
  for x, y in zip(mine, theirs, strict=False):
    keys = [k for k in {*x, *y} if x.get(k) != y.get(k)]
    if keys:
      found.append(f"{x['phase']} {x['step']}: {', '.join(sorted(keys)[:5])}")
  if len(mine) != len(theirs):
    found.append("metrics: number of rows")
  return found


def broken(folder: pathlib.Path, name: str, one: pathlib.Path) -> list[str]:
  """How a run differs that was killed amid RL and resumed with one thing broken."""
  run = Run(folder)
  run.until(lambda: (folder / "checkpoints" / "rl" / "6").is_dir())
  for process in run.processes:
    process.kill()
  run.end()
  run = Run(folder, broken=name)
  codes = run.end()
  assert set(codes) == {0}, f"exit codes {codes}, {name} broken: {told(folder)}"
  return differences(one, folder)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.chaos",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--kills", type=int, default=5)
  parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--broken", action="store_true", help="the negative controls")
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory(prefix="chaos") as place:
    folder = pathlib.Path(place)
    steps = max(STEPS, 2 * options.kills)
    seconds = whole(folder / "one", options.processes, steps)
    saves = len(digests(folder / "one"))
    said = {"seconds": round(seconds, 1), "saves": saves}
    if options.broken:
      said["broken"] = {
        name: broken(folder / name, name, folder / "one")[:3]
        for name in ("key", *BROKEN, "whole")
      }
      print(json.dumps(said, indent=2))
      unseen = [name for name, found in said["broken"].items() if not found]
      return int(unseen != ["whole"])
    rng = random.Random(options.seed)
    how = options.kills, options.processes, saves, rng, steps
    said["disturbed"] = disturbed(folder / "other", *how)
    said["differences"] = differences(folder / "one", folder / "other")
  print(json.dumps(said, indent=2))
  return int(bool(said["differences"]))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
