"""tokens.jsonl: every token of a few groups, with what the update made of it."""

from collections.abc import Iterator

import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.diagnostics import Trace
from r1jax.rewards.verdict import OUTCOMES

SIDES = ("", "low", "high", "cap")


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
