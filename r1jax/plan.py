"""The plan of a step of RL on devices that nobody has to own: does it fit, how long
does it take at best, and what binds it.

Three programs are compiled ahead of time for the topology, with the sizes and the mesh
of a config: `prefill` (the prompts of a rollout), `decode` (a turn of its loop: a token
for every slot) and `update` (one minibatch, with AdamW). Bytes are the compiler's.
Times are a roofline's: the longest of what the products, the memory and the links need
if each ran at its peak; no program reaches it.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import inspect
import math
import pathlib
import resource
import tempfile
import time

from flax import linen as nn
import jax
from ml_collections import ConfigDict
import numpy as np
import rich.console

from r1jax import (
  ahead_of_time,
  config_checks,
  experience,
  grpo,
  program_cost,
  rollout,
  run,
  settings,
  sharding,
  train_state,
)
from r1jax.errors import UserError
from r1jax.models import policy as policy_lib
from r1jax.models.config import PRESETS
from r1jax.models.policy import Policy
from r1jax.optimizer import make_optimizer
from r1jax.progress import Clock, Progress
from r1jax.prompts import PromptBatch
from r1jax.sampling import Sampler

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks as their makers publish them."""

  memory: float  # bytes that a program can have
  flops: float  # a second, bfloat16
  bandwidth: float  # bytes a second of its memory
  links: float  # bytes a second that it can send to its neighbours, all links together


