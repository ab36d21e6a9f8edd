"""An update and a decode step: time and FLOPs as one size at a time grows.

On the host's cores. Of each size the exponent k of cost ~ size^k is fitted; programs
take turns in one command, figures are medians. program_cost.py counts the FLOPs that
the program asks for: what XLA does beyond them shows as time alone.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import itertools
import math
import platform
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from experiments.benches import packing
from experiments.benches import rollout_parts as parts
from r1jax import grpo, program_cost, rollout, train_state
from r1jax.errors import UserError
from r1jax.models import config, policy
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.sampling import Sampler

LABELS = {
  "tokens": "tokens a row",
  "rows": "rows",
  "experts": "experts",
  "layers": "layers",
}
COSTS = {"update": "an update", "decode": "a decode step"}


@dataclasses.dataclass(frozen=True)
class Sizes(packing.Sizes):
  """What stays while another grows, and what each grows to. Every output is as long as
  `cap`, and a row of an update is one with its prompt."""

  # The dense policy, of all but experts; theirs is the miniature of as many layers.
  width: int = 128
  layers: int = 2
  head_dim: int = 32
  ffn: int = 352
  # Rows.
  outputs: int = 16
  group: int = 4
  prompt: int = 64  # tokens
  cap: int = 64  # tokens
  micro_batches: int = 1
  # What grows, upwards.
  all_tokens: tuple[int, ...] = (64, 128, 256, 512)  # half prompt, half output
  all_rows: tuple[int, ...] = (16, 32, 64, 128)
  all_experts: tuple[int, ...] = (4, 8, 16, 32)
  all_layers: tuple[int, ...] = (2, 4, 8, 16)
  active_experts: int = 2
  steps: int = 16  # of decoding, timed together; fewer than tokens of an output

  def grown(self, name: str) -> tuple[int, ...]:
    return getattr(self, f"all_{name}")

  def dense(self, layers: int = 0) -> policy.Policy:
    """A layer a turn of the loop over them, so that many compile as fast as few."""
    unrolled = super().dense(layers).config
    return policy.Policy(dataclasses.replace(unrolled, unroll=1))

  def sparse(self, experts: int) -> policy.Policy:
    """The miniature with experts in each layer, on sorted tokens."""
    how = dict(experts=experts, active_experts=self.active_experts, moe="ragged")
    how |= dict(layers=self.layers, dense_layers=0)
    return policy.Policy(config.tiny(self.vocab, **how))


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--only",
    default="",
    help=f"of {', '.join(LABELS)}, with commas between; empty: all",
  )
  parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the table, returns all figures. Raises UserError where there is no
  such size or there are too few repeats."""
  with contextlib.suppress(RuntimeError):  # JAX has begun: its devices are those then
    jax.config.update("jax_num_cpu_devices", parts.cores())
  return measure(options, Sizes())


