"""What the page says of a run: verdict, table, curves, complaints, cost and config."""

import json
import pathlib
from typing import Any

from r1jax import doctor, events, report
from r1jax.errors import UserError
from r1jax.goodput import Goodput
from r1jax.html_report.excerpt import POINTS, cut, json_object, number, size, thinned
from r1jax.metrics import MetricsFile

SERIES, CURVE_BYTES = 300, 1_300_000  # series, and bytes of all their points
CONFIG_BYTES = 300_000
# Figures of more than one series: name -> (phase, metric) of each.
TOGETHER = {
  "reward": (("rl", "reward"),),
  "accuracy and pass@1": (("rl", "accuracy"), ("eval", "pass_at_1"), ("eval", "cons")),
  "tokens a response": (("rl", "length"), ("eval", "mean_length")),
  "KL, nats a token": (("rl", "kl"), ("rl", "kl_old"), ("eval", "kl_to_base")),
  "entropy, nats a token": (("rl", "entropy"),),
  "reflection words a response": (
    ("rl", "reflection_rate"),
    ("eval", "reflection_rate"),
  ),
}
PHASES = {"rl": "rollouts", "eval": "held out"}


def metrics(workdir: pathlib.Path) -> list[dict]:
  """Rows with a phase and a step.

  Raises:
    UserError: there is none.
  """
  path = workdir / "metrics.jsonl"
  rows = [
    row
    for row in MetricsFile.rows_of(path)
    if isinstance(row, dict)
    and isinstance(row.get("phase"), str)
    and number(row.get("step")) is not None
  ]
  if not rows:
    raise UserError(
      f"{workdir} has no whole line in metrics.jsonl. Give the --workdir of a run that"
      " has begun; the first line comes with its first updates."
    )
  return rows


def stage(workdir: pathlib.Path) -> dict:
  """What a stage of R1 leaves of itself: its manifest when it is done, or else what it
  was begun with; {} of a run."""
  for name in ("manifest.json", "begun.json"):
    found = json_object(workdir / name)
    if isinstance(found.get("stage"), str) and isinstance(found.get("config"), dict):
      return found
  return {}


def of_phase(rows: list[dict], phase: str) -> list[dict]:
  return [row for row in rows if row["phase"] == phase]


# -- head ----------------------------------------------------------------------


def title(config: dict, workdir: pathlib.Path, stage: dict | None = None) -> str:
  """What was run; a folder without a config has its name."""
  objective, model = _inner(config, "objective"), _inner(config, "model")
  if "task" not in config or not (objective or stage):
    return workdir.resolve().name
  folder = pathlib.Path(str(model.get("folder") or "")).name
  asked = pathlib.Path(str(_inner(config, "data").get("problems") or "")).name
  said = f"{folder or 'in miniature'}: {asked or config['task']}"
  if stage:
    said = f"R1 {said}, stage {stage['stage']}"
  else:
    name = "PPO" if "ppo" in config else "R1-Zero"
    said = f"{name} {said}, objective {objective.get('preset')}"
  return f"{said}, seed {config.get('seed')}"


def verdict(
  config: dict, summary: dict, rows: list[dict], stage: dict | None = None
) -> str:
  """One sentence: how a run or a stage ended, or how far it came."""
  train = of_phase(rows, "rl")
  came = _came_to(config if not stage else {}, rows, train)
  if stage and number(stage.get("seconds")) is not None:
    said = (
      f"Stage {stage['stage']} of R1 is done, in {stage['seconds']:,.0f} s: {came}."
    )
  elif stage:
    said = f"Stage {stage['stage']} of R1 has begun and is not done: {came}."
  else:
    try:
      said = report.verdict(summary)
      if train and train[-1]["step"] > summary["final"]["step"]:
        said += f" It has gone on since, to update {train[-1]['step']}."
    except (KeyError, TypeError, ValueError):  # no summary, or of another kind of run
      said = f"{'It has ended' if summary else 'Without a result so far'}: {came}."
  return cut(said, 1_000)


def _came_to(config: dict, rows: list[dict], train: list[dict]) -> str:
  if not train:
    last = {row["phase"]: row["step"] for row in rows}
    return ", ".join(f"{phase} to step {step}" for phase, step in last.items())
  said = f"update {train[-1]['step']}"
  if number(config.get("steps")) is not None:
    said += f" of {config['steps']}"
  evals = [r for r in of_phase(rows, "eval") if number(r.get("pass_at_1")) is not None]
  if not evals:
    return said + ", not evaluated yet"
  first, last = evals[0], evals[-1]
  return (
    f"{said}, held-out pass@1 {first['pass_at_1']:.2f} -> {last['pass_at_1']:.2f}"
    f" at update {last['step']}"
  )


