"""Is the final answer right? (R1, section 2.2: accuracy rewards.)"""

from collections.abc import Sequence
from fractions import Fraction


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
  value = _number(answer)
  for gold in accepted:
    if answer == gold.strip() or (value is not None and value == _number(gold)):
      return 1.0
  return 0.0


def _number(text: str) -> Fraction | None:
  try:
    return Fraction(text.strip())
  except (ValueError, ZeroDivisionError):
    return None
