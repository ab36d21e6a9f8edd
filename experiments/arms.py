"""Runs beside each other, each an arm: what it changes of a preset.

A run that has ended is not run again, one that was stopped goes on, and those that
begin with the same base share it, from the moment that one of them has trained it.
Each has a core and a process of its own, and no accelerator: JAX_PLATFORMS is cpu if it
is not set.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from ml_collections import ConfigDict

from experiments.configs import ppo, r1, r1_zero
from r1jax import settings
from r1jax.errors import UserError

CONFIGS = {"r1_zero": r1_zero.get_config, "ppo": ppo.get_config, "r1": r1.get_config}
# What a base depends on.
BASE = ("seed", "task", "chain", "puzzle", "assistant", "counts", "data", "pretrain")
BASE += ("model",)
Pair = tuple[str, int]  # (arm, seed)


@dataclasses.dataclass(frozen=True)
class Arm:
  """A run: `python -m experiments.MODULE` with changes of its tiny preset."""

  module: str = "r1_zero"
  changes: dict = dataclasses.field(default_factory=dict)

  def config(self, seed: int) -> ConfigDict:
    """Raises UserError: a key that is not there."""
    config = CONFIGS[self.module]("tiny").copy_and_resolve_references().unlock()
    config.seed = seed
    for key, value in self.changes.items():
      section, _, leaf = key.rpartition(".")
      part = settings.config_get(config, section) if section else config
      if leaf not in part:
        raise UserError(
          f"an arm changes config.{key}, and experiments.{self.module} has no such key:"
          " --help lists all of them."
        )
      part[leaf] = value
    return config

  def base(self, seed: int) -> str:
    """The same for runs whose bases are the same."""
    plain = settings.plain(self.config(seed))
    text = json.dumps({key: plain[key] for key in BASE}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder_of(root: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  return root / name.replace(" ", "_") / f"seed_{seed}"


def ended(root: pathlib.Path, name: str, arm: Arm, seed: int) -> bool:
  """Whether a run has its result. Raises UserError: it is another config's."""
  folder = folder_of(root, name, seed)
  if not any((folder / x).exists() for x in ("summary.json", "report/report.json")):
    return False
  mark = mark_of(folder)
  if not mark.exists() or mark.read_text() != settings.sha256(arm.config(seed)):
    raise UserError(
      f"{folder} is a run of another config than the arm {name!r} has now: give another"
      " --workdir, or move it away to have it run anew."
    )
  return True


def mark_of(folder: pathlib.Path) -> pathlib.Path:
  """The file that names a run's config."""
  return folder.with_suffix(".sha256")


def run(
  root: pathlib.Path,
  arms: Mapping[str, Arm],
  wanted: Iterable[Pair],
  *,
  jobs: int = 0,
  environ: Mapping[str, str] | None = None,
  say: Callable[[str], None] = print,
) -> list[str]:
  """Runs what has not ended, several at a time.

  Args:
    root: gets a folder an arm and seed, and the bases.
    arms: by name.
    wanted: (arm, seed) of each run.
    jobs: runs at a time, at most one a core; 0: one a core.
    environ: variables that the runs have beside this process's.
    say: is told what begins and ends.

  Returns:
    What failed, in words; the others ran all the same.

  Raises:
    UserError: a run has ended whose config was another.
  """
  (root / "bases").mkdir(parents=True, exist_ok=True)
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  free = [[core] for core in cores][: jobs or None] or [[]] * max(jobs, 1)
  left = [
    (name, seed) for name, seed in wanted if not ended(root, name, arms[name], seed)
  ]
  bases = {pair: root / "bases" / arms[pair[0]].base(pair[1]) for pair in left}
  total, going, failed = len(left), {}, []
  try:
    while left or going:
      # A base that a run is making is waited for.
      making = {bases[p] for p in going if not bases[p].exists()}
      pair = next((p for p in left if bases[p] not in making), None)
      if free and pair:
        left.remove(pair)
        core = free.pop()
        process = start(root, arms[pair[0]], *pair, core, environ or {})
        going[pair] = process, core, time.monotonic()
        say(f"{pair[0]}, seed {pair[1]}: begins ({total - len(left)} of {total})")
        continue
      time.sleep(0.2)
      for pair, (process, core, begun) in list(going.items()):
        folder, code = folder_of(root, *pair), process.poll()
        if code == 0 or trained(folder):
          keep_base(folder, bases[pair])
        if code is None:
          continue
        del going[pair]
        free.append(core)
        name = f"{pair[0]}, seed {pair[1]}"
        if code:
          failed.append(f"{name}: exit code {code}, {folder.with_suffix('.log')}")
          say(failed[-1])
          continue
        say(f"{name}: {time.monotonic() - begun:.0f} s")
  finally:
    for process, *_ in going.values():
      process.terminate()
      process.wait()
  return failed


def trained(folder: pathlib.Path) -> bool:
  """Whether a run's base is whole: RL has a folder of checkpoints only when the last of
  the base's is on the disk."""
  return (folder / "checkpoints" / "rl").exists()


def start(
  root: pathlib.Path,
  arm: Arm,
  name: str,
  seed: int,
  core: list[int],
  environ: Mapping[str, str],
) -> subprocess.Popen:
  """A run's process, on its core, with the base that another run has left."""
  folder = folder_of(root, name, seed)
  folder.mkdir(parents=True, exist_ok=True)
  kept, here = root / "bases" / arm.base(seed), folder / "checkpoints"
  if kept.exists() and not here.exists():
    shutil.copytree(kept, here / "pretrain.partial")
    (here / "pretrain.partial").rename(here / "pretrain")
  flags = [f"--config.{key}={value}" for key, value in arm.changes.items()]
  line = [sys.executable, "-m", f"experiments.{arm.module}"]
  line += [f"--workdir={folder}", f"--config.seed={seed}", *flags]
  mark_of(folder).write_text(settings.sha256(arm.config(seed)))
  variables = {"JAX_PLATFORMS": "cpu", **os.environ, **environ}
  with folder.with_suffix(".log").open("a") as log:
    process = subprocess.Popen(line, stdout=log, stderr=log, env=variables)
  if core:
    os.sched_setaffinity(process.pid, core)
  return process


def keep_base(folder: pathlib.Path, kept: pathlib.Path) -> None:
  """Leaves a run's base for others that begin with the same.

  Args:
    folder: of the run.
    kept: where the others look for it.
  """
  made, partial = folder / "checkpoints" / "pretrain", kept.with_suffix(".partial")
  if made.exists() and not kept.exists():
    shutil.rmtree(partial, ignore_errors=True)  # of a copy that was stopped
    shutil.copytree(made, partial)
    partial.rename(kept)
