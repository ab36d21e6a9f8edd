"""tokens.html: every token of a few groups, with what the update made of it."""

from collections.abc import Iterator
import html
import itertools

import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.diagnostics import Trace
from r1jax.rewards.verdict import OUTCOMES

SIDES = ("", "low", "high", "cap")
STYLE = """
body { font: 14px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 70em; }
.row { margin: .2em 0; white-space: pre-wrap; font-family: ui-monospace, monospace; }
.row b { display: inline-block; width: 5.5em; font-weight: normal; color: #666; }
span { border-radius: 3px; padding: 1px 0; }
.low, .high, .cap { outline: 2px solid #000; }
h2 { font-size: 1em; margin: 1.5em 0 .3em; }
"""


def rows(trace: Trace, tokenizer: Tokenizer, group_size: int) -> Iterator[dict]:
  """One JSON-like row an output: its prompt, its tokens as text, numbers a token, and
  what it was rewarded for. `kl` is the k3 of each token to the reference (the
  objective's own estimator may be another); a run without one has none."""
  for i, mask in enumerate(np.asarray(trace.mask)):
    logprob, ratio, advantage, reference = (
      np.asarray(x, np.float64)[i, mask]
      for x in (trace.logprobs, trace.ratio, trace.advantages, trace.reference_logprobs)
    )
    asked = np.asarray(trace.prompts)[i, np.asarray(trace.prompt_mask)[i]]
    ids = np.asarray(trace.tokens)[i, mask]
    group, sample = divmod(int(trace.place[i]), group_size)
    row = {
      "group": group,
      "sample": sample,
      "tokens": [tokenizer.decode([t]) or tokenizer.piece(t) for t in ids.tolist()],
      "logprob": np.round(logprob, 4).tolist(),
      "ratio": np.round(ratio, 4).tolist(),
      "advantage": np.round(advantage, 4).tolist(),
      "clipped": [SIDES[c] for c in np.asarray(trace.clipped)[i, mask].tolist()],
      "problem": tokenizer.decode(asked.tolist()),
      "reward": round(float(trace.reward[i]), 4),
      "parts": {name: round(float(x[i]), 4) for name, x in trace.parts.items()},
    }
    if trace.outcome is not None:
      row["outcome"] = OUTCOMES[int(trace.outcome[i])]
    if reference.any():
      gap = reference - logprob
      row["kl"] = np.round(np.exp(gap) - gap - 1, 5).tolist()
    yield row


def page(traces: list[dict], title: str) -> str:
  """The HTML page. Text of the policy is escaped.

  Args:
    traces: rows as `rows` gives them, with their `step`.
    title: of the page.
  """
  body = [
    f"<h1>{html.escape(title)}</h1>",
    "<p>Outputs of a few groups as the update saw them. Green tokens had a positive"
    " advantage, red ones a negative one, the stronger the larger; a frame marks a"
    " clipped token. Point at a token for its log-probability, ratio and advantage;"
    " the number before an output is its first token's advantage.</p>",
  ]
  for (step, group), outputs in itertools.groupby(
    traces, key=lambda row: (row["step"], row["group"])
  ):
    body.append(f"<h2>update {step}, group {group}</h2>")
    body += [_output(row) for row in outputs]
  return (
    "<!doctype html><html lang='en'><meta charset='utf-8'>"
    f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    + "\n".join(body)
    + "</html>\n"
  )


def _output(row: dict) -> str:
  columns = ("tokens", "logprob", "ratio", "advantage", "clipped")
  spans = []
  for text, logprob, ratio, advantage, side in zip(
    *(row[c] for c in columns), strict=True
  ):
    hue = 140 if advantage > 0 else 0
    strength = min(abs(advantage) / 3, 1) * 0.6
    note = f"log p {logprob:.3f}, ratio {ratio:.3f}, advantage {advantage:.3f}"
    note += f", clipped: {side}" if side else ""
    spans.append(
      f"<span class='{side}' title='{note}' style='background:"
      f" hsla({hue}, 80%, 45%, {strength:.2f})'>{html.escape(text)}</span>"
    )
  first = f"{row['advantage'][0]:+.2f}" if row["advantage"] else "no loss"
  return f"<div class='row'><b>{first}</b>{''.join(spans)}</div>"
