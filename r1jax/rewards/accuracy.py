"""Is the final answer right? (R1, section 2.2: accuracy rewards.)"""

from collections.abc import Callable, Sequence

from r1jax.rewards import choice, instructions, reading, values
from r1jax.rewards.extraction import extract_answer, spoken
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
  """Extracts the answer and compares it, or holds the reply to its instructions.

  Args:
    completion: the model's text.
    accepted: the golds; one of them is enough.
    kind: `answer`, compared as the gold's type demands (values.py); `text`, the same
      but for white space; `choice`, a letter; or `instructions`: what follows the
      thinking, or the inside of the answer tags that wrap it, must follow them.
    prefill_think: the prompt already ended in `<think>`.
    algebra: asked about expressions that are not the same text; None: they differ.
  """
  if kind == "instructions":
    return _instructed(spoken(completion, prefill_think=prefill_think), accepted)
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


def _instructed(reply: str | None, accepted: Sequence[str]) -> Verdict:
  if reply is None:
    return Verdict("unparsable", "no reply")
  reply = reply.strip()
  if reply.startswith("<answer>") and reply.endswith("</answer>"):
    reply = reply.removeprefix("<answer>").removesuffix("</answer>")
  (spec,) = accepted
  return instructions.followed(reply, spec)


def _chosen(answer: str, accepted: Sequence[str]) -> Verdict:
  chosen = choice.letter(answer)
  if chosen is None:
    return Verdict("unparsable", f"no letter: {answer[:60]!r}")
  right = chosen in [choice.letter(gold) for gold in accepted]
  return Verdict("correct" if right else "wrong", chosen)
