"""An evaluation: samples of all problems, their verdicts, figures with intervals, and
what another one of the same problems says beside it.

  config.json       how it is done
  samples.jsonl     what was said, chunk by chunk: what is there is not drawn again
  verdicts.jsonl    a row a problem: texts, lengths, outcomes
  evaluation.json   how it was done, and the figures
  scaling.png       accuracy against votes and against tokens
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import rich.table

from r1jax import settings
from r1jax.errors import UserError
from r1jax.evals import answers, generate, pass_at_k, scaling
from r1jax.evals.answers import Decoding
from r1jax.evals.generate import Marks, Samples
from r1jax.evals.interval import figure, paired
from r1jax.metrics import MetricsFile, write_json, write_lines
from r1jax.rewards.scorer import Scorer
from r1jax.trained import Trained

CONFIG, SAMPLES = "config.json", "samples.jsonl"
RESULT, VERDICTS = "evaluation.json", "verdicts.jsonl"


def evaluate(
  load: Callable[[], Trained],
  asked: Sequence[tuple],
  decoding: Decoding,
  scorer: Scorer,
  folder: pathlib.Path,
  *,
  said: dict,
  ks: Sequence[int] = (),
  form: str | None = None,
  method: str = "bootstrap",
  progress: Callable[[int, int], None] = lambda done, all: None,
) -> dict:
  """Samples, judges and sums up; a folder that has part of it goes on.

  Args:
    load: gives the policy; not called where nothing is left to draw.
    asked: (problem, prompt) of each.
    decoding: how is sampled.
    scorer: judges.
    folder: of this evaluation.
    said: all that it depends on, for people and to refuse another one in the folder.
    ks: of pass@k, beside 1 and all samples.
    form: the style of the format reward, where the prompts ask for a form.
    method: of the intervals, of interval.METHODS.
    progress: (samples so far, all).

  Returns:
    What evaluation.json holds.

  Raises:
    UserError: another evaluation is in the folder; a k that is more than the samples.
  """
  check(ks, decoding.samples)
  refuse_another(folder, said)
  problems, prompts = zip(*asked, strict=True)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / CONFIG, said)
  samples = answers.sample(
    load, problems, prompts, decoding, folder / SAMPLES, progress
  )
  rules = dict(prefill_think=scorer.config.prefill_think)
  marks = generate.mark(samples, scorer=scorer, format_style=form or "tags", **rules)
  votes, right = generate.ballots(samples, marks, **rules)
  each, shares = of_each(samples, marks, votes, right, ks, form=bool(form))
  how = dict(method=method)
  found = {
    **said,
    "interval": method,
    "figures": {k: figure(x, shares=k in shares, **how) for k, x in each.items()},
    "majority": scaling.majority(votes, right, **how) if len(votes) else [],
    "budgets": scaling.budgets(samples.lengths, marks.correct, **how),
  }
  keep(folder / VERDICTS, samples, marks)
  title = f"{said['what']}: {len(problems)} problems, {decoding.samples} samples"
  scaling.plot(folder / "scaling.png", found["majority"], found["budgets"], title)
  write_json(folder / RESULT, found)
  return found


def finished(
  folder: pathlib.Path, said: dict, ks: Sequence[int], method: str
) -> dict | None:
  """What `evaluate` has left in the folder, if it has ended, with these pass@k and such
  intervals.

  Raises:
    UserError: another evaluation is in the folder.
  """
  refuse_another(folder, said)
  if not (folder / RESULT).exists():
    return None
  found = json.loads((folder / RESULT).read_text())
  has = found["interval"] == method and all(f"pass@{k}" in found["figures"] for k in ks)
  return found if has else None


def check(ks: Sequence[int], samples: int) -> None:
  """Raises UserError: a k of pass@k that cannot be."""
  wrong = [k for k in ks if not 1 <= k <= samples]
  if wrong:
    raise UserError(
      f"--k={wrong[0]}: pass@{wrong[0]} needs 1 to as many samples a problem as are"
      f" drawn, {samples}. Raise --samples, or give a smaller k."
    )


def begun(folder: pathlib.Path) -> dict:
  """How the folder's evaluation is done; {} where nothing has been drawn yet."""
  path, samples = folder / CONFIG, folder / SAMPLES
  drawn = (samples.exists() and samples.stat().st_size) or (folder / RESULT).exists()
  return json.loads(path.read_text()) if drawn and path.exists() else {}


def refuse_another(folder: pathlib.Path, said: dict) -> None:
  """Raises UserError: the folder holds an evaluation that was done otherwise."""
  before = begun(folder)
  changes = settings.differences(before, json.loads(json.dumps(said)))
  if before and changes:
    raise UserError(
      f"{folder} holds another evaluation ({'; '.join(changes)}). Give another --out,"
      " or the flags that it was begun with."
    )


