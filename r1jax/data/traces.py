"""Traces: problems with completions to learn from, one JSON object a line."""

from collections.abc import Iterable
import dataclasses
import json
import pathlib

from r1jax import prompts
from r1jax.data.packing import Example
from r1jax.data.problem import DOMAINS, KINDS, Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Trace:
  problem: Problem
  completion: str
  source: str = ""  # who wrote it, a stage or a pool


def write(path: pathlib.Path, traces: Iterable[Trace]) -> None:
  """All or nothing: a kill leaves the old file, or none. A problem's tests are not
  written: a trace is learned and not judged."""
  partial = path.with_suffix(".partial")
  with partial.open("w", encoding="utf-8") as file:
    for t in traces:
      row = {
        "problem": t.problem.problem,
        "answer": list(t.problem.answers),
        "kind": t.problem.kind,
        "language": t.problem.language,
        "domain": t.problem.domain,
        "completion": t.completion,
        "source": t.source,
      }
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
  partial.replace(path)


def read(path: pathlib.Path) -> list[Trace]:
  """What `write` wrote, or a user's file: `problem` and `completion` are needed.

  Raises:
    UserError: with FILE:line, what came and what is needed.
  """
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read: {error}.") from error
  found = [_trace(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line]
  if not found:
    raise UserError(f"{path} holds no trace.")
  return found


def _trace(line: str, where: str) -> Trace:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON ({error.msg}).") from error
  texts = ("problem", "completion")
  if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in texts):
    raise UserError(
      f"{where} is {line[:60]!r}; a trace is an object with the strings 'problem' and"
      " 'completion'."
    )
  for key in texts:
    if not row[key].strip():
      raise UserError(f"{where}: {key!r} is empty.")
  domain = row.get("domain", "reasoning")
  if domain not in DOMAINS:
    raise UserError(f"{where}: domain {domain!r} is not one of {', '.join(DOMAINS)}.")
  answers = row.get("answer", [])
  answers = answers if isinstance(answers, list) else [answers]
  if not all(isinstance(a, str | int | float) for a in answers):
    raise UserError(f"{where}: 'answer' is {row['answer']!r}, not a text or a number.")
  kind = row.get("kind", "answer")
  if kind not in KINDS:
    raise UserError(f"{where}: kind {kind!r} is not one of {', '.join(KINDS)}.")
  problem = Problem(
    row["problem"],
    tuple(map(str, answers)),
    kind,
    language=row.get("language", ""),
    domain=domain,
  )
  return Trace(problem, row["completion"], row.get("source", ""))


def examples(
  traces: Iterable[Trace], tokenizer: Tokenizer, *, template: str
) -> list[Example]:
  """Prompt, completion and EOS; the completion and EOS are learned (prompt masking)."""
  found = []
  for t in traces:
    prompt = prompts.encode(
      t.problem.problem, tokenizer, template=template, prefill_think=False
    )
    completion = [*tokenizer.encode(t.completion), tokenizer.eos_id]
    found.append(Example([*prompt, *completion], prompt=len(prompt)))
  return found
