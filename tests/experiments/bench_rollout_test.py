"""The benchmark of the rollout at toy sizes: its figures, its tables, what it refuses.
No time is judged."""

import argparse
import functools
import json
import pathlib

import numpy as np
import pytest
from quick import QUICK

from experiments import bench
from experiments.benches import rollout, rollout_beside_torch, rollout_parts

TOY = rollout_parts.Sizes(
  vocab=32,
  width=32,
  layers=2,
  head_dim=8,
  ffn=48,
  prompts=2,
  group=4,
  prompt=8,
  new=6,
  micro_batches=2,
  queue=8,
  slots=8,
  cache_tokens=0,
  median=4,
  cap=16,
  prefix=64,
  prefix_prompts=2,
  lengths=(64, 128, 256),
  length_layers=1,
  length_rows=2,
  length_steps=4,
  draft_pretrain=2,
  draft_prompts=1,
  draft_group=2,
)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
  slow = rollout_parts.compiled
  fast = functools.partial(slow, compiler_options=QUICK)
  monkeypatch.setattr(rollout_parts, "compiled", fast)


def measure(only: str, **flags) -> dict:
  options = argparse.Namespace(only=only, repeats=1, write=False, **flags)
  found = rollout.measure(options, TOY)
  json.dumps(found)
  return found


def positive(found: dict, *names: str) -> None:
  for name in names:
    assert found[name] > 0, name


@pytest.mark.slow
def test_the_rollout_and_the_iteration_run_beside_torch(capsys):
  pytest.importorskip("torch")
  pytest.importorskip("transformers", minversion="5.0")
  found = measure("transformers,iteration")
  positive(found, "r1jax_tokens_per_s", "transformers_tokens_per_s")
  positive(found, "iteration_seconds", "iteration_rollout_seconds")
  positive(found, "torch_rollout_seconds", "torch_update_seconds")
  ratio = found["r1jax_tokens_per_s"] / found["transformers_tokens_per_s"]
  assert found["ratio_to_transformers"] == pytest.approx(ratio)
  assert "iteration_by_rows_ratio_to_torch" in found
  ratio = found["torch_iteration_seconds"] / found["iteration_seconds"]
  assert found["iteration_ratio_to_torch"] == pytest.approx(ratio)
  assert {len(runs) for runs in found["rollout_runs"].values()} == {1}
  out = capsys.readouterr().out
  assert "| rollout, tokens a second |" in out
  assert "| whole iteration, seconds |" in out


def test_other_weights_are_noticed(monkeypatch):
  pytest.importorskip("torch")
  pytest.importorskip("transformers", minversion="5.0")
  network, right = TOY.dense(), rollout_beside_torch.qwen2
  params, _ = rollout_parts.weights_of(network)
  prompts = rollout_parts.problems(2, 8, TOY.vocab)

  def wrong(network, params):
    config, weights = right(network, params)
    name = "model.layers.1.self_attn.v_proj.bias"
    return config, weights | {name: weights[name] + 0.5}

  monkeypatch.setattr(rollout_beside_torch, "qwen2", wrong)
  with (
    pytest.raises(RuntimeError, match="logits of r1jax and transformers"),
    rollout_beside_torch.torch_process(network, params, prompts),
  ):
    pass


def test_refill_writes_the_static_batches_outputs_in_fewer_steps(capsys):
  found = measure("refill")
  positive(found, "refill_ratio_to_static")
  assert found["refill_equal_outputs"] == 1.0
  steps, total = found["refill_steps"], found["refill_tokens"]
  assert total / TOY.slots <= steps < found["static_steps"]
  assert found["slot_occupancy"] == total / (steps * TOY.slots)
  assert found["ideal_ratio"] == pytest.approx(1 / found["static_occupancy"])
  assert "The same tokens in 100.0 %" in capsys.readouterr().out


def test_lengths_have_the_tail_that_they_are_said_to_have():
  lengths = rollout_parts.heavy_tail(1024, 32, 256)
  assert np.median(lengths) == 32
  assert np.percentile(lengths, 99) == pytest.approx(256, rel=0.02)
  assert lengths.min() >= 1 and lengths.max() == 256
  assert (np.sort(lengths) != lengths).any()