# cloud.google.com/tpu/docs, a page a generation; nvidia.com's data sheets. A link's two
# directions are published together: half of it is what a chip can send.
CHIPS = {
  "v5e": Chip(15.75 * GIB, 197e12, 819e9, 100e9),
  "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 300e9),
  "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 224e9),
  "tpu7x": Chip(94.75 * GIB, 1154e12, 3690e9, 300e9),  # one of a chip's two cores
  "h100": Chip(79.1 * GIB, 989e12, 3350e9, 450e9),
  "h200": Chip(139.8 * GIB, 989e12, 4800e9, 450e9),
  "cpu": Chip(24.0 * GIB, 0.25e12, 20e9, 5e9),  # a small machine; ours, measured
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One of the three, on one device. The loop that decodes counts as one turn of it."""

  arguments: int  # bytes
  temporaries: int
  flops: float
  hbm: float  # bytes read and written
  sent: float  # bytes sent by collectives
  collectives: dict[str, tuple[float, float]]  # kind -> (number, bytes)
  compile_cpu_seconds: float
  # What a call of a loop does besides its turns: it gathers weights, say.
  call_hbm: float = 0.0
  call_sent: float = 0.0

  @property
  def peak(self) -> int:
    return self.arguments + self.temporaries

  def seconds(self, chip: Chip) -> dict[str, float]:
    """What each part of the chip needs by itself."""
    return {
      "compute": self.flops / chip.flops,
      "memory": self.hbm / chip.bandwidth,
      "links": self.sent / chip.links,
    }

  def call_seconds(self, chip: Chip) -> float:
    """Beside its turns."""
    return max(self.call_hbm / chip.bandwidth, self.call_sent / chip.links)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a config's step."""

  policy: Policy
  prompt: int  # tokens
  window: int  # output tokens


def of_preset(config: ConfigDict) -> ConfigDict:
  """The config with the sizes of model.preset, where those are a published model's and
  the checkpoint that it names is not here; its prompts are then tokens, of no text."""
  folder = config.model.folder
  if not folder or pathlib.Path(folder).exists() or not _released(config):
    return config
  config = config.copy_and_resolve_references()
  config.model.folder, config.data.template, config.data.examples = "", "short", 0
  return config


def _released(config: ConfigDict) -> int | None:
  """The vocabulary of a preset that is a published model's."""
  preset = PRESETS.get(config.model.preset)
  vocab = preset and inspect.signature(preset).parameters["vocab"].default
  return vocab if isinstance(vocab, int) else None


def sizes_of(config: ConfigDict) -> Sizes:
  """The first window's. Where the config leaves lengths or the vocabulary to the task's
  problems, those are made."""
  vocab, first = _released(config), settings.windows(config, longest_page=0)[0][1]
  if config.data.prompt_length and first and vocab:
    policy = Policy(settings.policy_config(config, vocab))
    return Sizes(policy, config.data.prompt_length, first)
  mesh = sharding.make_mesh(jax.devices()[:1])
  with (
    tempfile.TemporaryDirectory() as folder,
    jax.set_mesh(mesh),
    Progress(rich.console.Console(quiet=True)) as progress,
  ):
    made = run.prepare(config, pathlib.Path(folder), mesh, Clock(), progress)
    with contextlib.closing(made):
      return Sizes(made.policy, made.train.tokens.shape[1], made.windows[0][1])


def chip_of(topology: str, chip: str = "") -> Chip:
  """The topology's chip, or the one that is named.

  Raises:
    UserError: there is none of that name.
  """
  name = chip or topology.partition(":")[0]
  if name not in CHIPS:
    raise UserError(f"{name!r} is no chip that is known; these are {sorted(CHIPS)}.")
  return CHIPS[name]


def plan(
  config: ConfigDict,
  topology: str,
  *,
  chip: str = "",
  mean_tokens: int = 0,
  say: Callable[[str], None] = lambda text: None,
) -> dict:
  """The plan, as JSON-like values; sizes in bytes a chip, times in seconds.

  Args:
    config: of experiments.r1_zero.
    topology: "v5p:8x16x16", "h200:8", "cpu:8".
    chip: one of CHIPS whose limits to hold it against; "": the topology's.
    mean_tokens: of an output, for the rollout's time; 0: the whole window.
    say: is told what is compiled.

  Raises:
    UserError: no such topology or chip, a mesh that is not its devices', a size that
      does not divide; DoesNotFit: by so much that it does not compile.
  """
  limits = chip_of(topology, chip)
  devices = ahead_of_time.devices(topology)
  of_rl = config.copy_and_resolve_references()
  of_rl.pretrain.steps = 0  # its rows need not divide over these devices
  config_checks.check(of_rl, len(devices))
  mesh = sharding.make_mesh(devices, **config.mesh)
  sizes = sizes_of(config)
  if not 0 <= mean_tokens <= sizes.window:
    raise UserError(
      f"--mean_tokens={mean_tokens} must lie in 0..{sizes.window}, the output window"
      " (config.windows); 0 is the window."
    )
  if config.grpo.pack:
    raise UserError(
      f"config.grpo.pack={config.grpo.pack}: how many packed rows there are depends on"
      " the outputs, so the plan is of grpo.pack=0, which costs more."
    )
  c = settings.step_config(config, sizes.window)
  sharding.check_length(mesh, sizes.prompt + sizes.window, "rows of prompt and output")
  platform = ahead_of_time.platform(topology)
  compile_ = functools.partial(_compiled, mesh, platform)
  start = time.process_time()
  with jax.set_mesh(mesh):
    state, layouts, optimizer = _state(config, sizes.policy, mesh)
    say("prefill")
    prefill, carry = _prefill(config, c, sizes, mesh, state, compile_)
    say("decode")
    decode = _decode(c, sizes, mesh, state, carry, compile_)
    say("update")
    update = _update(config, c, sizes, mesh, state, layouts, optimizer, compile_)
  programs = {"prefill": prefill, "decode": decode, "update": update}
  kinds = {
    "parameters": program_cost.bytes_a_device((state.params, state.router)),
    "optimizer": program_cost.bytes_a_device(state.opt_state),
    "reference": program_cost.bytes_a_device(state.reference),
    "cache": program_cost.bytes_a_device(carry.cache),
  }
  return _figures(config, c, sizes, mesh, programs, kinds, limits, mean_tokens) | {
    "topology": topology,
    "chips": len(devices),
    "plan_cpu_seconds": time.process_time() - start,
    "plan_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  }


def _figures(config, c, sizes, mesh, programs, kinds, chip, mean_tokens) -> dict:
  """All that a reader asks."""
  outputs = config.prompts * c.group_size
  slots = c.slots or outputs
  tokens = mean_tokens or sizes.window
  turns = outputs * tokens / slots
  calls = turns / config.segment_tokens if config.segment_tokens else 1
  # While the rollout runs, moments and reference stay where they are.
  idle = kinds["optimizer"] + kinds["reference"]
  held = {
    "prefill": programs["prefill"].peak + idle,
    "decode": programs["decode"].peak + idle,
    "update": programs["update"].peak,
  }
  peak = max(held.values())
  times = {name: program.seconds(chip) for name, program in programs.items()}
  best = {name: max(parts.values()) for name, parts in times.items()}
  spent = {
    "prefill": best["prefill"],
    "decode": best["decode"] * turns + programs["decode"].call_seconds(chip) * calls,
    "update": best["update"] * c.minibatches,
  }
  longest = max(spent, key=spent.get)
  binds = max(times[longest], key=times[longest].get)
  return {
    "mesh": dict(mesh.shape),
    "outputs": outputs,
    "prompt_tokens": sizes.prompt,
    "window_tokens": sizes.window,
    "parameters": parameters(sizes.policy),
    "bytes": kinds | {"activations": programs["update"].temporaries},
    "peak_bytes": held,
    "memory_bytes": chip.memory,
    "free_hbm_fraction": 1 - peak / chip.memory,
    "fits": peak <= chip.memory,
    "fullest": max(held, key=held.get),
    "programs": {
      name: dataclasses.asdict(program) | {"seconds": times[name]}
      for name, program in programs.items()
    },
    "update_compile_cpu_seconds": programs["update"].compile_cpu_seconds,
    "decode_turns": turns,
    "mean_tokens": tokens,
    "step_seconds": spent | {"total": sum(spent.values())},
    "bottleneck": f"{longest}: {binds}",
  }


class DoesNotFit(UserError):
  """A program that the compiler refuses for want of memory."""


# What helps where a program does not compile for want of memory.
_FEWER = (
  "lower config.grpo.slots or set config.grpo.cache_tokens, or spread rows over more"
  " chips (config.mesh.data, fsdp, expert)."
)
REMEDIES = {
  "prefill": f"Raise config.grpo.prefill_parts; it makes the cache, too: {_FEWER}",
  "decode": f"It holds the cache: {_FEWER}",
  "update": "Raise config.grpo.micro_batches, config.mesh.context or tensor, set"
  " config.model.remat=nothing or config.optimizer.moments=bfloat16, or use more"
  " chips.",
}


# -- the programs ----------------------------------------------------------------------


@functools.cache
def parameters(policy: Policy) -> int:
  """How many a policy has."""
  shapes, _ = policy_lib.boxes(policy)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(shapes)))


