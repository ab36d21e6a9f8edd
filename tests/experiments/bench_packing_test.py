"""The benchmark of packing at toy sizes: its figures and table. No time is judged."""

import argparse
import functools
import json

import pytest
from quick import QUICK

from experiments import bench
from experiments.benches import packing, rollout_parts

TOY = packing.Sizes(
  vocab=32,
  width=32,
  layers=1,
  head_dim=8,
  ffn=48,
  outputs=16,
  group=4,
  prompt=8,
  median=4,
  cap=16,
  pack=32,
  micro_batches=4,
)


@pytest.mark.slow
def test_a_packed_update_is_that_of_an_output_a_row(capsys, monkeypatch):
  fast = functools.partial(rollout_parts.compiled, compiler_options=QUICK)
  monkeypatch.setattr(rollout_parts, "compiled", fast)
  found = packing.measure(argparse.Namespace(repeats=1), TOY)
  json.dumps(found)
  assert found["grad_norm_gap"] < 1e-4
  assert found["padded_efficiency"] < found["packing_efficiency"] <= 1
  ratio = found["padded_seconds"] / found["packed_seconds"]
  assert found["packed_ratio_to_padded"] == pytest.approx(ratio)
  out = capsys.readouterr().out
  assert "| packed into rows of 32 |" in out
  assert "| an output a row of 24 |" in out


def test_a_mistake_is_one_line_and_code_2(capsys):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["packing", "--repeats=0"])
  error = capsys.readouterr().err
  assert len(error.strip().splitlines()) == 1
  assert "--repeats=0" in error
