"""What a run trains on: problems on three sides that never mix."""

from collections.abc import Mapping
import dataclasses
import json
import random
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from r1jax import prompts
from r1jax.data import corpus, gym, problems, sources
from r1jax.data.assistant import Assistant
from r1jax.data.chain import Chain
from r1jax.data.problem import Problem
from r1jax.data.problems import Task
from r1jax.data.puzzle import Puzzle
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError

TASKS = {"chain": Chain, "puzzle": Puzzle, "assistant": Assistant}


@dataclasses.dataclass(frozen=True)
class World:
  task: Task
  pretrain: list[Problem]  # what the base corpus's pages are about
  train: list[Problem]  # what RL sees
  held_out: list[Problem]  # what the evaluation asks
  # Requests that reward models judge, where the task has some.
  requests: list[Problem] = dataclasses.field(default_factory=list)
  held_out_requests: list[Problem] = dataclasses.field(default_factory=list)


def make_task(name: str, options: Mapping) -> Task:
  """The generator called `name`, at the difficulty that `options[name]` sets; sums of
  the assistant are as long and large as those of `options["chain"]`."""
  if name not in TASKS:
    raise UserError(
      f"config.task={name!r} is not a task; choose one of {sorted(TASKS)}."
    )
  chain = options["chain"] if name == "assistant" else {}
  return TASKS[name](**chain, **options[name])


def make_world(
  task: Task,
  *,
  counts: dict[str, int],
  given: Mapping,
  seed: int,
) -> World:
  """Problems of the task; with a file, RL and evaluation problems come from it instead,
  and the corpus is still the task's, without any problem of the file.

  A problem of one step is not evaluated on: the corpus's fact pages state it outright.

  Args:
    task: the generator.
    counts: {"pretrain", "train", "held_out"}: how many to generate.
    given: a config's `data`: `problems`, "" for the task's own; `source` and
      `skip_malformed`; `held_out`, the share that is kept for evaluation; `count` and
      `options`, of reasoning-gym.
    seed: of reasoning-gym's problems.
  """
  made = problems.generate(task, **counts)
  if not given["problems"]:
    asked = [p for p in made.held_out if not task.is_fact(p.problem)]
    if not isinstance(task, Assistant):
      return World(task, made.pretrain, made.train, asked)
    return with_requests(task, made, asked, seed)
  rows = read(given, seed)
  train, kept = problems.split_file(rows, held_out=given["held_out"])
  of_file = {problems.squeeze(p.problem) for p in rows}
  pretrain = [
    p
    for p in (*made.pretrain, *made.train, *made.held_out)
    if problems.squeeze(p.problem) not in of_file
  ]
  return World(task, pretrain, train, [p for p in kept if not task.is_fact(p.problem)])


def of_config(config: Mapping) -> World:
  """The world of a run's config. Errors as `make_task` and `read`."""
  task, counts = make_task(config["task"], config), dict(config["counts"])
  return make_world(task, counts=counts, given=config["data"], seed=config["seed"])


def with_requests(
  task: Assistant, made: problems.Split, asked: list[Problem], seed: int
) -> World:
  """A world that also holds requests, and whose pages are about them and about sums
  with instructions too."""
  rng = random.Random(seed)
  requests, kept = problems.split_requests(task, task.requests())
  about = [
    task.instruct(p, rng) if rng.random() < task.instructed else p
    for p in made.pretrain
  ]
  return World(
    task,
    [*about, *requests],
    made.train,
    asked,
    requests,
    kept,
  )


def read(given: Mapping, seed: int) -> list[Problem]:
  """The problems that a config's `data` names."""
  name, source = given["problems"], given["source"]
  if source == "reasoning_gym":
    try:
      options = json.loads(given["options"] or "{}")
    except json.JSONDecodeError as error:
      raise UserError(
        f"config.data.options={given['options']!r} is not JSON ({error}). It is an"
        ' object such as {"min_terms": 2}.'
      ) from error
    if not isinstance(options, dict):
      raise UserError(
        f"config.data.options={given['options']!r} is not a JSON object such as"
        ' {"min_terms": 2}.'
      )
    return gym.generate(name, given["count"], seed=seed, options=options)
  return sources.read(source, name, skip_malformed=given["skip_malformed"])


def encode_problems(
  rows: list[Problem],
  tokenizer: Tokenizer,
  *,
  prompt_length: int,
  **asked: Any,
) -> prompts.PromptBatch:
  """All problems as one PromptBatch of NumPy arrays; a step takes rows of it.

  Args:
    rows: the problems.
    tokenizer: of the policy.
    prompt_length: P.
    asked: template, prefill_think and examples, as in prompts.encode.

  Raises:
    UserError: a prompt is longer than P (the problem is named).
  """
  encoded = []
  for p in rows:
    ids = prompts.encode(p.problem, tokenizer, **asked)
    if len(ids) > prompt_length:
      raise UserError(
        f"the problem {p.problem[:60]!r} makes a prompt of {len(ids)} tokens and the"
        f" window holds {prompt_length}. Set config.data.prompt_length={len(ids)} or"
        " more (0 fits it to the data), or drop the problem."
      )
    encoded.append(ids)
  tokens, mask = prompts.pad_left(encoded, prompt_length, tokenizer.pad_id)
  answers = [[ids for a in p.answers for ids in _spellings(a, tokenizer)] for p in rows]
  shape = (
    len(rows),
    max((len(accepted) for accepted in answers), default=0),
    max((len(a) for accepted in answers for a in accepted), default=0),
  )
  padded = np.full(shape, -1, np.int32)
  for i, accepted in enumerate(answers):
    for k, ids in enumerate(accepted):
      padded[i, k, : len(ids)] = ids
  return prompts.PromptBatch(tokens, mask, padded, np.arange(len(rows), dtype=np.int32))


def _spellings(answer: str, tokenizer: Tokenizer) -> list[list[int]]:
  """The answer's tokens, and those it has after a space where they are others."""
  alone, spaced = tokenizer.encode(answer), tokenizer.encode(" " + answer)
  return [alone] if spaced[1:] == alone else [alone, spaced]


def longest_prompt(rows: list[Problem], tokenizer: Tokenizer, **asked: Any) -> int:
  """Tokens of the longest prompt, rounded up to a multiple of 4."""
  lengths = [len(prompts.encode(p.problem, tokenizer, **asked)) for p in rows]
  return -(-max(lengths) // 4) * 4


def pages(config: ConfigDict, world: World, count: int) -> list[tuple[str, str]]:
  """`count` pages of a config's mix, as (prompt, what follows)."""
  p = config.pretrain
  return corpus.pages(
    world.task,
    world.pretrain,
    count,
    mix=p.mix.to_dict(),
    template=config.data.template,
    facts_a_page=p.facts_a_page,
    seed=config.seed,
  )
