"""RoPE of Hugging Face's config.json <-> theta, Yarn and Llama3.

Older files say rope_theta and rope_scaling (whose kind is "type" or "rope_type"), newer
ones rope_parameters.
"""

from collections.abc import Mapping
import math
from typing import Any

from r1jax.errors import UserError
from r1jax.models.config import Llama3, PolicyConfig, Yarn

KINDS = ("default", "yarn", "llama3")
LENGTH = "original_max_position_embeddings"


def from_hf(said: Mapping[str, Any], where: str) -> dict[str, Any]:
  """{rope_theta, and yarn or llama3 where there is one} for a PolicyConfig.

  Args:
    said: a config.json.
    where: its path, for messages.

  Raises:
    UserError: it is of another kind, or lacks a number.
  """
  rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
  kind = rope.get("rope_type") or rope.get("type") or "default"
  by_layers = [key for key, value in rope.items() if isinstance(value, dict)]
  if kind not in KINDS or by_layers:
    what = f"for each of {by_layers}" if by_layers else f"of rope_type={kind!r}"
    raise UserError(
      f"{where}: RoPE {what} cannot be expressed; it must be one of"
      f" {', '.join(KINDS)} for all layers."
    )
  for key, value in (("partial_rotary_factor", 1), ("truncate", True)):
    if rope.get(key, said.get(key)) not in (None, value):
      raise UserError(
        f"{where}: {key}={rope.get(key, said.get(key))!r} of RoPE cannot be expressed;"
        f" it must be {value!r}."
      )
  theta = rope.get("rope_theta") or said.get("rope_theta") or 10_000.0
  found: dict[str, Any] = {"rope_theta": float(theta)}
  longest = said.get("max_position_embeddings")
  numbers = {**rope, LENGTH: said.get(LENGTH) or rope.get(LENGTH) or longest}
  if numbers.get("factor") is None and kind == "yarn" and longest and numbers[LENGTH]:
    numbers["factor"] = longest / numbers[LENGTH]

  def number(key: str) -> float:
    if not isinstance(numbers.get(key), int | float):
      raise UserError(f"{where}: RoPE of rope_type={kind!r} needs the number {key}.")
    return float(numbers[key])

  if kind == "llama3":
    blend = number("factor"), number("low_freq_factor"), number("high_freq_factor")
    found["llama3"] = Llama3(*blend, int(number(LENGTH)))
  if kind == "yarn":
    found["yarn"] = _yarn(rope, number("factor"), int(number(LENGTH)))
  return found


def _log(factor: float) -> float:
  return 0.1 * math.log(factor) if factor > 1 else 0.0


def _yarn(rope: Mapping[str, Any], factor: float, length: int) -> Yarn:
  """As transformers reads it: cos and sin grow by attention_factor, or by m(mscale) /
  m(mscale_all_dim) where both are given, or else by m(1)."""
  mscale, all_dim = rope.get("mscale"), float(rope.get("mscale_all_dim") or 0)
  grows, log = rope.get("attention_factor"), _log(factor)
  if grows is None and not (mscale and all_dim):
    mscale, grows = 1.0, 1 + log if all_dim else None
  if grows is not None and log:
    mscale = (grows * (1 + all_dim * log) - 1) / log
  return Yarn(
    factor=factor,
    original_length=length,
    beta_fast=float(rope.get("beta_fast") or 32),
    beta_slow=float(rope.get("beta_slow") or 1),
    mscale=float(mscale or 0.0),
    mscale_all_dim=all_dim,
  )


def to_hf(config: PolicyConfig) -> dict[str, Any]:
  """The older keys, which every version of transformers reads; and
  max_position_embeddings, a note for servers: nothing is computed from it."""
  yarn, llama3, scaling, longest = config.yarn, config.llama3, None, 32_768
  if yarn is not None:
    scaling = dict(
      type="yarn",
      rope_type="yarn",
      factor=yarn.factor,
      beta_fast=yarn.beta_fast,
      beta_slow=yarn.beta_slow,
    )
    scaling[LENGTH], log = yarn.original_length, _log(yarn.factor)
    if yarn.mscale and yarn.mscale_all_dim:
      scaling |= dict(mscale=yarn.mscale, mscale_all_dim=yarn.mscale_all_dim)
    elif yarn.mscale_all_dim or yarn.mscale != 1.0:  # not what is taken for granted
      m = (1 + yarn.mscale * log) / (1 + yarn.mscale_all_dim * log)
      scaling |= dict(attention_factor=m, mscale_all_dim=yarn.mscale_all_dim)
    longest = int(yarn.factor * yarn.original_length)
  if llama3 is not None:
    scaling = dict(
      rope_type="llama3",
      factor=llama3.factor,
      low_freq_factor=llama3.low,
      high_freq_factor=llama3.high,
    )
    scaling[LENGTH] = llama3.original_length
    longest = int(llama3.factor * llama3.original_length)
  return {
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling,
    "max_position_embeddings": longest,
  }
