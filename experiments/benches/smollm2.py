"""GRPO on a published model: SmolLM2-135M, all of its weights and by LoRA.

The preset smollm2_135m of r1_zero, with transformers beside it: logits on five texts,
and now and then `generate` on the problems that the next step samples. It ends in
held-out figures before and after. A stopped benchmark goes on where it was.
"""

import argparse
from collections.abc import Callable
import contextlib
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import rich.console

from experiments import command
from experiments.benches import rollout, rollout_beside_torch, rollout_parts
from experiments.configs import r1_zero
from r1jax import config_checks, events, loop, sharding
from r1jax.data import problems
from r1jax.errors import UserError
from r1jax.evals.interval import interval
from r1jax.metrics import MetricsFile
from r1jax.models.sequence import Sequence
from r1jax.progress import Clock, Progress
from r1jax.reinforcement import reinforce
from r1jax.run import Run, open_workdir, prepare, take

ARMS = {
  "full": {},
  "lora": {
    "lora.rank": 16,
    "lora.targets": ("attention", "ffn"),
    "optimizer.learning_rate": 2e-4,  # ten times that of whole weights
  },
}
FLAGS = "steps", "beside", "folder", "workdir"
TEXTS = (
  "The capital of France is Paris, and the capital of Italy is Rome.",
  "def fibonacci(n):\n  return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
  "What is 17 + 25? Let us add the tens, then the ones: 30 + 12 = 42.",
  "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好，世界！ 🙂",
  "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--arms", default=",".join(ARMS), help="of " + ", ".join(ARMS))
  add("--steps", type=int, default=16, help="updates of each")
  add("--beside", type=int, default=4, help="of so many steps one is generated beside")
  add("--folder", default="models/smollm2_135m", help="of the model")
  add("--workdir", default="runs/bench-smollm2", help="where the runs lie")


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the tables, returns all figures.

  Raises:
    UserError: an unknown arm, no model in the folder, or no transformers.
  """
  arms = options.arms.split(",")
  if unknown := [arm for arm in arms if arm not in ARMS]:
    raise UserError(f"--arms: {unknown[0]!r} is not one of {', '.join(ARMS)}.")
  for name in ("steps", "beside"):
    if (given := getattr(options, name)) < 1:
      raise UserError(f"--{name}={given} must be at least 1.")
  rollout.check_torch("")
  if len(arms) == 1:
    found = {arms[0]: arm(arms[0], options)}
  else:
    found = in_turn(arms, options)
  found = {
    "bench": "smollm2",
    "cores": rollout_parts.cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "arms": found,
  }
  print("\n".join(markdown(found)))
  return found


def in_turn(arms: list[str], options: argparse.Namespace) -> dict[str, dict]:
  """Each in a process of its own, whose peak of memory is its own."""
  found = {}
  given = [f"--{k}={getattr(options, k)}" for k in FLAGS]
  for name in arms:
    this = [sys.executable, "-m", "experiments.bench", "smollm2", f"--arms={name}"]
    done = subprocess.run([*this, *given, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
      raise UserError(f"the arm {name} ended with exit code {done.returncode}.")
    found |= json.loads(done.stdout.splitlines()[-1])["arms"]
  return found


def config_of(name: str, options: argparse.Namespace) -> ConfigDict:
  """The preset's, with an arm's changes."""
  config = r1_zero.get_config("smollm2_135m")
  changes = {"model.folder": options.folder, "steps": options.steps, **ARMS[name]}
  # In segments, so that rollouts and updates have times of their own.
  changes["segment_tokens"] = config.windows[0][1]
  changes["eval.every"] = options.steps
  config.update_from_flattened_dict(changes)
  return config


def arm(name: str, options: argparse.Namespace) -> dict:
  """One run and what it took. Raises UserError as a run does."""
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # a step's time is its own
  command.use_compilation_cache("")
  config = config_of(name, options)
  config_checks.check(config, len(jax.devices()))
  workdir, clock = pathlib.Path(options.workdir).resolve() / name, Clock()
  open_workdir(config, workdir)
  mesh = sharding.make_mesh(**config.mesh)
  console = rich.console.Console(stderr=True)
  with jax.set_mesh(mesh), Progress(console) as progress:
    this = prepare(config, workdir, mesh, clock, progress)
    clock.record(workdir / "events.jsonl")
    with (
      contextlib.closing(this),
      rollout_beside_torch.process(options.folder) as theirs,
    ):
      params, router = loop.base(this)
      gap = logits_gap(this, params, theirs)
      beside = Beside(this, theirs, options.beside)
      reinforce(this, params, router, stream=beside)
      summary = loop.conclude(this)
  return {
    "logits_gap": gap,
    "steps": steps_of(workdir),
    "figures": figures(config, workdir),
    "peak_rss_gib": summary["peak_rss_gib"],
    "seconds": summary["seconds"],
  }


def logits_gap(this: Run, params: Any, theirs: Callable) -> float:
  """The largest difference of a logit on the texts, each as it is."""
  rows = [this.tokenizer.encode(text) for text in TEXTS]
  width = max(map(len, rows))
  mask = np.arange(width) < np.array([[len(row)] for row in rows])
  tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)

  @jax.jit
  def ours(params, tokens, mask):
    out = this.policy.apply({"params": params}, tokens, Sequence.of_mask(mask))
    return this.policy.apply({"params": params}, out.hidden, method="logits")

  # Padding follows a text, which does not see it.
  gap = np.abs(ours(params, tokens, jnp.asarray(mask)) - theirs("logits", tokens))
  return float(gap[mask].max())


class Beside:
  """The run's stream of problems; transformers answers those of every so many steps,
  from the first on, before they are handed out.

  Its seconds and tokens go to transformers.jsonl of the workdir.
  """

  def __init__(self, this: Run, theirs: Callable, every: int):
    c = this.config
    self.this, self.theirs, self.every = this, theirs, every
    self.stream = problems.stream(len(this.train.ids), c.prompts, seed=c.seed)
    self.file = MetricsFile(this.workdir / "transformers.jsonl")
    self.step = 0

  def __next__(self) -> np.ndarray:
    index, c = next(self.stream), self.this.config
    if self.step % self.every == 0:
      asked = take(self.this.train, np.asarray(index))
      g, new = c.grpo, self.this.windows[0][1]
      how = g.group_size, new, g.temperature, list(self.this.stop_ids)
      seconds, tokens = self.theirs("sample", asked.tokens, asked.mask, *how)
      self.file.write(
        dict(phase="rl", step=self.step + 1, seconds=seconds, tokens=tokens)
      )
    self.step += 1
    return index

  def get_state(self) -> dict:
    return {"stream": self.stream.get_state(), "step": self.step}

  def set_state(self, state: dict) -> None:
    self.stream.set_state(state["stream"])
    self.step = state["step"]
    self.file.roll_back({"rl": self.step})


def steps_of(workdir: pathlib.Path) -> list[dict]:
  """What each step took, and transformers beside it."""
  took = {
    (e.get("step"), e["name"]): e["seconds"]
    for e in events.read(workdir / "events.jsonl")
  }
  beside = {r["step"]: r for r in MetricsFile(workdir / "transformers.jsonl").rows()}
  rows = []
  for row in MetricsFile(workdir / "metrics.jsonl").phase("rl"):
    step, tokens = row["step"], row["length"] * row["samples"]
    parts = {name: took[step, name] for name in ("rollout", "reward", "update")}
    theirs = beside.get(step)
    rows.append(
      {
        "step": step,
        **{f"{name}_seconds": x for name, x in parts.items()},
        "seconds": sum(parts.values()),
        "tokens": round(tokens),
        "tokens_per_s": tokens / parts["rollout"],
        "transformers_seconds": theirs and theirs["seconds"],
        "transformers_tokens_per_s": theirs and theirs["tokens"] / theirs["seconds"],
        "reward": row["reward"],
      }
    )
  return rows


def figures(config: ConfigDict, workdir: pathlib.Path) -> dict:
  """Held out, before and after: figure -> base, final, change -> (mean, low, high)."""
  rows = MetricsFile(workdir / "samples.jsonl").rows()
  weights = config.reward.accuracy_weight, config.reward.format_weight
  found = {}
  for name, (accuracy, form) in (
    ("reward", weights),
    ("pass@1", (1.0, 0.0)),
    ("format rate", (0.0, 1.0)),
  ):
    base, final = (
      np.array(
        [
          accuracy * np.mean(r["correct"]) + form * np.mean(r["format"])
          for r in rows
          if r["step"] == step
        ]
      )
      for step in (0, config.steps)
    )
    columns = {"base": base, "final": final, "change": final - base}
    found[name] = {k: (float(x.mean()), *interval(x)) for k, x in columns.items()}
  return found


def markdown(f: dict) -> list[str]:
  """The tables, line by line."""
  lines = [
    f"{f['cores']} CPU cores, Python {f['python']}, JAX {f['jax']}, float32.",
    "",
    "| | held out | before | after | change |",
    "|---|---|---|---|---|",
  ]
  for name, a in f["arms"].items():
    for figure, x in a["figures"].items():
      cells = [
        f"{x[column][0]:{form}} [{x[column][1]:{form}}, {x[column][2]:{form}}]"
        for column, form in (("base", ".3f"), ("final", ".3f"), ("change", "+.3f"))
      ]
      lines.append(f"| {name} | {figure} | " + " | ".join(cells) + " |")
  lines += [
    "",
    "| | step | rollout, s | reward, s | update, s | sampled tokens | tokens a second |"
    " transformers `generate`, tokens a second | reward of the samples |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, a in f["arms"].items():
    for s in a["steps"]:
      theirs = s["transformers_tokens_per_s"]
      theirs = f"{theirs:.0f}" if theirs else ""
      parts = (
        f"{s[f'{part}_seconds']:.1f}" for part in ("rollout", "reward", "update")
      )
      lines.append(
        f"| {name} | {s['step']} | {' | '.join(parts)} | {s['tokens']:,}"
        f" | {s['tokens_per_s']:.0f} | {theirs} | {s['reward']:.2f} |"
      )
  lines += [
    "",
    "| | s a step, median | peak GiB | largest gap of a logit |",
    "|---|---|---|---|",
  ]
  for name, a in f["arms"].items():
    seconds = statistics.median(s["seconds"] for s in a["steps"])
    lines.append(
      f"| {name} | {seconds:.1f} | {a['peak_rss_gib']:.1f} | {a['logits_gap']:.1e} |"
    )
  return lines