def digest(asked: Sequence[tuple]) -> str:
  """Of problems and prompts, 16 hexadecimal digits. Args: asked: as `evaluate`."""
  rows = [(prompt, dataclasses.asdict(problem)) for problem, prompt in asked]
  for _, row in rows:
    del row["where"]  # where they are read from is not what they say
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def of_each(
  samples: Samples,
  marks: Marks,
  votes: np.ndarray,
  right: np.ndarray,
  ks: Sequence[int],
  *,
  form: bool,
) -> tuple[dict[str, np.ndarray], set[str]]:
  """(name -> its value on each problem; the names of those in 0..1). Args: form:
  whether the prompts ask for one."""
  correct, n = marks.correct, marks.correct.shape[1]
  each = {"pass@1": correct.mean(axis=1)}
  for k in sorted({*ks, n} - {1}):
    each[f"pass@{k}"] = pass_at_k.pass_at_k_of_each(correct, k)
  if len(votes) and n > 1:
    each[f"cons@{n}"] = pass_at_k.consensus(votes, right)
  if form:
    each["format"] = marks.format.mean(axis=1)
  each["truncated"] = 1.0 - samples.ended.mean(axis=1)
  for name, outcome in (("no answer", "unparsable"), ("lost", "infrastructure")):
    such = [[v.outcome == outcome for v in row] for row in marks.verdicts]
    each[name] = np.mean(such, axis=1)
  shares = set(each)
  each["tokens"] = samples.lengths.mean(axis=1)
  words = [[generate.reflections(text) for text in row] for row in samples.texts]
  each["reflection words"] = np.mean(words, axis=1)
  return each, shares


def keep(path: pathlib.Path, samples: Samples, marks: Marks) -> None:
  """A row a problem, for people and for comparisons."""
  lines = []
  rows = zip(
    samples.problems, samples.texts, samples.lengths, marks.verdicts, strict=True
  )
  for problem, texts, lengths, verdicts in rows:
    lines.append(
      {
        "problem": problem.problem,
        "answers": list(problem.answers),
        "texts": texts,
        "lengths": lengths.tolist(),
        "outcomes": [v.outcome for v in verdicts],
        "details": [v.detail for v in verdicts],
      }
    )
  write_lines(path, lines)


def against(folder: pathlib.Path, other: pathlib.Path) -> dict:
  """pass@1 of `folder` less that of `other`, on the problems that both were asked; it
  is put into the evaluation.json of `folder` too.

  Returns:
    {"folder": the other, "problems", "mean", "low", "high", "p"}.

  Raises:
    UserError: no evaluation there, or of other problems.
  """
  here, there = shares(folder), shares(other)
  both = [problem for problem in here if problem in there]
  if not both:
    raise UserError(
      f"--against={other}: none of its problems is one of {folder}. Evaluate both on"
      " the same ones."
    )
  pair = ([of[p] for p in both] for of in (there, here))
  found = {"folder": str(other), "problems": len(both)}
  found |= paired(*map(np.array, pair))._asdict()
  result = json.loads((folder / RESULT).read_text())
  write_json(folder / RESULT, {**result, "against": found})
  return found


def shares(folder: pathlib.Path) -> dict[tuple[str, int], float]:
  """(problem, how often it stood before) -> share of its samples that are right.

  Raises:
    UserError: no evaluation there that has ended, or its verdicts are of another form.
  """
  path, seen, found = folder / VERDICTS, collections.Counter(), {}
  if not path.exists() or not (folder / RESULT).exists():
    raise UserError(
      f"{folder} holds no evaluation that has ended (no {VERDICTS} and {RESULT}): give"
      " the folder that experiments.evaluate printed."
    )
  for number, row in enumerate(MetricsFile.rows_of(path), start=1):
    if not isinstance(row, dict) or not {"problem", "outcomes"} <= row.keys():
      raise UserError(
        f'{path}:{number} has no "problem" and "outcomes": it is not what an evaluation'
        " leaves. Evaluate anew, in another --out."
      )
    text = row["problem"]
    found[text, seen[text]] = float(np.mean([o == "correct" for o in row["outcomes"]]))
    seen[text] += 1
  return found


def table(found: dict) -> rich.table.Table:
  """The figures, and their intervals."""
  title = f"{found['what']}: {found['problems']} problems"
  table = rich.table.Table("", "value", "95 % over problems", title=title)
  for name, row in found["figures"].items():
    digits = ".1f" if name == "tokens" else ".3f"
    table.add_row(name, f"{row['value']:{digits}}", shown(row, digits), style=None)
  return table


def shown(row: dict, digits: str) -> str:
  """An interval, of a row with low and high. Args: digits: a format, such as .3f."""
  if row["low"] is None:
    return "-"
  return f"[{row['low']:{digits}}, {row['high']:{digits}}]"
