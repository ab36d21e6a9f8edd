"""Twelve claims of DeepSeek-R1 (arXiv 2501.12948, both versions), and what is measured
of each in miniature."""

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.arms import folder_of
from r1jax.evals.interval import students
from r1jax.metrics import MetricsFile


class Arms:
  """What the arms of one seed have left, read when it is asked for."""

  def __init__(self, root: pathlib.Path, seed: int):
    self.root, self.seed = root, seed

  def summary(self, arm: str) -> dict:
    folder = folder_of(self.root, arm, self.seed)
    return json.loads((folder / "summary.json").read_text())

  def rows(self, arm: str, file: str = "metrics") -> list[dict]:
    folder = folder_of(self.root, arm, self.seed)
    return MetricsFile.rows_of(folder / f"{file}.jsonl")

  def report(self) -> dict:
    folder = folder_of(self.root, "r1", self.seed)
    return json.loads((folder / "report" / "report.json").read_text())

  def final(self, arm: str, figure: str = "pass_at_1") -> float:
    return self.summary(arm)["final"][figure]

  def gain(self, arm: str, figure: str = "pass_at_1") -> float:
    """After RL less before."""
    return self.final(arm, figure) - self.summary(arm)["base"][figure]

  def rollouts(self, arm: str, figure: str, since: float = 0.0) -> float:
    """Mean over the rollouts that have the figure, or NaN. Args: since: the share of
    the run that is left out at its beginning."""
    rows = [row[figure] for row in self.rows(arm) if row["phase"] == "rl"]
    known = [x for x in rows[int(since * len(rows)) :] if x is not None]
    return float(np.mean(known)) if known else math.nan

  def along(self, arm: str) -> float:
    """pass@1 as the mean of all evaluations after the first: arms that end alike may
    have learned at different speeds."""
    rows = [row for row in self.rows(arm) if row["phase"] == "eval" and row["step"]]
    return float(np.mean([row["pass_at_1"] for row in rows]))

  def since_half_way(self, arm: str, figure: str = "pass_at_1") -> float:
    """At the end less half way, in samples of the same length."""
    return self.final(arm, figure) - self.summary(arm)["half_way"][figure]

  def stage(self, row: str, better: str, worse: str) -> float:
    """A row of R1's table: one stage less another."""
    table = self.report()["table"]
    return table[better][row]["mean"] - table[worse][row]["mean"]

  def uncapped(self, later: str, earlier: str) -> float:
    """Of RL stage 2 with preference rewards all along."""
    found = self.report()["reward_hacking"]["rl_2_uncapped"]
    return found[later] - found[earlier]


@dataclasses.dataclass(frozen=True)
class Effect:
  """A difference that the claim says is above `least`."""

  what: str
  measure: Callable[[Arms], float]
  least: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
  number: int
  says: str
  arms: tuple[str, ...]
  effects: tuple[Effect, ...]

  @property
  def seeds(self) -> int:
    """Of the full table: three where a seed is a whole pipeline."""
    return 3 if "r1" in self.arms else 5


def silent(arms: Arms) -> float:
  """Less the largest advantage in a group whose rewards are all equal; NaN without such
  a group."""
  groups: dict[tuple, list[dict]] = {}
  for row in arms.rows("zero", "tokens"):
    groups.setdefault((row["step"], row["group"]), []).append(row)
  largest = [
    max((abs(a) for row in group for a in row["advantage"]), default=0.0)
    for group in groups.values()
    if len({row["reward"] for row in group}) == 1
  ]
  return -max(largest, default=math.nan)


