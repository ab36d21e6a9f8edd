"""Checkpoints: how long a save holds up the loop, and what it takes by itself.

R1-Zero's miniature twice, on a base that is hardly trained: with a save after every
rollout, and with none but the last. Then its state alone: digest, save, restore.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import rich.console
import rich.table

from experiments.configs.r1_zero import get_config
from r1jax import digest, events, settings, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.errors import UserError
from r1jax.models.policy import Policy
from r1jax.optimizer import make_optimizer

VOCAB = 400  # of the miniature's tokenizer


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--rollouts", type=int, default=20, help="of each run")
  parser.add_argument("--repeats", type=int, default=5, help="of the state alone")


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the table, returns all figures. Raises UserError: too few."""
  if options.rollouts < 4 or options.repeats < 1:
    raise UserError(
      f"--rollouts={options.rollouts} must be at least 4, and"
      f" --repeats={options.repeats} at least 1."
    )
  console = rich.console.Console(stderr=True)
  with (
    tempfile.TemporaryDirectory() as place,
    console.status("checkpoint: runs with saves and without"),
  ):
    folder = pathlib.Path(place)
    with_saves = loop(folder / "saves", options.rollouts, every=2)
    without = loop(folder / "none", options.rollouts, every=10**6)
    console.print("the state alone")
    found = alone(folder / "state", options.repeats)
  step, free = (statistics.median(x["step"]) for x in (with_saves, without))
  held = statistics.median(with_saves["save"][:-1])
  found |= {
    "step_seconds": step,
    "step_seconds_without_saves": free,
    "blocking_seconds": held,
    "blocking_share_of_step": held / free,
    "slower_by": (step + held) / free - 1,
  }
  print_table(found)
  return found


def loop(workdir: pathlib.Path, rollouts: int, every: int) -> dict[str, list[float]]:
  """Seconds of each step and of each save in RL, without those that compile."""
  keys = {"pretrain.steps": 3, "steps": 2 * rollouts, "eval.every": 2 * rollouts}
  keys |= {"eval.problems": 8, "eval.samples": 2, "checkpoint_every": every}
  flags = [f"--config.{key}={value}" for key, value in keys.items()]
  line = [sys.executable, "-m", "experiments.r1_zero", f"--workdir={workdir}", *flags]
  done = subprocess.run(line, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f"the miniature ended with {done.returncode}: {done.stderr[-500:]}")
  rows = events.read(workdir / "events.jsonl")
  first = min(i for i, row in enumerate(rows) if row["name"] == "step")
  return {
    name: [row["seconds"] for row in rows[first + 1 :] if row["name"] == name]
    for name in ("step", "save")
  }


def alone(folder: pathlib.Path, repeats: int) -> dict:
  """Medians of digest, save (until it is on the disk) and restore."""
  config = get_config("tiny")
  network = Policy(settings.policy_config(config, VOCAB))
  optimizer = make_optimizer(settings.optimizer_config(config))

  def begin():
    return train_state.create(network, optimizer, jax.random.key(0), reference=True)

  state = jax.jit(begin)()
  leaves = jax.tree.leaves(state)
  seconds: dict[str, list[float]] = {"digest": [], "save": [], "restore": []}

  def timed(name, function):
    start = time.perf_counter()
    function()
    seconds[name].append(time.perf_counter() - start)

  checkpoints = Checkpoints(folder)
  shapes, layout = jax.eval_shape(begin), jax.tree.map(lambda x: x.sharding, state)

  def saved(step):
    checkpoints.save(step, state, {})
    checkpoints.wait()

  for step in range(repeats + 1):
    timed("digest", lambda: digest.of_tree(state))
    timed("save", lambda step=step: saved(step))
    timed("restore", lambda: checkpoints.restore(shapes, layout))
  checkpoints.close()
  found = {f"{k}_seconds": statistics.median(v[1:]) for k, v in seconds.items()}
  return {"megabytes": sum(x.nbytes for x in leaves) / 1e6, **found}


def print_table(found: dict) -> None:
  table = rich.table.Table("", "", title="checkpoints of R1-Zero's miniature")
  table.add_row("state", f"{found['megabytes']:.1f} MB")
  for name, key in (
    ("a rollout and its updates, no saves", "step_seconds_without_saves"),
    ("the same beside the save of the last", "step_seconds"),
    ("a save holds up the loop", "blocking_seconds"),
    ("the digest of it", "digest_seconds"),
    ("a save until it is on the disk", "save_seconds"),
    ("a restore, digest included", "restore_seconds"),
  ):
    table.add_row(name, f"{1e3 * found[key]:,.1f} ms")
  table.add_row("held up, of a step", f"{found['blocking_share_of_step']:.1%}")
  table.add_row("slower in all", f"{found['slower_by']:+.1%}")
  rich.console.Console().print(table)
