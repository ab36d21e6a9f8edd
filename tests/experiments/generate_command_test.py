"""python -m experiments.generate, on a run folder made by hand."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command, generate
from experiments.configs.r1_zero import get_config
from r1jax import rollout, settings, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence
from r1jax.optimizer import make_optimizer

SIZES = dict(width=32, layers=2, heads=2, q_latent=16, kv_latent=8, nope_dim=8)
SIZES |= dict(rope_dim=8, v_dim=8, dense_ffn=32, expert_ffn=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Of a run whose policy has random weights."""
  folder, config = tmp_path_factory.mktemp("run"), get_config("tiny")
  with config.unlocked():
    config.model.update(SIZES)
  texts = ["<think>4 + 3 = 7, wait 4 + 3 = 7</think><answer>7</answer>"] * 20
  tokenizer = Tokenizer.train(texts, vocab=400)
  tokenizer.save(folder / "tokenizer.model")
  (folder / "config.json").write_text(json.dumps(settings.plain(config)))
  policy = Policy(settings.policy_config(config, tokenizer.vocab))
  optimizer = make_optimizer(settings.optimizer_config(config))
  state = train_state.create(policy, optimizer, jax.random.key(0), reference=True)
  checkpoints = Checkpoints(folder / "checkpoints" / "rl")
  checkpoints.save(4, state, {"x": 1})
  checkpoints.close()
  return folder


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setattr(command, "use_compilation_cache", lambda folder: None)


def said(capsys, folder, *flags):
  generate.main(["--from", str(folder), "--max-tokens", "8", "--json", *flags])
  return json.loads(capsys.readouterr().out)


def test_a_prompt_is_answered_in_the_runs_template(capsys, folder):
  found = said(capsys, folder, "--prompt", "4 + 3", "--samples", "3")
  (prompt,) = found
  assert prompt == "<|User|>4 + 3<|Assistant|>" and len(found[prompt]) == 3
  tokenizer = Tokenizer.load(folder / "tokenizer.model")
  for completion in found[prompt]:
    assert 1 <= len(completion["tokens"]) <= 8
    assert completion["text"] == tokenizer.decode(completion["tokens"])
    assert completion["ended"] == (completion["tokens"][-1] == tokenizer.eos_id)
  assert found == said(capsys, folder, "--prompt", "4 + 3", "--samples", "3")
  other = said(capsys, folder, "--prompt", "4 + 3", "--samples", "3", "--seed", "1")
  assert found != other


def test_a_folder_may_be_named_from_where_one_is(capsys, folder, monkeypatch):
  monkeypatch.chdir(folder.parent)
  flags = ("--prompt", "4 + 3", "--temperature", "0")
  assert said(capsys, folder.name, *flags) == said(capsys, folder, *flags)


def test_the_likeliest_tokens_are_those_of_the_full_forward_pass(capsys, folder):
  from r1jax import trained

  flags = ("--prompt", "4 + 3", "--temperature", "0", "--raw")
  ((completion,),) = said(capsys, folder, *flags).values()
  kept = trained.load(folder)
  ids = [kept.tokenizer.bos_id, *kept.tokenizer.encode("4 + 3"), *completion["tokens"]]
  tokens = jnp.asarray([ids])
  seq = Sequence.of_mask(jnp.ones_like(tokens, bool))
  variables = {"params": kept.params, "router": kept.router}
  hidden = kept.policy.apply(variables, tokens, seq).hidden
  logits = np.asarray(kept.policy.apply(variables, hidden, method="logits"))[0]
  n = len(completion["tokens"])
  np.testing.assert_array_equal(logits[-n - 1 : -1].argmax(-1), completion["tokens"])
  assert completion["logprobs"] == [0.0] * n


def test_prompts_of_any_length_in_the_window_share_a_program(folder, caplog):
  from r1jax import trained

  kept = trained.load(folder)
  rollout._sampled.clear_cache()

  def ask(prompts):
    model = kept.policy, kept.params, kept.router, kept.tokenizer
    return rollout.generate(*model, prompts, max_tokens=4, window=16, stop=("</a",))

  with jax.log_compiles():
    ask(["4", "4 + 3"])
    ask(["4 + 3 + 4", "7"])
    ask(["", "3"])
  assert caplog.text.count("Compiling jit(_sampled)") == 1


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--top-p", "0"], r"top_p=0\.0 above 0"),
    (["--max-tokens", "0"], r"max_tokens=0 must be at least 1"),
    (["--stop", ""], r"stop='' must be a text"),
    (["--slots", "5"], r"slots=5 for 1 prompts x group_size=1 = 1 outputs.*Take 1"),
    (["--speculative", "yes"], r"speculative='yes' must be 'off', 'on' or 'auto'"),
    (["--speculative", "on"], r"MTP module.*mtp_depth=1"),
    (["--base"], r"no checkpoint yet.*leave --base out"),
    (
      ["--from", "nowhere"],
      r"nowhere is not the folder of a run.*experiments\.r1_zero",
    ),
  ],
)
def test_mistakes_end_with_what_to_do(flags, message, capsys, folder):
  with pytest.raises(SystemExit) as stop:
    generate.main(["--from", str(folder), "--prompt", "4 + 3", *flags])
  assert stop.value.code == 2
  assert re.search(message, capsys.readouterr().err)


def test_a_prompt_beyond_the_window_and_no_prompt_are_refused(folder):
  from r1jax import trained
  from r1jax.errors import UserError

  kept = trained.load(folder)
  model = kept.policy, kept.params, kept.router, kept.tokenizer
  with pytest.raises(UserError, match=r"does not fit window=4"):
    rollout.generate(*model, ["4 + 3 + 4 + 3"], window=4)
  with pytest.raises(UserError, match=r"prompts is empty"):
    rollout.generate(*model, [])


def test_weights_that_are_not_finite_are_named(folder):
  from r1jax import trained
  from r1jax.errors import NumericalError

  kept = trained.load(folder)
  params = jax.tree.map(lambda x: x, kept.params)
  params["final_norm"] = {
    "scale": jnp.full_like(params["final_norm"]["scale"], jnp.nan)
  }
  model = kept.policy, params, kept.router, kept.tokenizer
  with pytest.raises(NumericalError, match=r"prompt 0, sample 0 at token 0.*norms"):
    rollout.generate(*model, ["4 + 3"], max_tokens=4)
