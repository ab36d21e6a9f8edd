"""The stages of R1 from the command line: mistakes, and a whole small run that is
killed on its way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import forked

# Sizes at which the base learns enough to give some right answers.
SMALL = """
  model.width=48 model.heads=2 model.layers=2 pretrain.steps=150 pretrain.rows=24
  pretrain.micro_batches=2 prompts=8 grpo.group_size=4 grpo.micro_batches=2
  grpo.reference_refresh=4 eval.problems=8 eval.samples=4 eval.every=4
  checkpoint_every=2 steps=4 rl_2.changes.steps=6 rl_2.window=4 rl_2_uncapped.steps=4
  student.rl.steps=4 cold_start.prompts=128 cold_start.samples=8 cold_start.most=20
  sft_1.epochs=1 sft_3.epochs=1 distill.epochs=1 rejection.prompts=128
  rejection.samples=8 rejection.least_consistency=0.0 judging.samples=8
  judging.pairs_a_prompt=8 reward_models.epochs=1 counts.pretrain=400 counts.train=128
  counts.held_out=64 report.problems=32 report.samples=4
"""


def command(*arguments: str, module: str = "r1") -> list[str]:
  small = [f"--config.{pair}" for pair in SMALL.split()]
  return [sys.executable, "-m", f"experiments.{module}", *small, *arguments]


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
  _, _, *line = command(*arguments, **kwargs)
  return forked.run(*line, timeout=3600)


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--stage=nowhere", ["'nowhere'", "cold_start", "rejection"]),
    ("--stage=rejection", ["rejection reads rl_1", "missing", "--stage=rl_1"]),
    ("--config.task=chain", ["'chain'", "assistant"]),
    ("--config.rl_2.window=100", ["rl_2.window=100", "multiple", "updates"]),
    ("--config.rl_2.general_share=1.5", ["general_share=1.5", "between 0 and 1"]),
    ("--config.cold_start.samples=3", ["cold_start.samples=3", "multiple of 4"]),
    ("--config.distill.mode=magic", ["'magic'", "on_policy"]),
    ("--config.cold_start.rewriter=me", ["cold_start.rewriter='me'", "FILE.py"]),
    ("--config.rejection.judge=no.py:f", ["no.py"]),
    ("--config.reward.host=True", ["reward.host=True", "in the graph"]),
    ("--config.data.prefill_think=True", ["prefill_think=True"]),
    ("--config.rl_2.squash=tanh", ["'tanh'", "sigmoid"]),
    ("--config.judging.judgments=3", ["judgments=3", "even"]),
    ("--config.report.temperature=0.0", ["report.temperature=0.0", "above 0"]),
    ("--config.distill.divergence=x", ["'x'", "forward_kl"]),
    ("--config.sft_1.learning_rate=-1.0", ["sft_1.learning_rate=-1.0", "above 0"]),
    ("--config.sft_1.micro_batches=0", ["sft_1.rows", "above 0"]),
    ("--config.rejection.general_data=no.jsonl", ["no.jsonl", "no such file"]),
    ("--config.student.model.mtp_depth=1", ["config.student", "mtp_depth"]),
    ("--config.zero.steps=3", ["no config key"]),
    ("--config.sft_3.rows=9", ["sft_3.rows=9", "micro_batches"]),
  ],
)
def test_a_mistake_is_one_line_with_the_remedy(argument, words, tmp_path):
  done = run(argument, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
  for word in words:
    assert word in lines[0]


@pytest.mark.parametrize(
  "module, arguments, words",
  [
    ("distill", [], ["--from=DIR is needed"]),
    ("distill", ["--from=/nowhere"], ["'world' there is missing", "--stage=world"]),
    ("reward_model", ["--kind=evil"], ["'evil'", "helpful", "safety"]),
    ("reward_model", ["--train=x.jsonl"], ["--held_out", "both"]),
  ],
)
def test_a_stage_on_its_own_needs_a_pipeline(module, arguments, words, tmp_path):
  done = run(*arguments, f"--workdir={tmp_path / 'run'}", module=module)
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
  assert not (tmp_path / "run").exists()


def kill_when(there: pathlib.Path, arguments: list[str]) -> None:
  """Starts the command and kills it as soon as a file is there."""
  process = subprocess.Popen(
    command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  until = time.monotonic() + 280
  while not there.exists() and process.poll() is None and time.monotonic() < until:
    time.sleep(0.05)
  assert there.exists(), f"{there} never came; exit code {process.poll()}"
  process.send_signal(signal.SIGKILL)
  process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing disturbed: (its workdir, the flags of every run)."""
  folder = tmp_path_factory.mktemp("runs")
  flags = ["--config.ablations=True", f"--config.compilation_cache={folder / 'cache'}"]
  done = run(*flags, f"--workdir={folder / 'whole'}")
  assert done.returncode == 0, done.stderr
  assert "cold start: format above Zero" in " ".join(done.stdout.split())
  return folder / "whole", flags


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_where_it_would_have(whole, tmp_path):
  undisturbed, flags = whole
  killed = tmp_path / "killed"
  again = [*flags, f"--workdir={killed}"]
  kill_when(killed / "zero" / "checkpoints" / "rl" / "2", again)
  kill_when(killed / "rejection" / "samples.jsonl", again)
  kill_when(killed / "rl_2" / "checkpoints" / "rl" / "2", again)
  done = run(*again)
  assert done.returncode == 0, done.stderr
  assert "goes on where it was stopped" in done.stdout
  files = ["report/report.json", "cold_start/traces.jsonl", "rejection/traces.jsonl"]
  files += ["judging/train_pairs.jsonl", "rl_2/weights.json", "distill/weights.json"]
  for file in files:
    assert (undisturbed / file).read_bytes() == (killed / file).read_bytes(), file
  report = json.loads((killed / "report" / "report.json").read_text())
  assert {"base", "Zero", "Dev1", "Dev2", "Dev3", "R1"} <= set(report["table"])

  # An edited data set makes stale what reads it, and nothing is overwritten.
  traces = killed / "cold_start" / "traces.jsonl"
  rows = traces.read_text(encoding="utf-8").splitlines(keepends=True)
  traces.write_text("".join(rows[:-1]), encoding="utf-8")
  before = (killed / "sft_1" / "manifest.json").read_bytes()
  done = run(*again)
  assert done.returncode == 2 and "sft_1: input cold_start changed" in done.stderr
  assert "--rerun" in done.stderr
  assert (killed / "sft_1" / "manifest.json").read_bytes() == before
  assert not os.path.exists(killed / "old")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sft", "logits", "on_policy"])
