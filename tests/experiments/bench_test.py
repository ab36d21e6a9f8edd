"""The benchmark of the presets: its table, its JSON, and what it refuses."""

import json
import pathlib
import subprocess

import pytest

from experiments.benches import algorithms
from r1jax import presets
from tests import forked

RUN = dict(
  seed=0,
  base_pass_at_1=0.25,
  early_pass_at_1=0.5,
  pass_at_1=0.75,
  mean_length=30.0,
  kl_to_base=0.5,
  rl_seconds=60.0,
  rollouts=40.0,
  reflection_rate=1.0,
)


def bench(*args: str) -> subprocess.CompletedProcess:
  return forked.run("experiments.bench", *args, timeout=280)


def test_there_is_a_row_a_preset_and_ppo_at_two_lambdas():
  names = [row.name for row in algorithms.all_rows()]
  assert names[:-4] == [p for p in presets.PRESETS if p != "ppo"]
  assert names[-4:-2] == ["ppo λ=1.0", "ppo λ=0.95"]
  assert set(algorithms.EXPECT) == set(names)
  assert [row.name for row in algorithms.chosen("ppo")] == names[-4:]
  assert len({row.folder for row in algorithms.all_rows()}) == len(names)


def test_the_table_holds_means_and_seeds():
  other = {**RUN, "seed": 1, "pass_at_1": 0.85, "rl_seconds": 80.0}
  table = algorithms.markdown({"paper": [RUN, other]})
  line = table.splitlines()[2]
  assert "0.25 → 0.50 → 0.80" in line and "0.75 0.85" in line and "| 70 |" in line


def test_the_docs_keep_everything_around_the_table(tmp_path, monkeypatch):
  path = tmp_path / "docs.md"
  path.write_text(f"a\n{algorithms.BEGIN}old\n{algorithms.END}b\n")
  monkeypatch.setattr(algorithms, "DOCS", path)
  algorithms.write("new\n")
  assert path.read_text() == f"a\n{algorithms.BEGIN}new\n{algorithms.END}b\n"
  assert algorithms.BEGIN in (
    pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md"
  ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--presets=paper,grpo", ["'grpo'", "dr_grpo"]),
    ("--seeds=0", ["--seeds=0", "at least 1"]),
    ("--jobs=-1", ["--jobs=-1"]),
    ("--presets=paper --write", ["--write", "leave out --presets"]),
  ],
)
def test_a_mistake_is_one_line_and_code_2(flag, words):
  done = bench("algorithms", *flag.split())
  assert done.returncode == 2 and done.stderr.startswith("error: ")
  assert len(done.stderr.strip().splitlines()) == 1
  for word in words:
    assert word in done.stderr


@pytest.mark.slow
def test_runs_share_a_base_and_the_last_line_is_json(tmp_path):
  """Two rows at the smallest size; the second does not pre-train again."""
  small = [
    *("--config.model.width=32", "--config.model.heads=2", "--config.model.layers=2"),
    *("--config.pretrain.steps=4", "--config.pretrain.rows=8"),
    *("--config.pretrain.micro_batches=2", "--config.prompts=4"),
    *("--config.grpo.group_size=4", "--config.grpo.micro_batches=2"),
    *("--config.grpo.reference_refresh=2", "--config.eval.problems=4"),
    *("--config.eval.samples=2", "--config.eval.every=2"),
    *("--config.checkpoint_every=2", f"--config.compilation_cache={tmp_path / 'c'}"),
  ]
  done = bench(
    "algorithms",
    "--presets=trl,ppo λ=0.95",
    "--seeds=1",
    "--steps=2",
    "--json",
    f"--workdir={tmp_path}",
    "--",
    *small,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result["bench"] == "algorithms"
  assert list(result["rows"]) == ["trl", "ppo λ=0.95"]
  for runs in result["rows"].values():
    assert {"pass_at_1", "mean_length", "kl_to_base", "rl_seconds"} <= set(runs[0])
  assert "| `ppo λ=0.95` |" in done.stdout

  def pretraining(folder):
    rows = (tmp_path / folder / "seed_0" / "metrics.jsonl").read_text().splitlines()
    return [r for r in rows if '"pretrain"' in r]

  assert pretraining("trl") and not pretraining("ppo_lambda_0.95")
