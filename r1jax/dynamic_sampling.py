"""Which sampled groups are trained on: all of a rollout, or the first B that can teach.

A group whose rewards are all equal has no advantage. With dynamic sampling (DAPO, arXiv
2503.14476, section 3.2) a step draws waves of B problems from a pool of `pool` * B,
and its B slots take the informative groups until they are full or the pool is spent.

Slots are filled in the order of the pool and a wave is waited for to its end, so which
groups are taken does not depend on how soon they were answered. A slot that stays empty
has no loss and no share in any mean.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout, repeats


@struct.dataclass
class Slots:
  """The groups that a step trains on, and what was sampled to find them."""

  prompts: PromptBatch  # B
  rollout: Rollout  # B G
  rewards: Rewards  # B G
  filled: jax.Array  # B bool
  figures: dict[str, jax.Array]  # means over all sampled groups, dropped ones included
  waves: jax.Array  # [] int32, rollouts of B problems
  dropped: jax.Array  # [] int32, groups without variance that were left out
  surplus: jax.Array  # [] int32, informative groups for which no slot was left


def figures(rollout: Rollout, rewards: Rewards) -> dict[str, jax.Array]:
  """Means over a rollout, of rewards over the samples that were scored; and the share
  of each outcome."""
  some = rewards.valid.any(axis=1)
  equal = some & ~varied(rewards.total, rewards.valid)
  outcomes = {}
  if rewards.outcome is not None:
    for i, name in enumerate(OUTCOMES):
      outcomes[f"outcome_{name}"] = (rewards.outcome == i).mean(dtype=jnp.float32)
  return {
    "reward": rewards.mean(rewards.total),
    **{name: rewards.mean(part, name) for name, part in rewards.parts.items()},
    **outcomes,
    "length": rollout.lengths.mean(dtype=jnp.float32),
    "entropy": rollout.entropy.sum() / rollout.mask.sum(),
    "truncated": 1.0 - rollout.ended.mean(dtype=jnp.float32),
    "equal_groups": equal.sum() / jnp.maximum(some.sum(), 1),
    **rollout.figures(),
  }


def varied(x: jax.Array, valid: jax.Array) -> jax.Array:
  """[B] bool: whether the valid ones of a group's G values are not all the same."""
  highest = jnp.where(valid, x, -jnp.inf).max(axis=1)
  return highest > jnp.where(valid, x, jnp.inf).min(axis=1)


def informative(rewards: Rewards, filter_on: str) -> jax.Array:
  """[B] bool: the groups whose reward, or one part of it, is not the same for all.

  Raises:
    UserError: no such part.
  """
  if filter_on != "reward" and filter_on not in rewards.parts:
    raise UserError(
      f"config.objective.filter_on={filter_on!r} is neither 'reward' nor a part of it:"
      f" {', '.join(sorted(rewards.parts))}."
    )
  x = rewards.total if filter_on == "reward" else rewards.parts[filter_on]
  return varied(x, rewards.valid)


def all_of(prompts: PromptBatch, rollout: Rollout, rewards: Rewards) -> Slots:
  """Every group of one rollout has its slot: no dynamic sampling."""
  return Slots(
    prompts=prompts,
    rollout=rollout,
    rewards=rewards,
    filled=jnp.ones(rewards.total.shape[0], bool),
    figures=figures(rollout, rewards),
    waves=jnp.ones((), jnp.int32),
    dropped=jnp.zeros((), jnp.int32),
    surplus=jnp.zeros((), jnp.int32),
  )


def empty(like: Slots) -> Slots:
  """No slot filled, nothing counted. Args: a Slots, or its shapes."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def fill(slots: Slots, wave: Slots, filter_on: str) -> Slots:
  """Puts the informative groups of one more wave (as `all_of` gives it) into the empty
  slots, in their order."""
  batch = slots.filled.shape[0]
  good = informative(wave.rewards, filter_on)
  place = slots.filled.sum() + jnp.cumsum(good) - 1
  target = jnp.where(good & (place < batch), place, batch)  # `batch`: nowhere

  def put(x, new):
    return x.at[target].set(new, mode="drop")

  share = 1.0 / (slots.waves + 1)
  return Slots(
    prompts=jax.tree.map(put, slots.prompts, wave.prompts),
    rollout=jax.tree.map(put, slots.rollout, wave.rollout),
    rewards=jax.tree.map(put, slots.rewards, wave.rewards),
    filled=put(slots.filled, jnp.ones(batch, bool)),
    figures=jax.tree.map(lambda a, b: a + share * (b - a), slots.figures, wave.figures),
    waves=slots.waves + 1,
    dropped=slots.dropped + (~good).sum(),
    surplus=slots.surplus + (good & (place >= batch)).sum(),
  )


def wave_of(pool: PromptBatch, wave: int | jax.Array, batch: int) -> PromptBatch:
  """The `wave`-th `batch` problems of the pool, its rows spread like the pool's."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(
      x.reshape(batch, -1, *x.shape[1:]), wave, axis=1, keepdims=False
    ),
    pool,
  )


def collect(
  pool: PromptBatch,
  draw: Callable[[PromptBatch, jax.Array], Rollout],
  reward_fn: Callable[[PromptBatch, Rollout], Rewards],
  o: Objective,
) -> Slots:
  """Samples until the slots are full or the pool is spent, in the graph.

  Args:
    pool: `o.pool` * B problems; wave w takes rows w, w + pool, w + 2 pool, ...
    draw: (problems, how often each stood in the pool before) -> rollout.
    reward_fn: its rewards.
    o: the choices.
  """
  earlier, reward_fn = repeats(pool.ids), jax.named_scope("reward")(reward_fn)
  if o.pool == 1:
    rollout = draw(pool, earlier)
    return all_of(pool, rollout, reward_fn(pool, rollout))
  batch = pool.ids.shape[0] // o.pool

  def sampled(wave):
    prompts, before = wave_of((pool, earlier), wave, batch)
    rollout = draw(prompts, before)
    return all_of(prompts, rollout, reward_fn(prompts, rollout))

  def short(slots):
    return (slots.waves < o.pool) & ~slots.filled.all()

  def more(slots):
    return fill(slots, sampled(slots.waves), o.filter_on)

  nothing = empty(jax.eval_shape(sampled, jnp.zeros((), jnp.int32)))
  return jax.lax.while_loop(short, more, nothing)
