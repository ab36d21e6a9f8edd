"""What is seen of a few runs: a table, curves, bars."""

from collections.abc import Mapping, Sequence
import pathlib

from matplotlib.figure import Figure
import numpy as np

from experiments import compare
from experiments.compare import Runs

# Figures of metrics.jsonl in words.
WORDS = {
  "pass_at_1": "pass@1, held out",
  "mean_length": "tokens a response, held out",
  "reflection_rate": "reflection words a response, held out",
  "format_rate": "format, held out",
  "kl_to_base": "log π - log base a token, held out",
  "accuracy": "accuracy of rollouts",
  "reward": "reward of rollouts",
  "language": "share of words in the question's language",
  "entropy": "entropy, nats a token",
  "equal_groups": "share of groups whose rewards are equal",
  "kl": "KL to the reference, nats a token",
  "kl_old": "KL to the policy that sampled, nats a token",
  "clip_fraction": "share of tokens clipped",
  "clip_fraction_low": "share of tokens clipped from below (A < 0)",
  "clip_fraction_high": "share of tokens clipped from above (A > 0)",
  "ratio_max": "largest ratio",
  "value_error": "|V - return|",
  "grad_norm": "norm of the gradient",
}
QUARTERS = 4  # figures of rollouts are noisy: a table has means over the first and last


class Picture:
  """A PNG that a notebook shows where it is the last value of a cell."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def _repr_png_(self) -> bytes:
    return self.path.read_bytes()


def table(runs: Runs, figures: Sequence[str]) -> str:
  """A row a run, each figure at the beginning and at the end: of evaluations the first
  and the last, of rollouts the means over the first and the last quarter.

  Raises:
    UserError: a figure that no run has.
  """
  lines = [["", *figures], *([label] for label in runs.names)]
  for figure in figures:
    for line, (label, (_, values)) in zip(
      lines[1:], runs.curves(figure).items(), strict=True
    ):
      held_out = figure in runs.read.summary(runs.names[label])["final"]
      n = 1 if held_out else max(len(values) // QUARTERS, 1)
      ends = [np.mean(x) for x in (values[:n], values[-n:])] if values else []
      line.append(" -> ".join(f"{x:.3g}" for x in ends) or "none")
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def plot(runs: Runs, figures: Sequence[str]) -> Picture:
  """A panel a figure, a curve a run, against updates. Errors as `table`."""
  panels = {WORDS.get(figure, figure): runs.curves(figure) for figure in figures}
  return lines(runs.name, panels)


def lines(
  name: str, panels: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]]
) -> Picture:
  """Curves against updates, two panels a row.

  Args:
    name: of the notebook.
    panels: title -> label -> (updates, values), no values where there is no curve.
  """
  rows = -(-len(panels) // 2)
  drawn = Figure(figsize=(11, 3.4 * rows))
  axes = drawn.subplots(rows, 2, squeeze=False)
  for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
    for i, (label, curve) in enumerate(found.items()):
      axis.plot(*curve, color=f"C{i}", lw=1.5, label=label)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("update")
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(panels) :]:
    axis.axis("off")
  if len(next(iter(panels.values()))) > 1:
    axes[0, 0].legend(frameon=False, fontsize=9)
  return saved(drawn, compare.ROOT / name / "curves.png")


def bars(name: str, panels: Mapping[str, Mapping[str, float]]) -> Picture:
  """A panel a figure, a bar a label.

  Args:
    name: of the notebook.
    panels: title -> label -> value.
  """
  drawn = Figure(figsize=(1 + 3.4 * len(panels), 3.6))
  axes = drawn.subplots(1, len(panels), squeeze=False)
  for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
    made = axis.bar(list(values), list(values.values()), color="C0")
    axis.bar_label(made, fmt="%.2f", fontsize=8)
    axis.margins(y=0.12)
    axis.set_title(title, fontsize=10)
    axis.tick_params(axis="x", rotation=30, labelsize=8)
    axis.grid(axis="y", alpha=0.3)
  return saved(drawn, compare.ROOT / name / "bars.png")


def saved(drawn: Figure, path: pathlib.Path) -> Picture:
  """The figure as a PNG, in a folder that is made for it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn.tight_layout()
  drawn.savefig(path, dpi=110)
  return Picture(path)
