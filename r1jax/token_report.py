"""tokens.jsonl: every token of a few groups, with what the update made of it."""

from collections.abc import Iterator

import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.diagnostics import Trace
from r1jax.prompts import PromptBatch
from r1jax.rewards.verdict import OUTCOMES

SIDES = ("", "low", "high", "cap")


def rows(
  trace: Trace, tokenizer: Tokenizer, group_size: int, asked: PromptBatch
) -> Iterator[dict]:
  """One JSON-like row an output: its prompt, the accepted answers, its tokens as text,
  numbers a token, and what it was rewarded for. `kl` is the k3 of each token to the
  reference (the objective's own estimator may be another); a run without one has none.

  Args:
    trace: the outputs.
    tokenizer: of the policy.
    group_size: G.
    asked: all that RL asks, the outputs' prompts among them.
  """
  for i, mask in enumerate(np.asarray(trace.mask)):
    logprob, ratio, advantage, reference = (
      np.asarray(x, np.float64)[i, mask]
      for x in (trace.logprobs, trace.ratio, trace.advantages, trace.reference_logprobs)
    )
    prompt = np.asarray(trace.prompts)[i]
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
      "problem": tokenizer.decode(prompt[np.asarray(trace.prompt_mask)[i]].tolist()),
      "answers": _answers(prompt, asked, tokenizer),
      "reward": round(float(trace.reward[i]), 4),
      "parts": {name: round(float(x[i]), 4) for name, x in trace.parts.items()},
    }
    if trace.outcome is not None:
      row["outcome"] = OUTCOMES[int(trace.outcome[i])]
    if reference.any():
      gap = reference - logprob
      row["kl"] = np.round(np.exp(gap) - gap - 1, 5).tolist()
    yield row


def _answers(prompt: np.ndarray, asked: PromptBatch, tokenizer: Tokenizer) -> list[str]:
  """What is accepted for a prompt; spellings that differ by a space are one."""
  (places,) = (np.asarray(asked.tokens) == prompt).all(axis=1).nonzero()
  rows = [ids for place in places[:1] for ids in np.asarray(asked.answers[place])]
  texts = [tokenizer.decode(ids[ids >= 0].tolist()).strip() for ids in rows]
  return list(dict.fromkeys(filter(None, texts)))
