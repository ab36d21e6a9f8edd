"""Rejection sampling: the data of the second SFT (R1, supplement B.3.3).

The policy of RL stage 1 answers every prompt several times; what is correct, in one
language, without long paragraphs and code blocks is kept, and what rules cannot check
is asked of a judge. Non-reasoning data is mixed in by weight.
"""

from collections.abc import Mapping
import pathlib
import random

from r1jax.data import traces
from r1jax.data.traces import Trace
from r1jax.pipeline import filters, hooks
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.training_traces import draw, first_of_each
from r1jax.run import Run

JUDGES = {"none": None}
FORM = hooks.Form(
  "True or False: whether the trace is kept",
  lambda said: isinstance(said, bool | int) and said in (0, 1),
)


def accepted(section: Mapping, memory: pathlib.Path) -> list[filters.Filter]:
  """The filters, by a config's thresholds; the judge is asked last.

  Args:
    section: the config's `rejection`.
    memory: where what the judge says is kept; a killed stage need not ask again.
  """
  found = [
    ("wrong", filters.correct),
    ("misformatted", filters.formatted("chat")),
    ("mixed", filters.in_one_language(section["least_consistency"])),
    ("long_paragraph", filters.short_paragraphs(section["most_paragraph"])),
    ("code_block", filters.without_code),
    ("repetitive", filters.unrepeated(section["most_repetition"])),
  ]
  judge = hooks.load(section["judge"], JUDGES, "rejection.judge", FORM, memory)
  if judge is not None:
    found.append(("judged_bad", lambda t: bool(judge(t.completion, t.problem))))
  return found


def collect(
  project: Project, this: Run, policy: Weights, section: Mapping, folder: pathlib.Path
) -> dict:
  """Leaves traces.jsonl, shuffled, and card.json; returns the card."""
  seed = this.config.seed
  sampled, card = draw(
    project, this, policy, section, folder, seed=f"{seed} again", source="rl_1"
  )
  kept, counts = filters.sift(
    sampled, accepted(section, folder / "judged.jsonl"), of="rejection sampling"
  )
  reasoning = first_of_each(kept, section["keep"])
  rng = random.Random(seed)
  general = non_reasoning(project, section, len(reasoning), rng)
  mixture = [*reasoning, *general]
  rng.shuffle(mixture)
  traces.write(folder / "traces.jsonl", mixture)
  card |= {
    "counts": counts,
    "reasoning": len(reasoning),
    "non_reasoning": len(general),
  }
  filters.write_card(folder, "Rejection sampling", card)
  return card


def non_reasoning(
  project: Project, section: Mapping, reasoning: int, rng: random.Random
) -> list[Trace]:
  """Replies to requests: a user's file, or the pool of the miniature.

  Args:
    project: the pipeline.
    section: general_weight, their number a reasoning trace (R1: 200k to 600k), and
      general_data, a file of traces, "" for the task's own.
    reasoning: how many traces they join.
    rng: of the choice.
  """
  count = round(reasoning * section["general_weight"])
  if not count:
    return []
  if section["general_data"]:
    pool = traces.read(pathlib.Path(section["general_data"]))
    return [rng.choice(pool) for _ in range(count)]
  task = project.world.task
  chosen = [rng.choice(project.world.requests) for _ in range(count)]
  return [Trace(p, task.curated(p, rng), "pool") for p in chosen]
