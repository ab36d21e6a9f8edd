"""Does a step of R1-Zero fit a machine that is not here, and what binds it?

  python -m experiments.plan --config=experiments/configs/r1_zero.py:paper \
      --topology=v5p:8x16x16
  python -m experiments.plan --topology=cpu:8 --config.mesh.expert=2
  python -m experiments.plan --topology=cpu:8 --chip=h200 --json

--topology is a TPU slice, h100 (one), or cpu:N; --chip holds it against another chip's
limits. Prefill, a turn of decoding and an update are compiled for it, without a device
(pip install -e ".[tpu]" for a TPU's compiler; Linux). Nothing runs. Exit codes: 0 it
fits, 2 it does not or a mistake in the command.
"""

import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict
import rich.console
import rich.table

from experiments import command

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1_zero.py"
flags.DEFINE_string("topology", "v5p:2x2x1", "TPU slice, h100, or cpu:N")
flags.DEFINE_string("chip", "", "whose limits; default: the topology's")
flags.DEFINE_integer("mean_tokens", 0, "of an output; 0: the whole window")
flags.DEFINE_bool("json", False, "one JSON object, in the last line")


def main(config: ConfigDict, workdir: str) -> None:
  options = flags.FLAGS
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from r1jax import plan

  kind, _, count = options.topology.partition(":")
  if kind == "cpu" and count.isdigit() and int(count):
    jax.config.update("jax_num_cpu_devices", int(count))
  console = rich.console.Console(stderr=True)
  with console.status("compiling") as status:
    found = plan.plan(
      config,
      options.topology,
      chip=options.chip,
      mean_tokens=options.mean_tokens,
      say=lambda name: status.update(f"compiling {name}"),
    )
  show(rich.console.Console(), found)
  if options.json:
    print(json.dumps(found))
  sys.exit(0 if found["fits"] else 2)


def show(console: rich.console.Console, f: dict) -> None:
  """The tables and the verdict."""
  gib = 2**30
  mesh = " x ".join(f"{axis} {n}" for axis, n in f["mesh"].items() if n > 1) or "1"
  console.print(
    f"{f['parameters'] / 1e9:,.3g} B parameters, {f['outputs']:,} outputs of"
    f" {f['prompt_tokens']:,} + {f['window_tokens']:,} tokens on {f['chips']:,} chips"
    f" of {f['topology']}: {mesh}",
    highlight=False,
  )
  table = rich.table.Table("bytes a chip", "GiB")
  for kind, size in f["bytes"].items():
    table.add_row(kind, f"{size / gib:.2f}")
  for name, size in f["peak_bytes"].items():
    table.add_row(f"held during {name}", f"{size / gib:.2f}")
  table.add_row("the chip has", f"{f['memory_bytes'] / gib:.2f}")
  console.print(table)
  columns = ("of one", "TFLOP", "HBM GB", "sent GB", "compute s", "memory s", "links s")
  table = rich.table.Table(*columns, "compile CPU s")
  for name, p in f["programs"].items():
    row = [p["flops"] / 1e12, p["hbm"] / 1e9, p["sent"] / 1e9, *p["seconds"].values()]
    cells = [f"{x:.3g}" for x in row]
    table.add_row(name, *cells, f"{p['compile_cpu_seconds']:.0f}")
  console.print(table)
  table = rich.table.Table("collectives", "program", "number", "GB sent")
  for name, p in f["programs"].items():
    for kind, (number, sent) in p["collectives"].items():
      table.add_row(kind, name, f"{number:,.0f}", f"{sent / 1e9:.4g}")
  console.print(table)
  s = f["step_seconds"]
  console.print(
    f"A step at the roofline: {s['total']:,.3g} s = prefill {s['prefill']:,.3g} +"
    f" {f['decode_turns']:,.0f} turns of decoding {s['decode']:,.3g} + updates"
    f" {s['update']:,.3g}. Bound by {f['bottleneck']}.",
    highlight=False,
  )
  free = f["free_hbm_fraction"]
  verdict = f"It fits: {free:.0%} of a chip's memory is free."
  if not f["fits"]:
    largest = max(f["bytes"], key=f["bytes"].get)
    verdict = (
      f"It does not fit: {f['fullest']} needs {-free:.0%} more than there is. The"
      f" largest part is {largest}; {KNOBS[largest]}."
    )
  console.print(verdict, highlight=False)


KNOBS = {
  "parameters": "use more chips (config.mesh.fsdp, expert or tensor)",
  "optimizer": "set config.optimizer.moments=bfloat16, or use more chips",
  "reference": "set config.objective.kl_coef=0, or use more chips",
  "cache": "set config.grpo.slots or config.grpo.cache_tokens",
  "activations": "raise config.grpo.micro_batches, or config.mesh.context",
}


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
