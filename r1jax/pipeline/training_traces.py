"""A policy's answers to training problems as traces: what cold start and rejection
sampling begin with, and filter each in its own way."""

from collections.abc import Mapping, Sequence
import pathlib
import random

from r1jax.data.problem import Problem
from r1jax.data.traces import Trace
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.sampling import Decoding, Sampled, sample
from r1jax.run import Run


def draw(
  project: Project,
  this: Run,
  policy: Weights,
  section: Mapping,
  folder: pathlib.Path,
  *,
  seed: int | str,
  source: str,
) -> tuple[list[Trace], dict]:
  """(traces that ended, what a card says of them).

  Args:
    project, this: the pipeline and the stage.
    policy: the weights that answer.
    section: prompts, instructed, samples and temperature.
    folder: the stage's; samples.jsonl goes there.
    seed: of the choice of problems.
    source: the policy's name in a trace.
  """
  problems = asked(project, section["prompts"], section["instructed"], seed)
  said = sample(
    project,
    this,
    policy,
    problems,
    folder / "samples.jsonl",
    samples=section["samples"],
    decoding=Decoding(section["temperature"]),
  )
  found, truncated = traces_of(problems, said, source)
  card = {"prompts": len(problems), "samples": section["samples"]}
  return found, {**card, "tokens": said.tokens, "truncated": truncated}


def asked(
  project: Project, count: int, instructed: float, seed: int | str
) -> list[Problem]:
  """`count` training problems, a share of them with an instruction."""
  rng, task = random.Random(seed), project.world.task
  chosen = rng.sample(project.world.train, min(count, len(project.world.train)))
  return [task.instruct(p, rng) if rng.random() < instructed else p for p in chosen]


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
