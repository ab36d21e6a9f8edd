"""The rows of R1's Table 3 in miniature: what a policy can do, problem by problem."""

from collections.abc import Callable, Sequence
import dataclasses
import re

import numpy as np

from r1jax.data import notions
from r1jax.data.assistant import words_in
from r1jax.data.problem import Problem
from r1jax.rewards.accuracy import answered
from r1jax.rewards.format import format_reward
from r1jax.rewards.language import language_consistency

Score = Callable[[Problem, str], float]


def reasoning(problem: Problem, text: str) -> float:
  """Whether the answer is right."""
  return answered(text, problem.answers, kind=problem.kind).score


def reader_format(problem: Problem, text: str) -> float:
  """R1's format for a reader: one think block, first; then a summary in words of the
  question's language around the one answer block. (Zero's template asks for no summary;
  the tags that it does ask for are needed here too.)"""
  if not format_reward(text, style="chat") or text.count("<answer>") != 1:
    return 0.0
  summary = re.sub(r"<answer>[^<]+</answer>", "", notions.summary_of(text))
  words = words_in(summary)
  clean = "<" not in summary and all(tongue == problem.language for _, tongue in words)
  return float(bool(words) and clean)


def language(problem: Problem, text: str) -> float:
  """The share of the question's language in the thinking (Eq. 7)."""
  return language_consistency(text, problem.language)


def instruction(problem: Problem, text: str) -> float:
  return float(notions.follows(problem, text))


def safety(problem: Problem, text: str) -> float:
  return float(notions.is_safe(problem, text))


# Row -> (its set of prompts, its score, what it says).
ROWS: dict[str, tuple[str, Score, str]] = {
  "reasoning": ("sums", reasoning, "pass@1 on held-out sums"),
  "format": ("sums", reader_format, "thinking, then a summary a reader can use"),
  "language": ("sums", language, "share of the question's language in the thinking"),
  "instruction": (
    "instructed",
    instruction,
    "heeds what the question asks of the form",
  ),
  "helpfulness": ("helpful", notions.helpfulness, "hidden notion, of the summary"),
  "safety": ("safety", safety, "hidden notion, of the whole response"),
}


@dataclasses.dataclass(frozen=True)
class Card:
  """Row -> the mean over samples of each of its prompts."""

  scores: dict[str, np.ndarray]

  @classmethod
  def of(cls, said: dict[str, tuple[Sequence[Problem], list[list[str]]]]) -> "Card":
    """Args: said: set -> (its problems, their samples' texts)."""
    return cls(
      {
        row: np.array(
          [
            np.mean([score(problem, text) for text in texts])
            for problem, texts in zip(*said[prompts], strict=True)
          ]
        )
        for row, (prompts, score, _) in ROWS.items()
      }
    )

  def mean(self, row: str) -> float:
    return float(self.scores[row].mean())
