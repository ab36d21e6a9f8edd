"""Is the thinking in the language it should be in? (R1, Eq. 7.)

  R_language = words of the target language in the chain of thought / its words

The paper gives neither how words are cut nor how their language is found. Here code,
formulas, links and tags are left out first; a Han character is a word, and so is a run
of letters of one script; a word's language is its script. That is exact for English
against Chinese, and blind between two languages of one script: for those `detector`
asks a language detector about each sentence.
"""

from collections.abc import Callable
import functools
import itertools
import re
import unicodedata

from r1jax.errors import UserError

# Language -> the scripts its words are written in.
LANGUAGES = {
  "en": ("latin",),
  "de": ("latin",),
  "es": ("latin",),
  "fr": ("latin",),
  "it": ("latin",),
  "pt": ("latin",),
  "zh": ("han",),
  "ja": ("han", "kana"),
  "ko": ("hangul",),
  "ru": ("cyrillic",),
  "el": ("greek",),
  "ar": ("arabic",),
  "he": ("hebrew",),
  "hi": ("devanagari",),
  "th": ("thai",),
}
# What unicodedata.name begins with -> script.
_SCRIPTS = {
  **{"LATIN": "latin", "CYRILLIC": "cyrillic", "GREEK": "greek", "ARABIC": "arabic"},
  **{"HEBREW": "hebrew", "DEVANAGARI": "devanagari", "THAI": "thai", "CJK": "han"},
  **{"HIRAGANA": "kana", "KATAKANA": "kana", "HANGUL": "hangul", "FULLWIDTH": "latin"},
  **{"KATAKANA-HIRAGANA": "kana", "HALFWIDTH": "kana"},
}
# Blocks that are left out whole; one that is not closed stays.
_BLOCKS = (("```", "```"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"))
_LEFT_OUT = re.compile(
  r"`[^`\n]*`|\$[^$\n]*\$|\\[a-zA-Z]+(?:\{[^{}]*\})*"
  r"|https?://[^\s\u3000-\u303f\uff00-\uff60]+|</?[a-zA-Z|][^<>\n]{0,20}>"
)
_TAG = re.compile(r"</?(?:think|answer)>")
_RUN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# A detector's (text of one sentence) -> language code, or None where it cannot tell.
Detector = Callable[[str], str | None]


def language_consistency(
  completion: str,
  target: str,
  *,
  prefill_think: bool = False,
  detector: Detector | None = None,
) -> float:
  """The share of target-language words in the chain of thought.

  A chain that has text and no words, formulas say, is neutral: 1. An empty chain, or
  none, earns nothing: 0.

  Args:
    completion: the model's text.
    target: a key of LANGUAGES.
    prefill_think: the prompt already ended in `<think>`.
    detector: asked about every sentence whose words are in the target's script.

  Raises:
    UserError: no such language.
  """
  chain = thinking(completion, prefill_think=prefill_think)
  if not _TAG.sub("", chain).strip():
    return 0.0
  scripts = scripts_of(target)
  text = plain(chain)
  right = every = 0
  for sentence in re.split(r"(?<=[.!?。！？\n])", text) if detector else [text]:
    found = words(sentence)
    ours = sum(script in scripts for _, script in found)
    if detector and ours and detector(sentence) not in (target, None):
      ours = 0
    right, every = right + ours, every + len(found)
  return right / every if every else 1.0


def plain(text: str) -> str:
  """The text without code, formulas, links and tags."""
  return _LEFT_OUT.sub(" ", _without_blocks(text))


def scripts_of(language: str) -> tuple[str, ...]:
  """Raises UserError: no such language."""
  if language not in LANGUAGES:
    raise UserError(
      f"config.reward.language={language!r} is not one of {', '.join(LANGUAGES)}."
    )
  return LANGUAGES[language]


def thinking(completion: str, *, prefill_think: bool = False) -> str:
  """What stands in the think blocks, one that is still open included."""
  text = "<think>" + completion if prefill_think else completion
  return "\n".join(re.findall(r"<think>(.*?)(?:</think>|\Z)", text, re.DOTALL))


def words(text: str) -> list[tuple[str, str]]:
  """(word, script) of all words: a Han character, or a run of letters of one script.
  Single ASCII or Greek letters are variables, no words."""
  text = unicodedata.normalize("NFC", text)
  # Marks belong to the letter before them; ² and ½ are no letters.
  kept = (c for c in text if c == "〇" or unicodedata.category(c) not in _NO_LETTERS)
  found = []
  for run in _RUN.findall("".join(kept)):
    for script, letters in itertools.groupby(run, _script):
      word = "".join(letters)
      if script == "han":
        found += [(c, script) for c in word]
      elif len(word) > 1 or not (word.isascii() or script == "greek"):
        found.append((word, script))
  return found


_NO_LETTERS = ("Mn", "Mc", "No", "Nl")


@functools.cache
def _script(letter: str) -> str:
  if letter in "々〇":
    return "han"
  if letter in "'’":
    return "latin"
  name = unicodedata.name(letter, "")
  return _SCRIPTS.get(name.partition(" ")[0], "other")


def _without_blocks(text: str) -> str:
  for opening, closing in _BLOCKS:
    kept, at = [], 0
    while True:
      start = text.find(opening, at)
      end = text.find(closing, start + len(opening)) if start >= 0 else -1
      if end < 0:
        break
      kept += [text[at:start], " "]
      at = end + len(closing)
    text = "".join([*kept, text[at:]])
  return text


def cld2_detector() -> Detector:
  """Of sentences, by pycld2; it says None of short ones.

  Raises:
    UserError: it is not installed.
  """
  try:
    import pycld2
  except ImportError as error:
    raise UserError(
      "config.reward.language_detector needs pycld2: pip install 'r1jax[language]'."
    ) from error

  def detect(sentence: str) -> str | None:
    try:
      reliable, _, found = pycld2.detect(sentence, bestEffort=True)
    except (pycld2.error, UnicodeError):  # not valid UTF-8
      return None
    code = found[0][1].partition("-")[0]
    code = {"iw": "he"}.get(code, code)
    return code if reliable and code != "un" else None

  return detect
