"""Scores samples on the host: a pool of workers, and what came of each sample.

A sample goes to the next free slot; a slot has a maths worker and a sandbox of its own,
started when they are first needed. Results stand where their samples stood. When our
side fails the sample is tried again, and then it is lost: its outcome says so and
nobody scores it 0.
"""

import collections
from collections.abc import Iterable, Iterator
import concurrent.futures
import dataclasses
import itertools
import math
import os
import queue
import time

from r1jax.data.problem import Problem
from r1jax.errors import UserError
from r1jax.rewards import accuracy, language, wasi
from r1jax.rewards.code import CodeReward
from r1jax.rewards.format import STYLES, format_reward
from r1jax.rewards.golds import gold_error, gold_note, place
from r1jax.rewards.maths import MathsError, MathsWorker
from r1jax.rewards.program import Limits
from r1jax.rewards.rules import Rule, checked
from r1jax.rewards.sandbox import BACKENDS, MAX_SLOTS, Sandbox, open_sandbox
from r1jax.rewards.total import Breakdown, total
from r1jax.rewards.verdict import Verdict
from r1jax.rewards.wasi import Wasi

MATHS = ("math-verify", "exact")
SANDBOXES = (*BACKENDS, wasi.BACKEND)
_AHEAD = 8  # samples a worker that are under way at a time
_TRIES = 3
_CACHED = 100_000  # (gold, answer) pairs


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
  """Which rewards, and by what means."""

  accuracy_weight: float = 1.0
  format_weight: float = 1.0
  format_style: str = "tags"  # one of format.STYLES
  language_weight: float = 0.0  # 0: not computed
  language: str = "en"  # of problems that say none
  language_detector: bool = False
  prefill_think: bool = False
  workers: int = 0  # 0: one a core
  maths: str = "math-verify"  # or "exact": numbers and structures of numbers alone
  maths_seconds: float = 2.0  # an answer's algebra
  sandbox: str = "bubblewrap"  # for code; one of SANDBOXES
  limits: Limits = dataclasses.field(default_factory=Limits)

  def __post_init__(self):
    """Raises UserError: what came, the rule and the remedy."""
    for name in ("accuracy_weight", "format_weight", "language_weight"):
      if not math.isfinite(getattr(self, name)):
        raise UserError(f"config.reward.{name}={getattr(self, name)} must be a number.")
    if self.maths not in MATHS:
      raise UserError(
        f"config.reward.maths={self.maths!r} is not one of {', '.join(MATHS)}."
      )
    if self.sandbox not in SANDBOXES:
      raise UserError(
        f"config.reward.sandbox={self.sandbox!r} is not one of {', '.join(SANDBOXES)}."
      )
    language.scripts_of(self.language)
    if self.format_style not in STYLES:
      raise UserError(
        f"config.reward.format_style={self.format_style!r} is not one of"
        f" {', '.join(STYLES)}."
      )
    if not 0 <= self.workers <= MAX_SLOTS:
      raise UserError(
        f"config.reward.workers={self.workers} must lie in 0..{MAX_SLOTS}; 0 is one a"
        " core."
      )
    if not 0 < self.maths_seconds <= 3600:
      raise UserError(
        f"config.reward.maths_seconds={self.maths_seconds} must be above 0 and at most"
        " 3600."
      )


