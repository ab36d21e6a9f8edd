"""What came of a sample: every one ends in exactly one of these outcomes."""

import dataclasses

OUTCOMES = (
  "correct",
  "wrong",  # an answer that is not the right one
  "unparsable",  # no answer, or one that cannot be read
  "timeout",  # the deadline passed
  "crash",  # a program that stopped with an error
  "memory",  # the memory limit was hit
  "forbidden",  # a program that tried what the sandbox denies, or wrote without end
  "infrastructure",  # our side failed: neither right nor wrong, never scored
  "judged",  # a reply to a request: scored by a reward model, neither right nor wrong
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """An outcome and, for people, why."""

  outcome: str  # one of OUTCOMES
  detail: str = ""

  def __post_init__(self):
    if self.outcome not in OUTCOMES:
      raise ValueError(f"outcome {self.outcome!r} is not one of {', '.join(OUTCOMES)}")
    # It quotes what a program or a model wrote: no control characters, no half pairs.
    plain = "".join(c if c.isprintable() else "?" for c in self.detail[:300])
    object.__setattr__(self, "detail", plain)

  @property
  def score(self) -> float:
    """1 if correct; an infrastructure failure has no score and is masked out."""
    return float(self.outcome == "correct")
