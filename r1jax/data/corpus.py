"""The miniature's web: pages of mixed quality that the base model is pre-trained on.

Most pages guess; a few work a problem out, and fewer check their steps ("wait"). The
corpus holds these behaviours with low probability; RL can only amplify what pays.
"""

import random

import numpy as np

from r1jax import prompts
from r1jax.data.problem import Problem
from r1jax.data.problems import Task
from r1jax.data.tokenizer import Tokenizer


def pages(
  task: Task,
  problems: list[Problem],
  count: int,
  *,
  mix: dict[str, float],
  template: str,
  facts_a_page: int,
  seed: int,
) -> list[tuple[str, str]]:
  """`count` pages, each as (prompt, what follows it).

  Args:
    task: writes them.
    problems: what they are about (never an evaluation problem).
    count: how many.
    mix: kind -> weight; `facts` pages hold single true steps and no problem.
    template: of the prompts.
    facts_a_page: how many steps stand on a `facts` page.
    seed: of the choice of kinds, problems and slips.
  """
  rng = random.Random(seed)
  kinds = rng.choices(list(mix), weights=list(mix.values()), k=count)
  texts = []
  for kind in kinds:
    if kind == "facts":
      texts.append(("", ", ".join(task.fact(rng) for _ in range(facts_a_page))))
      continue
    problem = rng.choice(problems)
    prompt = prompts.render(template, problem.problem, prefill_think=False)
    texts.append((prompt, task.page(kind, problem, rng)))
  return texts


def pack(
  texts: list[str], tokenizer: Tokenizer, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pages, each between BOS and EOS, put side by side into rows.

  A page goes into the fullest open row that still holds it; pages longer than `width`
  are left out.

  Returns:
    (tokens [rows, width] int32, segments [rows, width] int32): segment 0 is padding,
    and a page attends to its own segment only.
  """
  docs = [
    [tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)
  ]
  docs = [d for d in docs if len(d) <= width]
  open_rows: list[list[list[int]]] = [[] for _ in range(width + 1)]  # by free room
  rows = []
  for doc in docs:
    room = next((r for r in range(len(doc), width) if open_rows[r]), None)
    row = [] if room is None else open_rows[room].pop()
    if room is None:
      rows.append(row)
    row.append(doc)
    open_rows[(width if room is None else room) - len(doc)].append(row)
  tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
  segments = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    flat = [t for doc in row for t in doc]
    tokens[i, : len(flat)] = flat
    segments[i, : len(flat)] = np.repeat(
      np.arange(1, len(row) + 1), [len(doc) for doc in row]
    )
  return tokens, segments
