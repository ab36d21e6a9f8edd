"""The update: outputs packed into rows, against an output a row.

On the host's cores. Outputs have heavy-tailed lengths; one minibatch and one AdamW
update, which take turns in one command; figures are medians.
"""

import argparse
import contextlib
import dataclasses
import functools
import platform
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from experiments.benches import rollout_parts as parts
from r1jax import grpo, train_state
from r1jax.errors import UserError
from r1jax.experience import Rows
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class Sizes(parts.Sizes):
  """The rollout's policy, prompts and lengths."""

  outputs: int = 512  # of the minibatch, in groups
  pack: int = 412  # tokens a packed row; narrower ones are less full
  micro_batches: int = 64


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--repeats", type=int, default=3, help="timed updates of each")


def run(options: argparse.Namespace) -> dict:
  """Measures, prints the table, returns all figures. Raises UserError where there are
  too few repeats."""
  with contextlib.suppress(RuntimeError):  # JAX has begun: its devices are those then
    jax.config.update("jax_num_cpu_devices", parts.cores())
  return measure(options, Sizes())


def measure(options: argparse.Namespace, z: Sizes) -> dict:
  """`run` at other sizes."""
  if options.repeats < 1:
    raise UserError(f"--repeats={options.repeats} must be at least 1.")
  with rich.console.Console(stderr=True).status("packing: compiling and timing"):
    found = packing(z, options.repeats)
  print("\n".join(markdown(found, z)))
  return found


def packing(z: Sizes, repeats: int) -> dict:
  """Seconds of an update both ways, its packing efficiency, and how far the gradient's
  norm is from that of an output a row."""
  network = z.dense()
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, steps=100))
  metrics, compile_seconds = {}, {}
  with parts.a_device_each_core(z.outputs // z.group) as put:
    state = train_state.restart(*parts.weights_of(network), optimizer, reference=False)
    args = put(state), put(minibatch(z), rows=True)

    def prepared(name, pack):
      update = functools.partial(
        grpo.update, policy=network, optimizer=optimizer, config=config(z, pack)
      )
      program, compile_seconds[name] = parts.compiled(update, *args)

      def keep(*args):
        state, metrics[name], _ = program(*args)
        return state, metrics[name]

      return lambda: parts.timed(keep, *args)

    runs = dict(packed=prepared("packed", z.pack), padded=prepared("padded", 0))
    times = parts.interleaved(repeats, runs)
  seconds = {name: statistics.median(t) for name, t in times.items()}
  norm = {name: float(m["grad_norm"]) for name, m in metrics.items()}
  rows = args[1]
  real = int(rows.prompt_mask.sum() + rows.completion_mask.sum())
  return {
    "bench": "packing",
    "cores": parts.cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "repeats": repeats,
    "packing_efficiency": float(metrics["packed"]["packing_efficiency"]),
    "padded_efficiency": real / (z.outputs * (z.prompt + z.cap)),
    "packed_ratio_to_padded": seconds["padded"] / seconds["packed"],
    **{f"{name}_seconds": x for name, x in seconds.items()},
    **{f"{name}_tokens_per_s": real / x for name, x in seconds.items()},
    "grad_norm_gap": abs(norm["packed"] / norm["padded"] - 1),
    "compile_seconds": compile_seconds,
    "runs": times,
  }


def config(z: Sizes, pack: int) -> grpo.GRPOConfig:
  return grpo.GRPOConfig(
    group_size=z.group,
    minibatches=1,
    micro_batches=z.micro_batches,
    pack=pack,
    max_tokens=z.cap,
    reference_refresh=0,
    objective=Objective(kl_coef=0.0, clip_low=0.2, clip_high=0.2),
  )


def minibatch(z: Sizes) -> Rows:
  """Random tokens and advantages; lengths of the rollout's benchmark."""
  rng, shape = np.random.default_rng(1), (z.outputs, z.cap)
  prompts = parts.problems(z.outputs // z.group, z.prompt, z.vocab)
  lengths = parts.heavy_tail(z.outputs, z.median, z.cap)
  mask = np.arange(z.cap)[None] < lengths[:, None]
  logprobs = jnp.asarray(np.where(mask, -np.log(z.vocab), 0.0), jnp.float32)
  advantages = np.broadcast_to(rng.normal(size=(z.outputs, 1)), shape)
  return Rows(
    prompts=jnp.repeat(prompts.tokens, z.group, axis=0),
    prompt_mask=jnp.repeat(prompts.mask, z.group, axis=0),
    completions=jnp.asarray(rng.integers(1, z.vocab, shape), jnp.int32),
    completion_mask=jnp.asarray(mask),
    in_loss=jnp.ones(z.outputs, bool),
    in_mean=jnp.ones(z.outputs, bool),
    sampler_logprobs=logprobs,
    old_logprobs=logprobs,
    reference_logprobs=jnp.zeros_like(logprobs),
    advantages=jnp.asarray(advantages, jnp.float32),
    place=jnp.arange(z.outputs, dtype=jnp.int32),
  )


def markdown(f: dict, z: Sizes) -> list[str]:
  """The table, line by line."""
  packed, padded = f["packing_efficiency"], f["padded_efficiency"]
  lines = [
    f"{f['cores']} CPU cores, Python {f['python']}, JAX {f['jax']}; medians of"
    f" {f['repeats']} updates in turn. {z.outputs} outputs with log-normal lengths (p50"
    f" {z.median}, p99 {z.cap}, cut there) after prompts of {z.prompt} tokens; a dense"
    f" model of {z.layers} layers, width {z.width}, vocabulary {z.vocab}, float32.",
    "",
    "| | real tokens of those computed | seconds an update | real tokens a second |",
    "|---|---|---|---|",
  ]
  for label, name, share in (
    (f"packed into rows of {z.pack}", "packed", f"{packed:.3f}"),
    (f"an output a row of {z.prompt + z.cap}", "padded", f"{padded:.3f}"),
  ):
    seconds, speed = f[f"{name}_seconds"], f[f"{name}_tokens_per_s"]
    lines.append(f"| {label} | {share} | {seconds:.2f} | {speed:,.0f} |")
  return [
    *lines,
    "",
    f"Packed is {f['packed_ratio_to_padded']:.2f} x as fast. The norms of the gradients"
    f" differ by {f['grad_norm_gap']:.1e} of them.",
  ]
