"""An evaluation: samples of all problems, their verdicts, figures with intervals, and
what another one of the same problems says beside it.

  samples.jsonl     what was said, chunk by chunk: what is there is not drawn again
  verdicts.jsonl    a row a problem: texts, lengths, outcomes
  evaluation.json   how it was done, and the figures
  scaling.png       accuracy against votes and against tokens
"""

from collections.abc import Callable, Sequence
import json
import pathlib

import numpy as np
import rich.table

from r1jax import settings
from r1jax.errors import UserError
from r1jax.evals import answers, generate, pass_at_k, scaling
from r1jax.evals.answers import Decoding
from r1jax.evals.generate import Marks, Samples
from r1jax.evals.interval import interval, paired
from r1jax.metrics import MetricsFile, write_json
from r1jax.rewards.scorer import Scorer
from r1jax.trained import Trained

RESULT, VERDICTS = "evaluation.json", "verdicts.jsonl"


def evaluate(
  kept: Trained,
  asked: Sequence[tuple],
  decoding: Decoding,
  scorer: Scorer,
  folder: pathlib.Path,
  *,
  said: dict,
  ks: Sequence[int] = (),
  prefill_think: bool = False,
  progress: Callable[[int, int], None] = lambda done, all: None,
) -> dict:
  """Samples, judges and sums up; a folder that has part of it goes on.

  Args:
    kept: the policy.
    asked: (problem, prompt) of each.
    decoding: how is sampled.
    scorer: judges.
    folder: of this evaluation.
    said: what else it depends on, for people and to refuse another one in the folder.
    ks: of pass@k, beside 1 and all samples.
    prefill_think: prompts ended in <think>.
    progress: (samples so far, all).

  Returns:
    What evaluation.json holds.

  Raises:
    UserError: another evaluation is in the folder; a k that is more than the samples.
  """
  check(ks, decoding.samples)
  problems, prompts = zip(*asked, strict=True)
  begin(folder, {**said, "problems": len(problems)})
  samples = answers.sample(
    kept, problems, prompts, decoding, folder / "samples.jsonl", progress
  )
  marks = generate.mark(samples, prefill_think=prefill_think, scorer=scorer)
  voted, right = generate.ballots(samples, marks, prefill_think=prefill_think)
  found = {
    **said,
    "problems": len(problems),
    "figures": figures(samples, marks, voted, right, ks),
    "majority": scaling.majority(voted, right) if voted else [],
    "budgets": scaling.budgets(samples.lengths, marks.correct),
  }
  keep(folder / VERDICTS, samples, marks)
  title = f"{said['what']}: {len(problems)} problems, {decoding.samples} samples"
  scaling.plot(folder / "scaling.png", found["majority"], found["budgets"], title)
  write_json(folder / RESULT, found)
  return found


def check(ks: Sequence[int], samples: int) -> None:
  """Raises UserError: a k of pass@k that cannot be."""
  wrong = [k for k in ks if not 1 <= k <= samples]
  if wrong:
    raise UserError(
      f"--k={wrong[0]}: pass@{wrong[0]} needs 1 to as many samples a problem as are"
      f" drawn, {samples}. Raise --samples, or give a smaller k."
    )


def begin(folder: pathlib.Path, said: dict) -> None:
  """Raises UserError: the folder holds an evaluation that was done otherwise."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "config.json"
  said = json.loads(json.dumps(said))
  if path.exists():
    changes = settings.differences(json.loads(path.read_text()), said)
    if changes:
      raise UserError(
        f"{folder} holds another evaluation ({'; '.join(changes)}). Give another"
        " --out, or the flags that it was begun with."
      )
  write_json(path, said)


def figures(
  samples: Samples,
  marks: Marks,
  voted: Sequence,
  right: np.ndarray,
  ks: Sequence[int],
) -> dict[str, dict[str, float]]:
  """name -> value, low and high of its 95 % interval over problems."""
  correct, n = marks.correct, marks.correct.shape[1]
  each = {"pass@1": correct.mean(axis=1)}
  for k in sorted({*ks, n} - {1}):
    each[f"pass@{k}"] = pass_at_k.pass_at_k_of_each(correct, k)
  if voted and n > 1:
    each[f"cons@{n}"] = np.array(
      [pass_at_k.consensus(*pair) for pair in zip(voted, right, strict=True)]
    )
  each["format"] = marks.format.mean(axis=1)
  each["truncated"] = 1.0 - samples.ended.mean(axis=1)
  lost = [[v.outcome == "infrastructure" for v in row] for row in marks.verdicts]
  each["lost"] = np.mean(lost, axis=1)
  shares = set(each)
  each["tokens"] = samples.lengths.mean(axis=1)
  words = [[generate.reflections(text) for text in row] for row in samples.texts]
  each["reflection words"] = np.mean(words, axis=1)
  found = {}
  for name, values in each.items():
    low, high = interval(values, shares=name in shares)
    found[name] = {"value": float(values.mean()), "low": low, "high": high}
  return found


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
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def against(folder: pathlib.Path, other: pathlib.Path) -> dict:
  """pass@1 of `folder` less that of `other`, on the problems that both were asked.

  Returns:
    {"problems", "mean", "low", "high", "p"}.

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
  return {"problems": len(both), **paired(*map(np.array, pair))._asdict()}


def shares(folder: pathlib.Path) -> dict[str, float]:
  """problem -> share of its samples that are right."""
  path = folder / VERDICTS
  if not path.exists():
    raise UserError(
      f"{folder} holds no evaluation that has ended (no {VERDICTS}): give the folder"
      " that experiments.evaluate printed."
    )
  return {
    row["problem"]: float(np.mean([o == "correct" for o in row["outcomes"]]))
    for row in MetricsFile.rows_of(path)
  }


def table(found: dict) -> rich.table.Table:
  """The figures, and their intervals."""
  title = f"{found['what']}: {found['problems']} problems"
  shown = rich.table.Table("", "value", "95 % over problems", title=title)
  for name, row in found["figures"].items():
    digits = 1 if name == "tokens" else 3
    value, low, high = (f"{row[k]:.{digits}f}" for k in ("value", "low", "high"))
    shown.add_row(name, value, f"[{low}, {high}]", style=None)
  return shown
