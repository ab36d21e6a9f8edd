"""Problem -> prompt: the templates, and left-padded tokens for the sampler."""

import re

from flax import struct
import jax
import numpy as np

from r1jax.data.hf_tokenizer import HFTokenizer
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

# What `chat` says after the problem, in the user's turn: every model has one.
CHAT = "chat"
INSTRUCTION = (
  "First think about the reasoning process and then provide the answer. The reasoning"
  " process and answer are enclosed within <think>...</think> and <answer>...</answer>"
  " tags, respectively, i.e., <think> reasoning process here </think> <answer> answer"
  " here </answer>."
)

# Worked examples, as earlier turns of the conversation: a small model does as they do
# where it does not do as it is told.
EXAMPLES = (
  (
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "<think> Tom starts with 3. 3 + 4 = 7. </think> <answer> 7 </answer>",
  ),
  (
    "A box holds 6 pens. How many pens are in 5 boxes?",
    "<think> Each box has 6. 5 * 6 = 30. </think> <answer> 30 </answer>",
  ),
  (
    "Ann had 20 coins, lost 8, then found 5. How many coins does she have?",
    "<think> 20 - 8 = 12. 12 + 5 = 17. </think> <answer> 17 </answer>",
  ),
)

_SYMBOL = re.compile(r"<(?=/?(?:think|answer)>|\|(?:User|Assistant)\|>)")


@struct.dataclass
class PromptBatch:
  """What a step starts from. Rows are problems."""

  tokens: jax.Array  # B P int32, padded on the left
  mask: jax.Array  # B P bool, True on real tokens
  answers: jax.Array  # B K L int32, the accepted answers' tokens, -1 beyond their end
  ids: jax.Array  # B int32, the problem's place in its source


def render(
  template: str,
  problem: str,
  *,
  prefill_think: bool,
  tokenizer: Tokenizer | HFTokenizer | None = None,
  examples: int = 0,
) -> str:
  """The prompt's text.

  A problem cannot open a think block or speak for the assistant. Tags and role symbols
  inside it are broken up ("< think>"), and with a published model's tokenizer what
  would become one of its control tokens is quoted (HFTokenizer.quote).

  Args:
    template: a name in TEMPLATES, or `chat`: the model's own chat template.
    problem: the user's text.
    prefill_think: end the prompt with an opened `<think>`, so that the completion holds
      only what follows it.
    tokenizer: of the model; `chat` needs it, and so does quoting.
    examples: EXAMPLES that `chat` shows before, in place of its instruction.

  Raises:
    UserError: unknown template, or `chat` without a chat template, or one that opens
      `<think>` where prefill_think does not say so.
  """
  if template not in (CHAT, *TEMPLATES):
    raise UserError(
      f"config.data.template={template!r} is not a template. Choose one of"
      f" {sorted((CHAT, *TEMPLATES))} (r1jax/prompts.py)."
    )
  if isinstance(tokenizer, HFTokenizer):
    problem = tokenizer.quote(problem)
  if template == CHAT:
    return _chat(problem, tokenizer, prefill_think, examples)
  text = TEMPLATES[template].replace("{problem}", _SYMBOL.sub("< ", problem))
  return text + ("<think>" if prefill_think else "")


def _chat(
  problem: str,
  tokenizer: Tokenizer | HFTokenizer | None,
  prefill_think: bool,
  examples: int,
) -> str:
  chat = tokenizer.chat if isinstance(tokenizer, HFTokenizer) else None
  if chat is None:
    raise UserError(
      f"config.data.template='chat' needs a model with a chat template, and"
      f" {getattr(tokenizer, 'where', 'this tokenizer')} has none. Choose one of"
      f" {sorted(TEMPLATES)}."
    )
  turns = [turn for pair in EXAMPLES[:examples] for turn in pair]
  turns.append(problem if turns else f"{problem}\n\n{INSTRUCTION}")
  roles = ("user", "assistant") * len(turns)
  pairs = zip(roles, turns, strict=False)
  text = chat.render([{"role": role, "content": turn} for role, turn in pairs])
  if opened(text) and not prefill_think:
    raise UserError(
      "config.data.prefill_think=False and this model's chat template ends prompts with"
      " <think>: its completions begin inside the thinking. Set"
      " config.data.prefill_think=True."
    )
  return _thinking(text) if prefill_think else text


def opened(prompt: str) -> bool:
  """Whether a prompt ends inside the thinking, as those of R1's own template do."""
  return prompt.rstrip().endswith("<think>")


def _thinking(prompt: str) -> str:
  return prompt if opened(prompt) else prompt + "<think>\n"


def user_turn(
  text: str, tokenizer: Tokenizer | HFTokenizer, *, prefill_think: bool = False
) -> str:
  """A user's turn in a published model's chat template, and nothing else; the text
  itself where the model has none. Args: prefill_think: it ends inside the thinking,
  also where the template does not open that."""
  turn = text
  if isinstance(tokenizer, HFTokenizer) and tokenizer.chat is not None:
    turn = tokenizer.chat.render([{"role": "user", "content": tokenizer.quote(text)}])
  return _thinking(turn) if prefill_think else turn


def encode(
  problem: str,
  tokenizer: Tokenizer | HFTokenizer,
  *,
  template: str,
  prefill_think: bool,
  examples: int = 0,
) -> list[int]:
  """The rendered prompt's tokens, after BOS; a chat template writes its own or none."""
  how = dict(prefill_think=prefill_think, tokenizer=tokenizer, examples=examples)
  text = render(template, problem, **how)
  ids = tokenizer.encode(text)
  return ids if template == CHAT else after_bos(ids, tokenizer)


def after_bos(ids: list[int], tokenizer: Tokenizer | HFTokenizer) -> list[int]:
  """The tokens of a text, with the BOS before them that the tokenizer begins texts
  with, if it has one and they do not begin with it already."""
  bos = tokenizer.bos_id
  return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


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
