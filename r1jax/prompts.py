"""Problem -> prompt: the templates, and left-padded tokens for the sampler."""

import re

from flax import struct
import jax
import numpy as np

from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError

# `r1_zero` says what Table 1 of the paper says (arXiv 2501.12948v2), in its wording;
# `short` is the same roles as two symbols, for a miniature whose window is 64 tokens.
TEMPLATES = {
  "r1_zero": (
    "A conversation between User and Assistant. The user asks a question, and the"
    " Assistant solves it. The assistant first thinks about the reasoning process in"
    " the mind and then provides the user with the answer. The reasoning process and"
    " answer are enclosed within <think>...</think> and <answer>...</answer> tags,"
    " respectively, i.e., <think> reasoning process here </think> <answer> answer here"
    " </answer>. User: {problem}. Assistant:"
  ),
  "short": "<|User|>{problem}<|Assistant|>",
}

_SYMBOL = re.compile(r"<(?=/?(?:think|answer)>|\|(?:User|Assistant)\|>)")


@struct.dataclass
class PromptBatch:
  """What a step starts from. Rows are problems."""

  tokens: jax.Array  # B P int32, padded on the left
  mask: jax.Array  # B P bool, True on real tokens
  answers: jax.Array  # B K L int32, the accepted answers' tokens, -1 beyond their end
  ids: jax.Array  # B int32, the problem's place in its source


def render(template: str, problem: str, *, prefill_think: bool) -> str:
  """The prompt's text.

  Tags and role symbols inside the user's problem are broken up ("< think>"), so that a
  problem cannot open a think block or speak for the assistant.

  Args:
    template: a name in TEMPLATES.
    problem: the user's text.
    prefill_think: end the prompt with an opened `<think>`, so that the completion holds
      only what follows it.

  Raises:
    UserError: unknown template.
  """
  if template not in TEMPLATES:
    raise UserError(
      f"config.data.template={template!r} is not a template. Choose one of"
      f" {sorted(TEMPLATES)} (r1jax/prompts.py)."
    )
  text = TEMPLATES[template].replace("{problem}", _SYMBOL.sub("< ", problem))
  return text + ("<think>" if prefill_think else "")


def encode(
  problem: str, tokenizer: Tokenizer, *, template: str, prefill_think: bool
) -> list[int]:
  """BOS and the rendered prompt's tokens."""
  text = render(template, problem, prefill_think=prefill_think)
  return [tokenizer.bos_id, *tokenizer.encode(text)]


def pad_left(
  rows: list[list[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, length] int32, mask [B, length] bool).

  Raises:
    UserError: a row is longer than `length`.
  """
  longest = max(map(len, rows))
  if longest > length:
    raise UserError(
      f"a prompt of {longest} tokens does not fit the window of {length}. Raise"
      f" config.data.prompt_length to {longest} or more, or drop the problem."
    )
  tokens = np.full((len(rows), length), pad_id, np.int32)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :] = row
  lengths = np.array([len(r) for r in rows])
  return tokens, np.arange(length)[None] >= length - lengths[:, None]
