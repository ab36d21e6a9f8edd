"""Is the reasoning where the template wants it? (R1, section 2.2: format rewards.)"""

import re

_TAG = re.compile(r"(</?(?:think|answer)>)")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]
STYLES = ("tags", "chat")


def format_reward(
  completion: str, *, prefill_think: bool = False, style: str = "tags"
) -> float:
  """1.0 for a completion in the style that was asked for, else 0.0.

  Args:
    completion: the model's text.
    prefill_think: the prompt already ended in `<think>`, so the completion must not
      open it again.
    style: `tags`, R1-Zero's template: exactly one think block, then exactly one answer
      block, and nothing else. `chat`, R1's own: exactly one think block, first, then
      something for the user, in which an answer block may stand. Blocks must hold text;
      white space may stand anywhere.
  """
  text = "<think>" + completion if prefill_think else completion
  parts = _TAG.split(text)
  if style == "chat":
    if parts[1:5:2] != _ORDER[:2] or {"<think>", "</think>"} & set(parts[5::2]):
      return 0.0
    before, think, after = parts[0], parts[2], "".join(parts[4::2])
    return float(bool(think.strip() and after.strip()) and not before.strip())
  if parts[1::2] != _ORDER:
    return 0.0
  before, think, between, answer, after = (part.strip() for part in parts[0::2])
  return float(bool(think and answer) and not (before or between or after))
