"""R1-Zero in two processes of two CPU devices is R1-Zero in one process of four."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.quick import QUICK

pytestmark = pytest.mark.xdist_group("two_processes")  # they share runs

SMALL = [
  "--config.compilation_cache=off",
  "--config.model.width=32",
  "--config.model.heads=2",
  "--config.model.layers=2",
  "--config.pretrain.steps=80",
  "--config.pretrain.rows=8",
  "--config.pretrain.micro_batches=1",
  "--config.prompts=8",
  "--config.grpo.group_size=4",
  "--config.grpo.minibatches=1",
  "--config.grpo.micro_batches=1",
  "--config.grpo.reference_refresh=4",
  "--config.eval.problems=8",
  "--config.eval.samples=2",
  "--config.eval.every=3",
  "--config.checkpoint_every=3",
  "--config.steps=3",
]


def run(workdir: pathlib.Path, processes: int) -> list[str]:
  """Runs it to its end, on four devices; what each process printed."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  flags = " ".join(f"--{key}={str(value).lower()}" for key, value in QUICK.items())
  begun = []
  for i in range(processes):
    variables = {"JAX_NUM_CPU_DEVICES": str(4 // processes), "XLA_FLAGS": flags}
    if processes > 1:
      variables["R1JAX_COORDINATOR"] = f"127.0.0.1:{port}"
      variables["R1JAX_PROCESSES"] = str(processes)
      variables["R1JAX_PROCESS_ID"] = str(i)
    command = [sys.executable, "-m", "experiments.r1_zero", f"--workdir={workdir}"]
    begun.append(
      subprocess.Popen(
        [*command, *SMALL],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | variables,
      )
    )
  printed = []
  try:
    for process in begun:
      out, err = process.communicate(timeout=400)
      assert process.returncode == 0, err
      printed.append(out)
  finally:
    for process in begun:
      process.kill()
      process.communicate()
  return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(workdir of one process, workdir of two, what each of the two printed)."""
  folder = tmp_path_factory.mktemp("runs")
  run(folder / "one", 1)
  return folder / "one", folder / "two", run(folder / "two", 2)


def lines(workdir: pathlib.Path, name: str) -> list[dict]:
  return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_losses_gradients_and_rewards_agree(runs):
  one, two = (lines(workdir, "metrics.jsonl") for workdir in runs[:2])
  trained = [row for row in one if row["phase"] == "rl"]
  assert len(trained) == 3
  assert all(row["grad_norm"] > 1e-3 and row["reward"] > 0 for row in trained)
  for ours, theirs in zip(two, one, strict=True):
    assert (ours.pop("phase"), ours.pop("step")) == (
      theirs.pop("phase"),
      theirs.pop("step"),
    )
    for name in ("nll", "loss", "grad_norm", "reward", "length", "pass_at_1"):
      if name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    # Some of the rest are nothing but rounding, such as the sampler's gap.
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["samples.jsonl", "tokens.jsonl"])
def test_the_same_problems_get_the_same_answers_in_the_same_order(runs, name):
  one, two = (lines(workdir, name) for workdir in runs[:2])
  assert one
  for ours, theirs in zip(two, one, strict=True):
    for row in (ours, theirs):  # figures of tokens are rounded to four digits
      for key in [k for k, v in row.items() if isinstance(v, float)]:
        del row[key]
    texts = ("problem", "texts", "answers", "tokens", "group", "sample", "step")
    assert {k: ours.get(k) for k in texts} == {k: theirs.get(k) for k in texts}


def test_the_first_process_alone_writes_and_speaks(runs):
  one, two, (first, second) = runs
  files = [sorted(p.name for p in folder.iterdir()) for folder in (one, two)]
  compared = ["processes.jsonl"]  # their times, of which one process has none
  assert sorted(files[0] + compared) == files[1]
  steps = [(row["phase"], row["step"]) for row in lines(two, "metrics.jsonl")]
  assert len(steps) == len(set(steps))
  assert "After RL" in first and "process 0 of 2" in first
  # Gloo's threads interrupt each other's lines.
  gloo = ("[Gloo]", "peer ranks")
  said = [x for x in second.splitlines() if x and not any(word in x for word in gloo)]
  assert len(said) == 1 and said[0].startswith("process 1 of 2 on ")
  assert "2 of 4 devices (variables)" in said[0]


def test_both_processes_checkpoint_the_same_state(runs):
  one, two = (
    sorted(str(p.relative_to(w)) for p in w.glob("checkpoints/*/*")) for w in runs[:2]
  )
  assert one == two and any(p.endswith("rl/3") for p in two)
