"""Samples of a policy, written chunk by chunk, so that a killed stage goes on."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib

import jax
import numpy as np

from r1jax import preemption, rollout, sharding
from r1jax.data.problem import Problem
from r1jax.evals import generate
from r1jax.metrics import MetricsFile
from r1jax.pipeline.project import Project, Weights
from r1jax.run import Run, compiled, put_batch, take

# Problems, and samples of each, that one program draws; more where the data shards of a
# mesh do not divide them.
CHUNK, GROUP = 64, 4
SAMPLE = 3  # what a random draw is for, beside RL's and the evaluations' 1 and 2


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How is sampled."""

  temperature: float = 1.0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sampled:
  """What was said to each problem."""

  texts: list[list[str]]  # problems x samples
  ended: list[list[bool]]  # False: cut off by the window
  tokens: int  # in all of them


def sample(
  project: Project,
  this: Run,
  weights: Weights,
  problems: Sequence[Problem],
  path: pathlib.Path,
  *,
  samples: int,
  decoding: Decoding,
  model: Mapping | None = None,
) -> Sampled:
  """Completions of every problem.

  Args:
    project, this: the pipeline and the stage that samples.
    weights: of the policy `this.policy`.
    problems: what is asked.
    path: of the JSONL file, a line a chunk; what stands there is not sampled again,
      unless a mesh of other chunks left it.
    samples: of each problem, a multiple of GROUP.
    decoding: temperature and nucleus.
    model: what tells this policy's shape from others'.
  """
  file, rounds = MetricsFile(path), samples // GROUP
  if samples != rounds * GROUP:
    raise ValueError(f"samples={samples} must be a multiple of {GROUP}")
  file.roll_back({})  # drops the half line of a kill
  chunk = math.lcm(CHUNK, sharding.data_shards(this.mesh))
  done = {row["step"]: row for row in file.rows() if row.get("chunk") == chunk}
  places = [
    np.arange(i, i + chunk) % len(problems) for i in range(0, len(problems), chunk)
  ]
  left = [n for n in range(len(places) * rounds) if n not in done]
  if left:
    encoded = project.encode(problems)
    # Answers have no say in sampling; without them all problems share one program.
    encoded = encoded.replace(answers=np.full((len(problems), 1, 1), -1, np.int32))
  for n in left:
    part, turn = places[n % len(places)], n // len(places)
    batch = put_batch(this, take(encoded, part))
    key = jax.random.fold_in(jax.random.key(this.config.seed), SAMPLE)
    key = jax.random.fold_in(key, turn)

    def draw(params, router, prompts, key):
      said = rollout.sample(
        this.policy,
        params,
        router,
        prompts,
        key,
        group_size=GROUP,
        max_tokens=this.windows[-1][1],
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop_ids=this.stop_ids,
        stop=this.stop,
        pad_id=this.tokenizer.pad_id,
      )
      return said.spoken()

    name = ("sample", decoding, str(model), this.windows[-1][1])
    program = project.program(
      name, lambda b=batch, k=key, f=draw: compiled(this, f, *weights, b, k)
    )
    with this.clock.phase("sample"):
      said = jax.device_get(program(*weights, batch, key))
    count = min(chunk, len(problems) - int(part[0]))
    done[n] = {
      "phase": "sample",
      "step": n,
      "chunk": chunk,
      "texts": generate.texts_of(said, this.tokenizer)[:count],
      "ended": said.ended[:count].tolist(),
      "tokens": int(said.mask[:count].sum()),
    }
    file.write(done[n])
    this.progress.update("sample", len(done), len(places) * rounds)
    if preemption.asked():
      preemption.leave()
  texts: list[list[str]] = [[] for _ in problems]
  ended: list[list[bool]] = [[] for _ in problems]
  for n in range(len(places) * rounds):
    row, at = done[n], places[n % len(places)]
    for place, group, ends in zip(at, row["texts"], row["ended"], strict=False):
      texts[place] += group
      ended[place] += ends
  return Sampled(texts, ended, sum(row["tokens"] for row in done.values()))
