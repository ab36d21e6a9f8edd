"""The result for people: tables in the terminal and in Markdown, and plots."""

from collections.abc import Mapping
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table

from r1jax.evals.report_card import ROWS
from r1jax.metrics import MetricsFile

# Stages whose rewards a model gives, in the order of the plot.
HACKING = {
  "rl_2": "R1: preference rewards at the end",
  "rl_2_uncapped": "all along",
}


def cell_text(cell: Mapping) -> str:
  low, high = cell["interval"]
  return f"{100 * cell['mean']:.1f} ±{50 * (high - low):.1f}"


def markdown(figures: Mapping) -> str:
  """The table and the directions as Markdown."""
  table = figures["table"]
  lines = ["| | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
  for row, (_, _, about) in ROWS.items():
    cells = [cell_text(table[column][row]) for column in table]
    lines.append(f"| {row}: {about} | " + " | ".join(cells) + " |")
  lines += ["", "| the paper says | here | points | seen |", "|---|---|---|---|"]
  for d in figures["directions"]:
    low, high = d["interval"]
    least = f" (above {100 * d['least']:.0f})" if d["least"] else ""
    lines.append(
      f"| {d['claim']} | {d['row']}: {d['better']} - {d['worse']}{least} |"
      f" {100 * d['gap']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {d['seen']} |"
    )
  return "\n".join(lines) + "\n"


def show_file(console: rich.console.Console, path: pathlib.Path) -> None:
  show(console, json.loads(path.read_text()))


def show(console: rich.console.Console, figures: Mapping) -> None:
  """The table and the directions in the terminal; a narrow one gets the table on its
  side."""
  found = {
    column: {row: f"{100 * cells[row]['mean']:.1f}" for row in ROWS}
    for column, cells in figures["table"].items()
  }
  if console.width < 14 + 9 * len(found):
    table = rich.table.Table("percent", *ROWS)
    for column, cells in found.items():
      table.add_row(column, *cells.values())
  else:
    table = rich.table.Table("percent", *found)
    for row in ROWS:
      table.add_row(row, *(cells[row] for cells in found.values()))
  console.print(table)
  table = rich.table.Table("the paper says", "points", "seen")
  for d in figures["directions"]:
    low, high = d["interval"]
    points = f"{100 * d['gap']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    table.add_row(d["claim"], points, d["seen"])
  console.print(table)


def plot(path: pathlib.Path, figures: Mapping, title: str) -> None:
  """A panel a row of the table, a bar a column, with intervals."""
  names = list(figures["table"])
  figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
  for axis, row in zip(axes.flat, ROWS, strict=True):
    cells = [figures["table"][name][row] for name in names]
    means = np.array([cell["mean"] for cell in cells])
    ends = np.array([cell["interval"] for cell in cells]).T
    errors = np.maximum(np.abs(ends - means), 0.0)
    axis.bar(range(len(names)), means, yerr=errors, color="#4477aa", ecolor="#555555")
    axis.set_title(row)
    axis.set_ylim(0, 1)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def plot_hacking(path: pathlib.Path, inputs: Mapping[str, pathlib.Path]) -> None:
  """Fig. 6 in miniature: what the reward model says of the requests that RL asks (its
  score, on an axis of its own), against what people would say of held-out ones and the
  accuracy on held-out sums."""
  shown = [name for name in HACKING if name in inputs]
  files = {name: MetricsFile(inputs[name] / "metrics.jsonl") for name in shown}
  said = {
    n: [r for r in f.phase("rl") if r.get("reward_model")] for n, f in files.items()
  }
  scores = [r["reward_model"] for rows in said.values() for r in rows]
  ends = (min(scores, default=0.0), max(scores, default=1.0))
  room = 0.05 * (ends[1] - ends[0]) or 1.0
  figure, axes = plt.subplots(
    1, len(shown), figsize=(6.5 * len(shown), 4.4), squeeze=False, sharey=True
  )
  for axis, name in zip(axes.flat, shown, strict=True):
    proxy = axis.twinx()
    steps = [r["step"] for r in said[name]]
    label, color = "mean score of both reward models", "#cc3311"
    proxy.plot(steps, [r["reward_model"] for r in said[name]], color=color, label=label)
    proxy.set_ylim(ends[0] - room, ends[1] + room)
    proxy.tick_params(axis="y", colors=color)
    for label, phase, key, style in (
      ("hidden helpfulness, held out", "examined", "helpfulness", "o-"),
      ("hidden safety, held out", "examined", "safety", "s-"),
      ("pass@1, held-out sums", "eval", "pass_at_1", "^-"),
    ):
      rows = files[name].phase(phase)
      axis.plot([r["step"] for r in rows], [r[key] for r in rows], style, label=label)
    axis.set_title(HACKING[name])
    axis.set_xlabel("updates")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
  lines = [*axis.get_lines(), *proxy.get_lines()]
  figure.legend(handles=lines, fontsize=8, loc="lower center", ncols=4)
  figure.tight_layout(rect=(0, 0.06, 1, 1))
  figure.savefig(path, dpi=110)
  plt.close(figure)
