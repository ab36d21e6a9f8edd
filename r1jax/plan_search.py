"""The smallest slice of a TPU pod, or the fewest hosts of GPUs, that hold a step.

Slices are tried from the smallest on. What is bound to overflow by the arithmetic of
`estimate` is not compiled; of the meshes of a slice those are that promise most room.
"""

from collections.abc import Callable, Iterator
import copy
import dataclasses
import math

from ml_collections import ConfigDict

from r1jax import plan, settings
from r1jax.errors import UserError

# cloud.google.com/tpu/docs: what can be asked for, by the number of chips.
SLICES = {
  "v5p": {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"},
    **{256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"},
  },
  "v5e": {
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
  },
}
SLICES["v6e"] = SLICES["v5e"]
SLICES["h100"] = SLICES["h200"] = {n: str(n) for n in (8, 16, 32, 64, 128, 256, 512)}
CACHE = 0.3  # of a chip's memory that the outputs' cache may have
ROOM = 0.1  # of it that stays free
MESHES = 2  # of a slice that are compiled


@dataclasses.dataclass(frozen=True)
class Choice:
  """A config's step on a slice."""

  config: ConfigDict
  chips: int
  topology: str
  bytes: dict[str, float]  # of a chip, by kind; a lower bound

  @property
  def total(self) -> float:
    """What an update and what a rollout holds, the larger."""
    b = self.bytes
    state = b["parameters"] + b["optimizer"] + b["reference"]
    return state + max(b["gradients"] + b["activations"], b["cache"])


def smallest(
  config: ConfigDict, family: str, *, say: Callable[[str], None] = lambda text: None
) -> list[dict]:
  """The plans that were made, the last of which fits with ROOM to spare; an entry that
  was not compiled has no `programs`.

  Args:
    config: of experiments.r1_zero; its mesh, micro-batches and slots are chosen here.
    family: one of SLICES.
    say: is told what is compiled.

  Raises:
    UserError: no such family, or no slice of it is large enough.
  """
  if family not in SLICES:
    raise UserError(f"--smallest={family!r} is not one of {sorted(SLICES)}.")
  chip, tried = plan.CHIPS[family], []
  room = (1 - ROOM) * chip.memory
  for chips, name in SLICES[family].items():
    found = choices(config, chip, chips, f"{family}:{name}")
    for choice in [x for x in found if x.total <= room][:MESHES] or found[:1]:
      tried.append(entry := _tried(choice, room, say))
      if entry["fits"]:
        return tried
  raise UserError(
    f"no slice of {family} holds this step with {ROOM:.0%} to spare: "
    + "; ".join(f"{x['topology']} ({x['why']})" for x in tried[-3:])
    + ". Set config.optimizer.moments=bfloat16, or shorten config.windows."
  )


def _tried(choice: Choice, room: float, say: Callable[[str], None]) -> dict:
  """The plan, if there can be one."""
  entry = {
    "topology": choice.topology,
    "chips": choice.chips,
    "mesh": {axis: n for axis, n in choice.config.mesh.items() if n > 1},
    "least_bytes": choice.bytes,
    "fits": False,
    "settings": {
      name: choice.config.grpo[name]
      for name in ("micro_batches", "slots", "prefill_parts")
    },
  }
  if choice.total > room:
    largest = max(choice.bytes, key=choice.bytes.get)
    least = f"{choice.total / plan.GIB:.1f} GiB at the least, most for {largest}"
    return entry | {"why": least}
  try:
    entry |= plan.plan(choice.config, choice.topology, say=say)
  except UserError as error:
    return entry | {"why": str(error)}
  free = entry["free_hbm_fraction"]
  why = f"{free:.0%} free during {entry['fullest']}"
  return entry | {"why": why, "fits": free >= ROOM}


def nearest(config: ConfigDict, chip: plan.Chip, chips: int, topology: str) -> str:
  """What to set for the mesh of these chips that promises most room; where none can
  hold the step, how much is missing.

  Args:
    config: of experiments.r1_zero.
    chip, chips, topology: of a plan that does not fit.
  """
  found = choices(config, chip, chips, topology)
  if not found:
    return "No mesh of these chips has the sizes' divisors."
  best, mesh = found[0], found[0].config.mesh
  if best.total > (1 - ROOM) * chip.memory:
    least, share = best.total / plan.GIB, best.total / chip.memory
    return (
      f"No mesh of {chips} chips holds it: {least:.1f} GiB a chip at the least;"
      f" {share:.1f} times as many chips might."
    )
  sizes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in mesh.items())
  names = ("micro_batches", "slots", "prefill_parts")
  rest = " ".join(f"--config.grpo.{n}={best.config.grpo[n]}" for n in names)
  return f"Of {chips} chips this promises most room: {sizes} {rest}"


