"""Import of a checkpoint: MB a second and peak memory, beside transformers.

A random checkpoint of Qwen2.5-1.5B's sizes in bfloat16 is written to a temporary
folder, and loaded by fresh processes in turn; figures are medians. Its files lie in the
page cache, as a plain read shows.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import rich.console

from experiments.benches import rollout_parts
from r1jax.errors import UserError
from r1jax.models import config, hf, hf_config, hf_names, safetensors_file
from r1jax.models.policy import Policy

DTYPES = "bfloat16", "float32"


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--repeats", type=int, default=3, help="loads of each")
  parser.add_argument("--dtype", default="bfloat16", help="of the arrays, or float32")
  parser.add_argument("--folder", default="", help="of a checkpoint, in its place")


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the table, returns all figures.

  Raises:
    UserError: too few repeats, an unknown dtype, no checkpoint in the folder, or a
      process that failed.
  """
  return measure(options, config.qwen2_5_1_5b(tied_embeddings=True))


def measure(options: argparse.Namespace, sizes: config.PolicyConfig) -> dict:
  """`run` with a checkpoint of other sizes."""
  if options.repeats < 1:
    raise UserError(f"--repeats={options.repeats} must be at least 1.")
  if options.dtype not in DTYPES:
    raise UserError(f"--dtype={options.dtype} must be one of {', '.join(DTYPES)}.")
  console = rich.console.Console(stderr=True)
  with tempfile.TemporaryDirectory() as made:
    folder = pathlib.Path(options.folder or made)
    if not options.folder:
      with console.status("import: writing a random checkpoint"):
        write(folder, sizes)
    with console.status("import: loading it"):
      found = times(folder, options)
  print("\n".join(markdown(found)))
  return found


def write(folder: pathlib.Path, sizes: config.PolicyConfig) -> None:
  """A checkpoint of random weights that transformers loads as well."""
  leaves = hf_names.leaves(sizes, hf.shapes(Policy(sizes)))
  shares = hf_names.tensors(leaves)
  layout = {
    name: (leaves[parts[0][0]].tensor_shape, np.dtype(ml_dtypes.bfloat16))
    for name, parts in shares.items()
  }
  drawn = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(ml_dtypes.bfloat16)
  values = (np.resize(drawn, shape) for shape, _ in layout.values())
  safetensors_file.write_folder(folder, layout, values, 2e9)
  said = hf_config.to_hf(sizes, "bfloat16")
  (folder / "config.json").write_text(json.dumps(said))


def times(folder: pathlib.Path, options: argparse.Namespace) -> dict:
  """All figures of one checkpoint."""
  hf.policy_config(folder)  # raises UserError
  tensors = safetensors_file.read_folder(folder).values()
  size = sum(x.bytes for x in tensors)
  largest = max(math.prod(x.shape) for x in tensors) * jnp.dtype(options.dtype).itemsize
  libraries = ["r1jax"]
  if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    libraries.append("transformers")
  runs: dict[str, list[dict]] = {name: [] for name in libraries}
  reads = []
  for _ in range(options.repeats):
    reads.append(plain_read(folder))
    for name in libraries:
      runs[name].append(load(name, folder, options.dtype))
  found = {
    "bench": "import",
    "cores": rollout_parts.cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "dtype": options.dtype,
    "file_mb": size / 1e6,
    "largest_tensor_mb": largest / 1e6,
    "plain_read_mb_per_s": size / 1e6 / statistics.median(reads),
    "runs": runs,
  }
  for name, loads in runs.items():
    beyond = [x["peak_bytes"] - x["before_bytes"] - x["array_bytes"] for x in loads]
    found |= {
      f"{name}_seconds": statistics.median(x["seconds"] for x in loads),
      f"{name}_mb_per_s": size / 1e6 / statistics.median(x["seconds"] for x in loads),
      f"{name}_peak_rss_mb": max(x["peak_bytes"] for x in loads) / 1e6,
      f"{name}_array_mb": loads[0]["array_bytes"] / 1e6,
      f"{name}_beyond_arrays_mb": max(beyond) / 1e6,
      f"{name}_beyond_of_largest": max(beyond) / largest,
    }
  return found


def plain_read(folder: pathlib.Path) -> float:
  """Seconds to read the files into one buffer."""
  buffer, begun = bytearray(2**24), time.perf_counter()
  for path in sorted(folder.glob("*.safetensors")):
    with path.open("rb", buffering=0) as file:
      while file.readinto(buffer):
        pass
  return time.perf_counter() - begun


def load(library: str, folder: pathlib.Path, dtype: str) -> dict:
  """Raises UserError with the last line of a process that failed."""
  module = "experiments.benches.load_once"
  command = [sys.executable, "-m", module, library, str(folder), dtype]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise UserError(f"{library} did not load {folder}: {why[-1]}")
  return json.loads(done.stdout.splitlines()[-1])


def markdown(f: dict) -> list[str]:
  """The table, line by line."""
  lines = [
    f"{f['cores']} CPU cores, Python {f['python']}, JAX {f['jax']}; medians of"
    f" {len(f['runs']['r1jax'])} loads in turn, each in a fresh process."
    f" {f['file_mb']:,.0f} MB of bfloat16 in the page cache, to {f['dtype']} arrays on"
    f" the CPU; the largest tensor has {f['largest_tensor_mb']:,.0f} MB there.",
    "",
    "| | seconds | MB a second | peak RSS, MB | of it beyond the arrays, MB | of the"
    " largest tensor |",
    "|---|---|---|---|---|---|",
  ]
  for name in f["runs"]:
    seconds, speed = f[f"{name}_seconds"], f[f"{name}_mb_per_s"]
    peak, beyond = f[f"{name}_peak_rss_mb"], f[f"{name}_beyond_arrays_mb"]
    lines.append(
      f"| {name} | {seconds:.1f} | {speed:,.0f} | {peak:,.0f} | {beyond:,.0f}"
      f" | {f[f'{name}_beyond_of_largest']:.2f} |"
    )
  return [*lines, f"| plain read | | {f['plain_read_mb_per_s']:,.0f} | | | |"]
