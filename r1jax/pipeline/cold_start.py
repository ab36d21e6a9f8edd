"""Cold start: R1-Zero's own thinking, made readable (R1, supplement B.3.2).

Zero answers prompts several times at temperature 1. What is right and readable is kept,
a rewriter puts it into the reader's language and adds a summary, and Dev1 is the base
fine-tuned on such traces.
"""

from collections.abc import Callable, Mapping
import pathlib

from r1jax.data import assistant, traces
from r1jax.data.problem import Problem
from r1jax.data.traces import Trace
from r1jax.pipeline import filters, hooks
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.training_traces import draw, first_of_each
from r1jax.run import Run

Rewriter = Callable[[str, Problem], str]  # (completion, its problem) -> a better one
REWRITERS: dict[str, Rewriter | None] = {
  "assistant": assistant.rewritten,  # the miniature's rule
  "none": None,
}
FORM = hooks.Form(
  "the new completion, a text that is not empty",
  lambda said: isinstance(said, str) and bool(said.strip()),
)


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
  sampled, card = draw(
    project, this, zero, section, folder, seed=this.config.seed, source="zero"
  )
  kept, counts = filters.sift(sampled, readable(section), of="cold start")
  chosen = first_of_each(kept, section["keep"])[: section["most"]]
  rewriter = hooks.load(
    section["rewriter"],
    REWRITERS,
    "cold_start.rewriter",
    FORM,
    folder / "rewritten.jsonl",
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
  card |= {"counts": counts, "rewritten": after}
  filters.write_card(folder, "Cold start", card)
  return card


def _refined(trace: Trace, rewriter: Rewriter | None) -> Trace:
  if rewriter is None:
    return trace
  text = rewriter(trace.completion, trace.problem)
  return Trace(trace.problem, text, "zero, rewritten")
