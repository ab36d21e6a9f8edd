"""The evaluation of a run, on a folder made by hand: as it was trained."""

import json
import shutil

import jax.numpy as jnp
import pytest

from experiments import command, evaluate
from experiments.configs.r1_zero import get_config
from r1jax import rollout, settings, trained
from r1jax.checkpoint import Checkpoints
from r1jax.data.tokenizer import Tokenizer

FLAGS = ["--problems=6", "--samples=2", "--max-tokens=8", "--json"]


def saved(folder, step, value=0.0):
  """Weights that nobody samples from."""
  state = {"params": {"w": jnp.full(4, value)}, "router": {"bias": jnp.zeros(2)}}
  checkpoints = Checkpoints(folder / "checkpoints" / "rl")
  checkpoints.save(step, state, {"x": 1})
  checkpoints.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run with choices of its own."""
  folder, config = tmp_path_factory.mktemp("run"), get_config("tiny")
  with config.unlocked():
    config.counts.update(pretrain=50, train=50, held_out=50)
    config.data.stop, config.data.stop_on_answer = (";",), True
    config.reward.format_style, config.reward.code_seconds = "chat", 3.0
  texts = ["<think>4 + 3 = 7; wait</think><answer>7</answer>"] * 20
  tokenizer = Tokenizer.train(texts, vocab=400)
  tokenizer.save(folder / "tokenizer.model")
  (folder / "config.json").write_text(json.dumps(settings.plain(config)))
  saved(folder, 4)
  return folder, config


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setattr(command, "use_compilation_cache", lambda folder: None)


def run(capsys, folder, *flags):
  evaluate.main([f"--from={folder}", *FLAGS, *flags])
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def stops(monkeypatch):
  """Lets the policy answer in the style of the run; gives the strings it stops at."""
  seen = []

  def generate(*args, samples, stop, **_):
    seen.append(stop)
    text = "<think>so</think>It is <answer>0</answer>."
    one = rollout.Completion(text, [1], [0.0], True)
    return [[one] * samples] * len(args[4])

  monkeypatch.setattr(rollout, "generate", generate)
  return seen


def test_a_run_stops_and_is_judged_as_it_was_trained(made, tmp_path, capsys, stops):
  found = run(capsys, made[0], f"--out={tmp_path / 'own'}")
  assert set(stops) == {(";", "</answer>")} and found["stop"] == [";", "</answer>"]
  assert found["figures"]["format"]["value"] == 1.0  # not of the style `tags`
  assert found["maths"] == "exact"  # its rewards are read in the graph
  stops.clear()
  other = run(capsys, made[0], "--stop=!", f"--out={tmp_path / 'other'}")
  assert set(stops) == {("!",)} and other["stop"] == ["!"]


def test_a_runs_scorer_is_that_of_its_config(made):
  folder, config = made
  kept = trained.opened(folder)
  options = evaluate.flags().parse_args([])
  want = settings.scorer_config(config)
  found = evaluate.judged(options, kept, False)
  assert found.limits == want.limits and found.format_style == "chat"
  kept.config.reward.host = True
  assert evaluate.judged(options, kept, False) == want
  options = evaluate.flags().parse_args(["--maths=exact", "--sandbox=wasi"])
  found = evaluate.judged(options, kept, True)
  assert (found.maths, found.sandbox, found.prefill_think) == ("exact", "wasi", True)


def test_samples_of_an_earlier_step_are_not_reused(made, tmp_path, capsys, stops):
  folder = shutil.copytree(made[0], tmp_path / "run")
  out = f"--out={tmp_path / 'out'}"
  first = run(capsys, folder, out)
  assert run(capsys, folder, out) == first and len(stops) == 1
  saved(folder, 8)
  with pytest.raises(SystemExit, match="2"):
    run(capsys, folder, out)
  assert f"weights: {first['weights']} -> rl 8 " in capsys.readouterr().err
  assert first["weights"].startswith("rl 4 ")


def test_the_identity_of_weights_is_that_of_what_is_loaded(made, tmp_path):
  """The same step of other weights is another; a base has one of its own."""
  folder = shutil.copytree(made[0], tmp_path / "run")
  before = trained.identity(folder)
  assert before == trained.identity(made[0])
  shutil.rmtree(folder / "checkpoints")
  with pytest.raises(trained.UserError, match="holds no checkpoint yet"):
    trained.identity(folder)
  saved(folder, 4, value=1.0)
  assert trained.identity(folder) != before
  with pytest.raises(trained.UserError, match="leave --base out"):
    trained.identity(folder, base=True)


def test_a_sandbox_that_is_missing_is_told_with_the_flag(
  made, tmp_path, capsys, monkeypatch
):
  file = tmp_path / "code.jsonl"
  file.write_text(
    json.dumps({"problem": "1?", "tests": [{"input": "1", "output": "1"}]}) + "\n"
  )
  from r1jax.rewards import sandbox

  monkeypatch.setattr(sandbox, "_missing", lambda: "bwrap is not installed")
  flags = ["--benchmark=jsonl", f"--file={file}", f"--out={tmp_path / 'out'}"]
  with pytest.raises(SystemExit, match="2"):
    run(capsys, made[0], *flags)
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert "--sandbox=wasi" in line and "config.reward.sandbox" not in line
  assert not (tmp_path / "out").exists()


def test_golds_that_are_compared_as_text_are_named(made, tmp_path, capsys, stops):
  pytest.importorskip("math_verify")
  file = tmp_path / "odd.jsonl"
  file.write_text(json.dumps({"problem": "1?", "answer": "x ?? y"}) + "\n")
  flags = ["--benchmark=jsonl", f"--file={file}", f"--out={tmp_path / 'out'}"]
  evaluate.main([f"--from={made[0]}", *FLAGS, *flags])
  assert "compared as text alone" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pipeline(made, tmp_path_factory):
  """A pipeline with the stages zero, sft_1 and rl_1 and a student."""
  folder, plain = tmp_path_factory.mktemp("pipeline"), settings.plain(made[1])
  (folder / "world").mkdir()
  shutil.copy(made[0] / "tokenizer.model", folder / "world")
  reward = {"format_style": "tags"}
  of_rl = plain | {"reward": plain["reward"] | reward}
  of_sft = {k: v for k, v in plain.items() if k != "reward"}
  student = {**of_sft, "student.model": plain["model"] | {"preset": "tiny_dense"}}
  stages = {
    "zero": of_rl | {"zero": {}},
    "sft_1": of_sft,
    "rl_1": of_rl | {"rl_1": {"reward": {"format_style": "chat"}}},
    "distill": student,
  }
  for name, config in stages.items():
    stage(folder / name, config)
  return folder


def stage(folder, config):
  weights = {"params": {"w": jnp.ones(4)}, "router": {"bias": jnp.zeros(2)}}
  checkpoints = Checkpoints(folder / "weights")
  checkpoints.save(0, weights, {"version": 1})
  checkpoints.close()
  begun = {"stage": folder.name, "inputs": {}, "config": config}
  (folder / "begun.json").write_text(json.dumps(begun))
  (folder / "weights.json").write_text(json.dumps({"sha256": folder.name * 20}))


@pytest.mark.parametrize(
  "name, style", [("zero", "tags"), ("sft_1", "chat"), ("rl_1", "chat")]
)
def test_a_stage_is_evaluated_in_its_own_format(
  pipeline, tmp_path, capsys, stops, name, style
):
  found = run(capsys, pipeline / name, f"--out={tmp_path / 'out'}")
  assert found["format"] == style and found["weights"].startswith(f"{name} {name}")
  assert found["figures"]["format"]["value"] == (style == "chat")


def test_a_stages_weights_are_those_that_it_left(pipeline):
  kept = trained.load(pipeline / "distill")
  assert kept.policy.config.attention == "gqa"  # the student's, not the teacher's
  assert kept.params["w"].tolist() == [1.0] * 4 and list(kept.router) == ["bias"]
  assert kept.tokenizer.vocab == trained.opened(pipeline / "rl_1").tokenizer.vocab


def test_a_pipelines_folder_stands_for_its_last_policy(pipeline, tmp_path, capsys):
  folder = shutil.copytree(pipeline, tmp_path / "pipeline")
  with pytest.raises(
    trained.UserError, match=r"done in it: distill, rl_1, sft_1, zero"
  ):
    trained.opened(folder)
  shutil.copytree(folder / "rl_1", folder / "rl_2")
  assert trained.identity(folder) == trained.identity(folder / "rl_2")
  assert trained.load(folder).params.keys() == {"w"}
  with pytest.raises(trained.UserError, match=r"--base: .*rl_2 is no run"):
    trained.opened(folder, base=True)
