"""Multiple choice: the one letter that an answer chooses."""

import re

from r1jax.rewards.reading import MAX_CHARS, normalise

_OPTION = re.compile(r"\(?\s*[A-J]\s*\)?")
_LETTER = re.compile(
  r"\(?\s*([A-Za-z])\s*\)?(?:[.:)]?|(?<=[).:])(\s.*)|[.:](\s.*))", re.DOTALL
)
# After the letter: another one, or a word that takes it back.
_SECOND_THOUGHT = re.compile(
  r"(?<![A-Za-z])(?:[A-J]|or|and|not|is|isn|nor|but|wrong|incorrect|false|neither|both"
  r"|none|all)(?![A-Za-z])"
)


def letter(text: str) -> str | None:
  """The option that an answer chooses: `B`, `(B)`, `b.`, `B) 12 m`; None for none or
  for more than one."""
  found = _LETTER.fullmatch(normalise(text)) if len(text) <= MAX_CHARS else None
  if not found or _SECOND_THOUGHT.search(found[2] or found[3] or ""):
    return None
  return found[1].upper()


def is_option(gold: str) -> bool:
  """Whether a gold is the letter of an option, A to J."""
  return len(gold) <= MAX_CHARS and bool(_OPTION.fullmatch(normalise(gold)))
