"""What published algorithms and libraries choose, in one table.

  python -m r1jax.presets        # the table of docs/algorithms.md

A row holds what differs from `paper`, R1 itself. Values that a source leaves open are
ours and are marked so. Learning rate, group size and updates a rollout are no part of
an objective; configs have them.
"""

import dataclasses
from typing import Any

from r1jax import advantages, policy_loss
from r1jax.errors import UserError
from r1jax.objective import Objective, inert, pick

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
  # DeepSeek-R1, arXiv 2501.12948v2, section 2.1 and 3.2.1. std: the paper is silent.
  "paper": {},
  # DeepSeekMath, arXiv 2402.03300, section 4.2. Clip: not stated; PPO's usual 0.2.
  "deepseekmath": dict(clip_low=0.2, clip_high=0.2, kl_coef=0.04),
  # arXiv 2503.20783 and its code: no 1/|o|, no std, no KL.
  "dr_grpo": dict(
    advantage="dr_grpo", clip_low=0.2, clip_high=0.2, kl_coef=0.0,
    aggregation="seq-mean-token-sum-norm",
  ),
  # arXiv 2503.14476: clip-higher, token mean, dynamic sampling, overlong shaping
  # (4,096 of 20,480 tokens). The pool's size is ours.
  "dapo": dict(
    clip_low=0.2, clip_high=0.28, kl_coef=0.0, aggregation="token-mean",
    overlong_buffer=0.2, pool=3, filter_on="accuracy",
  ),
  # arXiv 2507.18071, section 5.1.
  "gspo": dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
  # MiniMax-M1, arXiv 2506.13585: no lower bound; its upper one is not stated, 5 is that
  # of ScaleRL (arXiv 2510.13786).
  "cispo": dict(
    clip="cispo", clip_low=10.0, clip_high=4.0, kl_coef=0.0, aggregation="token-mean",
  ),
  # arXiv 2402.14740: REINFORCE with a leave-one-out baseline; KL in the reward.
  "rloo": dict(
    advantage="rloo", clip="none", kl="k1-in-reward", kl_coef=0.03,
    aggregation="seq-mean-token-sum-norm", sum_norm=1.0,
  ),
  # TRL's GRPOConfig (1.10, f2cd5771): loss_type "dapo", beta 0, no vLLM.
  "trl": dict(
    std_eps=1e-4, log_ratio_clamp=0.0, clip_low=0.2, clip_high=0.2, kl_coef=0.0,
    aggregation="token-mean", old_logprobs="trainer",
  ),
  # verl's defaults with adv_estimator=grpo (1dda039b): dual clip on, KL off.
  "verl": dict(
    clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coef=0.0, kl_max=10.0,
    aggregation="token-mean", old_logprobs="trainer",
  ),
  # tunix's GRPOConfig (c7d8950f): KL is k1 in the loss, empty rows do not count.
  "tunix": dict(
    clip_low=0.2, clip_high=0.2, kl="k1-in-loss", kl_coef=0.04, force_k1_in_loss=True,
    masked_rows="drop",
  ),
  # The baseline of R1's appendix A.3, as in DeepSeekMath's Eq. 1-2: a value model, KL
  # in the reward. python -m experiments.ppo. Clip: not stated.
  "ppo": dict(
    advantage="gae", clip_low=0.2, clip_high=0.2, kl="k1-in-reward",
  ),
}
# fmt: on


def objective(preset: str = "paper", **changes: Any) -> Objective:
  """The preset's choices with some of them changed.

  Raises:
    UserError: no such preset, no such choice, or a contradiction.
  """
  row = pick(PRESETS, preset, "preset")
  names = {f.name for f in dataclasses.fields(Objective)}
  for name in changes:
    if name not in names:
      raise UserError(f"config.objective has no choice {name!r}: {sorted(names)}.")
  o = Objective(**{**row, **changes})
  if o.advantage != "gae":
    pick(advantages.ADVANTAGES, o.advantage, "advantage")
  pick(policy_loss.RATIOS, o.ratio, "ratio")
  pick(policy_loss.SURROGATES, o.clip, "clip")
  pick(policy_loss.KLS, o.kl, "kl")
  pick(policy_loss.AGGREGATIONS, o.aggregation, "aggregation")
  pick(policy_loss.OFF_POLICY, o.off_policy, "off_policy")
  return o


def without_effect(preset: str, **changes: Any) -> list[str]:
  """A sentence for each of the changes that has no effect in its combination."""
  idle = inert(objective(preset, **changes))
  return [
    f"objective.{name}={value} has no effect here: {idle[name]}."
    for name, value in changes.items()
    if name in idle
  ]


# Columns of the table.
COLUMNS = {
  "advantage": ("advantage", "std_ddof", "std_eps", "gamma", "lam"),
  "ratio": ("ratio", "log_ratio_clamp", "old_logprobs"),
  "clip": ("clip", "clip_low", "clip_high", "dual_clip", "ratio_cap"),
  "KL": ("kl", "kl_coef", "kl_max", "force_k1_in_loss"),
  "aggregation": ("aggregation", "sum_norm", "masked_rows"),
  "outputs and groups": (
    *("truncated", "truncation_penalty", "overlong_buffer", "overlong_penalty"),
    *("off_policy", "negative_mask", "pool", "filter_on"),
  ),
}
# Shown whatever their value.
NAMED = ("advantage", "std_ddof", "std_eps", "gamma", "lam", "ratio", "old_logprobs")
NAMED += (
  "log_ratio_clamp",
  "clip",
  "clip_low",
  "clip_high",
  "kl",
  "kl_coef",
  "sum_norm",
)
NAMED += ("aggregation",)


def markdown() -> str:
  """The table: a row a preset. Left out are choices without effect and, but for the
  NAMED ones, those that a preset leaves as R1 has them."""
  plain = Objective()
  lines = [
    "| preset | " + " | ".join(COLUMNS) + " |",
    "|---" * (len(COLUMNS) + 1) + "|",
  ]
  for name in PRESETS:
    o = objective(name)
    idle = inert(o)
    cells = []
    for choices in COLUMNS.values():
      said = []
      for choice in choices:
        value = getattr(o, choice)
        usual = choice not in NAMED and value == getattr(plain, choice)
        if choice not in idle and not usual:
          said.append(f"{value}" if choice == choices[0] else f"{choice} {value}")
      cells.append(", ".join(said) or "–")
    lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(markdown(), end="")