CLAIMS = (
  Claim(
    1,
    "accuracy climbs by RL with rules alone",
    ("zero",),
    (Effect("pass@1, after RL less before", lambda x: x.gain("zero")),),
  ),
  Claim(
    2,
    "responses grow longer",
    ("zero", "dr_grpo"),
    (
      Effect("tokens, after less before", lambda x: x.gain("zero", "mean_length")),
      Effect(
        "the same by Dr. GRPO, whose loss does not favour length",
        lambda x: x.gain("dr_grpo", "mean_length"),
      ),
    ),
  ),
  Claim(
    3,
    "raising the cap on length lifts accuracy and length",
    ("cap", "cap_raised"),
    (
      Effect(
        "pass@1 since half way, cap raised there less kept",
        lambda x: x.since_half_way("cap_raised") - x.since_half_way("cap"),
      ),
      Effect(
        "tokens, likewise",
        lambda x: (
          x.since_half_way("cap_raised", "mean_length")
          - x.since_half_way("cap", "mean_length")
        ),
      ),
    ),
  ),
  Claim(
    4,
    "reflection words become more frequent",
    ("zero",),
    (
      Effect(
        "words a response, after less before",
        lambda x: x.gain("zero", "reflection_rate"),
      ),
      Effect(
        "words per 100 tokens, after less before",
        lambda x: (
          100
          * (
            x.final("zero", "reflection_rate") / x.final("zero", "mean_length")
            - x.summary("zero")["base"]["reflection_rate"]
            / x.summary("zero")["base"]["mean_length"]
          )
        ),
      ),
    ),
  ),
  Claim(
    5,
    "a majority of samples is right more often than one",
    ("zero",),
    (
      Effect(
        "cons@N less pass@1, after RL",
        lambda x: x.final("zero", cons(x)) - x.final("zero"),
      ),
      Effect(
        "cons@N less pass@1, half way",
        lambda x: (
          x.summary("zero")["half_way"][cons(x)]
          - x.summary("zero")["half_way"]["pass_at_1"]
        ),
      ),
    ),
  ),
  Claim(
    6,
    "a cold start trades reasoning for instructions, and RL wins it back",
    ("r1",),
    (
      Effect(
        "instructions, Dev1 - Zero", lambda x: x.stage("instruction", "Dev1", "Zero")
      ),
      Effect("reasoning, Zero - Dev1", lambda x: x.stage("reasoning", "Zero", "Dev1")),
      Effect("reasoning, Dev2 - Dev1", lambda x: x.stage("reasoning", "Dev2", "Dev1")),
    ),
  ),
  Claim(
    7,
    "without a reward for it, the language of thinking mixes",
    ("r1",),
    (
      Effect(
        "consistency, RL stage 1 with the reward - without",
        lambda x: x.stage("language", "Dev2", "Dev2, no language reward"),
      ),
      Effect(
        "consistency lost without it, Dev1 - Dev2",
        lambda x: x.stage("language", "Dev1", "Dev2, no language reward"),
      ),
    ),
  ),
  Claim(
    8,
    "a small clip range hurts where rollouts are stale",
    ("clip_0.2", "clip_1", "clip_10"),
    (
      Effect(
        "share of tokens clipped, eps 0.2 less 10",
        lambda x: (
          x.rollouts("clip_0.2", "clip_fraction")
          - x.rollouts("clip_10", "clip_fraction")
        ),
      ),
      Effect(
        "pass@1 along the run, eps 10 less 0.2",
        lambda x: x.along("clip_10") - x.along("clip_0.2"),
      ),
      Effect(
        "pass@1 along the run, eps 1 less 0.2",
        lambda x: x.along("clip_1") - x.along("clip_0.2"),
      ),
      Effect(
        "pass@1 at the end, eps 10 less 0.2",
        lambda x: x.final("clip_10") - x.final("clip_0.2"),
      ),
    ),
  ),
  Claim(
    9,
    "PPO needs lambda 1 to come near GRPO",
    ("zero", "ppo_0.95", "ppo_1"),
    (
      Effect(
        "pass@1 along the run, GRPO less PPO with lambda 0.95",
        lambda x: x.along("zero") - x.along("ppo_0.95"),
      ),
      Effect(
        "pass@1 at the end, likewise",
        lambda x: x.final("zero") - x.final("ppo_0.95"),
      ),
      Effect(
        "pass@1 along the run, PPO with lambda 1 less GRPO (above -0.02)",
        lambda x: x.along("ppo_1") - x.along("zero"),
        -0.02,
      ),
    ),
  ),
  Claim(
    10,
    "distillation beats RL on the small model",
    ("r1",),
    (
      Effect(
        "reasoning, distilled - RL on the student",
        lambda x: x.stage("reasoning", "distilled", "student RL"),
      ),
      Effect(
        "reasoning, RL on the student - its base",
        lambda x: x.stage("reasoning", "student RL", "student base"),
      ),
    ),
  ),
  Claim(
    11,
    "RL on a reward model for long learns to please it alone",
    ("r1",),
    (
      Effect(
        "the model's score, last quarter less first",
        lambda x: x.uncapped("proxy_last", "proxy_first"),
      ),
      Effect(
        "hidden helpfulness, R1 less preference rewards all along",
        lambda x: x.stage("helpfulness", "R1", "R1, uncapped"),
      ),
      Effect(
        "pass@1 by rules, before less after",
        lambda x: x.uncapped("rule_before", "rule_after"),
      ),
    ),
  ),
  Claim(
    12,
    "equal rewards teach nothing; a fresh reference keeps KL small",
    ("zero", "no_refresh"),
    (
      Effect(
        "less the largest advantage where a group's rewards are equal (0, to 4 digits)",
        silent,
        -1e-9,
      ),
      Effect(
        "KL to the reference in the second half, never refreshed less refreshed",
        lambda x: x.rollouts("no_refresh", "kl", 0.5) - x.rollouts("zero", "kl", 0.5),
      ),
    ),
  ),
)


def cons(arms: Arms) -> str:
  """The name of cons@N in an evaluation."""
  return next(k for k in arms.summary("zero")["final"] if k.startswith("cons_at_"))


class Found(NamedTuple):
  """An effect over seeds."""

  claim: int
  what: str
  least: float
  seeds: tuple[float, ...]
  mean: float
  low: float  # of the 95 % interval over seeds, mean -+ t s / sqrt n
  high: float

  @property
  def verdict(self) -> str:
    """ "shown" where the interval is above `least`, "opposite" where it is below."""
    if self.low > self.least:
      return "shown"
    return "opposite" if self.high < min(self.least, 0.0) else "not shown"


def found(claim: Claim, effect: Effect, values: Sequence[float]) -> Found:
  """Args: values: of the seeds, two or more."""
  mean = float(np.mean(values))
  said = claim.number, effect.what, effect.least, tuple(map(float, values))
  return Found(*said, mean, *students(values))