def figures(stage: dict) -> list[list]:
  """[name, number] of what a stage says in its manifest."""
  found = _leaves(_inner(stage, "figures"))
  numbers = [(name, number(json.loads(value))) for name, value in found]
  return [[cut(name, 60), value] for name, value in numbers if value is not None][:60]


def table(summary: dict) -> dict | None:
  """Base, half way, final and the change: pairs of texts, [figure, 95 % interval]."""
  columns = "base", "half_way", "final"
  if any(not isinstance(summary.get(name), dict) for name in columns):
    return None
  found = []
  for name in list(summary["final"])[:60]:
    values = [number(summary[column].get(name)) for column in columns]
    if name == "step" or None in values:
      continue
    between = _inner(_inner(summary, "intervals"), name)
    cells = [
      [f"{value:z.3f}", _range(between.get(column), "z.3f")]
      for column, value in zip(columns, values, strict=True)
    ]
    by = f"{values[2] - values[0]:+z.3f}", _range(between.get("change"), "+z.3f")
    found.append([cut(name.replace("_at_", "@"), 60), *cells, by])
  steps = [f"update {summary[column].get('step')}" for column in columns]
  return {"steps": steps, "rows": found}


def _range(ends: Any, form: str) -> str:
  """`[low, high]`, or nothing where there is no interval."""
  if not isinstance(ends, list) or [e for e in ends if number(e) is None]:
    return ""
  return f"[{ends[0]:{form}}, {ends[1]:{form}}]" if len(ends) == 2 else ""


def _inner(value: dict, name: str) -> dict:
  found = value.get(name)
  return found if isinstance(found, dict) else {}


# -- curves --------------------------------------------------------------------


