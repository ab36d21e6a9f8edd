"""How sure a reward model is, against how often it is right."""

from collections.abc import Sequence
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(path: pathlib.Path, table: Sequence[dict], kind: str) -> None:
  """The reliability diagram of `calibration.reliability`'s rows."""
  figure, axis = plt.subplots(figsize=(5, 5))
  axis.plot([0, 1], [0, 1], color="#999999", linestyle="--", label="calibrated")
  x, y = [row["predicted"] for row in table], [row["fraction"] for row in table]
  axis.plot(x, y, "o-", color="#4477aa", label=f"{kind} reward model")
  for row in table:
    place = (row["predicted"], row["fraction"])
    axis.annotate(f" {row['n']}", place, fontsize=8, va="top")
  axis.set_xlabel("probability that it gives (numbers: held-out cases)")
  axis.set_ylabel("fraction that is so")
  axis.set_xlim(0, 1)
  axis.set_ylim(0, 1)
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)
