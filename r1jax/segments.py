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

from r1jax import grpo
from r1jax import rollout as rollout_lib
from r1jax.models.policy import Policy
from r1jax.prompts import PromptBatch
from r1jax.rollout import Rollout
from r1jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Segments:
  """The compiled pieces of a step."""

  start: Callable
  advance: Callable
  experience: Callable
  update: Callable
  config: grpo.GRPOConfig
  segment_tokens: int

  def __call__(
    self, state: TrainState, prompts: PromptBatch, key: jax.Array
  ) -> tuple[TrainState, Rollout, dict]:
    """As `grpo.whole_step`; the state's buffers are spent by the first update."""
    carry = self.start(state, prompts)
    limit = 0
    while limit < self.config.max_tokens and not carry.done.all():
      limit = min(limit + self.segment_tokens, self.config.max_tokens)
      carry = self.advance(state, prompts, carry, key, limit)
    rollout = rollout_lib.finish(carry)
    rows, metrics = self.experience(state, prompts, rollout, key)
    per_update = []
    for i in range(self.config.minibatches):
      state, figures = self.update(state, jax.tree.map(lambda x, i=i: x[i], rows))
      per_update.append(figures)
    stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *per_update)
    return state, rollout, {**metrics, **grpo.over_minibatches(stacked)}


def make_segments(
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  reward_fn: Callable[[PromptBatch, Rollout], dict],
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

  def start(state: TrainState, prompts: PromptBatch) -> Any:
    return rollout_lib.start(
      policy,
      state.params,
      state.router,
      prompts,
      group_size=c.group_size,
      max_tokens=c.max_tokens,
      pad_id=pad_id,
    )

  def advance(state, prompts, carry, key, limit):
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
    )

  experience = functools.partial(
    grpo.experience, policy=policy, reward_fn=reward_fn, config=c
  )
  update = functools.partial(grpo.update, policy=policy, optimizer=optimizer, config=c)
  return Segments(
    start=jax.jit(start),
    advance=jax.jit(advance, donate_argnums=2),
    experience=jax.jit(experience),
    update=jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, None)),
    config=c,
    segment_tokens=segment_tokens,
  )