def measure(options: argparse.Namespace, z: Sizes) -> dict:
  """`run` at other sizes."""
  names = chosen(options.only)
  if options.repeats < 1:
    raise UserError(f"--repeats={options.repeats} must be at least 1.")
  found = {
    "bench": "scaling",
    "cores": parts.cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "repeats": options.repeats,
    "scaling": {},
  }
  # One mesh serves all numbers of rows.
  prompts = math.gcd(*(rows // z.group for rows in (z.outputs, *z.all_rows)))
  console = rich.console.Console(stderr=True)
  with (
    rich.progress.Progress(console=console) as progress,
    parts.a_device_each_core(prompts) as put,
  ):
    found["devices"] = jax.sharding.get_mesh().size
    # The sizes that they begin with are one policy.
    prepare = {cost: functools.cache(make) for cost, make in PREPARE.items()}
    task = progress.add_task("", total=len(names))
    for name in names:
      progress.update(task, description=LABELS[name])
      found["scaling"][name] = scaling(name, z, options.repeats, prepare, put)
      progress.advance(task)
  print("\n".join(markdown(found, z)))
  return found


def chosen(only: str) -> list[str]:
  """Raises UserError where a name is of no size."""
  wanted = [name for name in only.split(",") if name] or list(LABELS)
  wrong = sorted(set(wanted) - set(LABELS))
  if wrong:
    raise UserError(f"--only: {wrong} do not grow here; these do: {list(LABELS)}.")
  return [name for name in LABELS if name in wanted]


def scaling(
  name: str, z: Sizes, repeats: int, prepare: dict[str, Callable], put: Callable
) -> dict:
  """Milliseconds and FLOPs of both costs at each size, and the exponents of both."""
  sizes = z.grown(name)
  runs, flops, compile_seconds = {}, {}, {}
  for size, cost in itertools.product(sizes, COSTS):
    key = f"{cost}_{size}"
    made = prepare[cost](*at(z, name, size), put)
    runs[key], flops[key], compile_seconds[key] = made
  times = parts.interleaved(repeats, runs)

  def of(cost):
    keys = [f"{cost}_{size}" for size in sizes]
    ms = [1e3 * statistics.median(times[key]) for key in keys]
    counted = [flops[key] for key in keys]
    return {
      "ms": ms,
      **exponents(sizes, ms, ""),
      "flops": counted,
      **exponents(sizes, counted, "flops_"),
    }

  return {
    "sizes": list(sizes),
    **{cost: of(cost) for cost in COSTS},
    "compile_seconds": compile_seconds,
    "runs": times,
  }


def at(z: Sizes, name: str, size: int) -> tuple[Sizes, policy.Policy]:
  """(the sizes, the policy) where what is called so has grown to `size`."""
  changes = {
    "tokens": dict(prompt=size // 2, cap=size - size // 2),
    "rows": dict(outputs=size),
    "experts": {},
    "layers": dict(layers=size),
  }
  z = dataclasses.replace(z, **changes[name])
  z = dataclasses.replace(z, median=z.cap)
  return z, z.sparse(size) if name == "experts" else z.dense()


# -- the costs: (sizes, policy, put) -> (run, which returns seconds; FLOPs; seconds of
# compilation) -------------------------------------------------------------------------


def prepared_update(z: Sizes, network: policy.Policy, put: Callable) -> tuple:
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, steps=100))
  state = train_state.restart(*parts.weights_of(network), optimizer, reference=False)
  args = put(state), put(packing.minibatch(z), rows=True)
  update = functools.partial(
    grpo.update, policy=network, optimizer=optimizer, config=packing.config(z, 0)
  )
  flops = program_cost.flops(jax.jit(update).trace(*args).jaxpr)
  program, seconds = parts.compiled(update, *args)
  return functools.partial(parts.timed, program, *args), flops, seconds


def prepared_decode(z: Sizes, network: policy.Policy, put: Callable) -> tuple:
  """A step where every output is about to end: the cache is as full as it gets."""
  settings = Sampler(group_size=z.group, max_tokens=z.cap, pad_id=parts.PAD)
  weights, key = put(parts.weights_of(network)), put(jax.random.key(0))
  batch = put(parts.problems(z.outputs // z.group, z.prompt, z.vocab), rows=True)

  def begin(params, router, batch, key):
    return rollout.start(network, params, router, batch, key, settings)

  def decode(carry, params, router, limit):
    return rollout.advance(network, params, router, carry, limit, settings)

  # It runs once, untimed.
  quick = {"xla_backend_optimization_level": 0}
  begun, _ = parts.compiled(begin, *weights, batch, key, compiler_options=quick)
  carry, limit = begun(*weights, batch, key), put(jnp.int32(z.steps))
  where = jax.tree.map(lambda x: x.sharding, carry)
  flops = program_cost.flops(jax.jit(decode).trace(carry, *weights, limit).jaxpr)
  program, seconds = parts.compiled(decode, carry, *weights, limit, donate_argnums=0)

  def keep(before):
    nonlocal carry
    carry = program(before, *weights, limit)
    return carry

  def run():
    length = z.cap - z.steps - 1  # none ends
    slots = carry.slots.replace(length=np.full_like(carry.slots.length, length))
    outputs = carry.outputs.replace(lengths=np.full_like(carry.outputs.lengths, length))
    before = carry.replace(step=np.int32(0), slots=slots, outputs=outputs)
    before = jax.block_until_ready(jax.device_put(before, where))
    return parts.timed(keep, before) / z.steps

  return run, flops, seconds


PREPARE = {"update": prepared_update, "decode": prepared_decode}


# -- the fit ---------------------------------------------------------------------------


def exponents(sizes: Sequence[int], costs: Sequence[float], prefix: str) -> dict:
  """k over all sizes and over the upper half of them, two at least."""
  half = min(len(sizes) // 2, len(sizes) - 2)
  return {
    f"{prefix}exponent": exponent(sizes, costs),
    f"upper_{prefix}exponent": exponent(sizes[half:], costs[half:]),
  }


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
  """k of cost ~ size^k, by least squares between the logarithms."""
  return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# -- the table -------------------------------------------------------------------------


def markdown(f: dict, z: Sizes) -> list[str]:
  """The table, line by line."""
  lines = [
    f"{f['cores']} CPU cores as {f['devices']} devices, Python {f['python']}, JAX"
    f" {f['jax']}; medians of {f['repeats']} runs in turn. Where it is not what grows:"
    f" {z.outputs} rows of {z.prompt + z.cap} tokens, half prompt and half output; a"
    f" dense model of {z.layers} layers, width {z.width}, vocabulary {z.vocab}; experts"
    f" are the miniature's, {z.active_experts} active, of sorted tokens; float32."
    " A decode step is one of all rows at their full length. k: cost ~ size^k.",
    "",
    "| | " + " | ".join(f"{cost}, ms | its GFLOP" for cost in COSTS.values()) + " |",
    "|---|---|---|---|---|",
  ]
  for name, found in f["scaling"].items():
    costs = [found[cost] for cost in COSTS]
    for i, size in enumerate(found["sizes"]):
      pairs = [(f"{c['ms'][i]:,.2f}", f"{c['flops'][i] / 1e9:.3g}") for c in costs]
      lines.append(row(f"{LABELS[name]}: {size}", pairs))
    for label, upper in (("k", ""), ("k, upper half", "upper_")):
      ks = [(c[f"{upper}exponent"], c[f"{upper}flops_exponent"]) for c in costs]
      pairs = [(f"**{k:.2f}**", f"{of_flops:.2f}") for k, of_flops in ks]
      lines.append(row(f"{LABELS[name]}: {label}", pairs))
  if "experts" in f["scaling"]:
    lines += [
      "",
      "On a CPU XLA multiplies each sorted token by all experts and keeps one product:"
      " time grows with experts that the arithmetic does not need.",
    ]
  return lines


def row(label: str, pairs: list[tuple[str, str]]) -> str:
  cells = itertools.chain.from_iterable(pairs)
  return f"| {label} | {' | '.join(cells)} |"
