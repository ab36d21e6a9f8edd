"""Is the reasoning where the template wants it? (R1, section 2.2: format rewards.)"""

import re

_TAG = re.compile(r"(</?(?:think|answer)>)")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def format_reward(completion: str, *, prefill_think: bool = False) -> float:
  """1.0 for exactly one think block, then exactly one answer block, and nothing else.

  Both blocks must hold text; white space may stand before, between and after them.

  Args:
    completion: the model's text.
    prefill_think: the prompt already ended in `<think>`, so the completion must not
      open it again.
  """
  text = "<think>" + completion if prefill_think else completion
  parts = _TAG.split(text)
  if parts[1::2] != _ORDER:
    return 0.0
  before, think, between, answer, after = (part.strip() for part in parts[0::2])
  return float(bool(think and answer) and not (before or between or after))