class Scorer:
  """Scores (completion, problem) pairs. A context: leaving it ends all workers."""

  def __init__(
    self,
    config: ScorerConfig,
    problems: Iterable[Problem],
    rules: dict[str, tuple[float, Rule]] | None = None,
  ):
    """Starts what the problems need, and tries it.

    Args:
      config: the choices.
      problems: all that will be scored: without code among them no sandbox is opened.
      rules: your own, name -> (weight, rule).

    Raises:
      UserError: a sandbox or math-verify is needed and missing (what to install), a
        gold that cannot be read, or a rule that fails on a trial text.
    """
    c = self.config = config
    problems = list(problems)
    kinds = {p.kind for p in problems}
    self.rules = {n: (w, checked(f, n)) for n, (w, f) in (rules or {}).items()}
    self.weights = {"accuracy": c.accuracy_weight, "format": c.format_weight}
    if c.language_weight:
      self.weights["language"] = c.language_weight
    self.weights |= {name: weight for name, (weight, _) in self.rules.items()}
    self.notes: list[str] = []  # for people, of the data
    self._detector = language.cld2_detector() if c.language_detector else None
    sandbox = _sandbox(c) if "code" in kinds else None
    self.workers = c.workers or _cores()
    maths = c.maths == "math-verify" and "answer" in kinds
    self._slots = queue.LifoQueue()
    self._known = {}  # (gold, answer) -> what algebra said
    for i in range(self.workers):
      self._slots.put(
        _Slot(
          maths=MathsWorker(c.maths_seconds) if maths else None,
          code=CodeReward(sandbox, slot=i, prefill_think=c.prefill_think)
          if sandbox
          else None,
        )
      )
    self._pool = concurrent.futures.ThreadPoolExecutor(self.workers, "reward")
    try:
      self._try(problems)
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Scorer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def score(self, samples: Iterable[tuple[str, Problem]]) -> list[Breakdown]:
    """The samples' rewards, in their order. Safe from any thread.

    Raises:
      UserError: a rule of yours failed.
    """
    return list(self.stream(samples))

  def stream(self, samples: Iterable[tuple[str, Problem]]) -> Iterator[Breakdown]:
    """As `score`, one by one: no more are taken than the workers keep up with."""
    samples, under_way = iter(samples), collections.deque()
    while True:
      room = self.workers * _AHEAD - len(under_way)
      for sample in itertools.islice(samples, room):
        under_way.append(self._pool.submit(self._one, *sample))
      if not under_way:
        return
      yield under_way.popleft().result()

  def verdicts(self, samples: Iterable[tuple[str, Problem]]) -> list[Verdict]:
    """Right or not, without the other rewards; for evaluations."""
    return list(self._pool.map(lambda sample: self._verdict(*sample), samples))

  def close(self) -> None:
    """Waits for what is under way and ends all processes."""
    self._pool.shutdown(cancel_futures=True)
    while not self._slots.empty():
      self._slots.get().close()

  def _one(self, completion: str, problem: Problem) -> Breakdown:
    c, verdict = self.config, self._verdict(completion, problem)
    how = dict(prefill_think=c.prefill_think)
    form = format_reward(completion, style=c.format_style, **how)
    parts = {"accuracy": verdict.score, "format": form}
    if "language" in self.weights:
      target = problem.language or c.language
      parts["language"] = language.language_consistency(
        completion, target, detector=self._detector, **how
      )
    for name, (_, rule) in self.rules.items():
      parts[name] = rule(completion, problem)
    reward = total(parts, self.weights)
    return Breakdown(reward, parts, verdict.outcome, verdict.detail)

  def _verdict(self, completion: str, problem: Problem) -> Verdict:
    slot = self._slots.get()
    try:
      for _ in range(_TRIES):
        verdict = self._tried(completion, problem, slot)
        if verdict.outcome != "infrastructure":
          break
      return verdict
    finally:
      self._slots.put(slot)

  def _tried(self, completion: str, problem: Problem, slot: "_Slot") -> Verdict:
    try:
      if problem.kind == "code":
        return slot.code(completion, problem)
      return accuracy.answered(
        completion,
        problem.answers,
        kind=problem.kind,
        prefill_think=self.config.prefill_think,
        algebra=self._algebra(slot) if slot.maths else None,
      )
    except Exception as error:  # ours, not the sample's
      return Verdict("infrastructure", f"{type(error).__name__}: {error}")

  def _algebra(self, slot: "_Slot") -> accuracy.Algebra:
    """For one answer: all its expressions together have the worker's seconds."""
    slot.maths.start()  # its imports are not the answer's
    until = time.monotonic() + slot.maths.seconds

    def asked(gold: str, answer: str) -> str:
      known = self._known.get((gold, answer))
      if known is None:
        left = until - time.monotonic()
        known = slot.maths(gold, answer, left) if left > 0 else "timeout"
        if known in ("equal", "different") and len(self._known) < _CACHED:
          self._known[gold, answer] = known
      return known

    return asked

  def _try(self, problems: list[Problem]) -> None:
    """Raises UserError where the first real sample would."""
    slot = self._slots.get()
    try:
      if slot.maths:
        slot.maths.start()
    except MathsError as error:
      raise UserError(f"{error} or set config.reward.maths=exact.") from error
    finally:
      self._slots.put(slot)
    bad = [(p, error) for p in problems if (error := gold_error(p))]
    if bad:
      more = f" (and {len(bad) - 1} more such golds)" if len(bad) > 1 else ""
      raise UserError(
        f"{place(bad[0][0])}: {bad[0][1]}{more}. Mend it or leave the problem out."
      )
    try:
      notes = self._pool.map(lambda p: gold_note(p, self._is_expression), problems)
      odd = [(p, note) for p, note in zip(problems, notes, strict=True) if note]
    except MathsError as error:
      raise UserError(f"{error}, while the golds were read.") from error
    if odd:
      more = f", and {len(odd) - 1} more such golds" if len(odd) > 1 else ""
      where, note = place(odd[0][0]), odd[0][1]
      self.notes.append(f"compared as text alone: {where}: {note}{more}.")
    styles = {(p.kind, p.tests and p.tests.style): p for p in problems}
    for problem in styles.values():
      for text in ("", "<think>I add.</think><answer>7</answer>"):
        self._one(text, problem)

  def _is_expression(self, text: str) -> bool:
    slot = self._slots.get()
    try:
      return not slot.maths or slot.maths.reads(text)
    finally:
      self._slots.put(slot)


def _sandbox(c: ScorerConfig) -> Sandbox | Wasi:
  if c.sandbox == wasi.BACKEND:
    return wasi.open_wasi(c.limits)
  return open_sandbox(c.sandbox, c.limits)


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return min(len(os.sched_getaffinity(0)), MAX_SLOTS)
  return min(os.cpu_count() or 1, MAX_SLOTS)


@dataclasses.dataclass
class _Slot:
  """What one worker at a time uses."""

  maths: MathsWorker | None
  code: CodeReward | None

  def close(self) -> None:
    for part in (self.maths, self.code):
      if part:
        part.close()
