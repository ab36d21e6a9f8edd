"""What ails a run of RL, in plain words, each with the knob to turn.

A check looks at the last rollouts' rows of metrics.jsonl and speaks when they all say
the same. A run asks them of itself as it goes; `python -m experiments.doctor FOLDER`
asks them of any run. Where one complaint explains another, the first alone is made.
"""

from collections.abc import Callable, Sequence
import dataclasses
import statistics

LOOK = 5  # rollouts that have to agree
NOTE = "loss near 0"  # is no fault


@dataclasses.dataclass(frozen=True)
class Complaint:
  name: str
  text: str  # what is seen, and what to turn


def examine(train: Sequence[dict], look: int = LOOK) -> list[Complaint]:
  """What the last rollouts say.

  Args:
    train: rows of RL's metrics, from the first rollout on.
    look: how many of the last have to agree; fewer rows than that say nothing.
  """
  rows = [{k: v for k, v in row.items() if v is not None} for row in train]
  if len(rows) < look:
    return []
  found: list[Complaint] = []
  for name, (check, explained_by) in CHECKS.items():
    if any(complaint.name in explained_by for complaint in found):
      continue
    try:
      text = check(rows, rows[-look:])
    except KeyError:  # a figure was not finite, or the run has none of its kind
      continue
    if text:
      found.append(Complaint(name, text))
  return found


def mean(rows: Sequence[dict], key: str) -> float:
  """Of what rows have of it; 0 without any."""
  values = [row[key] for row in rows if row.get(key) is not None]
  return statistics.fmean(values) if values else 0.0


def gone(row: dict) -> float:
  """Nats a token from the reference, or where there is none from the sampler."""
  return row.get("kl") or row.get("kl_old") or 0.0


def truncated(rows: list[dict], last: list[dict]) -> str:
  if min(row["truncated"] for row in last) < 0.8:
    return ""
  return (
    f"{mean(last, 'truncated'):.0%} of the outputs fill the window and are cut off, so"
    " no answer is ever finished. Widen config.windows, or make the policy stop: a base"
    " that has seen outputs end, config.data.examples to show some."
  )


def no_format(rows: list[dict], last: list[dict]) -> str:
  if max(row["format"] for row in last) > 0.005:
    return ""
  return (
    "no output has the form that is asked for, so there is no answer to judge. Show the"
    " form: config.data.examples=3, config.data.template, or a base that has seen tags"
    " (config.pretrain.mix); or ask for another, config.reward.format_style. The first"
    " outputs are in samples.jsonl."
  )


def equal_groups(rows: list[dict], last: list[dict]) -> str:
  if min(row["equal_groups"] for row in last) < 0.95 or mean(last, "accuracy") > 0.9:
    return ""
  return (
    f"in {mean(last, 'equal_groups'):.0%} of the groups all outputs have the same"
    f" reward ({mean(last, 'reward'):.2f} in the mean), so no output has an advantage"
    " and nothing is learned. Ask what is right sometimes: other problems"
    " (config.chain, config.data.problems), a better base (config.pretrain.steps), a"
    " larger config.grpo.group_size, a higher config.grpo.temperature; or sample until"
    " groups differ (config.objective.preset=dapo)."
  )


def entropy(rows: list[dict], last: list[dict]) -> str:
  before, now = mean(rows[:1], "entropy"), mean(last, "entropy")
  if not now < 0.1 * min(before, 1.0) or mean(last, "accuracy") > 0.9:
    return ""
  return (
    f"the entropy fell from {before:.3f} to {now:.4f} nats a token: the outputs of a"
    " group are all alike and nothing new is tried. Begin again from an earlier"
    " checkpoint with a lower config.optimizer.learning_rate, a higher"
    " config.grpo.temperature, or a higher config.objective.clip_high."
  )


def divergence(rows: list[dict], last: list[dict]) -> str:
  now = statistics.fmean(map(gone, last))
  if now < 1.0:
    return ""
  return (
    f"the policy is {now:.2f} nats a token away from its reference: it left it faster"
    " than rewards can steer. Begin again with a lower config.optimizer.learning_rate,"
    " a lower config.optimizer.clip_norm, or a higher config.objective.kl_coef."
  )


def rate_too_small(rows: list[dict], last: list[dict]) -> str:
  """Neither the reward nor the policy moves, though there are gradients."""
  first = rows[: len(last)]
  if len(rows) < 3 * len(last) or mean(last, "grad_norm") < 1e-6:
    return ""
  most = max(map(gone, rows))
  # Router biases move without a gradient, and turn a few tokens.
  if abs(mean(last, "reward") - mean(first, "reward")) > 0.1 or most > 2e-3:
    return ""
  return (
    f"after {len(rows)} rollouts the policy is where it was (at most {most:.0e} nats a"
    f" token away), though gradients of norm {mean(last, 'grad_norm'):.2g} are there."
    " Raise config.optimizer.learning_rate, tenfold to begin with."
  )


def length_paid(rows: list[dict], last: list[dict]) -> str:
  if len(rows) < 3 * len(last):
    return ""
  first = rows[: len(last)]
  longer = mean(last, "length") / max(mean(first, "length"), 1.0)
  paid = mean(last, "reward") - mean(first, "reward")
  right = mean(last, "accuracy") - mean(first, "accuracy")
  if longer < 1.25 or paid < 0.05 or right > 0.1 * paid:
    return ""
  return (
    f"outputs are {longer:.1f} times as long and rewards rose by {paid:.2f}, yet"
    f" answers are no better ({right:+.2f}): length is what is paid. Look at the"
    " longest outputs in samples.jsonl, and at what each reward gives"
    " (experiments.score). Lower the weight of what they collect (config.reward.rules),"
    " or charge for length (config.objective.overlong_penalty)."
  )


def loss_near_zero(rows: list[dict], last: list[dict]) -> str:
  still = max(abs(row["loss"]) for row in last) < 1e-3
  learns = min(row["grad_norm"] for row in last) > 1e-3
  if not (still and learns) or max(row["clip_fraction"] for row in last) > 1e-3:
    return ""
  return (
    "the loss stays near 0 and has to: outputs are learned from by the policy that drew"
    " them, so ratios are 1, and the advantages of a group add up to 0. Its gradient"
    f" does not (norm {mean(last, 'grad_norm'):.2g}). Follow the reward, not the loss;"
    " there is nothing to turn."
  )


# name -> (check, the complaints that explain it)
CHECKS: dict[str, tuple[Callable[[list[dict], list[dict]], str], tuple[str, ...]]] = {
  "truncated": (truncated, ()),
  "KL exploded": (divergence, ()),
  "entropy collapsed": (entropy, ("truncated", "KL exploded")),
  "no format": (no_format, ("truncated", "KL exploded", "entropy collapsed")),
  "equal groups": (
    equal_groups,
    ("truncated", "KL exploded", "entropy collapsed", "no format"),
  ),
  "learning rate too small": (
    rate_too_small,
    ("truncated", "no format", "equal groups"),
  ),
  "length is paid": (length_paid, ("truncated", "KL exploded")),
  NOTE: (
    loss_near_zero,
    ("truncated", "KL exploded", "equal groups", "learning rate too small"),
  ),
}