def curves(rows: list[dict]) -> dict:
  """{"series", "figures", "note"}: every numeric metric of every phase."""
  found = _points(rows)
  keys = list(found)[:SERIES]
  most = max(min(POINTS, CURVE_BYTES // (20 * len(keys) or 1)), 50)
  series, thin = [], False
  for phase, name in keys:
    steps, values = zip(*found[phase, name], strict=True)
    places = thinned(values, most)
    thin |= len(places) < len(values)
    series.append(
      {
        "phase": cut(phase, 60),
        "name": cut(name, 60),
        "x": [number(steps[i]) for i in places],
        "y": [number(values[i]) for i in places],
      }
    )
  note = "Every row of metrics.jsonl is drawn."
  if thin:
    note = (
      f"Long curves are thinned to about {most:,} points: the first, the last, and the"
      " least and largest value of every stretch. All are in metrics.jsonl."
    )
  if len(found) > len(keys):
    note += f" {len(found) - len(keys)} more metrics are left out here."
  return {"series": series, "figures": _figures(keys), "note": note}


def _points(rows: list[dict]) -> dict[tuple[str, str], list[tuple]]:
  """(phase, metric) -> (step, value) of each row that has it; RL's phases first."""
  found: dict[tuple[str, str], list[tuple]] = {}
  for row in rows:
    for name, value in row.items():
      if name not in ("step", "phase") and number(value) is not None:
        found.setdefault((row["phase"], name), []).append((row["step"], value))
  order = ["rl", "eval", "pretrain"]
  last = len(order)
  return dict(
    sorted(
      found.items(),
      key=lambda item: order.index(item[0][0]) if item[0][0] in order else last,
    )
  )


def _figures(keys: list[tuple[str, str]]) -> list[dict]:
  """What can be plotted: the figures of RL that the page opens with, then each series
  on its own. {"name", "set", "lines": [[place among the series, label]]}."""
  found = []
  for name, wanted in TOGETHER.items():
    lines = []
    for phase, metric in wanted:
      for place, key in enumerate(keys):
        one_of = metric == "cons" and key[1].startswith("cons_at_")
        if key == (phase, metric) or (key[0] == phase and one_of):
          lines.append([place, _label(key, keys)])
    if len(lines) > 1 and (("rl", "kl") in keys) and name.startswith("KL"):
      lines = [line for line in lines if keys[line[0]] != ("rl", "kl_old")]
    if lines:
      found.append({"name": name, "set": "", "lines": lines})
  for place, (phase, metric) in enumerate(keys):
    name = cut(metric, 60)
    found.append({"name": name, "set": cut(phase, 60), "lines": [[place, name]]})
  return found


def _label(key: tuple[str, str], keys: list[tuple[str, str]]) -> str:
  phase, metric = key
  if phase == "eval" and metric != "mean_length" and metric != "reflection_rate":
    return metric.replace("_at_", "@").replace("kl_to_base", "held out, to the base")
  if metric == "kl":
    return "rollouts, to the reference"
  if metric == "kl_old":
    return "rollouts, to the sampler"
  return PHASES[phase]


# -- doctor, cost, config ------------------------------------------------------


def complaints(rows: list[dict]) -> dict:
  """What ails the run's RL: {"rollouts", "look", "list": [[name, text, is a note]]}."""
  train = of_phase(rows, "rl")
  said = doctor.examine(train)
  found = [[c.name, cut(c.text, 2_000), c.name == doctor.NOTE] for c in said]
  return {"rollouts": len(train), "look": doctor.LOOK, "list": found}


def cost(summary: dict, path: pathlib.Path, stage: dict | None = None) -> dict:
  """{"facts": [[label, text]], "bars": {heading: [[name, number]]}, "notes"}.

  Args:
    summary: of a run that has ended, or {}.
    path: of events.jsonl.
    stage: of R1; it leaves no summary.
  """
  facts, bars, notes = [], {}, []
  for name, label in (("devices", "devices"), ("jax", "jax"), ("seed", "seed")):
    if name in summary:
      facts.append([label, cut(summary[name], 200)])
  if number(summary.get("peak_rss_gib")) is not None:
    facts.append(["peak memory of the host", f"{summary['peak_rss_gib']} GiB"])
  if "config_sha256" in summary:
    facts.append(["sha256 of the config", cut(summary["config_sha256"], 64)])
  if not summary and not stage:
    notes.append("summary.json comes when the run ends; it names devices and memory.")
  if compiled := _inner(summary, "compilations"):
    names = (f"{name} {count}" for name, count in compiled.items())
    facts.append(["compilations", cut(", ".join(names), 1_000)])
  spent = {k: v for k, v in _inner(summary, "seconds").items() if k != "total"}
  if happened := events.read(path):
    run = Goodput.of(happened)
    facts[:0] = [
      ["wall time", f"{run.wall:,.1f} s"],
      ["work that was kept", f"{run.kept:,.1f} s, a goodput of {run.goodput:.1%}"],
      ["restarts", f"{run.restarts}, with {run.steps_again} steps done again"],
    ]
    spent = {**run.seconds, "without a name": run.unnamed}
  else:
    notes.append(f"{path.name} has no events: no time by phase over restarts.")
  bars["seconds by phase"] = _bars(spent)
  counts = {k: v for k, v in _inner(summary, "outcomes").items() if k != "samples"}
  bars["outcomes of all samples of RL"] = _bars(counts)
  return {"facts": facts, "bars": {k: v for k, v in bars.items() if v}, "notes": notes}


def _bars(values: dict) -> list[list]:
  """The largest first."""
  found = [[cut(k, 60), number(v)] for k, v in values.items() if number(v)]
  return sorted(found, key=lambda row: -row[1])[:40]


def configuration(config: dict, usual: dict) -> dict:
  """{"rows": [[key, value, the usual one or null if they agree]], "note"}."""
  if not config:
    return {"rows": [], "compared": False, "note": "There is no config.json."}
  mine, theirs = dict(_leaves(config)), dict(_leaves(usual))
  found, left = [], CONFIG_BYTES
  for key, value in mine.items():
    other = theirs.get(key, "not there")
    row = [cut(key, 200), cut(value, 500), cut(other, 500)]
    row[2] = None if not usual or other == value else row[2]
    left -= size(row) + 1
    if left < 0:
      break
    found.append(row)
  note = ""
  if len(found) < len(mine):
    note = f"{len(found):,} of {len(mine):,} keys; all are in config.json."
  return {"rows": found, "compared": bool(usual), "note": note}


def _leaves(value: dict, prefix: str = "") -> list[tuple[str, str]]:
  """(key.of.it, JSON) of every value that is no dict, or an empty one."""
  found = []
  for key, inner in value.items():
    if isinstance(inner, dict) and inner:
      found += _leaves(inner, f"{prefix}{key}.")
    else:
      found.append((f"{prefix}{key}", json.dumps(inner, ensure_ascii=False)))
  return found
