"""A run that starts from a Hugging Face checkpoint: it says what that one says, learns
from text, resumes, and answers through `generate`."""

import json
import re
import subprocess
import sys

from flax import linen as nn
import jax
import numpy as np
import pytest

from r1jax import run as runs
from r1jax.models import config as sizes
from r1jax.models import hf
from r1jax.models.policy import Policy, init
from tests import published

SMALL = [
  *("--config.pretrain.steps=0", "--config.data.template=chat"),
  *("--config.reward.host=True", "--config.reward.workers=1"),
  *("--config.windows=((0,12),)", "--config.model.dtype=float32"),
  *("--config.prompts=4", "--config.grpo.group_size=4"),
  *("--config.grpo.minibatches=1", "--config.grpo.micro_batches=2"),
  *("--config.grpo.reference_refresh=0", "--config.eval.every=2"),
  *("--config.eval.problems=4", "--config.eval.samples=2", "--config.steps=2"),
  "--config.checkpoint_every=2",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Llama of 0.1 M parameters with a tokenizer of bytes."""
  folder = published.small(tmp_path_factory.mktemp("model"))
  policy = Policy(sizes.tiny_dense(262, qkv_bias=False, width=32, layers=2))
  params, router = nn.unbox(init(policy, jax.random.key(0)))
  hf.save(folder, policy, params, router, dtype="float32")
  return folder, params


def command(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{module}", *arguments],
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "given"
  said = f"--config.model.folder={checkpoint[0]}"
  done = command("r1_zero", f"--workdir={workdir}", said, *SMALL)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_it_begins_with_the_checkpoints_weights_and_moves_them(finished, checkpoint):
  workdir, _ = finished
  assert json.loads((workdir / "summary.json").read_text())["final"]["step"] == 2
  kept = runs.load(workdir)
  assert kept.policy.config.vocab == 262
  before, after = (jax.tree.leaves(tree) for tree in (checkpoint[1], kept.params))
  moved = [float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True)]
  # As far as two steps of AdamW go, from there.
  assert 0 < max(moved) < 2e-3


def test_the_rewards_are_read_from_text(finished):
  rows = (finished[0] / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(row) for row in rows if '"phase": "rl"' in row]
  assert [row["step"] for row in steps] == [1, 2]
  assert all("outcome_unparsable" in row for row in steps)


def test_the_same_command_shows_a_run_that_has_ended(finished, checkpoint):
  said = f"--config.model.folder={checkpoint[0]}"
  again = command("r1_zero", f"--workdir={finished[0]}", said, *SMALL)
  assert again.returncode == 0 and "This run has ended" in again.stdout


def test_the_run_answers_in_its_models_template(finished):
  said = command("generate", f"--from={finished[0]}", "--prompt=1 + 2", "--json")
  assert said.returncode == 0, said.stderr
  (prompt,) = json.loads(said.stdout)
  assert prompt.startswith("<|user|>1 + 2") and prompt.endswith("<|assistant|>")


@pytest.mark.parametrize(
  "more, words",
  [
    (["--config.model.folder=nowhere"], r"nowhere/config\.json cannot be read"),
    (["--config.model.folder="], r"'chat' is a published model's own; set model\.f"),
    (["--config.model.width=8"], r"width set beside model\.folder"),
    (["--config.windows=((0,0),)"], r"never saw them; set the tokens"),
  ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, more, words):
  said = f"--config.model.folder={checkpoint[0]}"
  done = command("r1_zero", f"--workdir={tmp_path / 'run'}", said, *SMALL, *more)
  assert done.returncode == 2
  (line,) = done.stderr.strip().splitlines()
  assert re.search(words, line), line
  assert not (tmp_path / "run" / "config.json").exists()
