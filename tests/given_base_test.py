"""A run that starts from a Hugging Face checkpoint: it says what that one says, learns
from text, resumes, and answers through `generate`."""

import json
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command as commands
from experiments import export, generate
from r1jax import prompts, trained
from r1jax.models import config as sizes
from r1jax.models import hf
from r1jax.models.policy import Policy, init
from r1jax.models.sequence import Sequence
from tests import forked, published

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


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setattr(commands, "use_compilation_cache", lambda folder: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Llama of 0.1 M parameters with a tokenizer of bytes."""
  folder = published.small(tmp_path_factory.mktemp("model"))
  policy = Policy(sizes.tiny_dense(262, qkv_bias=False, width=32, layers=2))
  params, router = nn.unbox(init(policy, jax.random.key(0)))
  hf.save(folder, policy, params, router, dtype="float32")
  return folder, params


def command(module, *arguments):
  return forked.run(f"experiments.{module}", *arguments, timeout=600)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "given"
  rules = workdir.with_name("rules.py")
  rules.write_text("def letters(text, problem):\n  return len(set(text)) / 12\n")
  said = f"--config.model.folder={checkpoint[0]}"
  paid = f"--config.reward.rules={rules}:letters=1"
  done = command("r1_zero", f"--workdir={workdir}", said, paid, *SMALL)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_it_begins_with_the_checkpoints_weights_and_moves_them(finished, checkpoint):
  workdir, _ = finished
  assert json.loads((workdir / "summary.json").read_text())["final"]["step"] == 2
  kept = trained.load(workdir)
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
  paid = f"--config.reward.rules={finished[0].with_name('rules.py')}:letters=1"
  again = command("r1_zero", f"--workdir={finished[0]}", said, paid, *SMALL)
  assert again.returncode == 0 and "This run has ended" in again.stdout


def test_the_run_answers_in_its_models_template(finished):
  said = command("generate", f"--from={finished[0]}", "--prompt=1 + 2", "--json")
  assert said.returncode == 0, said.stderr
  (prompt,) = json.loads(said.stdout)
  assert prompt.startswith("<|user|>1 + 2") and prompt.endswith("<|assistant|>")


def test_a_published_checkpoint_answers_a_users_turn(checkpoint, capsys):
  generate.main(
    [*("--from", str(checkpoint[0]), "--prompt", "1 + 2"), "--json", "--max-tokens=4"]
  )
  (prompt,) = json.loads(capsys.readouterr().out)
  kept = trained.load(checkpoint[0])
  assert prompt == kept.tokenizer.chat.render([{"role": "user", "content": "1 + 2"}])


def test_what_was_trained_goes_out_as_transformers_loads_it(finished, tmp_path, capsys):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  said = ["--from", str(finished[0]), "--to", str(tmp_path / "out")]
  export.main([*said, "--dtype=float32"])
  assert "model.safetensors" in capsys.readouterr().out
  kept = trained.load(finished[0])
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  text = prompts.user_turn("1 + 2", kept.tokenizer)
  ids = kept.tokenizer.encode(text)
  assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
  assert set(model.config.eos_token_id) == set(kept.tokenizer.stop_ids)
  tokens, variables = jnp.asarray([ids]), {"params": kept.params, "router": kept.router}
  seq = Sequence.of_mask(jnp.ones_like(tokens, bool))
  hidden = kept.policy.apply(variables, tokens, seq).hidden
  got = kept.policy.apply(variables, hidden, method="logits")
  with torch.no_grad():
    want = model(torch.tensor([ids])).logits.numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
  with pytest.raises(SystemExit, match="2"):
    export.main(said)
  assert "holds a checkpoint already" in capsys.readouterr().err


def test_the_base_of_a_run_is_the_checkpoint(finished, checkpoint):
  base = trained.load(finished[0], base=True)
  jax.tree.map(np.testing.assert_array_equal, base.params, checkpoint[1])


def test_a_run_without_adapters_has_none_to_write(finished, tmp_path, capsys):
  with pytest.raises(SystemExit, match="2"):
    export.main(["--from", str(finished[0]), "--to", str(tmp_path), "--adapters"])
  assert "no adapters" in capsys.readouterr().err


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
