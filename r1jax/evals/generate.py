"""Samples of held-out problems, read as text by the host rules."""

import dataclasses
import re

import numpy as np

from r1jax.data.problems import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.evals import pass_at_k
from r1jax.rewards.accuracy import accuracy, extract_answer
from r1jax.rewards.format import format_reward
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


def summarise(samples: Samples, *, prefill_think: bool) -> dict[str, float]:
  """The figures of an evaluation, from text alone.

  Returns:
    pass_at_1, cons_at_N, pass_at_N (N samples a problem), mean_length in tokens,
    reflection_rate in words a response, format_rate, truncation_rate.
  """
  correct = np.array(
    [
      [accuracy(text, problem.answers) > 0 for text in texts]
      for problem, texts in zip(samples.problems, samples.texts, strict=True)
    ]
  )
  flat = [text for texts in samples.texts for text in texts]
  n = correct.shape[1]
  answers = [[extract_answer(t) for t in texts] for texts in samples.texts]
  formats = [format_reward(t, prefill_think=prefill_think) for t in flat]
  return {
    "pass_at_1": pass_at_k.pass_at_1(correct),
    f"cons_at_{n}": pass_at_k.cons_at_n(answers, correct),
    f"pass_at_{n}": pass_at_k.pass_at_k(correct, n),
    "mean_length": float(samples.lengths.mean()),
    "reflection_rate": float(np.mean([reflections(t) for t in flat])),
    "format_rate": float(np.mean(formats)),
    "truncation_rate": float(1.0 - samples.ended.mean()),
  }
