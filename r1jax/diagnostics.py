"""What a researcher looks at after every step: extremes, percentiles, single tokens."""

from collections.abc import Mapping, Sequence

from flax import struct
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from r1jax.dynamic_sampling import Slots
from r1jax.experience import Rows
from r1jax.rewards.in_graph import Rewards


@struct.dataclass
class Trace:
  """Every token of a few groups, as the update that trained on it saw it."""

  tokens: jax.Array  # M T int32
  mask: jax.Array  # M T bool, the tokens with a loss
  logprobs: jax.Array  # M T float32, of the policy being trained
  old_logprobs: jax.Array  # M T float32
  ratio: jax.Array  # M T float32, the loss's: of a token or of its whole output
  advantages: jax.Array  # M T float32
  clipped: jax.Array  # M T int8: 0 not, 1 low, 2 high, 3 cap
  place: jax.Array  # M int32, b * G + g
  reference_logprobs: jax.Array  # M T float32; 0 where there is no reference
  prompts: jax.Array  # M P int32
  prompt_mask: jax.Array  # M P bool
  reward: jax.Array  # M float32, the total
  parts: dict[str, jax.Array]  # M float32 each, without their weights
  outcome: jax.Array | None  # M int32, a place in OUTCOMES


def trace(rows: Rows, per_token: dict, slots: Slots, count: int) -> Trace:
  """The first `count` outputs of the rollout, out of the shuffled minibatches.

  Args:
    rows: with leading axes [K, M].
    per_token: `logprobs`, `ratio` and `clipped` [K, M, T], from the updates.
    slots: what the rows are of.
    count: outputs to keep.
  """
  order = jnp.argsort(rows.place.reshape(-1))[:count]
  of_rows = dict(
    tokens=rows.completions,
    mask=rows.mask,
    logprobs=per_token["logprobs"],
    old_logprobs=rows.old_logprobs,
    ratio=per_token["ratio"],
    advantages=rows.advantages,
    clipped=per_token["clipped"],
    place=rows.place,
    reference_logprobs=rows.reference_logprobs,
    prompts=rows.prompts,
    prompt_mask=rows.prompt_mask,
  )
  of_rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_rows)
  found = _taken(of_rows, order)
  rewards = slots.rewards
  of_outputs = dict(reward=rewards.total, parts=rewards.parts, outcome=rewards.outcome)
  of_outputs = jax.tree.map(lambda x: x.reshape(-1), of_outputs)
  return Trace(**found, **_taken(of_outputs, found["place"]))


def _taken(tree: dict, places: jax.Array) -> dict:
  """Rows of all arrays of a tree, in one gather over the mesh; whole numbers below 2^24
  stay what they are."""
  one = jax.tree.map(lambda x: x[0], tree)
  flat = jax.vmap(lambda row: ravel_pytree(row)[0].astype(jnp.float32))(tree)
  back = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one))[1]
  return jax.vmap(back)(flat[places])


def of_batch(slots: Slots, rewards: Rewards, advantages: jax.Array) -> dict:
  """Percentiles and extremes of the groups that are trained on; the means over all that
  were sampled; what dynamic sampling left out.

  Args:
    slots: the groups.
    rewards: after shaping.
    advantages: [B * G, T].
  """
  filled = slots.filled[:, None] & rewards.valid
  mask = (slots.rollout.mask & filled[:, :, None]).reshape(advantages.shape)
  trained = {}
  for name, x in (("length", slots.rollout.lengths), ("reward", rewards.total)):
    kept = jnp.where(filled, x.astype(jnp.float32), jnp.nan)
    for percent in (10, 50, 90):
      trained[f"{name}_p{percent}"] = jnp.nanpercentile(kept, percent)
  trained["advantage_max"] = jnp.max(jnp.where(mask, advantages, -jnp.inf))
  trained["advantage_min"] = jnp.min(jnp.where(mask, advantages, jnp.inf))
  for name in rewards.parts.keys() - slots.rewards.parts.keys():  # what shaping added
    trained[name] = jnp.nanmean(jnp.where(filled, rewards.parts[name], jnp.nan))
  some = filled.any()  # without a group to train on these figures are 0
  trained = {name: jnp.where(some, x, 0.0) for name, x in trained.items()}
  found = {**slots.figures, **trained}
  found["groups_empty"] = (~slots.filled).sum()
  for name in ("waves", "dropped", "surplus"):
    key = name if name == "waves" else f"groups_{name}"
    found[key] = getattr(slots, name)
  return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}


def alarms(figures: dict[str, float], thresholds: Mapping[str, float]) -> list[str]:
  """A sentence for each outcome that more samples had than its threshold, a share."""
  return [
    f"{figures[f'outcome_{name}']:.1%} of the samples ended in {name!r}, more than"
    f" config.reward.alarm.{name}={share}"
    for name, share in thresholds.items()
    if name != "hacking" and figures[f"outcome_{name}"] > share
  ]


def hacked(
  train: Sequence[dict],
  evals: Sequence[dict],
  drop: float,
  score: str = "pass_at_1",
) -> str:
  """A sentence where the preference reward rises and the rules' score falls: the policy
  pleases the reward model and not people (R1, section 3.2.2 and Fig. 6). Else "".

  Args:
    train: metrics of RL steps; those with a reward model's part count.
    evals: evaluations by rules, in their order.
    drop: of the score since the last evaluation before the first such step.
    score: the name of what the rules say.
  """
  asked = [row for row in train if row.get("reward_model")]
  before = [row for row in evals if asked and row["step"] < asked[0]["step"]]
  if len(asked) < 4 or not before or evals[-1] is before[-1]:
    return ""
  half = len(asked) // 2
  first, last = (
    sum(row["reward_model"] for row in rows) / len(rows)
    for rows in (asked[:half], asked[half:])
  )
  lost = before[-1][score] - evals[-1][score]
  if last <= first or lost <= drop:
    return ""
  return (
    f"reward hacking? The preference reward rose from {first:.3f} to {last:.3f} and"
    f" {score} on held-out problems fell by {lost:.3f}, more than"
    f" config.reward.alarm.hacking={drop}. Shorten the window with preference rewards,"
    " or lower their weight."
  )


def over_updates(per_update: dict) -> dict:
  """A rollout's figures from its K updates': means, except that maxima stay maxima and
  what compares sampler and trainer is read before the first update."""
  return {
    name: x[0]
    if name.startswith("sampler_")
    else x.max()
    if name.endswith("_max")
    else x.mean()
    for name, x in per_update.items()
  }
