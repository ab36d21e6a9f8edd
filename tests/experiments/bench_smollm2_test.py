"""The benchmark on a published model, with a toy in its place: its figures and tables,
and that it goes on where it was. No time is judged."""

import argparse
import json

from flax import linen as nn
import jax
import pytest

from experiments import bench, command
from experiments.benches import smollm2
from r1jax.models import config, hf
from r1jax.models.policy import Policy, init
from tests import published


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
  monkeypatch.setattr(command, "use_compilation_cache", lambda folder: None)
  yield
  jax.config.update("jax_cpu_enable_async_dispatch", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = published.small(tmp_path_factory.mktemp("model"))
  policy = Policy(config.tiny_dense(262, qkv_bias=False, width=32, layers=2))
  params, router = nn.unbox(init(policy, jax.random.key(0)))
  hf.save(folder, policy, params, router, dtype="float32")
  return folder


@pytest.mark.slow
def test_an_arm_has_its_steps_figures_and_gap(folder, tmp_path, monkeypatch, capsys):
  pytest.importorskip("torch")
  small = {"eval.problems": 8, "eval.samples": 2, "windows": ((0, 8),)}
  small |= {"prompts": 8, "grpo.micro_batches": 1}  # of eight devices
  monkeypatch.setitem(smollm2.ARMS, "lora", smollm2.ARMS["lora"] | small)
  options = argparse.Namespace(
    arms="lora", steps=2, beside=2, folder=str(folder), workdir=str(tmp_path)
  )
  found = smollm2.run(options)
  json.dumps(found)
  arm = found["arms"]["lora"]
  assert arm["logits_gap"] < 2e-5
  assert [row["step"] for row in arm["steps"]] == [1, 2]
  beside = [row["transformers_seconds"] is not None for row in arm["steps"]]
  assert beside == [True, False]
  for row in arm["steps"]:
    parts = (row[f"{x}_seconds"] for x in ("rollout", "reward", "update"))
    assert row["seconds"] == pytest.approx(sum(parts))
    assert row["tokens"] <= 8 * 8 * 8
    assert row["tokens_per_s"] * row["rollout_seconds"] == pytest.approx(
      row["tokens"], abs=1
    )
  for figure, columns in arm["figures"].items():
    assert columns["base"][0] + columns["change"][0] == pytest.approx(
      columns["final"][0]
    ), figure
  out = capsys.readouterr().out
  assert "| lora | format rate |" in out and "| lora | 2 |" in out
  # Stopped after the run and before its figures were read: nothing is run again.
  again = smollm2.run(options)
  assert again["arms"]["lora"]["figures"] == arm["figures"]
  assert again["arms"]["lora"]["steps"] == arm["steps"]


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--arms=full,big", ["'big'", "full, lora"]),
    ("--steps=0", ["--steps=0", "at least 1"]),
    ("--folder=/nowhere", ["/nowhere/config.json"]),
  ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, flag, words, tmp_path):
  pytest.importorskip("torch")
  with pytest.raises(SystemExit, match="2"):
    bench.main(["smollm2", "--arms=full", f"--workdir={tmp_path}", flag])
  error = capsys.readouterr().err
  assert len(error.strip().splitlines()) == 1, error
  assert all(word in error for word in words), error
