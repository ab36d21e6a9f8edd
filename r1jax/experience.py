"""What a step learns from: sampled outputs as training rows, seen by every policy that
the loss compares."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from r1jax import packing, sharding
from r1jax.dynamic_sampling import Slots
from r1jax.errors import UserError
from r1jax.models.policy import Forward, Policy
from r1jax.models.sequence import Sequence
from r1jax.objective import Objective
from r1jax.packing import Packing, Part
from r1jax.prompts import PromptBatch
from r1jax.rewards import in_graph
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout
from r1jax.step_config import StepConfig
from r1jax.train_state import TrainState


@struct.dataclass
class Rows:
  """Outputs as training rows: a left-padded prompt, then a right-padded completion."""

  prompts: jax.Array  # M P int32
  prompt_mask: jax.Array  # M P bool
  completions: jax.Array  # M T int32
  completion_mask: jax.Array  # M T bool, through the stop token
  in_loss: jax.Array  # M bool, outputs that have a loss
  in_mean: jax.Array  # M bool, outputs that count in means over outputs
  sampler_logprobs: jax.Array  # M T float32
  old_logprobs: jax.Array  # M T float32, the denominator of the ratio
  reference_logprobs: jax.Array  # M T float32
  advantages: jax.Array  # M T float32
  place: jax.Array  # M int32, where the row stood in the rollout, b * G + g
  experts: jax.Array | None = None  # M N P+T A, the sampler's
  support: jax.Array | None = None  # M T V/8 uint8, what could be sampled

  @property
  def mask(self) -> jax.Array:  # M T bool, the tokens with a loss
    return self.completion_mask & self.in_loss[..., None]

  @property
  def prompt_lengths(self) -> jax.Array:  # M int32
    return self.prompt_mask.sum(axis=1)

  @property
  def first(self) -> jax.Array:  # M int32, first real one of the P + T tokens
    return self.prompts.shape[1] - self.prompt_lengths


def sequences(
  rows: Rows, group: int = 1, part: Part | None = None
) -> tuple[jax.Array, Sequence]:
  """Prompt and completion as one row of tokens [M, P + T], and where they stand; of
  whole groups of so many outputs [M / G, P + G T], with their prompt there once; of a
  part of packed outputs [R, width]."""
  if part is not None:
    tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
    return part.lay(tokens, rows.first), part.sequence()
  if group == 1:
    tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
    mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
    return sharding.shard_batch(tokens), Sequence.of_mask(mask)
  prompts, mask = (
    x.reshape(-1, group, x.shape[1])[:, 0] for x in (rows.prompts, rows.prompt_mask)
  )
  outputs = rows.completions.reshape(len(prompts), -1)
  seq = Sequence.of_groups(mask, together(rows.completion_mask, group))
  tokens = jnp.concatenate([prompts, outputs], axis=1)
  return sharding.shard_batch(tokens), seq


@jax.named_scope("logprobs")
def completion_logprobs(
  policy: Policy,
  params: Any,
  router: Any,
  rows: Rows,
  temperature: float,
  *,
  replay: bool = False,
  group: int = 1,
  part: Part | None = None,
) -> tuple[jax.Array, Forward]:
  """Log-probabilities of the completions, teacher-forced, of the distribution that the
  sampler drew from: at its temperature and over its support.

  Args:
    policy, params, router: the network.
    rows: M rows.
    temperature: divides the logits.
    replay: use the experts that the sampler chose.
    group: the rows are groups of so many outputs, one after the other, and each prompt
      is computed once. The numbers are the same.
    part: the rows are packed, and these of the packed rows are computed. The numbers
      are the same, and those of outputs that are not here mean nothing.

  Returns:
    ([M, T] float32, the forward pass, a row for each output (of a part: as packed) and
    without a cache); only real tokens are counted in its load.
  """
  length = rows.prompts.shape[1]
  tokens, seq = sequences(rows, group, part)
  experts = None
  if replay and rows.experts is not None:
    experts = sampled_experts(rows, seq, part)
  variables = {"params": params, "router": router}
  out = policy.apply(variables, tokens, seq, experts)
  if part is not None:
    logprobs = _packed_logprobs(policy, variables, rows, part, out, temperature)
    return logprobs, out.replace(cache=None)
  out = out.replace(
    hidden=seq.by_output(out.hidden),
    experts=None if out.experts is None else jax.vmap(seq.by_output)(out.experts),
    cache=None,
  )
  hidden = out.hidden[:, length - 1 : -1]
  logprobs, _ = policy.apply(
    variables,
    hidden,
    rows.completions,
    rows.support,
    temperature=temperature,
    method="token_statistics",
  )
  return logprobs, out


def _packed_logprobs(policy, variables, rows, part, out, temperature):
  """[M, T]: the token after each place is predicted where the rows are, then taken."""
  tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
  before = rows.prompt_lengths - 1  # tokens that foresee nothing of the completion
  support = rows.support
  logprobs, _ = policy.apply(
    variables,
    out.hidden,
    part.lay(tokens, rows.first + 1),
    None if support is None else part.lay(support, -before),
    temperature=temperature,
    method="token_statistics",
  )
  return part.take(logprobs, before, rows.completions.shape[1])


def sampled_experts(rows: Rows, seq: Sequence, part: Part | None = None) -> jax.Array:
  """The sampler's choice where the tokens stand, [N, rows of seq, their tokens, A]."""
  if part is None:
    return jax.vmap(seq.by_group, 1)(rows.experts)
  return jax.vmap(part.lay, (1, None))(rows.experts, rows.first)


