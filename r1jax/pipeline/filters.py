"""Which sampled traces are good enough to learn from (R1, supplement B.3.2, B.3.3).

A filter is a name and a function that says whether a trace is kept. The paper names
what it filters (wrong answers, repetition, mixed languages, long paragraphs, code
blocks) and gives no thresholds; here each has one, with a name.
"""

from collections.abc import Callable, Sequence
import pathlib
import re

from r1jax.data.traces import Trace
from r1jax.errors import UserError
from r1jax.metrics import write_json
from r1jax.rewards.accuracy import answered
from r1jax.rewards.format import format_reward
from r1jax.rewards.language import language_consistency, thinking

_HAN = "\u3400-\u9fff"
Filter = tuple[str, Callable[[Trace], bool]]


def sift(
  traces: Sequence[Trace], filters: Sequence[Filter], *, of: str
) -> tuple[list[Trace], dict[str, int]]:
  """(what passes every filter, {"sampled", what each filter dropped, "kept"}); a trace
  counts for the first filter that drops it.

  Raises:
    UserError: nothing is left; it names the counts that emptied it.
  """
  counts = {"sampled": len(traces), **{name: 0 for name, _ in filters}}
  kept = []
  for trace in traces:
    fault = next((name for name, keeps in filters if not keeps(trace)), None)
    if fault is None:
      kept.append(trace)
    else:
      counts[fault] += 1
  counts["kept"] = len(kept)
  if not kept:
    said = ", ".join(f"{name} {n}" for name, n in counts.items())
    raise UserError(
      f"{of}: no trace is left after the filters ({said}). Sample more, from a better"
      " checkpoint, or loosen the filter that drops most."
    )
  return kept, counts


def write_card(folder: pathlib.Path, name: str, card: dict) -> None:
  """A data set's card: card.json for programs, card.md for people."""
  write_json(folder / "card.json", card)
  lines = [f"# {name}", "", "| | |", "|---|---|"]
  for key, value in card.items():
    if isinstance(value, dict):
      lines += [f"| {key}: {part} | {count} |" for part, count in value.items()]
    else:
      lines.append(f"| {key} | {value} |")
  (folder / "card.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def correct(trace: Trace) -> bool:
  """The answer is one of the accepted, by the exact rules."""
  p = trace.problem
  return answered(trace.completion, p.answers, kind=p.kind).outcome == "correct"


def formatted(style: str) -> Callable[[Trace], bool]:
  return lambda trace: format_reward(trace.completion, style=style) == 1.0


def repetition(text: str, n: int = 8) -> float:
  """The share of windows of n words that stood before in the text; a Han character is a
  word."""
  words = re.findall(rf"[{_HAN}]|[^\W{_HAN}]+|[^\w\s]", text)
  windows = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
  return 1.0 - len(set(windows)) / len(windows) if windows else 0.0


def unrepeated(most: float) -> Callable[[Trace], bool]:
  """At most this share of repeated windows."""
  return lambda trace: repetition(trace.completion) <= most


def in_one_language(least: float) -> Callable[[Trace], bool]:
  """The thinking has at least this share of words of the problem's language."""

  def keeps(trace: Trace) -> bool:
    target = trace.problem.language
    return not target or language_consistency(trace.completion, target) >= least

  return keeps


def short_paragraphs(most: int) -> Callable[[Trace], bool]:
  """No paragraph of the thinking has more characters than this."""
  return lambda t: max(map(len, thinking(t.completion).split("\n\n"))) <= most


def without_code(trace: Trace) -> bool:
  """No code block in the thinking."""
  return "```" not in thinking(trace.completion)
