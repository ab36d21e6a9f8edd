"""The miniature's web: pages of mixed quality that the base model is pre-trained on.

Most pages guess; a few work a problem out, and fewer check their steps ("wait"). The
corpus holds these behaviours with low probability; RL can only amplify what pays.
"""

import random

from r1jax import prompts
from r1jax.data import packing
from r1jax.data.packing import Example
from r1jax.data.problem import Problem
from r1jax.data.problems import Task
from r1jax.data.tokenizer import Tokenizer
from r1jax.sft import Pages


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
    mix: kind -> weight; `facts` pages hold single true steps and no problem, `request`
      pages are about problems that no rule can judge.
    template: of the prompts.
    facts_a_page: how many steps stand on a `facts` page.
    seed: of the choice of kinds, problems and slips.
  """
  rng = random.Random(seed)
  requests = [p for p in problems if p.domain != "reasoning"]
  sums = [p for p in problems if p.domain == "reasoning"]
  kinds = rng.choices(list(mix), weights=list(mix.values()), k=count)
  texts = []
  for kind in kinds:
    if kind == "facts":
      texts.append(("", ", ".join(task.fact(rng) for _ in range(facts_a_page))))
      continue
    problem = rng.choice(requests if kind == "request" else sums)
    prompt = prompts.render(template, problem.problem, prefill_think=False)
    texts.append((prompt, task.page(kind, problem, rng)))
  return texts


def pack(texts: list[str], tokenizer: Tokenizer, width: int) -> Pages:
  """Pages, each between BOS and EOS, side by side in rows of `width` tokens; all of a
  page is learned, and pages that are too long are left out."""
  ids = tokenizer.encode_batch(texts)
  examples = [
    Example([tokenizer.bos_id, *page, tokenizer.eos_id], prompt=1) for page in ids
  ]
  packed = packing.pack(examples, width, pad_id=tokenizer.pad_id, longest_first=False)
  return packed.pages
