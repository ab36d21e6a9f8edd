"""The Pallas kernels: bytes, FLOPs, a TPU compiler's cycles, and times on a GPU.

Without a TPU: every case is compiled for a topology (libtpu is needed, a TPU is not),
and the compiler's own estimate of a kernel's cycles is set against what the matrix unit
and the memory allow at best. Without a GPU its figures are "not measured".
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import rich.console
import rich.progress

from experiments.benches import gpu_times, kernel_cases
from r1jax.errors import UserError
from r1jax.kernels import grouped_matmul

# One v5p: bfloat16 FLOP/s, bytes/s, cycles/s.
FLOPS, BANDWIDTH, CLOCK = 459e12, 2.76e12, 1.75e9
NOT_MEASURED = "not measured"
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels: begin -->\n", "<!-- kernels: end -->\n"


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--topology", default="v5p:2x2x1", help="that the kernels are compiled for"
  )
  parser.add_argument(
    "--only", default="", help="names of cases, with commas between; empty: all"
  )
  parser.add_argument(
    "--write", action="store_true", help="also put the tables into docs/kernels.md"
  )


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the tables, returns all figures.

  Raises:
    UserError: a name is no case's, or a part would be written as the whole.
  """
  cases = chosen(options.only)
  if options.write and options.only:
    raise UserError("--write puts all cases into the docs; leave out --only.")
  rows, columns = [], rich.progress.Progress.get_default_columns()
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(*columns, console=console) as progress:
    task = progress.add_task("compiling for " + options.topology, total=len(cases))
    for case in cases:
      progress.update(task, description=f"compiling {case.name}")
      rows.append(ahead_of_time(case, options.topology))
      progress.advance(task)
  found = {"topology": options.topology, "jax": jax.__version__, "kernels": rows}
  found |= {"python": platform.python_version(), "libtpu": version("libtpu")}
  found |= headlines(rows) | {"tiles": tiles()}
  on_gpu = jax.default_backend() == "gpu"
  found["gpu"] = gpu_times.run() if on_gpu else NOT_MEASURED
  show(found)
  if options.write:
    head, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCS.write_text(head + BEGIN + "\n".join(markdown(found)) + "\n" + END + tail)
  return found


def version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def chosen(only: str) -> list[kernel_cases.Case]:
  """Raises UserError where a name is no case's."""
  names = [case.name for case in kernel_cases.CASES]
  wanted = [name for name in only.split(",") if name] or names
  wrong = sorted(set(wanted) - set(names))
  if wrong:
    raise UserError(f"--only: {wrong} are no cases; these are {names}.")
  return [case for case in kernel_cases.CASES if case.name in wanted]


