"""What a run leaves for people to look at: curves, sampled groups, one sentence."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rich.console
import rich.table
import rich.text


def curves(
  path: pathlib.Path, train: list[dict], evals: list[dict], title: str
) -> None:
  """Accuracy, length, reflection and KL against updates: Figure 2 of R1 in miniature.

  Args:
    path: of the PNG.
    train: rows of phase `rl`.
    evals: rows of phase `eval`.
    title: of the figure.
  """
  figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
  steps, held_out = [r["step"] for r in train], [r["step"] for r in evals]
  cons = next(k for k in evals[0] if k.startswith("cons_at_"))
  kl, label = "kl", "KL to the reference, nats a token"
  if any(kl not in row for row in train):
    kl, label = "kl_old", "KL to the sampling policy, nats a token"
  panels = [
    (
      "accuracy",
      "accuracy",
      [("pass_at_1", "pass@1"), (cons, cons.replace("_at_", "@"))],
    ),
    ("length", "tokens a response", [("mean_length", "held out")]),
    (
      "reflection_rate",
      "reflection words a response",
      [("reflection_rate", "held out")],
    ),
    (kl, label, []),
  ]
  for axis, (key, label, lines) in zip(axes.flat, panels, strict=True):
    axis.plot(steps, [r[key] for r in train], color="0.7", lw=1, label="rollouts")
    for name, shown in lines:
      axis.plot(held_out, [r[name] for r in evals], marker="o", ms=4, label=shown)
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
  for axis in axes[1]:
    axis.set_xlabel("update")
  figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def show_groups(
  console: rich.console.Console, samples: list[dict], heading: str
) -> None:
  """A few responses to a few problems. Model output is printed as plain text."""
  console.print(rich.text.Text(heading, style="bold"))
  for row in samples:
    accepted = " or ".join(row["answers"])
    console.print(
      rich.text.Text(f"  {row['problem']}   (answer {accepted})", style="cyan")
    )
    for text in row["texts"]:
      console.print(rich.text.Text(f"    {text}"))


def show_table(console: rich.console.Console, summary: dict) -> None:
  """Base, half way and final, side by side; and by how much final is above base, in
  95 % of resamplings of the problems."""
  heads = "base", "half way", "final", "change (95 % over problems)"
  table = rich.table.Table("held-out problems", *heads)
  for name in summary["final"]:
    if name != "step":
      values = [summary[column][name] for column in ("base", "half_way", "final")]
      change = f"{values[2] - values[0]:+.3f}"
      if name in summary["intervals"]:
        low, high = summary["intervals"][name]["change"]
        change += f" [{low:+.3f}, {high:+.3f}]"
      table.add_row(name, *(f"{v:.3f}" for v in values), change)
  console.print(table)


def verdict(summary: dict) -> str:
  """One line that says what happened, whatever it was."""
  base, final = summary["base"], summary["final"]

  def change(name: str, digits: int) -> str:
    return f"{base[name]:.{digits}f} -> {final[name]:.{digits}f}"

  low, high = summary["intervals"]["pass_at_1"]["change"]
  word = "learned" if low > 0 else "lost accuracy" if high < 0 else "hardly moved"
  return (
    f"RL {word}: pass@1 {change('pass_at_1', 2)}, length {change('mean_length', 1)}"
    f" tokens, reflection words a response {change('reflection_rate', 2)}, in"
    f" {summary['seconds']['total']:.0f} s."
  )
