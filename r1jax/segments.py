"""A step in pieces, for rollouts too long to lose.

The pieces are those of `grpo.whole_step`, each its own program, and give the same
numbers. Only `update` donates the state, so that until the first update of a step the
last finished state can still be saved.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax import diagnostics, dynamic_sampling, grpo
from r1jax import rollout as rollout_lib
from r1jax.models.policy import Policy
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout
from r1jax.sampling import Sampler
from r1jax.slots import Decoding
from r1jax.train_state import TrainState


@struct.dataclass
class Seen:
  """What the host looks at after a segment of a rollout."""

  running: jax.Array  # [] bool
  over: jax.Array  # B G bool, outputs to which nothing is added any more
  lengths: jax.Array  # B G int32
  tokens: jax.Array  # B G T int32

  @classmethod
  def of(cls, carry: Decoding) -> "Seen":
    o = carry.outputs
    over = o.ended | o.starved | (o.lengths >= o.limits)
    # A copy of the tokens: those of the carry are given to the next segment.
    return cls(carry.running, over, jnp.copy(o.lengths), jnp.copy(o.tokens))


@dataclasses.dataclass(frozen=True)
class Segments:
  """The compiled pieces of a step."""

  wave: Callable
  start: Callable
  advance: Callable
  score: Callable
  fill: Callable
  experience: Callable
  update: Callable
  trace: Callable
  config: grpo.GRPOConfig
  segment_tokens: int
  ahead: Callable | None
  phase: Callable[[str], contextlib.AbstractContextManager]

  def __call__(
    self, state: TrainState, prompts: PromptBatch, key: jax.Array
  ) -> tuple[TrainState, Rollout, dict, diagnostics.Trace]:
    """As `grpo.whole_step`; the state's buffers are spent by the first update."""
    jax.block_until_ready(state.step)  # the update before is not this rollout's time
    slots = self._collect(state, prompts, key)
    rows, metrics = self.experience(state, slots, key)
    updates = []
    for i in range(self.config.minibatches):
      state, *figures = self.update(state, jax.tree.map(lambda x, i=i: x[i], rows))
      updates.append(figures)
    per_update, per_token = jax.tree.map(lambda *x: jnp.stack(x), *updates)
    metrics = {**metrics, **diagnostics.over_updates(per_update)}
    return state, slots.rollout.spoken(), metrics, self.trace(rows, per_token, slots)

  def _collect(self, state: TrainState, pool: PromptBatch, key: jax.Array) -> Any:
    """As `dynamic_sampling.collect`."""
    slots = None
    for i in range(self.config.objective.pool):
      prompts, earlier = self.wave(pool, i)
      with self.phase("rollout"):
        rollout = jax.block_until_ready(self._rollout(state, prompts, earlier, key))
      with self.phase("reward"):
        wave = jax.block_until_ready(self.score(prompts, rollout))
      if self.config.objective.pool == 1:
        return wave
      slots = dynamic_sampling.empty(wave) if slots is None else slots
      slots = self.fill(slots, wave)
      if slots.filled.all():
        break
    return slots

  def _rollout(self, state, prompts, earlier, key) -> Rollout:
    carry, seen = self.start(state, prompts, key, earlier)
    limit, told = 0, set()
    while seen.running:
      limit += self.segment_tokens
      carry, following = self.advance(state, carry, limit)  # it works while we go on
      if self.ahead:
        self._tell(prompts.ids, seen, told)
      seen = following
    return rollout_lib.finish(carry)

  def _tell(self, ids: jax.Array, seen: "Seen", told: set) -> None:
    """Hands the outputs that are over, and were not before, to the host's rewards."""
    new_ids, outputs = [], []
    parts = (ids, seen.over, seen.lengths, seen.tokens)
    for shards in zip(*(x.addressable_shards for x in parts), strict=True):
      first = shards[1].index[0].start or 0
      of, over, lengths, tokens = (np.asarray(shard.data) for shard in shards)
      for row, sample in np.argwhere(over):
        place = first + int(row), int(sample)
        if place not in told:
          told.add(place)
          new_ids.append(int(of[row]))
          outputs.append(tokens[row, sample, : lengths[row, sample]])
    if outputs:
      self.ahead(new_ids, outputs)


def make_segments(
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], Rewards],
  config: grpo.GRPOConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
  segment_tokens: int,
  ahead: Callable | None = None,
  state_shardings: Any = None,
  phase: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Segments:
  """Jits the pieces.

  Args:
    policy, optimizer, reward_fn, config, stop_ids, pad_id: as in `grpo.whole_step`.
    segment_tokens: how many tokens a slot decodes in a program.
    ahead: (problems' ids, outputs' tokens) is called with the outputs that a segment
      has finished, while the next one runs: HostReward.ahead.
    state_shardings: how an updated state is laid out; None leaves it to the compiler.
    phase: (name) -> a context that times a rollout, or its rewards: Clock.phase.
  """
  c = config

  def wave(pool, i):
    earlier = rollout_lib.repeats(pool.ids)
    if c.objective.pool == 1:
      return pool, earlier
    batch = pool.ids.shape[0] // c.objective.pool
    return dynamic_sampling.wave_of((pool, earlier), i, batch)

  sampler = Sampler(**c.sampling(stop_ids=stop_ids, pad_id=pad_id))

  def start(state: TrainState, prompts: PromptBatch, key, earlier) -> Any:
    key = grpo.key_of(key, state.step, grpo.ROLLOUT)
    weights = policy, state.params, state.router
    carry = rollout_lib.start(*weights, prompts, key, sampler, earlier=earlier)
    return carry, Seen.of(carry)

  def advance(state: TrainState, carry, limit) -> Any:
    weights = policy, state.params, state.router
    carry = rollout_lib.advance(*weights, carry, limit, sampler)
    return carry, Seen.of(carry)

  def score(prompts, rollout):
    rewards = jax.named_scope("reward")(reward_fn)(prompts, rollout)
    return dynamic_sampling.all_of(prompts, rollout, rewards)

  def trace(rows, per_token, slots):
    return diagnostics.trace(rows, per_token, slots, c.traced_groups * c.group_size)

  experience = functools.partial(grpo.experience, policy=policy, config=config)
  update = functools.partial(grpo.update, policy=policy, optimizer=optimizer, config=c)
  fill = functools.partial(dynamic_sampling.fill, filter_on=c.objective.filter_on)
  out = state_shardings, None, None
  return Segments(
    wave=jax.jit(wave),
    start=jax.jit(start),
    advance=jax.jit(advance, donate_argnums=1),
    score=jax.jit(score),
    fill=jax.jit(fill, donate_argnums=0),
    experience=jax.jit(experience),
    update=jax.jit(update, donate_argnums=0, out_shardings=out),
    trace=jax.jit(trace),
    config=c,
    segment_tokens=segment_tokens,
    ahead=ahead,
    phase=phase,
  )
