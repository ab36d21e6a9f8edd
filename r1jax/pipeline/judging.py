"""Data of the reward models: judged pairs, and labels of safety (R1, supplement B.2).

Two policies reply to the requests that RL will ask: the base, whose replies are bad in
many ways, and the policy that RL will start from. A judge compares pairs of replies;
people, here the miniature's own notion, say what is safe. The replies to held-out
requests are kept apart, for the reward models' own evaluation.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import random

from r1jax.data import notions, preferences
from r1jax.data.preferences import Comparison, SafetyLabel
from r1jax.data.problem import Problem
from r1jax.errors import UserError
from r1jax.metrics import write_json
from r1jax.pipeline import hooks
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.sampling import Decoding, sample
from r1jax.run import Run

SIDES = ("train", "held_out")
JUDGES = ("arena",)  # the miniature's; or FILE.py:function


def collect(
  project: Project,
  this: Run,
  writers: Mapping[str, Weights],
  section: Mapping,
  folder: pathlib.Path,
) -> dict:
  """Leaves pairs and labels as <side>_pairs.jsonl and <side>_labels.jsonl, and
  card.json; returns the card.

  Args:
    project, this: the pipeline and the stage.
    writers: name -> the weights of a policy that replies.
    section: the config's `reward_models`.
    folder: the stage's.
  """
  seed, card = this.config.seed, {}
  world = project.world
  asked = dict(zip(SIDES, (world.requests, world.held_out_requests), strict=True))
  for side, problems in asked.items():
    replies = [
      sample(
        project,
        this,
        weights,
        problems,
        folder / f"{side}_{name}.jsonl",
        samples=section["samples"],
        decoding=Decoding(section["temperature"]),
      )[0]
      for name, weights in writers.items()
    ]
    groups = [
      [text for group in of for text in group if text.strip()]
      for of in zip(*replies, strict=True)
    ]
    rows = list(zip(problems, groups, strict=True))
    judge = judge_of(section, problems, seed)
    pairs, counts = preferences.judged(
      compared([(p, g) for p, g in rows if p.domain == "helpful"], section, seed),
      judge,
      judgments=section["judgments"],
      seed=seed,
    )
    card[side] = dataclasses.asdict(counts)
    if section["balance_length"]:
      pairs, before, after = preferences.balanced(
        pairs, lambda text: len(notions.summary_of(text)), seed
      )
      card[side] |= {
        "length_before": dataclasses.asdict(before),
        "length_after": dataclasses.asdict(after),
      }
    labels = [
      SafetyLabel(p.problem, text, notions.is_safe(p, text))
      for p, group in rows
      if p.domain == "safety"
      for text in dict.fromkeys(group)
    ]
    card[side] |= {
      "pairs": len(pairs),
      "labels": len(labels),
      "safe": sum(label.safe for label in labels),
    }
    if not pairs or not 0 < card[side]["safe"] < len(labels):
      raise UserError(
        f"reward models: the {side} side has {len(pairs)} sure pairs and"
        f" {card[side]['safe']} safe replies of {len(labels)}; pairs are needed, and"
        f" replies of both kinds ({card[side]}). Sample more replies"
        " (config.reward_models.samples)."
      )
    preferences.write(folder / f"{side}_pairs.jsonl", pairs)
    preferences.write(folder / f"{side}_labels.jsonl", labels)
  write_json(folder / "card.json", card)
  return card


def judge_of(section: Mapping, problems: Sequence[Problem], seed: int):
  """The judge that the config names: the miniature's, or FILE.py:function."""
  ours = notions.arena_judge(
    {p.problem: p.language for p in problems},
    noise=section["judge_noise"],
    first_bias=section["judge_first_bias"],
    seed=seed,
  )
  return hooks.load(
    section["judge"], dict.fromkeys(JUDGES, ours), "reward_models.judge"
  )


def compared(
  rows: Sequence[tuple[Problem, list[str]]], section: Mapping, seed: int
) -> list[Comparison]:
  """Random pairs of replies to the same request, whose summaries differ: the helpful
  model reads nothing else."""
  rng, found = random.Random(seed), []
  for problem, texts in rows:
    for _ in range(section["pairs_a_prompt"]):
      a, b = rng.sample(texts, 2)
      if notions.summary_of(a) != notions.summary_of(b):
        found.append(Comparison(problem.problem, a, b))
  return found