def _spec(x, layout):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def _state(config, policy, mesh):
  """(the TrainState's ShapeDtypeStructs, its shardings, the optimizer)."""
  optimizer = make_optimizer(settings.optimizer_config(config))
  reference = settings.objective(config).needs_reference
  how = dict(reference=reference)
  shapes = jax.eval_shape(
    lambda: train_state.create(policy, optimizer, jax.random.key(0), **how)
  )
  layouts = train_state.shardings(policy, optimizer, mesh, **how)
  return jax.tree.map(_spec, shapes, layouts), layouts, optimizer


def _compiled(mesh, platform, function, *specs, **options):
  """(Program, compiled)."""
  start = time.process_time()
  traced = jax.jit(function, **options).trace(*specs)
  lowered = traced.lower(lowering_platforms=(platform,))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    said = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
    given = program_cost.bytes_a_device(specs) / GIB
    raise DoesNotFit(
      f"{function.__name__} does not fit this topology: {said} Its arguments alone are"
      f" {given:.1f} GiB a chip. {REMEDIES[function.__name__]}"
    ) from error
  seconds = time.process_time() - start
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  said = program_cost.kernels(traced.jaxpr)
  call = program_cost.traffic(text, turns=0, said=said)
  traffic = program_cost.traffic(text, said=said)
  loops = function.__name__ == "decode"
  if loops:
    traffic -= call
  program = Program(
    arguments=memory.argument_size_in_bytes,
    temporaries=_temporaries(memory, platform),
    flops=program_cost.flops(traced.jaxpr) / mesh.size,
    hbm=traffic.hbm,
    sent=traffic.sent,
    collectives=traffic.collectives,
    compile_cpu_seconds=seconds,
    call_hbm=call.hbm if loops else 0.0,
    call_sent=call.sent if loops else 0.0,
  )
  return program, compiled