def test_a_shared_prefix_costs_its_share():
  found = measure("prefix")
  assert found["prefix_bytes_ratio"] == 1 / TOY.group
  assert found["prefix_flops_ratio"] <= 1.1 / TOY.group
  entries = 2 * TOY.prefix * TOY.kv_heads * 2 * TOY.head_dim * TOY.layers
  assert found["prefix_bytes"][0] == 4 * entries
  # The matrices of a layer alone, at two a multiplication; its loop counts once.
  matrices = TOY.width * (8 * TOY.head_dim + 4 * TOY.head_dim + 3 * TOY.ffn)
  assert found["prefix_flops"][0] > 2 * 2 * TOY.prefix * matrices


def test_bytes_double_with_the_length():
  found = measure("length")
  rows = found["cost_by_length"]
  assert [row["length"] for row in rows] == [64, 128, 256]
  a_token = 4 * 2 * 2 * TOY.kv_heads * TOY.head_dim
  for row in rows:
    # The prompt that both rows share, and the levels that are full by then.
    assert row["bytes"] == a_token * (TOY.prompt + TOY.length_rows * row["length"]) / 2
    positive(row, "ms", "gb_per_s")


def test_the_fit_is_a_line():
  rows = [{"bytes": x, "ms": 3.0 + 0.5 * x} for x in (1, 2, 4, 8)]
  found = rollout_parts.fit(rows)
  assert found["a_ms"] == pytest.approx(3.0)
  assert found["b_ms_per_byte"] == pytest.approx(0.5)
  assert found["r2"] == pytest.approx(1.0)


@pytest.mark.slow
def test_drafts_are_counted():
  found = measure("speculative")
  positive(found, "speculative_tokens_per_s", "plain_tokens_per_s")
  assert 0 <= found["speculative_acceptance"] <= 1
  assert 1 <= found["speculative_tokens_a_step"] <= 2


def test_the_docs_get_the_tables_and_the_plot(monkeypatch, tmp_path):
  docs = tmp_path / "rollout.md"
  docs.write_text("before\n" + rollout.BEGIN + "old\n" + rollout.END + "after\n")
  monkeypatch.setattr(rollout, "DOCS", docs)
  monkeypatch.setattr(
    rollout, "PARTS", {"length": lambda z, repeats: LENGTH, "prefix": prefix}
  )
  rollout.measure(argparse.Namespace(only="", repeats=1, write=True), TOY)
  text = docs.read_text()
  assert text.startswith("before\n") and text.endswith("after\n")
  assert "old" not in text
  assert "| 1,024 | 2.00 | 3.0 | 1.5 |" in text
  assert "| MB | 1.00 | 4.00 | 1.000 / 4 |" in text
  assert (tmp_path / "rollout_length.png").stat().st_size > 1000
  page = pathlib.Path(__file__).parents[2] / "docs" / "rollout.md"
  assert rollout.BEGIN in page.read_text() and rollout.END in page.read_text()


LENGTH = {
  "cost_by_length": [
    {"length": 1024, "ms": 2.0, "bytes": 3_000_000, "gb_per_s": 1.5},
    {"length": 2048, "ms": 4.0, "bytes": 6_000_000, "gb_per_s": 1.5},
  ],
  "length_fit": {"a_ms": 0.0, "b_ms_per_byte": 2 / 3e6, "r2": 1.0},
  "length_rows": 2,
}


def prefix(z, repeats):
  return {
    "prefix_flops_ratio": 0.25,
    "prefix_bytes_ratio": 0.25,
    "prefix_flops": [1e9, 4e9],
    "prefix_bytes": [1_000_000, 4_000_000],
  }


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--only=refill,nonsense"], ["nonsense", "transformers"]),
    (["--repeats=0"], ["--repeats=0", "at least 1"]),
    (["--write", "--only=refill"], ["leave out --only"]),
  ],
)
def test_a_mistake_is_one_line_and_code_2(flags, words, capsys):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["rollout", *flags])
  error = capsys.readouterr().err
  assert len(error.strip().splitlines()) == 1
  for word in words:
    assert word in error


def test_what_is_missing_is_named_before_anything_is_measured(monkeypatch, capsys):
  monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="2"):
    bench.main(["rollout"])
  error = capsys.readouterr().err
  assert 'pip install -e ".[test]"' in error
  assert "--only=refill,prefix,length,speculative" in error
