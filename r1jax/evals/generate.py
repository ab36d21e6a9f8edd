"""Samples of held-out problems, read as text by the host rules."""

from collections.abc import Hashable
import dataclasses
import re

import numpy as np

from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.evals import pass_at_k
from r1jax.rewards.accuracy import answered
from r1jax.rewards.choice import letter
from r1jax.rewards.extraction import extract_answer
from r1jax.rewards.format import format_reward
from r1jax.rewards.scorer import Scorer
from r1jax.rewards.verdict import Verdict
from r1jax.rollout import Rollout

# The words whose frequency R1 tracks (supplement, "self-evolution" of R1-Zero).
REFLECTION = re.compile(
  r"\b(wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Samples:
  """What the policy said to each problem."""

  problems: list[Problem]
  texts: list[list[str]]  # problems x samples
  lengths: np.ndarray  # problems x samples, tokens
  ended: np.ndarray  # problems x samples, bool


def texts_of(rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
  """The completions of a rollout, [B][G] strings."""
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  return [
    [tokenizer.decode(row[keep]) for row, keep in zip(rows, keeps, strict=True)]
    for rows, keeps in zip(tokens, mask, strict=True)
  ]


def reflections(text: str) -> int:
  """How many reflection words stand in a response."""
  return len(REFLECTION.findall(text))


@dataclasses.dataclass(frozen=True)
class Marks:
  """What each sample was found to be, problems x samples."""

  verdicts: list[list[Verdict]]
  correct: np.ndarray  # bool
  format: np.ndarray  # the format reward


def mark(
  samples: Samples,
  *,
  prefill_think: bool,
  format_style: str = "tags",
  scorer: Scorer | None = None,
) -> Marks:
  """Judges samples by their text alone.

  Args:
    samples: what was said.
    prefill_think: the prompts ended in `<think>`.
    format_style: of the format reward.
    scorer: says what is right; None: the exact comparison of accuracy.py. What it could
      not score counts as wrong.
  """
  how = dict(prefill_think=prefill_think)
  pairs = [
    (text, problem)
    for problem, texts in zip(samples.problems, samples.texts, strict=True)
    for text in texts
  ]
  if scorer:
    verdicts = scorer.verdicts(pairs)
  else:
    verdicts = [answered(text, p.answers, kind=p.kind, **how) for text, p in pairs]
  correct = np.array([v.outcome == "correct" for v in verdicts])
  formats = np.array([format_reward(t, style=format_style, **how) for t, _ in pairs])
  shape = len(samples.problems), -1
  n = len(samples.texts[0])
  rows = [verdicts[i : i + n] for i in range(0, len(verdicts), n)]
  return Marks(rows, correct.reshape(shape), formats.reshape(shape))


def summarise(
  samples: Samples, marks: Marks, *, prefill_think: bool
) -> dict[str, float]:
  """The figures of an evaluation.

  Returns:
    pass_at_1, cons_at_N, pass_at_N (N samples a problem), mean_length in tokens,
    reflection_rate in words a response, format_rate, truncation_rate, lost_rate:
    samples that could not be scored.
  """
  correct, n = marks.correct, marks.correct.shape[1]
  voted, right = ballots(samples, marks, prefill_think=prefill_think)
  said = [reflections(text) for texts in samples.texts for text in texts]
  lost = [v.outcome == "infrastructure" for row in marks.verdicts for v in row]
  return {
    "pass_at_1": pass_at_k.pass_at_1(correct),
    f"cons_at_{n}": pass_at_k.cons_at_n(voted, right),
    f"pass_at_{n}": pass_at_k.pass_at_k(correct, n),
    "mean_length": float(samples.lengths.mean()),
    "reflection_rate": float(np.mean(said)),
    "format_rate": float(marks.format.mean()),
    "truncation_rate": float(1.0 - samples.ended.mean()),
    "lost_rate": float(np.mean(lost)),
  }


def ballots(
  samples: Samples, marks: Marks, *, prefill_think: bool
) -> tuple[np.ndarray, np.ndarray]:
  """What the samples of each problem vote for, and whether it is right. Programs and
  replies held to instructions do not vote (no two are the same text), nor do samples
  that could not be scored.

  Returns:
    ([problems that vote, samples] int classes, -1 for no vote; [the same] bool).
  """
  alone = ("code", "instructions")
  kept = [i for i, p in enumerate(samples.problems) if p.kind not in alone]
  votes = np.zeros((len(kept), marks.correct.shape[1]), int)
  for row, i in zip(votes, kept, strict=True):
    problem, found = samples.problems[i], []
    for text, verdict in zip(samples.texts[i], marks.verdicts[i], strict=True):
      answer = extract_answer(text, prefill_think=prefill_think)
      lost = answer is None or verdict.outcome == "infrastructure"
      found.append(None if lost else _meaning(answer, problem.kind))
    # Of one accepted answer there is one class, in whatever forms it was found right.
    golds = {_meaning(gold, problem.kind) for gold in problem.answers}
    right = {m for m, ok in zip(found, marks.correct[i], strict=True) if ok}
    row[:] = pass_at_k.classes(found, right if len(golds) == 1 else ())
  return votes, marks.correct[kept]


def _meaning(answer: str, kind: str) -> Hashable:
  """What an answer says, as its problem's kind compares it; None: no letter."""
  if kind == "choice":
    return letter(answer)
  return tuple(answer.split()) if kind == "text" else pass_at_k.meaning(answer)
