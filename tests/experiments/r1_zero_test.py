"""The command line: a mistake ends early, in one line, with the remedy and code 2."""

import subprocess
import sys

import pytest

from tests import forked

BAD = "experiments/configs/r1_zero.py:nope"


def run(*arguments: str) -> subprocess.CompletedProcess:
  return forked.run("experiments.r1_zero", *arguments)


@pytest.mark.parametrize(
  "argument, words",
  [
    ("--config.grpo.grup_size=8", ["'grup_size'", "Did you mean 'group_size'"]),
    ("--config.grpo.group_size=1", ["group_size=1", "at least 2"]),
    ("--config.mesh.tensor=16", ["tensor=16", "devices", "fsdp=-1"]),
    ("--config.steps=121", ["steps=121", "try 122"]),
    ("--config.grpo.reference_refresh=15", ["reference_refresh=15", "multiple"]),
    ("--config.prompts=15", ["prompts=15", "multiple of"]),
    ("--config.data.prompt_length=4", ["prompt_length=", "drop the problem"]),
    ("--config.task=chess", ["'chess'", "chain", "puzzle"]),
    ("--config.data.problems=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("--config.data.template=chatty", ["'chatty'", "r1_zero"]),
    ("--config=nowhere.py", ["nowhere.py"]),
    (f"--config={BAD}", ["nope", "tiny", "paper"]),
    ("--wrkdir=x", ["wrkdir"]),
    ("--config.steps=many", ["steps", "many"]),
    ("--config.optimizer.learning_rate=fast", ["learning_rate", "fast"]),
    ("--config.windows=(0,64)", ["windows", "((0, 64),)"]),
    ("--config.segment_tokens=-1", ["segment_tokens=-1", "negative"]),
    ("--config.model.width=0", ["width=0", "1 or more"]),
    ("--config.pretrain.steps=0", ["pretrain.steps=0", "a base"]),
    ("--config.optimizer.schedule=linear", ["'linear'", "cosine"]),
    (
      "--config=experiments/configs/r1_zero.py:paper",
      ["expert=128, tensor=16", "devices"],
    ),
  ],
)
def test_a_mistake_is_one_line_with_the_remedy(argument, words, tmp_path):
  workdir = tmp_path / "run"
  done = run(argument, f"--workdir={workdir}")
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
  for word in words:
    assert word in lines[0]
  assert not (workdir / "metrics.jsonl").exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  file = tmp_path / "file"
  file.write_text("mine")
  done = run(f"--workdir={file}")
  assert done.returncode == 2 and "cannot be written" in done.stderr
  assert file.read_text() == "mine"


@pytest.mark.parametrize(
  "content, words",
  [
    ("", ["no usable problem"]),
    ('{"problem": "1 + 1", "answer": "2"}\n{"problem": \n', [":2:", "not JSON"]),
    ('{"problem": "1 + 1"}\n', [":1:", '"answer"']),
    ('{"problem": "1 + 1 + 1", "answer": 3}\n' * 9, ["1 distinct problems"]),
  ],
)
def test_a_bad_problem_file_names_its_line(content, words, tmp_path):
  path = tmp_path / "problems.jsonl"
  path.write_text(content)
  done = run(f"--config.data.problems={path}", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2
  for word in words:
    assert word in done.stderr


def test_help_names_the_keys():
  command = [sys.executable, "-m", "experiments.r1_zero", "--help"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0
  assert "--config.grpo.group_size=16" in done.stdout
  assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config.objective.preset=grpo"], ["objective.preset='grpo'", "dr_grpo"]),
    (["--config.objective.kl=k1-in-loss"], ["k1-in-loss", "k1-in-reward"]),
    (["--config.objective.dual_clip=0.9"], ["dual_clip=0.9", "above 1"]),
    (["--config.objective.clip_hi=0.3"], ["'clip_hi'", "'clip_high'"]),
    (["--config.objective.pool=200"], ["prompts=16", "pool=200", "2000 problems"]),
    (
      ["--config.objective.overlong_buffer=500"],
      ["overlong_buffer=500", "the window"],
    ),
    (
      ["--config.grpo.top_k=5", "--config.grpo.keep_sampling_mask=False"],
      ["keep_sampling_mask=False", "top_k=5"],
    ),
  ],
)
def test_a_contradictory_objective_is_one_line_before_anything_is_written(
  arguments, words, tmp_path
):
  done = run(*arguments, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
  for word in words:
    assert word in lines[0]
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
