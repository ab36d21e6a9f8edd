"""The objective: every choice in which GRPO's descendants differ, by name.

The formulas behind the names stand in advantages.py and policy_loss.py, what published
algorithms choose in presets.py.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
  """The defaults are R1's (arXiv 2501.12948, section 2.1 and 3.2.1)."""

  # -- rewards -> advantages
  advantage: str = "grpo"  # r1jax/advantages.py:ADVANTAGES, or "gae" (PPO)
  std_ddof: int = 1  # 1: squares over G - 1; 0: over G
  std_eps: float = 1e-6  # added to the std
  gamma: float = 1.0  # discount of GAE (PPO)
  lam: float = 1.0  # lambda of GAE (PPO)
  # -- ratio and clip
  ratio: str = "token"  # r1jax/policy_loss.py:RATIOS
  log_ratio_clamp: float = 20.0  # log-ratios are kept in +-this; 0: not at all
  clip: str = "ppo"  # r1jax/policy_loss.py:SURROGATES
  clip_low: float = 10.0  # ratios below 1 - this are clipped
  clip_high: float = 10.0  # ratios above 1 + this are clipped
  dual_clip: float = 0.0  # c: floor c * A of the surrogate where A < 0; 0: none
  ratio_cap: float = 0.0  # delta of two-sided clipping; 0: none
  # -- KL
  kl: str = "k3"  # r1jax/policy_loss.py:KLS, or "k1-in-reward"
  kl_coef: float = 0.001  # beta
  kl_max: float = 0.0  # k3 is kept below this; 0: not at all
  force_k1_in_loss: bool = False  # allow kl="k1-in-loss" all the same
  # -- tokens -> one number
  aggregation: str = "seq-mean-token-mean"  # r1jax/policy_loss.py:AGGREGATIONS
  sum_norm: float = 0.0  # L of seq-mean-token-sum-norm, tokens; 0: the window
  masked_rows: str = "count"  # or "drop": do outputs without loss count in row means?
  # -- outputs that hit the window
  truncated: str = "keep"  # "mask": no loss; "penalise": a lower reward
  truncation_penalty: float = 1.0  # off the reward of a truncated output
  overlong_buffer: float = 0.0  # tokens before the window's end; below 1: a share of it
  overlong_penalty: float = 1.0  # at the end of the buffer
  # -- sampler against trainer
  old_logprobs: str = "sampler"  # or "trainer": recomputed before the first update
  off_policy: str = "none"  # r1jax/policy_loss.py:OFF_POLICY
  off_policy_cap: float = 2.0  # C
  off_policy_floor: float = 0.0  # weights below this are masked too
  negative_mask: float = 0.0  # delta of DeepSeek-V3.2's mask, nats a token; 0: none
  # -- groups without variance
  pool: int = 1  # rollouts of B groups to draw from at most; 1: no dynamic sampling
  filter_on: str = "reward"  # whose variance counts: the rule reward, or a part of it

  def __post_init__(self):
    for ok, rule in contradictions(self):
      if not ok:
        raise UserError(f"config.objective.{rule}.")

  @property
  def needs_reference(self) -> bool:
    return self.kl_coef > 0

  def overlong_tokens(self, window: int) -> int:
    """The overlong buffer in tokens.

    Raises:
      UserError: it does not fit the window.
    """
    buffer = self.overlong_buffer
    tokens = round(buffer * window) if 0 < buffer < 1 else int(buffer)
    if buffer and not 1 <= tokens <= window:
      raise UserError(
        f"config.objective.overlong_buffer={buffer} is {tokens} tokens and must lie in"
        f" 1..{window}, the window; a number below 1 is a share of it (DAPO: 0.2)."
      )
    return tokens


def pick(table: Mapping[str, Any], name: str, key: str) -> Any:
  """table[name], or a UserError that lists what there is."""
  if name not in table:
    raise UserError(
      f"config.objective.{key}={name!r} is not one of {', '.join(sorted(table))}."
    )
  return table[name]


