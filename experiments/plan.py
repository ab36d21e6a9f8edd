r"""Does a step of R1-Zero fit a machine that is not here, and what binds it?

  python -m experiments.plan --config=experiments/configs/r1_zero.py:paper \
      --topology=v5p:8x16x16
  python -m experiments.plan --topology=cpu:8 --config.mesh.expert=2
  python -m experiments.plan --topology=cpu:8 --chip=h200 --json

  python -m experiments.plan --config=experiments/configs/r1_zero.py:paper \
      --smallest=v5p --config.optimizer.moments=bfloat16

--topology=v5p:2x2x1   a slice of v5p, v5e, v6e or tpu7x; h100 or h200:8, GPUs in hosts
                       of eight; cpu:8, this machine as so many devices
--chip=h200            hold it against another chip's limits
--smallest=v5p         find the smallest slice of v5p, v5e or v6e, or the fewest h100 or
                       h200, that hold the step with a tenth of memory to spare
--mean_tokens=8000     of an output, for the rollout's time; 0: the whole window
--json                 all of it as one JSON object, in the last line

Of a config that names a checkpoint (config.model.folder) only config.json and the
headers of its files are read; without them, config.model.preset says the sizes.

Prefill, a turn of decoding and an update are compiled without a device: a TPU's
compiler is in pip install -e ".[tpu]", a GPU's in ".[cuda]" (Linux). Nothing runs.
Exit codes: 0 it fits, 2 it does not or a mistake in the command.
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
flags.DEFINE_string("topology", "v5p:2x2x1", "TPU slice, GPUs, or cpu:N")
flags.DEFINE_string("chip", "", "whose limits; default: the topology's")
flags.DEFINE_string("smallest", "", "which slice of v5p, v5e, v6e, h200, ...")
flags.DEFINE_integer("mean_tokens", 0, "of an output; 0: the whole window")
flags.DEFINE_bool("json", False, "one JSON object, in the last line")


def main(config: ConfigDict, workdir: str) -> None:
  options = flags.FLAGS
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax

  from r1jax import ahead_of_time, plan, plan_search
  from r1jax.errors import UserError

  folder, config = config.model.folder, plan.of_preset(config)
  kind, _, count = options.topology.partition(":")
  if kind == "cpu" and count.isdigit() and int(count):
    jax.config.update("jax_num_cpu_devices", int(count))

  def nearest(chips: int) -> str:
    limits = plan.chip_of(options.topology, options.chip)
    return plan_search.nearest(config, limits, chips, options.topology)

  console = rich.console.Console(stderr=True)
  with console.status("compiling") as status:

    def say(name: str) -> None:
      status.update(f"compiling {name}")

    if options.smallest:
      tried = plan_search.smallest(config, options.smallest, say=say)
      found = tried[-1]
    else:
      how = dict(chip=options.chip, mean_tokens=options.mean_tokens, say=say)
      try:
        found = plan.plan(config, options.topology, **how)
      except plan.DoesNotFit as error:
        chips = len(ahead_of_time.devices(options.topology))
        raise UserError(f"{error} {nearest(chips)}") from error
  out = rich.console.Console()
  if options.smallest:
    show_tried(out, tried)
  if folder and not config.model.folder:
    text = f"{folder} is not here: these are the sizes of {config.model.preset}."
    out.print(text, highlight=False)
  show(out, found)
  if not found["fits"]:
    out.print(nearest(found["chips"]), highlight=False, soft_wrap=True)
  if options.json:
    print(json.dumps(found))
  sys.exit(0 if found["fits"] else 2)


def short(x: float) -> str:
  """Three digits, or all before the point."""
  return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def show_tried(console: rich.console.Console, tried: list[dict]) -> None:
  """What the search saw, slice by slice."""
  table = rich.table.Table("slice", "chips", "mesh", "fits", "why")
  for entry in tried:
    mesh = " x ".join(f"{axis} {n}" for axis, n in entry["mesh"].items() if n > 1)
    fits = "yes" if entry["fits"] else "no"
    table.add_row(entry["topology"], f"{entry['chips']:,}", mesh, fits, entry["why"])
  console.print(table)


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
    cells = [short(x) for x in row]
    table.add_row(name, *cells, f"{p['compile_cpu_seconds']:.0f}")
  console.print(table)
  table = rich.table.Table("collectives", "program", "number", "GB sent")
  for name, p in f["programs"].items():
    for kind, (number, sent) in p["collectives"].items():
      table.add_row(kind, name, f"{number:,.0f}", short(sent / 1e9))
  console.print(table)
  s = f["step_seconds"]
  console.print(
    f"A step at the roofline: {short(s['total'])} s = prefill {short(s['prefill'])} +"
    f" {f['decode_turns']:,.0f} turns of decoding {short(s['decode'])} + updates"
    f" {short(s['update'])}. Bound by {f['bottleneck']}.",
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