def choices(
  config: ConfigDict, chip: plan.Chip, chips: int, topology: str
) -> list[Choice]:
  """The config on every mesh of so many chips that its sizes allow, with as few rows at
  a time as there are shards, and slots within CACHE; that with most room first."""
  found = _choices(config, chip, chips, topology)
  return sorted(found, key=lambda x: (x.total, x.bytes["activations"]))


def _choices(config, chip, chips, topology) -> Iterator[Choice]:
  sizes = plan.sizes_of(config)
  c, g = sizes.policy.config, config.grpo
  outputs = config.prompts * g.group_size
  rows = outputs // g.minibatches
  for tensor in (1, 2, 4, 8, 16):
    if chips % tensor or c.heads % tensor or (c.kv_heads and c.kv_heads % tensor):
      continue
    expert = math.gcd(c.experts, chips // tensor) if c.moe_layers else 1
    shards = chips // tensor
    if rows % shards or config.prompts % shards:
      continue
    # Entries of MLA are one head's: not cut along tensor.
    heads = tensor if c.kv_heads else 1
    entry = c.layers * c.cache.width * c.compute_dtype.itemsize * sizes.window / heads
    fitting = int(CACHE * chip.memory // entry) * shards
    slots = 2 ** int(math.log2(fitting)) if fitting else 0
    if slots < shards or outputs % slots:
      continue
    changed = copy.deepcopy(config)
    with changed.unlocked():
      changed.mesh.update(
        data=1, fsdp=shards // expert, expert=expert, tensor=tensor, context=1
      )
      changed.grpo.micro_batches = rows // shards
      changed.grpo.slots = min(slots, outputs)
      # As many tokens of prompts at a time as an update has of a row.
      held = config.prompts // shards
      share = held * sizes.prompt / (sizes.prompt + sizes.window)
      changed.grpo.prefill_parts = next(
        n for n in range(1, held + 1) if held % n == 0 and n >= share
      )
    yield Choice(changed, chips, topology, estimate(changed, sizes, chips))


def estimate(config: ConfigDict, sizes: plan.Sizes, chips: int) -> dict[str, float]:
  """Bytes of a chip that an update or a rollout cannot do without."""
  c, mesh = sizes.policy.config, config.mesh
  weights = plan.parameters(sizes.policy)
  moment = 2 if config.optimizer.moments == "bfloat16" else 4
  reference = 4 if settings.objective(config).needs_reference else 0
  length, tensor = sizes.prompt + sizes.window, mesh.tensor
  two = c.compute_dtype.itemsize
  kept = length / tensor * c.width * c.layers * two  # a row, between the layers
  head = c.head_dim or c.nope_dim + c.rope_dim
  attention = 4 * length * c.heads / tensor * head * two
  # The experts of a device, whole while a layer uses them, and their gradient; what the
  # exchange brings them, what they make of it, and the gradients of that.
  experts = 2 * 3 * c.width * c.expert_ffn * c.experts / mesh.expert * two
  pairs = length / tensor * c.active_experts * c.expert_capacity
  experts += 2 * pairs * (2 * c.width + 3 * c.expert_ffn) * two
  shards = chips // tensor
  heads = tensor if c.kv_heads else 1
  entry = c.layers * c.cache.width * two / heads
  outputs = config.grpo.slots * sizes.window
  return {
    "parameters": 4 * weights / chips,
    "optimizer": 2 * moment * weights / chips,
    "reference": reference * weights / chips,
    # Their sum in float32, a part's and the weights that are cast.
    "gradients": (4 + 2 * two) * weights / chips,
    "activations": kept + attention + experts,
    "cache": entry * (outputs + config.prompts * sizes.prompt) / shards,
  }
