"""A step in pieces, for rollouts too long to lose.

The pieces are those of `grpo.whole_step`, each its own program, and give the same
numbers. Only `update` donates the state, so that until the first update of a step the
last finished state can still be saved.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import optax

from r1jax import diagnostics, dynamic_sampling, grpo
from r1jax import rollout as rollout_lib
from r1jax.models.policy import Policy
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout
from r1jax.support import truncates
from r1jax.train_state import TrainState


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

  def __call__(
    self, state: TrainState, prompts: PromptBatch, key: jax.Array
  ) -> tuple[TrainState, Rollout, dict, diagnostics.Trace]:
    """As `grpo.whole_step`; the state's buffers are spent by the first update."""
    slots = self._collect(state, prompts, key)
    rows, metrics = self.experience(state, slots, key)
    updates = []
    for i in range(self.config.minibatches):
      state, *figures = self.update(state, jax.tree.map(lambda x, i=i: x[i], rows))
      updates.append(figures)
    per_update, per_token = jax.tree.map(lambda *x: jax.numpy.stack(x), *updates)
    metrics = {**metrics, **diagnostics.over_updates(per_update)}
    return state, slots.rollout.spoken(), metrics, self.trace(rows, per_token)

  def _collect(self, state: TrainState, pool: PromptBatch, key: jax.Array) -> Any:
    """As `dynamic_sampling.collect`."""
    slots = None
    for i in range(self.config.objective.pool):
      prompts, earlier = self.wave(pool, i)
      wave = self.score(prompts, self._rollout(state, prompts, earlier, key))
      if self.config.objective.pool == 1:
        return wave
      slots = dynamic_sampling.empty(wave) if slots is None else slots
      slots = self.fill(slots, wave)
      if slots.filled.all():
        break
    return slots

  def _rollout(self, state, prompts, earlier, key) -> Rollout:
    carry = self.start(state, prompts)
    limit = 0
    while limit < self.config.max_tokens and not carry.done.all():
      limit = min(limit + self.segment_tokens, self.config.max_tokens)
      carry = self.advance(state, prompts, carry, key, earlier, limit)
    return rollout_lib.finish(carry)


def make_segments(
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], Rewards],
  config: grpo.GRPOConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
  segment_tokens: int,
  state_shardings: Any = None,
) -> Segments:
  """Jits the pieces.

  Args:
    policy, optimizer, reward_fn, config, stop_ids, pad_id: as in `grpo.whole_step`.
    segment_tokens: how many tokens a program decodes.
    state_shardings: how an updated state is laid out; None leaves it to the compiler.
  """
  c = config

  def wave(pool, i):
    earlier = rollout_lib.repeats(pool.ids)
    if c.objective.pool == 1:
      return pool, earlier
    batch = pool.ids.shape[0] // c.objective.pool
    return dynamic_sampling.wave_of((pool, earlier), i, batch)

  def start(state: TrainState, prompts: PromptBatch) -> Any:
    return rollout_lib.start(
      policy,
      state.params,
      state.router,
      prompts,
      group_size=c.group_size,
      max_tokens=c.max_tokens,
      pad_id=pad_id,
      truncated_support=truncates(c.top_k, c.top_p),
    )

  def advance(state, prompts, carry, key, earlier, limit):
    return rollout_lib.advance(
      policy,
      state.params,
      state.router,
      prompts,
      carry,
      grpo.key_of(key, state.step, grpo.ROLLOUT),
      limit,
      temperature=c.temperature,
      stop_ids=stop_ids,
      pad_id=pad_id,
      top_k=c.top_k,
      top_p=c.top_p,
      earlier=earlier,
    )

  def score(prompts, rollout):
    return dynamic_sampling.all_of(prompts, rollout, reward_fn(prompts, rollout))

  def trace(rows, per_token):
    return diagnostics.trace(rows, per_token, c.traced_groups * c.group_size)

  experience = functools.partial(grpo.experience, policy=policy, config=config)
  update = functools.partial(grpo.update, policy=policy, optimizer=optimizer, config=c)
  fill = functools.partial(dynamic_sampling.fill, filter_on=c.objective.filter_on)
  out = state_shardings, None, None
  return Segments(
    wave=jax.jit(wave),
    start=jax.jit(start),
    advance=jax.jit(advance, donate_argnums=2),
    score=jax.jit(score),
    fill=jax.jit(fill, donate_argnums=0),
    experience=jax.jit(experience),
    update=jax.jit(update, donate_argnums=0, out_shardings=out),
    trace=jax.jit(trace),
    config=c,
    segment_tokens=segment_tokens,
  )
