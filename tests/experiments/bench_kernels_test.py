"""The benchmark of the kernels: its arithmetic, its rows, its table of times."""

import argparse
import json

import jax.numpy as jnp
import pytest

from experiments import bench
from experiments.benches import gpu_times, kernel_cases, kernels, static_cycles
from r1jax import ops
from r1jax.errors import UserError

CASE = kernel_cases.attention("mla_forward", 8192, 2, 2, 192, 128)
TOLD = {"seconds": 1.0, "temp_bytes": 5, "flops": 7.0}


@pytest.fixture
def compiler(monkeypatch):
  """The process that compiles, replaced: (told, calls)."""
  calls = []

  def answer(told, stderr="", returncode=0):
    def run(command, **_):
      calls.append(command)
      out = "" if told is None else "noise\n" + json.dumps(told) + "\n"
      return argparse.Namespace(stdout=out, stderr=stderr, returncode=returncode)

    monkeypatch.setattr(kernels.subprocess, "run", run)
    return calls

  return answer


def test_work_is_counted_by_hand():
  # Half of 2 * T^2 pairs, heads, two products; q and k 192 wide, v and the output 128.
  assert CASE.flops == 2 * 8192**2 * (192 + 128)
  assert CASE.bytes == 8192 * 2 * 2 * (192 + 192 + 128 + 128)
  decode = kernel_cases.decode("d", 8, 8192, 128, ops.Layout.mla(512, 64))
  assert decode.flops == 2 * 8 * 128 * 8192 * (576 + 512)
  assert decode.bytes == 8 * 8192 * 640 * 2


def test_the_fraction_is_of_the_kernel_and_of_the_program(compiler):
  compiler({**TOLD, "cycles": {"mla_attention_forward.1": 250_000, "copy.3": 50_000}})
  row = kernels.ahead_of_time(CASE, "v5p:2x2x1")
  bound = CASE.flops / 459e12 * 1.75e9
  assert row["fraction_of_bound"] == pytest.approx(bound / 250_000)
  assert row["program_fraction_of_bound"] == pytest.approx(bound / 300_000)
  found = kernels.headlines([row])
  assert found["mla_forward_fraction_of_bound"] == row["fraction_of_bound"]
  assert found["mla_decode_ratio_to_floor"] == "not measured"


def test_cycles_that_mean_nothing_are_not_given(compiler):
  compiler({**TOLD, "cycles": {"decode_attention.1": 10, "mla_attention_forward": 10}})
  by_memory = kernel_cases.decode("d", 8, 8192, 28, ops.Layout.gqa(4, 128))
  assert by_memory.bytes / 2.76e12 > by_memory.flops / 459e12
  for case, topology, why in (
    (by_memory, "v5p:2x2x1", "memory bounds it"),
    (CASE, "v5e:2x2", "v5p alone"),
    (kernel_cases.experts("e", 512, 128, 128, 2), "v5p:2x2x1", "guessed"),
  ):
    row = kernels.ahead_of_time(case, topology)
    assert row["cycles"] is None
    assert why in row["why_no_cycles"]
    assert row["temp_bytes"] == 5


def test_a_compiler_that_fails_is_not_measured(compiler):
  compiler(None, stderr="warning\nno libtpu here", returncode=1)
  row = kernels.ahead_of_time(CASE, "v5p:2x2x1")
  assert row["why_no_cycles"] == "not measured: no libtpu here"
  assert "temp_bytes" not in row


def test_fitted_tiles_are_bound_by_the_matrix_unit_and_the_default_by_memory():
  default, fitted = kernels.tiles()
  assert default["memory_ms"] > default["matrix_ms"] == fitted["matrix_ms"]
  assert fitted["memory_ms"] < fitted["matrix_ms"] == fitted["least_ms"]
  # By hand: x once a column of 128, w once a row of 128, the result once.
  m, d, f, e = 32_768, 7168, 2048, 8
  moved = 2 * (m * d * f / 128 + e * d * f * (m / e / 128) + m * f)
  assert default["memory_ms"] == pytest.approx(1e3 * moved / 2.76e12)


def test_the_command_prints_json_and_says_what_was_not_measured(compiler, capsys):
  calls = compiler({**TOLD, "cycles": {"mla_attention_forward.1": 250_000}})
  bench.main(["kernels", "--only=mla_forward", "--json"])
  out = capsys.readouterr().out
  found = json.loads(out.splitlines()[-1])
  assert found["gpu"] == "not measured"
  assert [row["name"] for row in found["kernels"]] == ["mla_forward"]
  assert calls[0][-2:] == ["mla_forward", "v5p:2x2x1"]


def test_the_docs_get_the_tables(compiler, monkeypatch, tmp_path):
  compiler({**TOLD, "cycles": {"mla_attention_forward.1": 250_000}})
  docs = tmp_path / "kernels.md"
  docs.write_text("before\n" + kernels.BEGIN + "old\n" + kernels.END + "after\n")
  monkeypatch.setattr(kernels, "DOCS", docs)
  monkeypatch.setattr(kernel_cases, "CASES", [CASE])
  bench.main(["kernels", "--write"])
  text = docs.read_text()
  assert text.startswith("before\n")
  assert text.endswith("after\n")
  assert "old" not in text
  assert (
    "| mla_forward | T 8192, heads 2/2, 192/128 | 43 | 21 | 250,000 | 0.655" in text
  )


def test_a_part_is_not_written_as_the_whole(capsys):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["kernels", "--write", "--only=mla_forward"])
  assert "leave out --only" in capsys.readouterr().err


def test_an_unknown_case_is_named(capsys):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["kernels", "--only=mla_forward,nonsense"])
  error = capsys.readouterr().err
  assert "nonsense" in error
  assert "mla_decode" in error


def test_times_of_a_gpu_are_refused_without_one():
  with pytest.raises(UserError, match="sees no GPU"):
    gpu_times.run()


def test_rows_of_times_hold_their_ratios(monkeypatch):
  """The harness itself, at toy sizes: interpreted, and cuDNN is missing here."""
  monkeypatch.setattr(gpu_times, "TOKENS", 32)
  row = gpu_times.attention(32, 2, 16, 16, "triton", 2)
  assert row["forward_ms"] > 0
  assert row["forward_of_cudnn"] is None
  flops = 2 * 32 * 32 * 32
  assert row["forward_tflops"] == pytest.approx(flops / row["forward_ms"] / 1e9)
  assert row["forward_of_xla"] > 0
  row = gpu_times.decode(2, 128, 4, ops.Layout.gqa(2, 16), "triton", 2)
  assert row["of_copy_bandwidth"] > 0
  row = gpu_times.experts(64, 16, 16, 2, "triton", 2)
  assert row["tflops"] > 0


def test_the_estimates_are_read_as_the_compiler_writes_them():
  text = 'x { hlo_op_name: "mla_attention_forward.1"\n  estimated_cycles: 253173 }'
  assert static_cycles.ENTRY.findall(text) == [("mla_attention_forward.1", "253173")]
  assert jnp.bfloat16 == kernel_cases.BF16
