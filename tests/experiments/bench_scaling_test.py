"""The benchmark of scaling at toy sizes: its fit and figures. No time is judged."""

import argparse
import json

import pytest
from quick import QUICK

from experiments import bench
from experiments.benches import rollout_parts, scaling

TOY = scaling.Sizes(
  vocab=32,
  width=32,
  layers=1,
  head_dim=8,
  ffn=48,
  outputs=4,
  group=4,
  prompt=4,
  cap=4,
  all_tokens=(8, 16),
  all_rows=(4, 8),
  all_experts=(2, 4),
  all_layers=(1, 2),
  steps=2,
)


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_the_exponent_of_a_power_law_is_its_own(k):
  sizes = (3, 4, 10, 64, 65)
  costs = [7.0 * size**k for size in sizes]
  assert scaling.exponent(sizes, costs) == pytest.approx(k, abs=1e-9)
  # Neither unit matters.
  scaled = scaling.exponent([10 * s for s in sizes], [1e9 * c for c in costs])
  assert scaled == pytest.approx(k, abs=1e-9)


def test_the_upper_half_is_fitted_alone():
  two = scaling.exponents((1, 2), [1.0, 2.0], "")
  assert two == pytest.approx(dict(exponent=1.0, upper_exponent=1.0))
  sizes = (1, 2, 4, 8)
  found = scaling.exponents(sizes, [5.0, 5.0, 16.0, 64.0], "")
  assert found["upper_exponent"] == pytest.approx(2.0)
  assert 0 < found["exponent"] < 2
  line = scaling.exponents(sizes, [10.0 + s for s in sizes], "flops_")
  assert 0 < line["flops_exponent"] < line["upper_flops_exponent"] < 1
  odd = scaling.exponents((1, 2, 4), [9.0, 2.0, 4.0], "")  # the middle is of it
  assert odd["upper_exponent"] == pytest.approx(1.0)


def test_one_size_grows_at_a_time():
  for name in scaling.LABELS:
    for size in TOY.grown(name):
      z, network = scaling.at(TOY, name, size)
      now = dict(
        tokens=z.prompt + z.cap,
        rows=z.outputs,
        experts=network.config.experts,
        layers=network.config.layers,
      )
      still = dict(tokens=8, rows=4, experts=0, layers=1)
      if name == "experts":
        assert network.config.active_experts == TOY.active_experts
      assert now == still | {name: size}


@pytest.mark.slow
def test_there_is_a_figure_of_each_cost_at_each_size(capsys, monkeypatch):
  slow = rollout_parts.compiled

  def fast(function, *args, **how):
    return slow(function, *args, **how | {"compiler_options": QUICK})

  monkeypatch.setattr(rollout_parts, "compiled", fast)
  # Tokens and layers grow in the same programs.
  found = scaling.measure(argparse.Namespace(only="experts,rows", repeats=1), TOY)
  json.dumps(found)
  out = capsys.readouterr().out
  assert list(found["scaling"]) == ["rows", "experts"]
  for name, of in found["scaling"].items():
    sizes = list(TOY.grown(name))
    assert of["sizes"] == sizes
    for cost in scaling.COSTS:
      c = of[cost]
      assert len(c["ms"]) == len(c["flops"]) == len(sizes)
      assert min(c["ms"]) > 0
      assert c["exponent"] == pytest.approx(scaling.exponent(sizes, c["ms"]))
      assert all(len(of["runs"][f"{cost}_{size}"]) == 1 for size in sizes)
    for size in sizes:
      assert f"| {scaling.LABELS[name]}: {size} |" in out
    assert f"| {scaling.LABELS[name]}: k |" in out
  flops = {
    (name, cost): of[cost]["flops_exponent"]
    for name, of in found["scaling"].items()
    for cost in scaling.COSTS
  }
  # Rows are apart, and only the router knows of an expert that is not active.
  assert flops["rows", "update"] == pytest.approx(1.0, abs=0.05)
  assert flops["rows", "decode"] == pytest.approx(1.0, abs=0.05)
  assert flops["experts", "update"] == pytest.approx(0.0, abs=0.05)
  assert flops["experts", "decode"] == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize(
  "flag, says",
  [("--repeats=0", "--repeats=0 must be"), ("--only=rows,depth", "['depth']")],
)
def test_a_mistake_is_one_line_and_code_2(capsys, flag, says):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["scaling", flag])
  error = capsys.readouterr().err
  assert len(error.strip().splitlines()) == 1
  assert says in error
