"""Cold start: R1-Zero's own thinking, made readable (R1, supplement B.3.2).

Zero answers prompts several times at temperature 1. What is right and readable is kept,
a rewriter puts it into the reader's language and adds a summary, and Dev1 is the base
fine-tuned on such traces.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import random

from r1jax.data import assistant, traces
from r1jax.data.problem import Problem
from r1jax.data.traces import Trace
from r1jax.errors import UserError
from r1jax.pipeline import filters, hooks
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.sampling import Decoding, Sampled, sample
from r1jax.run import Run

Rewriter = Callable[[str, Problem], str]  # (completion, its problem) -> a better one
REWRITERS: dict[str, Rewriter | None] = {
  "assistant": assistant.rewritten,  # the miniature's rule
  "none": None,
}


def asked(
  project: Project, count: int, instructed: float, seed: int | str
) -> list[Problem]:
  """`count` training problems, a share of them with an instruction."""
  rng, task = random.Random(seed), project.world.task
  chosen = rng.sample(project.world.train, min(count, len(project.world.train)))
  return [task.instruct(p, rng) if rng.random() < instructed else p for p in chosen]


def readable(section: Mapping) -> list[filters.Filter]:
  """The filters of cold-start data, by a config's thresholds."""
  return [
    ("wrong", filters.correct),
    ("misformatted", filters.formatted("tags")),  # Zero's own
    ("repetitive", filters.unrepeated(section["most_repetition"])),
    ("mixed", filters.in_one_language(section["least_consistency"])),
  ]


def collect(
  project: Project, this: Run, zero: Weights, section: Mapping, folder: pathlib.Path
) -> dict:
  """Leaves traces.jsonl and card.json; returns the card."""
  problems = asked(project, section["prompts"], section["instructed"], this.config.seed)
  said = sample(
    project,
    this,
    zero,
    problems,
    folder / "samples.jsonl",
    samples=section["samples"],
    decoding=Decoding(section["temperature"]),
  )
  sampled, truncated = traces_of(problems, said, "zero")
  kept, counts = filters.sift(sampled, readable(section), of="cold start")
  chosen = first_of_each(kept, section["keep"])[: section["most"]]
  rewriter = hooks.load(
    section["rewriter"], REWRITERS, "cold_start.rewriter", folder / "rewritten.jsonl"
  )
  refined = [_refined(trace, rewriter) for trace in chosen]
  least = 1.0 if rewriter else section["least_consistency"]
  last = [
    ("misformatted", filters.formatted("chat")),
    ("still_wrong", filters.correct),
    ("still_mixed", filters.in_one_language(least)),
  ]
  written, after = filters.sift(refined, last, of="cold start, rewritten")
  traces.write(folder / "traces.jsonl", written)
  card = {
    "tokens": said.tokens,
    "truncated": truncated,
    "counts": counts,
    "rewritten": after,
  }
  filters.write_card(folder, "Cold start", card)
  return card


def traces_of(
  problems: Sequence[Problem], said: Sampled, source: str
) -> tuple[list[Trace], int]:
  """(the samples that ended, how many did not): SFT would teach those to end there."""
  rows = zip(problems, said.texts, said.ended, strict=True)
  pairs = [
    (Trace(problem, text, source), ends)
    for problem, group, ended in rows
    for text, ends in zip(group, ended, strict=True)
  ]
  return [t for t, ends in pairs if ends], sum(not ends for _, ends in pairs)


def first_of_each(kept: Sequence[Trace], most: int) -> list[Trace]:
  """At most so many traces of a problem, and no text twice."""
  found: dict[str, dict[str, Trace]] = {}
  for trace in kept:
    group = found.setdefault(trace.problem.problem, {})
    if len(group) < most:
      group.setdefault(trace.completion, trace)
  return [trace for group in found.values() for trace in group.values()]


def _refined(trace: Trace, rewriter: Rewriter | None) -> Trace:
  if rewriter is None:
    return trace
  text = rewriter(trace.completion, trace.problem)
  if not isinstance(text, str) or not text.strip():
    raise UserError(
      f"the rewriter of cold_start.rewriter gave {text!r} for the problem"
      f" {trace.problem.problem[:60]!r}; it must return the new completion, a text."
    )
  return Trace(trace.problem, text, "zero, rewritten")
