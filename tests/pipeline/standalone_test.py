"""Stages on their own: whose folder it is, which pairs are pairs, and what a killed
training of a reward model does not do again."""

import json
import types

import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.pipeline import preference_models, standalone


def test_a_folder_is_gone_on_in_by_the_same_call_alone(tmp_path):
  folder, begun = tmp_path / "result", {"kind": "helpful", "made": {"sft_3": "a"}}
  standalone.claim(folder, begun)
  (folder / "metrics.jsonl").write_text("kept")
  standalone.claim(folder, begun)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  with pytest.raises(UserError, match=r"was begun otherwise .*sft_3.*nothing was over"):
    standalone.claim(folder, {**begun, "made": {"sft_3": "b"}})
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    standalone.claim(tmp_path / "file" / "result", {})


@pytest.mark.parametrize(
  "chosen, rejected, ok",
  [
    ("<think></think> soft", "<think></think> hot", True),
    ("<think>a</think> soft", "<think>b</think> soft", False),  # the thinking alone
    (" soft", " hot", False),  # all of it is thinking that never ends
    ("<think></think> soft", " soft", True),
  ],
)
def test_a_pair_differs_in_what_the_helpful_model_reads(chosen, rejected, ok, tmp_path):
  path = tmp_path / "pairs.jsonl"
  row = {"prompt": "q", "chosen": chosen, "rejected": rejected, "delta": 2}
  path.write_text(json.dumps(row))
  if ok:
    assert [p.chosen for p in standalone.pairs_of(path)] == [chosen]
    return
  with pytest.raises(UserError, match="1 of 1 pairs have the same summary"):
    standalone.pairs_of(path)


@pytest.mark.parametrize("left", ["nothing", "arrays", "weights"])
def test_a_reward_model_is_learned_again_only_if_it_was_not_whole(
  left, tmp_path, monkeypatch
):
  """A kill may leave arrays without weights.json, which names them."""
  model, done = tmp_path / "safety", []
  if left != "nothing":
    (model / "weights").mkdir(parents=True)
    (model / "weights" / "arrays").write_text("old")
  if left == "weights":
    (model / "weights.json").write_text("{}")

  def learn(*args):
    done.append("learned")
    return "new"

  def save(folder, weights):
    assert not list(folder.iterdir())
    (folder / "weights.json").write_text("{}")

  def load(folder, network, mesh):
    assert folder == model
    return "old"

  scores = np.array([2.0, -1.0])
  said = []
  for name, value in dict(
    learn=learn,
    save_weights=save,
    load_weights=load,
    _longest=lambda *args, **kwargs: 4,
    Value=lambda config: None,
    scored=lambda this, value, weights, *args, **kwargs: said.append(weights) or scores,
  ).items():
    monkeypatch.setattr(preference_models, name, value)
  config = types.SimpleNamespace(data=types.SimpleNamespace(template="short"))
  this = types.SimpleNamespace(
    config=config, policy=types.SimpleNamespace(config=None), tokenizer=None
  )
  labels = [types.SimpleNamespace(prompt="q", response="r", safe=s) for s in (1, 0)]
  args = this, None, {"train": labels, "held_out": labels}, "safety", {"rows": 2}
  project = types.SimpleNamespace(mesh=None)
  first = preference_models.train(project, *args, tmp_path)
  assert first["auc"] == 1.0 and (tmp_path / "safety_calibration.png").exists()
  assert done == ([] if left == "weights" else ["learned"])
  assert said == ["old" if left == "weights" else "new"]
  assert preference_models.train(project, *args, tmp_path) == first
  assert len(said) == 1  # what is finished is read
