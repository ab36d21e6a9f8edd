"""Problems: where they come from, how they are split, and the stream that feeds RL."""

import dataclasses
import hashlib
import random
from typing import Protocol

import grain
import numpy as np

from r1jax.data.problem import Problem
from r1jax.errors import UserError


class Task(Protocol):
  """What a generator of problems and of its miniature world's pages offers."""

  symbols: tuple[str, ...]  # pieces the tokenizer keeps whole

  def problem(self, rng: random.Random) -> Problem: ...

  def identity(self, problem: Problem) -> str: ...  # of one identity: on one side

  def fact(self, rng: random.Random) -> str: ...

  def is_fact(self, text: str) -> bool: ...

  def page(self, kind: str, problem: Problem, rng: random.Random) -> str: ...


@dataclasses.dataclass(frozen=True)
class Split:
  """Three sets of problems that share no text."""

  pretrain: list[Problem]
  train: list[Problem]
  held_out: list[Problem]


def bucket(text: str) -> float:
  """A number in [0, 1) that depends on the text alone; it decides a problem's side."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def squeeze(text: str) -> str:
  """The text without white space: `4+3` and `4 + 3` are one problem."""
  return "".join(text.split())


def generate(task: Task, *, pretrain: int, train: int, held_out: int) -> Split:
  """Draws distinct problems until each side is full; the bucket of its identity puts a
  problem on its side, whatever the seed, so that no two runs ever mix them.

  Raises:
    UserError: the task has too few distinct problems.
  """
  rng = random.Random(0)
  sides = {"held_out": {}, "train": {}, "pretrain": {}}
  wanted = {"held_out": held_out, "train": train, "pretrain": pretrain}
  tries = 0
  while any(len(sides[s]) < wanted[s] for s in sides):
    tries += 1
    if tries > 50 * sum(wanted.values()):
      raise UserError(
        "the task yields too few distinct problems:"
        f" {dict((s, len(p)) for s, p in sides.items())} of {wanted}. Make the task"
        " harder (more terms or higher numbers) or lower config.counts."
      )
    p = task.problem(rng)
    b = bucket(task.identity(p))
    side = "held_out" if b < 0.1 else "train" if b < 0.5 else "pretrain"
    if len(sides[side]) < wanted[side]:
      sides[side].setdefault(p.problem, p)
  return Split(**{s: list(p.values()) for s, p in sides.items()})


def split_requests(task: Task, rows: list[Problem]) -> tuple[list, list]:
  """(train, held_out), a fifth of the identities held out. They are few, so pages of
  the corpus are about those that RL trains on."""
  held_out = [p for p in rows if bucket(task.identity(p)) < 0.2]
  return [p for p in rows if bucket(task.identity(p)) >= 0.2], held_out


def split_file(problems: list[Problem], *, held_out: float) -> tuple[list, list]:
  """(train, held_out) halves of a file's problems, by the bucket of their text, so that
  a problem that stands twice never lands on both sides.

  Raises:
    UserError: a side would be empty.
  """
  ordered = sorted({bucket(squeeze(p.problem)): p for p in problems}.items())
  cut = round(len(ordered) * held_out)
  kept, rest = [p for _, p in ordered[:cut]], [p for _, p in ordered[cut:]]
  if not kept or not rest:
    raise UserError(
      f"{len(ordered)} distinct problems cannot be split with"
      f" config.data.held_out={held_out}: both sides need at least one."
    )
  return rest, kept


def stream(count: int, batch: int, *, seed: int) -> grain.DatasetIterator:
  """Endless shuffled indices of problems, `batch` at a time.

  `get_state()` of the iterator is a small JSON-like value, the same on every host, and
  `set_state` continues exactly.

  Raises:
    UserError: fewer problems than a batch.
  """
  if count < batch:
    raise UserError(
      f"{count} training problems are fewer than one step's config.prompts={batch}."
      " Give more problems or lower config.prompts."
    )
  data = grain.MapDataset.source(np.arange(count)).seed(seed).shuffle().repeat()
  return iter(
    grain.experimental.ElasticIterator(data, batch, grain.sharding.NoSharding())
  )
