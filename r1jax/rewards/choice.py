"""Multiple choice: the one letter that an answer chooses."""

import re

from r1jax.rewards.reading import MAX_CHARS, normalise

_OPTION = re.compile(r"\(?\s*[A-J]\s*\)?")
_LETTER = re.compile(
  r"(?:(?:option|answer|choice)\s*:?\s*)?\(?\s*([A-Z])\s*\)?"
  r"(?:[.:)]?|(?<=[).:])(\s.*)|[.:](\s.*)|\s-(\s.*))",
  re.DOTALL | re.IGNORECASE,
)
# After the letter: another option, or a word that takes it back.
_SECOND_THOUGHT = re.compile(
  r"\s*(?i:is|isn|not|wrong|incorrect|false|or|and|nor|but)(?![A-Za-z])"
  r"|.*(?<![A-Za-z])(?i:or|and|not|nor|but|both|neither)\s+\(?[A-J](?![A-Za-z])"
  r"|.*(?<![A-Za-z])[A-J]\s*[).:](?![A-Za-z0-9])"
  r"|\s*(?:[B-J](?![A-Za-z])|A\s*$)",
  re.DOTALL,
)


def letter(text: str) -> str | None:
  """The option that an answer chooses: `B`, `(B)`, `b.`, `B) 12 m`; None for none or
  for more than one."""
  found = _LETTER.fullmatch(normalise(text)) if len(text) <= MAX_CHARS else None
  if not found or _SECOND_THOUGHT.match(found[2] or found[3] or found[4] or ""):
    return None
  return found[1].upper()


def is_option(gold: str) -> bool:
  """Whether a gold is the letter of an option, A to J."""
  return len(gold) <= MAX_CHARS and bool(_OPTION.fullmatch(normalise(gold)))
