"""A policy's samples of many problems, kept chunk by chunk, so that a killed evaluation
goes on where it was."""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib

import numpy as np

from r1jax import rollout
from r1jax.data.hf_tokenizer import HFTokenizer
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.evals.generate import Samples
from r1jax.metrics import MetricsFile
from r1jax.sampling import Sampler
from r1jax.trained import Trained


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How is sampled; the defaults are the paper's (supplement D.1)."""

  samples: int = 16  # of each problem
  temperature: float = 0.6
  top_p: float = 0.95
  max_tokens: int = 32_768
  stop: tuple[str, ...] = ()
  seed: int = 0
  rows: int = 256  # samples that are drawn at once

  def __post_init__(self):
    """Raises UserError: what came, what is allowed."""
    for name in ("samples", "max_tokens", "rows"):
      if getattr(self, name) < 1:
        flag = name.replace("_", "-")
        raise UserError(f"--{flag}={getattr(self, name)} must be 1 or more.")
    same = dict(temperature=self.temperature, top_p=self.top_p)
    Sampler(group_size=1, max_tokens=self.max_tokens, pad_id=0, **same)

  @property
  def group(self) -> int:
    """Samples of a problem that are drawn at once: the most that divide all of them."""
    return max(g for g in range(1, self.samples + 1) if self.fits(g))

  def fits(self, group: int) -> bool:
    return self.samples % group == 0 and group <= self.rows


def sample(
  load: Callable[[], Trained],
  problems: Sequence[Problem],
  prompts: Sequence[str],
  decoding: Decoding,
  path: pathlib.Path,
  progress: Callable[[int, int], None] = lambda done, all: None,
) -> Samples:
  """All samples; what the file has is not drawn again.

  Args:
    load: gives the policy and its tokenizer; called where something is to be drawn.
    problems, prompts: what is asked, and the prompts that ask it.
    decoding: how.
    path: of samples.jsonl, a row a problem and chunk: {"phase", "step": the chunk,
      "problem": its place, "texts", "lengths", "ended"}.
    progress: is told how many samples there are, of how many.

  Raises:
    UserError, NumericalError: as rollout.generate.
  """
  d, file, group = decoding, MetricsFile(path), decoding.group
  file.roll_back({})  # drops the half line of a kill
  width = min(max(d.rows // group, 1), len(problems))
  places = [
    np.arange(i, i + width) % len(problems) for i in range(0, len(problems), width)
  ]
  # The last of them is filled up with the first problems.
  chunks = [
    (n, part, part[: len(problems) - int(part[0])].tolist())
    for n, part in enumerate(places * (d.samples // group))
  ]
  done = {(row["step"], row["problem"]): row for row in file.rows()}
  left = [c for c in chunks if not all((c[0], i) in done for i in c[2])]
  kept = load() if left else None
  for n, part, real in left:
    said = rollout.generate(
      kept.policy,
      kept.params,
      kept.router,
      kept.tokenizer,
      [prompts[i] for i in part],
      samples=group,
      max_tokens=d.max_tokens,
      temperature=d.temperature,
      top_p=d.top_p,
      stop=d.stop,
      window=window(kept.tokenizer, prompts),
      seed=(d.seed * 1_000_003 + n) % 2**31,
      record_experts=False,
    )
    for i, row in zip(real, said, strict=False):
      if (n, i) in done:
        continue
      done[n, i] = {
        "phase": "sample",
        "step": n,
        "problem": i,
        "texts": [one.text for one in row],
        "lengths": [len(one.tokens) for one in row],
        "ended": [one.ended for one in row],
      }
      file.write(done[n, i])
    progress(group * len(done), d.samples * len(problems))
  of = [
    [done[n, i] for n, _, real in chunks if i in real] for i in range(len(problems))
  ]
  texts, lengths, ended = (
    [[x for row in rows for x in row[key]] for rows in of]
    for key in ("texts", "lengths", "ended")
  )
  return Samples(list(problems), texts, np.array(lengths), np.array(ended))


def longest(tokenizer: Tokenizer | HFTokenizer, prompts: Sequence[str]) -> int:
  """Tokens of the longest prompt, with BOS."""
  return 1 + max(map(len, tokenizer.encode_batch(list(prompts))))


def window(tokenizer: Tokenizer | HFTokenizer, prompts: Sequence[str]) -> int:
  """Tokens of the program's prompts: a power of two."""
  return 1 << (longest(tokenizer, prompts) - 1).bit_length()