def ahead_of_time(case: kernel_cases.Case, topology: str) -> dict:
  """What the compiler says of a case, in a process of its own."""
  matrix, memory = case.flops / FLOPS * CLOCK, case.bytes / BANDWIDTH * CLOCK
  row = {
    "name": case.name,
    "shape": case.shape,
    "flops": case.flops,
    "bytes": case.bytes,
    "matrix_cycles": matrix,
    "memory_cycles": memory,
    "cycles": None,
    "why_no_cycles": case.no_cycles,
  }
  command = [sys.executable, "-m", "experiments.benches.static_cycles"]
  done = subprocess.run(
    [*command, case.name, topology],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return row | {"why_no_cycles": f"{NOT_MEASURED}: {last[:300]}"}
  told = json.loads(done.stdout.splitlines()[-1])
  row |= {
    "temp_bytes": told["temp_bytes"],
    "compile_seconds": told["seconds"],
    "compiled_flops": told["flops"],  # a loop's body counts once
  }
  ours = {op: n for op, n in told["cycles"].items() if case.kernel in op}
  why = case.no_cycles
  if not why and not topology.startswith("v5p"):
    why = "clock and peaks are known here for v5p alone"
  if not why and memory > matrix:
    why = "memory bounds it, and the estimate leaves its waits out"
  if why or not ours:
    return row | {"why_no_cycles": why or "the compiler told none"}
  return row | {
    "cycles": sum(ours.values()),
    "program_cycles": sum(told["cycles"].values()),
    "fraction_of_bound": matrix / sum(ours.values()),
    "program_fraction_of_bound": matrix / sum(told["cycles"].values()),
  }


def headlines(rows: list[dict]) -> dict:
  by_name = {row["name"]: row.get("fraction_of_bound") for row in rows}
  forward, decode = by_name.get("mla_forward"), by_name.get("mla_decode")
  return {
    "mla_forward_fraction_of_bound": forward or NOT_MEASURED,
    "mla_decode_ratio_to_floor": 1 / decode if decode else NOT_MEASURED,
  }


def tiles() -> list[dict]:
  """The experts' product by its tiles: how long memory and matrix unit need at least.

  A tile of x is read for every column of tiles, one of w for every row of them; counted
  for groups of equal size.
  """
  m, d, f, groups = 32_768, 7168, 2048, 8
  fitted = grouped_matmul.tiles(m, groups, d, f)
  rows = []
  for name, (tm, tk, tn) in (("default", (128, 128, 128)), ("fitted", fitted)):
    moved = 2 * (m * d * (f / tn) + groups * d * f * (m / groups / tm) + m * f)
    memory, matrix = moved / BANDWIDTH, 2 * m * d * f / FLOPS
    rows.append(
      {
        "tiles": name,
        "size": [tm, tk, tn],
        "memory_ms": 1e3 * memory,
        "matrix_ms": 1e3 * matrix,
        "least_ms": 1e3 * max(memory, matrix),
      }
    )
  return rows


# -- the tables ------------------------------------------------------------------------


def show(found: dict) -> None:
  for text in (*markdown(found), ""):
    print(text)


def markdown(found: dict) -> list[str]:
  """The tables, line by line."""
  lines = [
    f"For {found['topology']}, JAX {found['jax']}, Python {found['python']},"
    f" libtpu {found['libtpu']}:",
    "",
    "| case | shape | GFLOP | MB | cycles | of the matrix unit's bound | temp MB |",
    "|---|---|---|---|---|---|---|",
  ]
  notes = {}
  for row in found["kernels"]:
    if not row["cycles"]:
      cycles, bound = f"[{note(notes, row['why_no_cycles'])}]", ""
    else:
      cycles = f"{row['cycles']:,}"
      bound = f"{row['fraction_of_bound']:.3f}, with what is around it"
      bound += f" {row['program_fraction_of_bound']:.3f}"
    temp = f"{row['temp_bytes'] / 1e6:,.1f}" if "temp_bytes" in row else ""
    figures = f"{row['flops'] / 1e9:,.0f}", f"{row['bytes'] / 1e6:,.0f}"
    cells = row["name"], row["shape"], *figures, cycles, bound, temp
    lines.append("| " + " | ".join(cells) + " |")
  lines += ["", *(f"[{n}]: {why}." for why, n in notes.items()), ""]
  lines += [
    "The experts' product by its tiles, at the least:",
    "",
    "| tiles | rows, inner, outer | memory ms | matrix unit ms | least ms |",
    "|---|---|---|---|---|",
  ]
  for row in found["tiles"]:
    size = ", ".join(str(n) for n in row["size"])
    times = [f"{row[k]:.2f}" for k in ("memory_ms", "matrix_ms", "least_ms")]
    lines.append("| " + " | ".join([row["tiles"], size, *times]) + " |")
  if found["gpu"] == NOT_MEASURED:
    return [*lines, "", "On a GPU: not measured in this run."]
  lines += ["", f"On {jax.devices()[0].device_kind}:", ""]
  for row in found["gpu"]:
    figures = [f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, float)]
    lines.append(f"* {row['kernel']}, {row['shape']}: {', '.join(figures)}")
  return lines


def note(notes: dict[str, int], why: str) -> int:
  """The number of a reason, a new one if it has none yet."""
  return notes.setdefault(why, len(notes) + 1)
