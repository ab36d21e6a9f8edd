"""Is the final answer right? (R1, section 2.2: accuracy rewards.)"""

from collections.abc import Sequence
from fractions import Fraction
import re

MAX_DIGITS = 100  # a longer number is compared as text
_NUMBER = re.compile(
  r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,3})?|\d+/\d+)", re.ASCII | re.IGNORECASE
)


def extract_answer(completion: str) -> str | None:
  """The text between the last `<answer>` and the `</answer>` that follows it, stripped;
  None where there is none or it is empty."""
  _, opened, tail = completion.rpartition("<answer>")
  content, closed, _ = tail.partition("</answer>")
  return (content.strip() or None) if opened and closed else None


def accuracy(completion: str, accepted: Sequence[str]) -> float:
  """1.0 if the extracted answer is one of the accepted, as text or as a number."""
  answer = extract_answer(completion)
  if answer is None:
    return 0.0
  value = number(answer)
  for gold in accepted:
    if answer == gold.strip() or (value is not None and value == number(gold)):
      return 1.0
  return 0.0


def number(text: str) -> Fraction | None:
  """The value of `12`, `-0.5`, `5e-1` or `1/2`; None for anything else."""
  text = text.strip()
  if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
    return None
  try:
    return Fraction(text)
  except (ValueError, ZeroDivisionError):
    return None
