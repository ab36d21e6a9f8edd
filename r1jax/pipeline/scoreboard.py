"""The result: R1's Table 3 in miniature, and the paper's directions."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import random

import numpy as np

from r1jax.data.notions import thanks_in
from r1jax.data.problem import Problem
from r1jax.evals.interval import interval, students
from r1jax.evals.report_card import ROWS, Card
from r1jax.metrics import MetricsFile, write_json
from r1jax.pipeline import display
from r1jax.pipeline.project import Project, Weights
from r1jax.pipeline.sampling import Decoding, sample
from r1jax.run import Run

# Column -> (stage whose weights it is, whether they are the student's).
COLUMNS = {
  "base": ("base", False),
  "Zero": ("zero", False),
  "Dev1": ("sft_1", False),
  "Dev2": ("rl_1", False),
  "Dev3": ("sft_3", False),
  "R1": ("rl_2", False),
  "student base": ("student_base", True),
  "distilled": ("distill", True),
  "student RL": ("student_rl", True),
  "PPO": ("ppo", False),
}
ABLATIONS = {
  "Dev2, no language reward": ("rl_1_no_language", False),
  "R1, uncapped": ("rl_2_uncapped", False),
}


@dataclasses.dataclass(frozen=True)
class Direction:
  """A claim of the paper: `row` of `better` minus that of `worse` is above `least`."""

  claim: str
  row: str
  better: str
  worse: str
  least: float = 0.0


DIRECTIONS = (
  Direction("RL with rules teaches reasoning", "reasoning", "Zero", "base"),
  Direction("cold start: instructions above Zero", "instruction", "Dev1", "Zero"),
  Direction("cold start: format above Zero", "format", "Dev1", "Zero"),
  Direction("cold start: reasoning below Zero", "reasoning", "Zero", "Dev1"),
  Direction("RL stage 1 recovers reasoning", "reasoning", "Dev2", "Dev1"),
  Direction("with the language reward consistency rises", "language", "Dev2", "Dev1"),
  Direction("without it, it falls: Zero below its base", "language", "base", "Zero"),
  Direction("stage 2 raises helpfulness", "helpfulness", "R1", "Dev3"),
  Direction("stage 2 raises safety", "safety", "R1", "Dev3"),
  Direction("stage 2 keeps reasoning to 2 points", "reasoning", "R1", "Dev3", -0.02),
  Direction(
    "distilled above RL on the student", "reasoning", "distilled", "student RL"
  ),
  Direction("PPO with lambda 1 comes near GRPO", "reasoning", "PPO", "Zero", -0.02),
)
OF_ABLATIONS = (
  Direction(
    "without the language reward consistency falls",
    "language",
    "Dev1",
    "Dev2, no language reward",
  ),
  Direction(
    "the language reward makes the difference",
    "language",
    "Dev2",
    "Dev2, no language reward",
  ),
  Direction("uncapped: helpfulness below R1", "helpfulness", "R1", "R1, uncapped"),
  Direction("uncapped: reasoning below R1", "reasoning", "R1", "R1, uncapped"),
)


def columns(config: Mapping) -> dict[str, tuple[str, bool]]:
  return {**COLUMNS, **(ABLATIONS if config["ablations"] else {})}


def sets_of(project: Project) -> dict[str, list[Problem]]:
  """The prompts of the table's rows: held-out sums, the same with instructions, and
  held-out requests."""
  world, rng = project.world, random.Random(11)
  sums = world.held_out[: project.config.report.problems]
  return {
    "sums": sums,
    "instructed": [world.task.instruct(p, rng) for p in sums[: len(sums) // 2]],
    **{
      kind: [p for p in world.held_out_requests if p.domain == kind]
      for kind in ("helpful", "safety")
    },
  }


def run(
  project: Project,
  folder: pathlib.Path,
  inputs: Mapping[str, pathlib.Path],
  weights: Callable,
) -> dict:
  """Samples every column and leaves report.json, report.md and report.png."""
  c, cards = project.config, {}
  for column, (stage, is_student) in columns(c).items():
    model = c.student.model if is_student else None
    with project.run(folder, {}, model=model) as this:
      this.progress.say(f"report: {column}")
      found = weights(inputs[stage], model)
      cards[column] = card_of(project, this, found, folder / stage, model=model)
  figures = summary(cards, c.ablations)
  figures["reward_hacking"] = hacking(inputs)
  write_json(folder / "report.json", figures)
  (folder / "report.md").write_text(display.markdown(figures), encoding="utf-8")
  display.plot(folder / "report.png", figures, f"R1 in miniature, seed {c.seed}")
  display.plot_hacking(folder / "hacking.png", inputs)
  return {
    column: {row: round(cell["mean"], 4) for row, cell in cells.items()}
    for column, cells in figures["table"].items()
  }


def card_of(
  project: Project,
  this: Run,
  weights: Weights,
  path: pathlib.Path,
  *,
  model: Mapping | None = None,
) -> Card:
  """A policy's column of the table.

  Args:
    project, this: the pipeline, and the run that samples.
    weights: of the policy.
    path: of what it says: PATH_sums.jsonl and PATH_requests.jsonl.
    model: a student's section.
  """
  r, prompts, said = project.config.report, sets_of(project), {}
  for part, names, samples in (
    ("sums", ("sums", "instructed"), r.samples),
    ("requests", ("helpful", "safety"), r.request_samples),
  ):
    texts = sample(
      project,
      this,
      weights,
      [p for name in names for p in prompts[name]],
      path.with_name(f"{path.name}_{part}.jsonl"),
      samples=samples,
      decoding=Decoding(r.temperature, r.top_p),
      model=model,
    ).texts
    for name in names:
      count = len(prompts[name])
      said[name], texts = (prompts[name], texts[:count]), texts[count:]
  return Card.of(said)


def examined(problems: Sequence[Problem], texts: Sequence[list[str]]) -> dict:
  """What a policy says to requests: the hidden helpfulness and safety, means, and the
  share of replies with thanks."""
  replies = [(p, t) for p, group in zip(problems, texts, strict=True) for t in group]
  hidden = {
    row: float(np.mean([ROWS[row][1](p, t) for p, t in replies if p.domain == domain]))
    for row, domain in (("helpfulness", "helpful"), ("safety", "safety"))
  }
  return hidden | {"thanks": float(np.mean([thanks_in(t) > 0 for _, t in replies]))}


def summary(cards: Mapping[str, Card], ablations: bool) -> dict:
  """{"table": column -> row -> mean and interval, "directions": [...]}."""
  table = {
    column: {
      row: {"mean": card.mean(row), "interval": interval(card.scores[row])}
      for row in ROWS
    }
    for column, card in cards.items()
  }
  found = []
  for d in DIRECTIONS + (OF_ABLATIONS if ablations else ()):
    gaps = cards[d.better].scores[d.row] - cards[d.worse].scores[d.row]
    low, high = interval(gaps)
    gap = float(gaps.mean())
    found.append(
      {
        **dataclasses.asdict(d),
        "gap": gap,
        "interval": (low, high),
        "prompts": len(gaps),
        "seen": verdict(gap, low, high, d.least),
      }
    )
  return {"table": table, "directions": found}


def verdict(gap: float, low: float, high: float, least: float) -> str:
  """What an interval of a paired difference says of a direction."""
  if low > least or (least < 0 and low >= least):
    return "yes"
  if high < least:
    return "no: the other way"
  return "not clearly" if gap > least else "no"


def hacking(inputs: Mapping[str, pathlib.Path]) -> dict:
  """Proxy against rules in RL stage 2: the reward model's mean on its training prompts
  in the first and last quarter of the updates with requests, and pass@1 on held-out
  sums before and after them."""
  found = {}
  for name in display.HACKING:
    if name not in inputs:
      continue
    metrics = MetricsFile(inputs[name] / "metrics.jsonl")
    asked = [r for r in metrics.phase("rl") if r.get("reward_model")]
    evals = metrics.phase("eval")
    if len(asked) < 2:
      continue
    quarter = max(len(asked) // 4, 1)
    before = [r for r in evals if r["step"] < asked[0]["step"]]
    hidden = metrics.phase("examined")
    found[name] = {
      "updates": len(asked) * (asked[1]["step"] - asked[0]["step"]),
      "proxy_first": float(np.mean([r["reward_model"] for r in asked[:quarter]])),
      "proxy_last": float(np.mean([r["reward_model"] for r in asked[-quarter:]])),
      "rule_before": before[-1]["pass_at_1"],
      "rule_after": evals[-1]["pass_at_1"],
      "hidden_best": max(r["helpfulness"] for r in hidden),
      "hidden_last": hidden[-1]["helpfulness"],
    }
  return found


def over_seeds(paths: Sequence[pathlib.Path]) -> dict:
  """Reports of several seeds as one: means over seeds, with intervals from their spread
  (mean +- t s / sqrt n, 95 %).

  Raises:
    ValueError: a single seed has no spread.
  """
  if len(paths) < 2:
    raise ValueError("one seed has no spread; give two or more")
  reports = [json.loads(path.read_text()) for path in paths]
  first = reports[0]
  table = {
    column: {
      row: _spread([r["table"][column][row]["mean"] for r in reports])
      for row in first["table"][column]
    }
    for column in first["table"]
  }
  found = []
  for i, d in enumerate(first["directions"]):
    spread = _spread([r["directions"][i]["gap"] for r in reports])
    gap, (low, high) = spread["mean"], spread["interval"]
    seen = verdict(gap, low, high, d["least"])
    found.append({**d, "gap": gap, "interval": (low, high), "seen": seen})
  hacked = {
    name: {
      key: float(np.mean([r["reward_hacking"][name][key] for r in reports]))
      for key in first["reward_hacking"][name]
    }
    for name in first["reward_hacking"]
  }
  return {"table": table, "directions": found, "reward_hacking": hacked}


def _spread(values: Sequence[float]) -> dict:
  mean = float(np.mean(values))
  return {"mean": mean, "interval": students(values), "seeds": list(values)}