def packed(rows: Rows, config: StepConfig, parts: int) -> tuple[Rows, Packing]:
  """(the rows in the order of their places, where they stand in rows of `grpo.pack`
  tokens); a part of a packing has no more tokens than the rows in so many parts."""
  lengths = rows.prompt_lengths + rows.completion_mask.sum(axis=1)
  count, longest = len(lengths), rows.prompts.shape[1] + rows.completions.shape[1]
  config.check_pack(rows.prompts.shape[1])
  found = packing.pack(lengths, config.pack, count // parts * longest)
  return found.sort(rows), found


def rows_of(prompts: PromptBatch, rollout: Rollout) -> Rows:
  """A rollout's outputs, one a row, in their order; advantages are still 0.

  Args:
    prompts: B problems.
    rollout: [B, G, ...].
  """
  b, g, t = rollout.tokens.shape

  def of_outputs(x):
    return x.reshape(b * g, *x.shape[2:])

  def of_prompts(x):
    return jnp.repeat(x, g, axis=0)

  experts = None
  if rollout.experts is not None:
    both = [of_prompts(rollout.prompt_experts), of_outputs(rollout.experts)]
    experts = jnp.concatenate(both, axis=2)
  logprobs = of_outputs(rollout.logprobs)
  return Rows(
    prompts=of_prompts(prompts.tokens),
    prompt_mask=of_prompts(prompts.mask),
    completions=of_outputs(rollout.tokens),
    completion_mask=of_outputs(rollout.mask),
    in_loss=jnp.ones(b * g, bool),
    in_mean=jnp.ones(b * g, bool),
    sampler_logprobs=logprobs,
    old_logprobs=logprobs,
    reference_logprobs=jnp.zeros((b * g, t), jnp.float32),
    advantages=jnp.zeros((b * g, t), jnp.float32),
    place=jnp.arange(b * g, dtype=jnp.int32),
    experts=experts,
    support=None if rollout.support is None else of_outputs(rollout.support),
  )


def counted(slots: Slots, o: Objective) -> Rows:
  """The rows of the slots, with what the objective says of truncated outputs: whether
  they have a loss, and whether they count in means. Empty slots and samples that were
  not scored do neither."""
  rows = rows_of(slots.prompts, slots.rollout)
  filled = (slots.filled[:, None] & slots.rewards.valid).reshape(-1)
  in_loss = filled
  if o.truncated == "mask":
    in_loss = filled & slots.rollout.ended.reshape(-1)
  in_mean = in_loss if o.masked_rows == "drop" else filled
  return rows.replace(in_loss=in_loss, in_mean=in_mean)


def together(x: jax.Array, size: int) -> jax.Array:
  """[M, ...] -> [M / size, size, ...]."""
  return x.reshape(-1, size, *x.shape[1:])


def apart(x: jax.Array) -> jax.Array:
  """[N, size, ...] -> [N size, ...]."""
  return x.reshape(-1, *x.shape[2:])


def by_parts(
  function: Callable[[Rows], Any], rows: Rows, parts: int, group: int = 1
) -> Any:
  """function(rows), a part at a time; part i takes groups i, i + parts, ..."""

  def cut(x):
    return together(together(x, group), parts).swapaxes(0, 1)

  def join(x):
    return apart(apart(x.swapaxes(0, 1)))

  def part(x):
    found = function(jax.tree.map(apart, x))
    return jax.tree.map(lambda x: together(x, group), found)

  return jax.tree.map(join, jax.lax.map(part, jax.tree.map(cut, rows)))


def by_packed_parts(
  function: Callable[[Rows, Part], jax.Array], rows: Rows, places: Packing
) -> jax.Array:
  """[M, T] float32 of all outputs, of which function(rows, part) says it for those that
  are in the part. Args: rows and places as from `packed`."""

  def add(i, total):
    part = places.part(i)
    return jnp.where(part.here[:, None], function(rows, part), total)

  zeros = jnp.zeros(rows.completions.shape, jnp.float32)
  return places.unsort(jax.lax.fori_loop(0, places.parts, add, zeros))


def recall(rows: Rows, state: TrainState, policy: Policy, config: StepConfig) -> Rows:
  """Fills in what the reference and, if asked, the trainer's own pass say of the rows.

  Raises:
    UserError: a KL term without a reference.
  """
  c, o = config, config.objective
  parts = c.minibatches * c.micro_batches
  placed = packed(rows, c, parts) if c.pack else None

  def logprobs(params, router, replay):
    def found(some, part=None):
      how = dict(replay=replay, group=c.unit, part=part)
      network = policy, params, router
      return completion_logprobs(*network, some, c.temperature, **how)[0]

    if placed:
      return by_packed_parts(found, *placed)
    return by_parts(found, rows, parts, c.unit)

  if o.old_logprobs == "trainer":
    with jax.named_scope("old"):
      old = logprobs(state.params, state.router, c.routing_replay)
    rows = rows.replace(old_logprobs=old)
  if o.needs_reference:
    if state.reference is None:
      raise UserError(
        f"config.objective.kl_coef={o.kl_coef} needs a reference and the state has"
        " none. Make it with reference=True, or set kl_coef=0."
      )
    with jax.named_scope("reference"):
      reference = logprobs(state.reference.params, state.reference.router, False)
    rows = rows.replace(reference_logprobs=reference)
  return rows


def shaped(slots: Slots, rows: Rows, o: Objective, window: int) -> Rewards:
  """The rule's rewards with what the objective adds, each a part with its coefficient
  for a weight: the overlong penalty, the price of a truncated output, KL in the reward.

  Args:
    slots: the groups.
    rows: their rows in the same order, after `recall`.
    o: the choices.
    window: output tokens.
  """
  rewards, rollout = slots.rewards, slots.rollout
  if o.overlong_buffer:
    buffer = o.overlong_tokens(window)
    near_end = in_graph.overlong(rollout.lengths, window=window, buffer=buffer)
    rewards = rewards.plus("overlong", o.overlong_penalty, near_end)
  if o.truncated == "penalise":
    price = jnp.where(rollout.ended, 0.0, -1.0)
    rewards = rewards.plus("truncation", o.truncation_penalty, price)
  if o.kl_coef and o.kl == "k1-in-reward" and o.advantage != "gae":
    kl = token_kl(rows).sum(axis=1).reshape(rewards.total.shape)
    rewards = rewards.plus("kl_in_reward", o.kl_coef, -kl)
  return rewards


def token_kl(rows: Rows) -> jax.Array:
  """k1 a token, log pi_old - log pi_reference, [M, T]; 0 where there is no token."""
  gap = rows.old_logprobs - rows.reference_logprobs
  return jnp.where(rows.completion_mask, gap, 0.0)


def shuffled(rows: Any, key: jax.Array, minibatches: int, group: int = 1) -> Any:
  """Arrays with a first axis of M rows, in a random order, as [K, M / K, ...]; groups
  of so many rows stay together; every minibatch is spread over all devices."""
  order = jax.random.permutation(key, jax.tree.leaves(rows)[0].shape[0] // group)
  order = order.reshape(minibatches, -1)

  def one(x):
    x = jax.vmap(apart)(together(x, group)[order])
    return sharding.shard_batch(x, axis=1)

  return jax.tree.map(one, rows)
