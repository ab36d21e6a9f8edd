"""Traces: problems with completions to learn from, one JSON object a line."""

from collections.abc import Iterable
import dataclasses
import json
import pathlib
import reprlib

from r1jax import prompts
from r1jax.data.packing import Example
from r1jax.data.problem import DOMAINS, KINDS, Problem
from r1jax.data.rows import checked_problem, fail, read_rows, text_of
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
  found = read_rows(path, _trace, '{"problem": "...", "completion": "..."}')
  if not found:
    raise UserError(f"{path} holds no trace.")
  return found


def _trace(row: dict) -> Trace:
  answers, kind = row.get("answer", []), row.get("kind", "answer")
  answers = answers if isinstance(answers, list) else [answers]
  if not all(isinstance(a, str | int | float) for a in answers):
    fail(f'"answer" is {reprlib.repr(row["answer"])}, not a text or a number')
  domain = row.get("domain", "reasoning")
  for name, value, known in (("kind", kind, KINDS), ("domain", domain, DOMAINS)):
    if value not in known:
      fail(f'"{name}" is {reprlib.repr(value)}, none of {", ".join(known)}')
  language, source = row.get("language", ""), row.get("source", "")
  if not isinstance(language, str) or not isinstance(source, str):
    fail('"language" and "source" are texts')
  problem = checked_problem(text_of(row, "problem"), tuple(map(str, answers)), kind)
  problem = dataclasses.replace(problem, language=language, domain=domain)
  return Trace(problem, text_of(row, "completion"), source)


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
