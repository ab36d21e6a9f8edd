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
from r1jax.pipeline import filters, hooks
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.sampling import Decoding, Sampled, sample
from r1jax.run import Run

SIDES = ("train", "held_out")
JUDGES = ("arena",)  # the miniature's; or FILE.py:function
FORM = hooks.Form(
  f"one of {', '.join(preferences.GRADES)}",
  lambda said: isinstance(said, str) and said in preferences.GRADES,
)


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
    section: the config's `judging`.
    folder: the stage's.
  """
  seed, card = this.config.seed, {}
  world = project.world
  asked = dict(zip(SIDES, (world.requests, world.held_out_requests), strict=True))
  for side, problems in asked.items():
    replies = []
    for name, weights in writers.items():
      said = sample(
        project,
        this,
        weights,
        problems,
        folder / f"{side}_{name}.jsonl",
        samples=section["samples"],
        decoding=Decoding(section["temperature"]),
      )
      replies.append(whole(said))
    groups = [
      [text for group in of for text in group] for of in zip(*replies, strict=True)
    ]
    rows = list(zip(problems, groups, strict=True))
    rng = random.Random(f"{seed} {side}")
    judge = judge_of(section, problems, rng.random(), folder / f"{side}_judge.jsonl")
    pairs, counts = preferences.judged(
      compared([(p, g) for p, g in rows if p.domain == "helpful"], section, rng),
      judge,
      judgments=section["judgments"],
      seed=rng.randrange(2**32),
    )
    card[side] = dataclasses.asdict(counts)
    if section["balance_length"]:
      pairs, before, after = preferences.balanced(
        pairs, lambda text: len(notions.summary_of(text)), rng.randrange(2**32)
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
        f"judging: the {side} side has {len(pairs)} sure pairs and"
        f" {card[side]['safe']} safe replies of {len(labels)}; pairs are needed, and"
        f" replies of both kinds ({card[side]}). Sample more replies"
        " (config.judging.samples)."
      )
    preferences.write(folder / f"{side}_pairs.jsonl", pairs)
    preferences.write(folder / f"{side}_labels.jsonl", labels)
  filters.write_card(folder, "Preferences and safety labels", card)
  return card


def whole(said: Sampled) -> list[list[str]]:
  """The replies that ended and say something, by problem. One that was cut off has no
  end of its own for a reward model to be read at."""
  return [
    [text for text, ends in zip(group, ended, strict=True) if ends and text.strip()]
    for group, ended in zip(said.texts, said.ended, strict=True)
  ]


def judge_of(
  section: Mapping, problems: Sequence[Problem], seed: float, memory: pathlib.Path
) -> preferences.Judge:
  """The judge that the config names: the miniature's, or FILE.py:function, whose
  verdicts are kept in `memory`."""
  ours = notions.arena_judge(
    {p.problem: p.language for p in problems},
    noise=section["judge_noise"],
    first_bias=section["judge_first_bias"],
    flattery=section["judge_flattery"],
    seed=seed,
  )
  mine = dict.fromkeys(JUDGES, ours)
  return hooks.load(section["judge"], mine, "judging.judge", FORM, memory)


def compared(
  rows: Sequence[tuple[Problem, list[str]]], section: Mapping, rng: random.Random
) -> list[Comparison]:
  """Random pairs of replies to the same request, whose summaries differ: the helpful
  model reads nothing else."""
  found = []
  for problem, texts in rows:
    for _ in range(section["pairs_a_prompt"] if len(texts) > 1 else 0):
      a, b = rng.sample(texts, 2)
      if notions.summary_of(a) != notions.summary_of(b):
        found.append(Comparison(problem.problem, a, b))
  return found
