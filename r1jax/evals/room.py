"""How many samples a device has room for at once."""

import os
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from r1jax import rollout
from r1jax.models.policy import Policy, boxes
from r1jax.program_cost import bytes_a_device
from r1jax.prompts import PromptBatch
from r1jax.sampling import Sampler

SHARE = 0.5  # of what the weights leave; the rest is for what a step works on
MOST = 256


def rows(policy: Policy, window: int, max_tokens: int, *, bytes_each: int) -> int:
  """Samples to draw at once: a power of two, from 1 to MOST, whose caches take no more
  than SHARE of the memory beside the weights.

  Args:
    policy: the network.
    window: tokens of a prompt.
    max_tokens: of a sample.
    bytes_each: of a weight.
  """
  params, router = nn.unbox(boxes(policy))
  count = sum(x.size for x in jax.tree.leaves((params, router)))
  left = SHARE * (memory() - count * bytes_each)
  fit = int(left // bytes_a_row(policy, params, router, window, max_tokens))
  return 1 << max(min(fit, MOST), 1).bit_length() - 1


def bytes_a_row(
  policy: Policy, params: dict, router: dict, window: int, max_tokens: int
) -> int:
  """What the sampler carries for one sample of a prompt of its own.

  Args: as `rollout.sample` and `rows`; arrays or their shapes.
  """
  s = Sampler(group_size=1, max_tokens=max_tokens, pad_id=0, record_experts=False)
  shape = jax.ShapeDtypeStruct
  prompts = PromptBatch(
    tokens=shape((1, window), jnp.int32),
    mask=shape((1, window), bool),
    answers=shape((1, 1, 1), jnp.int32),
    ids=shape((1,), jnp.int32),
  )

  def begun(params, router, prompts):
    return rollout.start(policy, params, router, prompts, jax.random.key(0), s)

  return bytes_a_device(jax.eval_shape(begun, params, router, prompts))


def memory() -> int:
  """Bytes of the device; where it does not say, what this machine has available."""
  said = jax.local_devices()[0].memory_stats() or {}
  return said.get("bytes_limit") or available()


def available(root: pathlib.Path = pathlib.Path("/")) -> int:
  """Bytes of host memory that a process may take, of the container's where that has a
  bound. Args: root: of the file system."""
  found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  meminfo, bound = root / "proc/meminfo", root / "sys/fs/cgroup/memory.max"
  if meminfo.exists():
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    found.append(1024 * int(lines["MemAvailable"].split()[0]))
  if bound.exists() and (text := bound.read_text().strip()).isdigit():
    found.append(int(text))
  return min(found)