def _temporaries(memory, platform: str) -> int:
  """Bytes beside the arguments at the fullest moment."""
  if platform == "tpu":
    # The sum of its parts counts a donated argument that is written again twice; the
    # compiler refuses by this figure.
    return memory.peak_memory_in_bytes - memory.argument_size_in_bytes
  returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.temp_size_in_bytes + returned


def _sampler(c) -> Sampler:
  return Sampler(**c.sampling(pad_id=0, stop_ids=(1,)))


def _prefill(config, c, sizes, mesh, state, compile_):
  rows = sharding.batch_sharding(mesh)

  def of_rows(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct((config.prompts, *shape), dtype, sharding=rows)

  prompts = PromptBatch(
    tokens=of_rows(sizes.prompt),
    mask=of_rows(sizes.prompt, dtype=bool),
    answers=of_rows(1, 2),
    ids=of_rows(),
  )

  def prefill(params, router, prompts):
    key = jax.random.key(0)
    return rollout.start(sizes.policy, params, router, prompts, key, _sampler(c))

  args = state.params, state.router, prompts
  program, compiled = compile_(prefill, *args)
  carry = jax.tree.map(_spec, jax.eval_shape(prefill, *args), compiled.output_shardings)
  return program, carry


def _decode(c, sizes, mesh, state, carry, compile_):
  def decode(params, router, carry, limit):
    return rollout.advance(sizes.policy, params, router, carry, limit, _sampler(c))

  limit = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh))
  args = state.params, state.router, carry, limit
  layouts = jax.tree.map(lambda x: x.sharding, carry)
  program, _ = compile_(decode, *args, donate_argnums=2, out_shardings=layouts)
  return program


def _update(config, c, sizes, mesh, state, layouts, optimizer, compile_):
  """A minibatch."""
  count = config.prompts * c.group_size // c.minibatches
  rows = sharding.batch_sharding(mesh)
  p, t, policy = sizes.prompt, sizes.window, sizes.policy.config

  def of_rows(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=rows)

  experts = None
  if policy.moe_layers and c.record_experts:
    dtype = np.uint8 if policy.experts <= 256 else np.int32
    shape = policy.moe_layers, p + t, policy.active_experts
    experts = of_rows(*shape, dtype=dtype)
  batch = experience.Rows(
    prompts=of_rows(p, dtype=np.int32),
    prompt_mask=of_rows(p, dtype=bool),
    completions=of_rows(t, dtype=np.int32),
    completion_mask=of_rows(t, dtype=bool),
    in_loss=of_rows(dtype=bool),
    in_mean=of_rows(dtype=bool),
    sampler_logprobs=of_rows(t),
    old_logprobs=of_rows(t),
    reference_logprobs=of_rows(t),
    advantages=of_rows(t),
    place=of_rows(dtype=np.int32),
    experts=experts,
  )

  def update(state, rows):
    how = dict(policy=sizes.policy, optimizer=optimizer, config=c)
    return grpo.update(state, rows, **how)

  program, _ = compile_(
    update, state, batch, donate_argnums=0, out_shardings=(layouts, None, None)
  )
  return program