def contradictions(o: Objective) -> list[tuple[bool, str]]:
  """(holds, what came and the rule) for every rule."""

  def one_of(key: str, *names: str) -> tuple[bool, str]:
    value = getattr(o, key)
    return value in names, f"{key}={value!r} is not one of {', '.join(names)}"

  def at_least_zero(key: str) -> tuple[bool, str]:
    value = getattr(o, key)
    return value >= 0, f"{key}={value} must not be negative"

  return [
    one_of("masked_rows", "count", "drop"),
    one_of("truncated", "keep", "mask", "penalise"),
    one_of("old_logprobs", "sampler", "trainer"),
    *map(at_least_zero, ("std_eps", "log_ratio_clamp", "kl_coef", "kl_max")),
    *map(at_least_zero, ("sum_norm", "overlong_buffer", "off_policy_floor")),
    *map(at_least_zero, ("overlong_penalty", "negative_mask", "dual_clip")),
    at_least_zero("ratio_cap"),
    (
      min(o.clip_low, o.clip_high) > 0,
      f"clip_low={o.clip_low} and clip_high={o.clip_high} must be above 0; clip='none'"
      " leaves ratios unclipped",
    ),
    (
      not 0 < o.dual_clip <= 1,
      f"dual_clip={o.dual_clip} must be above 1: at 1 or below it binds at ratio 1 and"
      " stops every negative output (verl uses 3); 0 turns it off",
    ),
    (
      not 0 < o.ratio_cap <= 1 + o.clip_high,
      f"ratio_cap={o.ratio_cap} must be above 1 + clip_high = {1 + o.clip_high}: below"
      " it the upper clip could never bind; 0 turns it off",
    ),
    (
      not (o.dual_clip and o.ratio_cap),
      f"dual_clip={o.dual_clip} and ratio_cap={o.ratio_cap} bound the same side"
      " (negative advantages, large ratios) in two ways; set one of them to 0",
    ),
    (
      o.kl != "k1-in-loss" or not o.kl_coef or o.force_k1_in_loss,
      "kl='k1-in-loss' regularises nothing: on the policy's own samples the expected"
      " gradient of log pi - log ref is 0. Use kl='k2' (gradient of KL(policy ||"
      " reference)), 'k3', or 'k1-in-reward'; force_k1_in_loss=True to have it all"
      " the same",
    ),
    (
      o.truncated != "penalise" or o.truncation_penalty > 0,
      f"truncation_penalty={o.truncation_penalty} must be above 0 with"
      " truncated='penalise'",
    ),
    (
      o.off_policy == "none" or o.old_logprobs == "trainer",
      f"off_policy={o.off_policy!r} weighs the trainer's old log-probabilities against"
      " the sampler's, so it needs old_logprobs='trainer'",
    ),
    (
      o.off_policy == "none" or o.off_policy_cap > max(o.off_policy_floor, 0),
      f"off_policy_cap={o.off_policy_cap} must be above 0 and above"
      f" off_policy_floor={o.off_policy_floor}",
    ),
    (o.pool >= 1, f"pool={o.pool} must be at least 1; 1 turns dynamic sampling off"),
    (
      0 <= o.gamma <= 1 and 0 <= o.lam <= 1,
      f"gamma={o.gamma} and lam={o.lam} must lie in 0..1",
    ),
  ]


def inert(o: Objective) -> dict[str, str]:
  """{option: why it has no effect in this combination}."""
  scaled = o.advantage not in ("dr_grpo", "rloo", "gae")
  bounded = o.clip not in ("cispo", "none")
  rules = [
    ("std_ddof std_eps", scaled, f"advantage={o.advantage!r} divides by no std"),
    ("gamma lam", o.advantage == "gae", "only PPO's advantage='gae' discounts"),
    ("clip_low clip_high", o.clip != "none", "clip='none'"),
    (
      "clip_low",
      o.clip_low < 1,
      "a ratio is above 0, so 1 - clip_low is never reached",
    ),
    ("dual_clip ratio_cap", bounded, f"clip={o.clip!r} has no such bound"),
    ("kl kl_max force_k1_in_loss", o.kl_coef > 0, "kl_coef=0"),
    ("kl_max", o.kl in ("k3", "ratio-k3"), f"kl={o.kl!r} is no k3"),
    ("force_k1_in_loss", o.kl == "k1-in-loss", f"kl={o.kl!r}"),
    (
      "sum_norm",
      o.aggregation == "seq-mean-token-sum-norm",
      f"aggregation={o.aggregation!r} divides by lengths",
    ),
    ("masked_rows", o.truncated == "mask", f"truncated={o.truncated!r} masks no row"),
    (
      "masked_rows",
      o.aggregation != "token-mean",
      "aggregation='token-mean' counts tokens, not rows",
    ),
    ("truncation_penalty", o.truncated == "penalise", f"truncated={o.truncated!r}"),
    ("overlong_penalty", o.overlong_buffer > 0, "overlong_buffer=0"),
    ("overlong_buffer", o.overlong_penalty > 0, "overlong_penalty=0"),
    ("off_policy_cap off_policy_floor", o.off_policy != "none", "off_policy='none'"),
    (
      "off_policy_floor",
      o.off_policy.endswith("mask"),
      f"off_policy={o.off_policy!r} masks nothing",
    ),
    ("filter_on", o.pool > 1, "pool=1 filters no group"),
  ]
  found: dict[str, str] = {}
  for options, has_effect, why in rules:
    if not has_effect:
      for option in options.split():
        found.setdefault(option, why)
  return found
