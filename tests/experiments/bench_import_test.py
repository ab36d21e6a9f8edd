"""The benchmark of import at toy sizes: its figures and table. No time is judged."""

import argparse
import json

import pytest

from experiments import bench
from experiments.benches import importing
from r1jax.models import config, hf

TOY = config.tiny_dense(260, init_std=None)


def options(**changed):
  return argparse.Namespace(
    **{"repeats": 1, "dtype": "float32", "folder": "", **changed}
  )


def test_a_random_checkpoint_is_loaded_by_both(capsys):
  found = importing.measure(options(), TOY)
  json.dumps(found)
  entries = found["file_mb"] * 1e6 / 2
  for name in ("r1jax", "transformers"):
    # bfloat16 in the file, float32 in the arrays.
    assert found[f"{name}_array_mb"] * 1e6 == pytest.approx(4 * entries, rel=1e-3), name
    assert found[f"{name}_peak_rss_mb"] > found[f"{name}_array_mb"]
    assert found[f"{name}_mb_per_s"] * found[f"{name}_seconds"] == pytest.approx(
      found["file_mb"]
    )
  out = capsys.readouterr().out
  assert "| r1jax |" in out and "| transformers |" in out and "| plain read |" in out


def test_the_checkpoint_is_what_import_reads(tmp_path):
  importing.write(tmp_path, TOY)
  policy, params, _ = hf.load(tmp_path)
  assert policy.config.width == TOY.width
  assert 0.01 < params["embedding"].std() < 0.03


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--repeats=0", ["--repeats=0", "at least 1"]),
    ("--dtype=int8", ["--dtype=int8", "bfloat16, float32"]),
    ("--folder=/nowhere", ["/nowhere/config.json"]),
  ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, flag, words):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["import", flag])
  error = capsys.readouterr().err
  assert len(error.strip().splitlines()) == 1
  assert all(word in error for word in words), error
