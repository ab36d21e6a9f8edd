"""Runs that are broken on purpose, one for each complaint of the doctor.

python -m tests.broken_runs makes tests/broken/NAME.jsonl again: what the doctor reads
of each run's metrics.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent / "broken"
READ = (
  *("accuracy", "clip_fraction", "entropy", "equal_groups", "format", "grad_norm"),
  *("kl", "kl_old", "length", "loss", "reward", "step", "truncated"),
)
SMALL = {
  "model.width": 32,
  "model.heads": 2,
  "model.layers": 2,
  "pretrain.steps": 300,
  "pretrain.rows": 16,
  "pretrain.micro_batches": 2,
  "prompts": 8,
  "grpo.group_size": 8,
  "grpo.micro_batches": 2,
  "eval.problems": 8,
  "eval.samples": 2,
  "eval.every": 40,
  "steps": 40,
}
RULES = """def long(completion, problem):
  return len(completion) / 100


def seven(completion, problem):
  return ("<answer>7</answer>" in completion) - len(completion) / 100
"""
BROKEN = {
  "truncated": {"windows": "((0,3),)"},
  "KL exploded": {"optimizer.learning_rate": 0.1, "optimizer.warmup_steps": 0},
  "entropy collapsed": {
    "reward.host": True,
    "reward.maths": "exact",
    "reward.accuracy_weight": 0.0,
    "reward.rules": "{rules}:seven=1",
    "optimizer.learning_rate": 0.005,
    "objective.kl_coef": 0.0,
  },
  "no format": {
    f"pretrain.mix.{kind}": float(kind == "bare")
    for kind in ("facts", "bare", "guess", "working", "checked")
  },
  "equal groups": {"reward.accuracy_weight": 0.0, "reward.format_weight": 0.0},
  "learning rate too small": {"optimizer.learning_rate": 1e-9},
  "length is paid": {
    "reward.host": True,
    "reward.maths": "exact",
    "reward.accuracy_weight": 0.0,
    "reward.rules": "{rules}:long=1",
    "optimizer.learning_rate": 0.002,
  },
  "loss near 0": {"grpo.minibatches": 1, "steps": 20, "eval.every": 20},
}


def run(name: str, workdir: pathlib.Path, *more: str) -> str:
  """What the run prints; its metrics lie in the workdir."""
  rules = workdir.parent / "rules.py"
  rules.write_text(RULES)
  keys = {**SMALL, **BROKEN[name]}
  values = {k: str(v).format(rules=rules) for k, v in keys.items()}
  flags = [f"--config.{key}={value}" for key, value in values.items()]
  line = [sys.executable, "-m", "experiments.r1_zero", f"--workdir={workdir}", *flags]
  done = subprocess.run([*line, *more], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def rows(workdir: pathlib.Path) -> list[dict]:
  """What the doctor reads of a run's rollouts, to four digits."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [row for row in map(json.loads, lines) if row["phase"] == "rl"]
  return [
    {k: float(f"{row[k]:.4g}") for k in READ if row.get(k) is not None} for row in found
  ]


def recorded(name: str) -> list[dict]:
  """The run's rows as they lie in the repository."""
  lines = (HERE / f"{name.replace(' ', '_')}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


if __name__ == "__main__":
  HERE.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    for name in sys.argv[1:] or BROKEN:
      workdir = pathlib.Path(folder) / name.replace(" ", "_")
      run(name, workdir)
      text = "".join(json.dumps(row) + "\n" for row in rows(workdir))
      (HERE / f"{workdir.name}.jsonl").write_text(text)
      print(name, flush=True)
