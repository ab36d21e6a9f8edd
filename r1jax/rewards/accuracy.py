"""Is the final answer right? (R1, section 2.2: accuracy rewards.)"""

from collections.abc import Callable, Sequence

from r1jax.rewards import choice, reading, values
from r1jax.rewards.extraction import extract_answer
from r1jax.rewards.verdict import Verdict

# (gold, answer) in LaTeX -> equal, different, timeout, memory or crash (maths.py)
Algebra = Callable[[str, str], str]


def accuracy(
  completion: str, accepted: Sequence[str], *, prefill_think: bool = False
) -> float:
  """1.0 if the extracted answer says what one of the accepted says, without algebra."""
  return answered(completion, accepted, prefill_think=prefill_think).score


def answered(
  completion: str,
  accepted: Sequence[str],
  *,
  kind: str = "answer",
  prefill_think: bool = False,
  algebra: Algebra | None = None,
) -> Verdict:
  """Extracts the answer and compares it.

  Args:
    completion: the model's text.
    accepted: the golds; one of them is enough.
    kind: `answer`, compared as the gold's type demands (values.py); `text`, the same
      but for white space; or `choice`, a letter.
    prefill_think: the prompt already ended in `<think>`.
    algebra: asked about expressions that are not the same text; None: they differ.
  """
  answer = extract_answer(completion, prefill_think=prefill_think)
  if answer is None:
    return Verdict("unparsable", "no answer")
  if kind == "choice":
    return _chosen(answer, accepted)
  if any(answer.split() == gold.split() for gold in accepted):
    return Verdict("correct")
  if kind == "text":
    return Verdict("wrong", answer[:60])
  options = [choice.letter(gold) for gold in accepted if choice.is_option(gold)]
  if options and choice.letter(answer) in options:
    return Verdict("correct")
  said = reading.parse(answer)
  if said is None:
    return Verdict("unparsable", f"the answer cannot be read: {answer[:60]!r}")
  undecided = []

  def equal(gold: str, answer: str) -> bool:
    if undecided:  # one expression that is too much is enough
      return False
    result = algebra(gold, answer)
    if result in ("timeout", "memory"):
      undecided.append(result)
    return result == "equal"

  for gold in accepted:
    meant = reading.parse(gold)
    if meant is not None and values.same(meant, said, equal if algebra else None):
      return Verdict("correct")
  if undecided:
    return Verdict(undecided[0], f"algebra on {answer[:60]!r}")
  return Verdict("wrong", answer[:60])


def _chosen(answer: str, accepted: Sequence[str]) -> Verdict:
  chosen = choice.letter(answer)
  if chosen is None:
    return Verdict("unparsable", f"no letter: {answer[:60]!r}")
  right = chosen in [choice.letter(gold) for gold in accepted]
  return Verdict("correct" if right else "wrong", chosen)
