"""The prompts of a rollout, read once: what decoding needs of them.

A part of the prompts at a time, where all at once would not fit: each device reads its
own prompts part by part, and nothing moves between devices for that.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from r1jax import sharding, slots
from r1jax.models import sequence
from r1jax.models.policy import Policy
from r1jax.prompts import PromptBatch


@struct.dataclass
class Read:
  cache: jax.Array  # N B P L
  hidden: jax.Array  # B D, of each prompt's last token, after the final norm
  norms: jax.Array  # N B float32, of each layer's output there
  experts: jax.Array | None  # N B P A, of the N MoE layers; None: not recorded
  draft_cache: jax.Array | None  # 1 B P L, the MTP module's entries; None: no drafts


ROWS = Read(cache=1, hidden=0, norms=1, experts=1, draft_cache=1)  # their axes


def read(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  *,
  drafts: bool,
  record_experts: bool,
  parts: int,
  shards: int,
) -> Read:
  """Reads B prompts.

  Args:
    policy, params, router: the network.
    prompts: B of them.
    drafts: whether the MTP module will draft.
    record_experts: whether to keep the router's choice.
    parts: how many the prompts are read in, one after another.
    shards: of the mesh, that have B / shards prompts each; parts divides that.
  """

  def some(tokens, mask):
    variables = {"params": params, "router": router}
    seq = sequence.Sequence.of_mask(mask)
    out = policy.apply(variables, tokens, seq)
    entries = None
    if drafts:
      args = out.hidden, tokens, seq
      entries = policy.apply(variables, *args, method="mtp_entries")
      # The module's input at the last token needs the one after it: an output's own.
      entries = jnp.pad(entries[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    experts = slots.narrow(policy, out.experts) if record_experts else None
    return Read(out.cache, out.hidden[:, -1], out.norms, experts, entries)

  args = prompts.tokens, prompts.mask
  return some(*args) if parts == 1 else _in_parts(some, args, parts, shards)


def _in_parts(function: Callable, args: Any, parts: int, shards: int) -> Read:
  """A part has rows of every shard, which lie side by side there."""
  rows = args[0].shape[0]
  each = rows // (shards * parts)
  pieces = [x.reshape(shards, parts, each, *x.shape[1:]) for x in args]

  def part(i):
    return [sharding.shard_batch(x[:, i].reshape(-1, *x.shape[3:])) for x in pieces]

  def split(x, axis, *sizes):
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

  def new(axis, x):
    whole = jnp.zeros((*x.shape[:axis], rows, *x.shape[axis + 1 :]), x.dtype)
    return split(sharding.shard_batch(whole, axis), axis, shards, parts, each)

  def add(found, i):
    def put(axis, whole, x):
      x = split(x, axis, shards, 1, each)
      return jax.lax.dynamic_update_slice_in_dim(whole, x, i, axis + 1)

    return jax.tree.map(put, axes, found, function(*part(i))), None

  shapes = jax.eval_shape(lambda: function(*part(0)))
  axes = jax.tree.map(lambda axis, x: None if x is None else axis, ROWS, shapes)
  found = jax.tree.map(new, axes, shapes)
  found, _ = jax.lax.scan(add, found, jnp.arange(parts))

  def join(axis, x):
    x = x.reshape(*x.shape[:axis], rows, *x.shape[axis + 3 :])
    return sharding.shard_batch(x, axis)

  return jax.tree.map(join, axes, found)
