"""The rollout: against transformers and torch, refill, shared prefix, cost by length.

On the host's cores. What is compared takes turns in one command; figures are medians.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import platform

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.console
import rich.progress

from experiments.benches import (
  kernels,
  rollout_beside_torch,
  rollout_drafts,
  rollout_parts,
)
from r1jax.errors import UserError

PARTS = {
  "transformers": rollout_beside_torch.transformers,
  "iteration": rollout_beside_torch.iteration,
  "refill": rollout_parts.refill,
  "prefix": rollout_parts.prefix,
  "length": rollout_parts.length,
  "speculative": rollout_drafts.speculative,
}
NEEDS_TORCH = {"transformers", "iteration"}
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "rollout.md"
BEGIN, END = "<!-- rollout: begin -->\n", "<!-- rollout: end -->\n"


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--only",
    default="",
    help=f"of {', '.join(PARTS)}, with commas between; empty: all",
  )
  parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
  parser.add_argument(
    "--write",
    action="store_true",
    help="also put tables and plot into docs/rollout.md and docs/rollout_length.png",
  )


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the tables, returns all figures.

  Raises:
    UserError: no such part, too few repeats, a part would be written as the whole, or
      torch is missing.
  """
  with contextlib.suppress(RuntimeError):  # JAX has begun: its devices are those then
    jax.config.update("jax_num_cpu_devices", rollout_parts.cores())
  return measure(options, rollout_parts.Sizes())


def measure(options: argparse.Namespace, sizes: rollout_parts.Sizes) -> dict:
  """`run` at other sizes."""
  names = chosen(options.only)
  if options.repeats < 1:
    raise UserError(f"--repeats={options.repeats} must be at least 1.")
  if options.write and options.only:
    raise UserError("--write puts all parts into the docs; leave out --only.")
  if NEEDS_TORCH & set(names):
    others = ",".join(x for x in PARTS if x not in NEEDS_TORCH)
    check_torch(f", or measure the rest: --only={others}")
  found = {
    "bench": "rollout",
    "cores": rollout_parts.cores(),
    "repeats": options.repeats,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "torch": kernels.version("torch"),
    "transformers": kernels.version("transformers"),
  }
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(console=console) as progress:
    task = progress.add_task("", total=len(names))
    for name in names:
      progress.update(task, description=name)
      found |= PARTS[name](sizes, options.repeats)
      progress.advance(task)
  tables = "\n".join(markdown(found, sizes)) + "\n"
  print(tables)
  if options.write:
    write(tables)
    plot(found, DOCS.with_name("rollout_length.png"))
  return found


def chosen(only: str) -> list[str]:
  """Raises UserError where a name is no part's."""
  names = list(PARTS)
  wanted = [name for name in only.split(",") if name] or names
  wrong = sorted(set(wanted) - set(names))
  if wrong:
    raise UserError(f"--only: {wrong} are no parts; these are {names}.")
  return [name for name in names if name in wanted]


def check_torch(instead: str) -> None:
  """Raises UserError where torch or transformers is missing. Args: instead: what can
  be measured without them."""
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"{package}, which r1jax is compared with, is missing: pip install -e"
        f' ".[test]" on Python 3.11{instead}.'
      )


# -- tables and plot -------------------------------------------------------------------


def markdown(f: dict, z: rollout_parts.Sizes) -> list[str]:
  """The tables of the parts that were measured, line by line."""
  lines = [
    f"{f['cores']} CPU cores, Python {f['python']}, JAX {f['jax']}, torch {f['torch']},"
    f" transformers {f['transformers']}; medians of {f['repeats']} runs in turn. A"
    f" Qwen2 of {z.layers} layers, width {z.width}, {z.heads} heads with {z.kv_heads}"
    f" for keys, vocabulary {z.vocab}, float32.",
  ]
  if "ratio_to_transformers" in f or "iteration_ratio_to_torch" in f:
    lines += ["", *against_torch(f, z)]
  if "refill_ratio_to_static" in f:
    lines += ["", *refill(f, z)]
  if "prefix_flops_ratio" in f:
    lines += ["", *prefix(f, z)]
  if "cost_by_length" in f:
    lines += ["", *cost_by_length(f, z)]
  if "speculative_ratio" in f:
    lines += ["", *speculative(f, z)]
  return lines


def against_torch(f: dict, z: rollout_parts.Sizes) -> list[str]:
  lines = [
    f"{z.prompts} prompts x {z.group}, prompts of {z.prompt} tokens, {z.new} new ones:",
    "",
    "| | r1jax | transformers, torch | r1jax is faster |",
    "|---|---|---|---|",
  ]
  if "ratio_to_transformers" in f:
    ours, theirs = f["r1jax_tokens_per_s"], f["transformers_tokens_per_s"]
    ratio = f["ratio_to_transformers"]
    lines.append(
      f"| rollout, tokens a second | {ours:,.0f} | {theirs:,.0f} | {ratio:.2f} x |"
    )
  if "iteration_ratio_to_torch" in f:
    ratio = f"{f['iteration_ratio_to_torch']:.2f} x"
    for label, ours, theirs, faster in (
      ("whole iteration, seconds", "iteration", "torch_iteration", ratio),
      ("… its rollout", "iteration_rollout", "torch_rollout", ""),
      ("… its update", "iteration_update", "torch_update", ""),
      ("… its update by rows", "iteration_by_rows_update", "torch_update", ""),
    ):
      ours, theirs = f[f"{ours}_seconds"], f[f"{theirs}_seconds"]
      lines.append(f"| {label} | {ours:.2f} | {theirs:.2f} | {faster} |")
  names = ("rollout", "iteration")
  took = [f"{f[k]:.1f}" for n in names if (k := f"{n}_compile_seconds") in f]
  took = f"{' and '.join(took)} seconds"
  return [*lines, "", f"r1jax compiles for {took}, once, which is not counted above."]


