"""From a sample's rewards to its reward: the compositions of R1's stages.

  R1-Zero, Eq. 4:          R_rule = R_accuracy + R_format
  RL stage 1, Eq. 7:       R = R_rule + R_language
  RL stage 2, Eq. 8-10:    R = R_reasoning + R_language, R_reasoning = R_rule, for a
                           reasoning problem, and
                           R = R_general + R_language, R_general = R_model + R_format,
                           for a general one

(arXiv 2501.12948v2.) All weights are 1 in the paper; here each has a name.
"""

from collections.abc import Mapping
import dataclasses

COMPOSITIONS = {
  "zero": ("accuracy", "format"),
  "stage_1": ("accuracy", "format", "language"),
  "stage_2_reasoning": ("accuracy", "format", "language"),
  "stage_2_general": ("reward_model", "format", "language"),
}


@dataclasses.dataclass(frozen=True)
class Breakdown:
  """A sample's reward, and all that it came of."""

  total: float  # sum of weights * parts
  parts: Mapping[str, float]
  outcome: str  # one of verdict.OUTCOMES
  detail: str = ""


def total(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
  """sum_k w_k R_k. Args: the same names on both sides.

  Raises:
    ValueError: a part without a weight, or a weight without its part.
  """
  if parts.keys() != weights.keys():
    raise ValueError(
      f"the parts {sorted(parts)} and the weights {sorted(weights)} must have the same"
      " names."
    )
  return sum(weights[name] * part for name, part in parts.items())


def composed(composition: str, parts: Mapping[str, float], **weights: float) -> float:
  """The reward of a stage.

  Args:
    composition: a name in COMPOSITIONS.
    parts: at least those that the composition names; others are left out.
    weights: of parts, 1 where not given.

  Raises:
    ValueError: no such composition, a part that is missing, or a weight of none.
  """
  if composition not in COMPOSITIONS:
    raise ValueError(
      f"composition {composition!r} is not one of {', '.join(COMPOSITIONS)}."
    )
  names = COMPOSITIONS[composition]
  missing = [name for name in names if name not in parts]
  if missing:
    raise ValueError(f"{composition} needs the reward {missing[0]!r}.")
  if weights.keys() - set(names):
    raise ValueError(
      f"{composition} has no reward {sorted(weights.keys() - set(names))}"
    )
  return total(
    {name: parts[name] for name in names},
    {name: weights.get(name, 1.0) for name in names},
  )