def test_a_student_on_its_own(mode, whole, tmp_path):
  pipeline, flags = whole
  call = [*flags, f"--from={pipeline}", f"--workdir={tmp_path / 'student'}"]
  call += [f"--config.distill.mode={mode}", "--config.distill.on_policy_steps=3"]
  done = run(*call, module="distill")
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / "student" / "summary.json").read_text())
  assert summary["mode"] == mode and {"before", "after"} <= set(summary)
  digests = [
    (f / "weights.json").read_text()
    for f in (pipeline / "distill", tmp_path / "student")
  ]
  assert (digests[0] == digests[1]) == (mode == "sft")  # the pipeline's own student
  done = run(*call, module="distill")
  assert done.returncode == 2 and "nothing was overwritten" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_a_reward_model_on_its_own(kind, whole, tmp_path):
  pipeline, flags = whole
  folder = tmp_path / "model"
  call = [*flags, f"--from={pipeline}", f"--workdir={folder}", f"--kind={kind}"]
  done = run(*call, module="reward_model")
  assert done.returncode == 0, done.stderr
  assert (folder / f"{kind}_calibration.png").read_bytes()[:4] == b"\x89PNG"
  own = (folder / kind / "weights.json").read_bytes()
  assert own == (pipeline / "reward_models" / kind / "weights.json").read_bytes()