def refill(f: dict, z: rollout_parts.Sizes) -> list[str]:
  return [
    f"{z.queue * z.group:,} outputs with log-normal lengths (p50 {z.median}, p99"
    f" {z.cap}, cut there) over {z.slots} slots"
    f" and a cache of {z.cache_tokens:,} tokens:",
    "",
    "| | steps | slots in use | tokens a second |",
    "|---|---|---|---|",
    f"| refill | {f['refill_steps']:,} | {f['slot_occupancy']:.3f} |"
    f" {f['refill_tokens_per_s']:,.0f} |",
    f"| batches of {z.slots}, each to its longest | {f['static_steps']:,} |"
    f" {f['static_occupancy']:.3f} | {f['static_tokens_per_s']:,.0f} |",
    "",
    f"Refill is {f['refill_ratio_to_static']:.2f} x as fast; if every slot were always"
    f" in use and a step cost the same, {f['ideal_ratio']:.2f} x. The same tokens in"
    f" {100 * f['refill_equal_outputs']:.1f} % of the outputs.",
  ]


def prefix(f: dict, z: rollout_parts.Sizes) -> list[str]:
  rows = []
  for name, unit in (("flops", "GFLOP"), ("bytes", "MB")):
    shared, alone = (x / (1e9 if unit == "GFLOP" else 1e6) for x in f[f"prefix_{name}"])
    part = f[f"prefix_{name}_ratio"] * z.group
    rows.append(f"| {unit} | {shared:,.2f} | {alone:,.2f} | {part:.3f} / {z.group} |")
  return [
    f"{z.prefix_prompts} prompts of {z.prefix} tokens, {z.group} outputs each, counted"
    " and not timed:",
    "",
    "| prefill and the prompts' cache | shared by a group | one an output | ratio |",
    "|---|---|---|---|",
    *rows,
  ]


def cost_by_length(f: dict, z: rollout_parts.Sizes) -> list[str]:
  line = f["length_fit"]
  return [
    f"A step of {z.length_rows} rows, {z.length_layers} layers, by each row's live"
    " tokens:",
    "",
    "| live tokens | ms a step | cache read, MB | GB/s |",
    "|---|---|---|---|",
    *(
      f"| {row['length']:,} | {row['ms']:.2f} | {row['bytes'] / 1e6:,.1f} |"
      f" {row['gb_per_s']:.1f} |"
      for row in f["cost_by_length"]
    ),
    "",
    f"Least squares: {line['a_ms']:.2f} ms + {1e6 * line['b_ms_per_byte']:.4f} ms a MB,"
    f" R² {line['r2']:.4f}.",
  ]


def speculative(f: dict, z: rollout_parts.Sizes) -> list[str]:
  return [
    f"R1-Zero's base in miniature after {f['speculative_updates']} updates with an MTP"
    f" module, {z.draft_prompts} held-out problems x {z.draft_group}:",
    "",
    "| | tokens a second | tokens a row and step | drafts taken |",
    "|---|---|---|---|",
    f"| speculative | {f['speculative_tokens_per_s']:,.0f} |"
    f" {f['speculative_tokens_a_step']:.2f} | {f['speculative_acceptance']:.2f} |",
    f"| plain | {f['plain_tokens_per_s']:,.0f} | 1.00 | |",
  ]


def write(tables: str) -> None:
  """Puts the tables between their marks in the docs."""
  head, _, rest = DOCS.read_text().partition(BEGIN)
  _, _, tail = rest.partition(END)
  DOCS.write_text(head + BEGIN + tables + END + tail)


def plot(f: dict, path: pathlib.Path) -> None:
  """Milliseconds a step against live tokens, and the fitted line."""
  rows, line = f["cost_by_length"], f["length_fit"]
  lengths = [row["length"] for row in rows]
  fitted = [line["a_ms"] + line["b_ms_per_byte"] * row["bytes"] for row in rows]
  figure, axis = plt.subplots(figsize=(6, 4))
  axis.plot(lengths, fitted, color="0.7", lw=1, label="a + b × bytes of cache")
  axis.plot(lengths, [row["ms"] for row in rows], "o", ms=4, label="measured")
  axis.set_xlabel("live tokens a row")
  axis.set_ylabel(f"ms a step of {f['length_rows']} rows")
  axis.set_xlim(left=0)
  axis.set_ylim(bottom=0)
  axis.grid(alpha=0.3)
  axis.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)
