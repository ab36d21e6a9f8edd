"""Are verifiable instructions followed? (IFEval, arXiv 2311.07911.)

The 25 checks do what google-research's instruction_following_eval does, but for these:

  sentences      cut by the plain rule of `_sentences`, not by nltk's Punkt
  capital words  cut at white space and punctuation but for - ' . and / inside a word;
                 nltk also cuts DON'T in two
  language       most words are in a script of the language (language.py) and pycld2,
                 where it is installed, names no other; the original asks langdetect.
                 Without pycld2, languages of one script look alike: English passes as
                 German
  keywords, markers and section names are text; the original takes them for patterns
  a bullet point has its text on the line of its star
  a missing argument is refused; the original draws one at random
"""

from collections.abc import Callable
import difflib
import itertools
import json
import re
import reprlib
from typing import Any
import unicodedata

from r1jax.errors import UserError
from r1jax.rewards import language
from r1jax.rewards.verdict import Verdict

Check = Callable[[str, dict[str, Any]], bool]  # (reply, kwargs) -> followed

RELATIONS = ("less than", "at least")
# Language -> the scripts its words are written in.
LANGUAGES = {
  **language.LANGUAGES,
  **dict.fromkeys(("fi", "pl", "sw", "vi"), ("latin",)),
  **dict.fromkeys(("bg", "uk"), ("cyrillic",)),
  **dict.fromkeys(("fa", "ur"), ("arabic",)),
  **dict.fromkeys(("mr", "ne"), ("devanagari",)),
  **{"bn": ("bengali",), "gu": ("gujarati",), "kn": ("kannada",)},
  **{"ml": ("malayalam",), "pa": ("gurmukhi",), "ta": ("tamil",), "te": ("telugu",)},
}


def followed(reply: str, spec: str, *, loose: bool = False) -> Verdict:
  """Whether a reply follows all instructions; the first that it breaks is the detail.

  Args:
    reply: what is judged, without the thinking; white space around it does not count.
    spec: JSON, [{"id": ..., "kwargs": {...}}, ...].
    loose: an instruction is also followed if it would be without the reply's first
      line, its last, or both, and without asterisks (the paper's loose accuracy).

  Raises:
    ValueError: the spec asks for something that there is not.
  """
  asked, reply = read_spec(spec), reply.strip()
  if not reply:
    return Verdict("unparsable", "an empty reply")
  texts = [text for text in _loosened(reply) if text.strip()] if loose else [reply]
  for name, kwargs in asked:
    _, check = INSTRUCTIONS[name]
    if not any(check(text, kwargs) for text in texts):
      return Verdict("wrong", name)
  return Verdict("correct")


def _loosened(reply: str) -> list[str]:
  lines = reply.split("\n")
  parts = (lines, lines[1:], lines[:-1], lines[1:-1])
  texts = ["\n".join(part).strip() for part in parts]
  return [*texts, *(text.replace("*", "") for text in texts)]


# -- what is asked ---------------------------------------------------------------------


def spec_of(instructions: Any) -> str:
  """The spec of a list of {"id", "kwargs"}, checked; kwargs that are null are left out.

  Raises:
    ValueError: an unknown id, or kwargs that are missing, unknown or mistyped.
  """
  asked = _checked(instructions)
  return json.dumps([{"id": i, "kwargs": k} for i, k in asked], ensure_ascii=False)


def read_spec(spec: str) -> list[tuple[str, dict[str, Any]]]:
  """(id, kwargs) of every instruction. Raises ValueError as `spec_of`, or no JSON."""
  try:
    instructions = json.loads(spec)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"the instructions {spec[:60]!r} are not JSON") from error
  return _checked(instructions)


def _checked(instructions: Any) -> list[tuple[str, dict[str, Any]]]:
  if not isinstance(instructions, list) or not instructions:
    shown = reprlib.repr(instructions)
    raise ValueError(f'instructions are a list of {{"id", "kwargs"}}, not {shown}')
  return [_instruction(one) for one in instructions]


def _instruction(one: Any) -> tuple[str, dict[str, Any]]:
  if not isinstance(one, dict) or not isinstance(one.get("id"), str):
    raise ValueError(f'an instruction has an "id" that is a text: {reprlib.repr(one)}')
  name, kwargs = one["id"], one.get("kwargs")
  if name not in INSTRUCTIONS:
    near = difflib.get_close_matches(name[:60], INSTRUCTIONS, n=3, cutoff=0)
    raise ValueError(
      f"there is no instruction {reprlib.repr(name)}; IFEval's nearest are"
      f" {', '.join(near)}"
    )
  if not isinstance(kwargs, dict | None):
    raise ValueError(f'"kwargs" of {name} is {reprlib.repr(kwargs)}, not an object')
  kwargs = {k: v for k, v in (kwargs or {}).items() if v is not None}
  names, _ = INSTRUCTIONS[name]
  for key in kwargs:
    if key not in names:
      takes = " and ".join(names) or "nothing"
      raise ValueError(f"{name} takes {takes}, not {reprlib.repr(key)}")
  for key in names:
    if key not in kwargs:
      raise ValueError(f'{name} has no "{key}"')
    right, what = _KWARGS[key]
    if not right(kwargs[key]):
      shown = reprlib.repr(kwargs[key])
      raise ValueError(f'"{key}" of {name} is {shown}, not {what}')
  nth = kwargs.get("nth_paragraph")
  if nth is not None and not 1 <= nth <= kwargs["num_paragraphs"]:
    raise ValueError(f'"nth_paragraph" of {name} is {nth}, not in 1..num_paragraphs')
  return name, kwargs


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


_TEXT = _is_text, "a text"
_TEXTS = (
  lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
  "a list of texts",
)
_COUNT = (
  lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
  "a whole number of 0 or more",
)
_RELATION = lambda value: value in RELATIONS, " or ".join(RELATIONS)
_KWARGS = {
  **dict.fromkeys(("keywords", "forbidden_words"), _TEXTS),
  **dict.fromkeys(("relation", "let_relation", "capital_relation"), _RELATION),
  **dict.fromkeys(("keyword", "first_word", "postscript_marker"), _TEXT),
  **dict.fromkeys(("section_spliter", "prompt_to_repeat", "end_phrase"), _TEXT),
  **dict.fromkeys(("frequency", "let_frequency", "capital_frequency"), _COUNT),
  **dict.fromkeys(("num_sentences", "num_paragraphs", "num_words"), _COUNT),
  **dict.fromkeys(("nth_paragraph", "num_placeholders", "num_bullets"), _COUNT),
  **dict.fromkeys(("num_highlights", "num_sections"), _COUNT),
  "letter": (lambda value: _is_text(value) and len(value) == 1, "one character"),
  "language": (
    lambda value: isinstance(value, str) and value in LANGUAGES,
    f"one of {', '.join(LANGUAGES)}",
  ),
}


# -- the checks ------------------------------------------------------------------------


def _holds(count: int, relation: str, limit: int) -> bool:
  return count < limit if relation == "less than" else count >= limit


def _occurrences(text: str, reply: str, *, whole: bool = False) -> int:
  """How often a text stands in the reply, in any case; `whole`: as a word."""
  pattern = re.escape(text)
  pattern = rf"(?<!\w){pattern}(?!\w)" if whole else pattern
  return len(re.findall(pattern, reply, re.IGNORECASE))


def _existence(reply: str, kwargs: dict) -> bool:
  return all(_occurrences(word, reply) for word in kwargs["keywords"])


def _frequency(reply: str, kwargs: dict) -> bool:
  count = _occurrences(kwargs["keyword"].strip(), reply)
  return _holds(count, kwargs["relation"], kwargs["frequency"])


def _forbidden(reply: str, kwargs: dict) -> bool:
  return not any(_occurrences(w, reply, whole=True) for w in kwargs["forbidden_words"])


def _letter_frequency(reply: str, kwargs: dict) -> bool:
  count = reply.lower().count(kwargs["letter"].lower())
  return _holds(count, kwargs["let_relation"], kwargs["let_frequency"])


def _response_language(reply: str, kwargs: dict) -> bool:
  return _is_in(kwargs["language"], reply)


def _number_sentences(reply: str, kwargs: dict) -> bool:
  return _holds(_sentences(reply), kwargs["relation"], kwargs["num_sentences"])


def _number_words(reply: str, kwargs: dict) -> bool:
  count = len(re.findall(r"\w+", reply))
  return _holds(count, kwargs["relation"], kwargs["num_words"])


def _number_paragraphs(reply: str, kwargs: dict) -> bool:
  """Between the dividers ***, exactly so many."""
  paragraphs = re.split(r"\s?\*\*\*\s?", reply)
  return _filled(paragraphs) == kwargs["num_paragraphs"]


def _filled(parts: list[str]) -> int | None:
  """How many parts have text; None where one that is not at an end has none."""
  if not all(part.strip() for part in parts[1:-1]):
    return None
  return sum(bool(part.strip()) for part in parts)


def _nth_paragraph_first_word(reply: str, kwargs: dict) -> bool:
  """Blank lines part the paragraphs; the word ends at its first punctuation."""
  paragraphs = reply.split("\n\n")
  count, nth = sum(bool(p.strip()) for p in paragraphs), kwargs["nth_paragraph"]
  start = paragraphs[nth - 1].split() if nth <= count else []
  if not start or count != kwargs["num_paragraphs"]:
    return False
  word = re.split("[.,?!'\"]", start[0].lstrip("'").lstrip('"'))[0]
  return word.lower() == kwargs["first_word"].lower()


def _number_placeholders(reply: str, kwargs: dict) -> bool:
  return len(re.findall(r"\[[^\[\]\n]*\]", reply)) >= kwargs["num_placeholders"]


_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def _postscript(reply: str, kwargs: dict) -> bool:
  marker = kwargs["postscript_marker"].strip()
  pattern = _POSTSCRIPTS.get(marker) or re.escape(marker.lower())
  return bool(re.search(pattern, reply.lower()))


def _number_bullet_lists(reply: str, kwargs: dict) -> bool:
  """Exactly so many lines that begin with - or with a star and something else."""
  lines = [line.strip() for line in reply.split("\n")]
  found = [line for line in lines if re.match(r"-|\*[^*]", line)]
  return len(found) == kwargs["num_bullets"]


_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _constrained_response(reply: str, kwargs: dict) -> bool:
  return any(option in reply for option in _CONSTRAINED)


def _number_highlighted_sections(reply: str, kwargs: dict) -> bool:
  single, double = r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*"
  found = [*re.findall(single, reply), *re.findall(double, reply)]
  return sum(bool(text.strip()) for text in found) >= kwargs["num_highlights"]


def _multiple_sections(reply: str, kwargs: dict) -> bool:
  pattern = re.escape(kwargs["section_spliter"].strip()) + r"\s?\d"
  return len(re.findall(pattern, reply)) >= kwargs["num_sections"]


def _json_format(reply: str, kwargs: dict) -> bool:
  """A JSON value, perhaps in a code fence."""
  text = re.sub(r"\A```(?:json|Json|JSON)?", "", reply.strip()).removesuffix("```")
  try:
    json.loads(text.strip())
  except (ValueError, RecursionError):
    return False
  return True


def _title(reply: str, kwargs: dict) -> bool:
  for line in reply.split("\n"):
    start, end = line.find("<<"), line.rfind(">>")
    if 0 <= start < end and line[start:end].lstrip("<").rstrip(">").strip():
      return True
  return False


def _two_responses(reply: str, kwargs: dict) -> bool:
  responses = reply.split("******")
  different = {part.strip() for part in responses} - {""}
  return _filled(responses) == 2 == len(different)


def _repeat_prompt(reply: str, kwargs: dict) -> bool:
  prompt = kwargs["prompt_to_repeat"].strip().lower()
  return reply.strip().lower().startswith(prompt)


def _end_checker(reply: str, kwargs: dict) -> bool:
  phrase = kwargs["end_phrase"].strip().lower()
  return reply.strip().strip('"').lower().endswith(phrase)


def _quotation(reply: str, kwargs: dict) -> bool:
  reply = reply.strip()
  return len(reply) > 1 and reply[0] == reply[-1] == '"'


def _capital_word_frequency(reply: str, kwargs: dict) -> bool:
  words = re.findall(r"\w+(?:[-'’./]\w+)*", reply)
  count = sum(word.isupper() for word in words)
  return _holds(count, kwargs["capital_relation"], kwargs["capital_frequency"])


def _english_capital(reply: str, kwargs: dict) -> bool:
  return reply.isupper() and _is_in("en", reply)


def _english_lowercase(reply: str, kwargs: dict) -> bool:
  return reply.islower() and _is_in("en", reply)


def _no_comma(reply: str, kwargs: dict) -> bool:
  return "," not in reply


# Id -> the names of its kwargs, all of them needed, and its check.
INSTRUCTIONS: dict[str, tuple[tuple[str, ...], Check]] = {
  "keywords:existence": (("keywords",), _existence),
  "keywords:frequency": (("keyword", "frequency", "relation"), _frequency),
  "keywords:forbidden_words": (("forbidden_words",), _forbidden),
  "keywords:letter_frequency": (
    ("letter", "let_frequency", "let_relation"),
    _letter_frequency,
  ),
  "language:response_language": (("language",), _response_language),
  "length_constraints:number_sentences": (
    ("num_sentences", "relation"),
    _number_sentences,
  ),
  "length_constraints:number_paragraphs": (("num_paragraphs",), _number_paragraphs),
  "length_constraints:number_words": (("num_words", "relation"), _number_words),
  "length_constraints:nth_paragraph_first_word": (
    ("num_paragraphs", "nth_paragraph", "first_word"),
    _nth_paragraph_first_word,
  ),
  "detectable_content:number_placeholders": (
    ("num_placeholders",),
    _number_placeholders,
  ),
  "detectable_content:postscript": (("postscript_marker",), _postscript),
  "detectable_format:number_bullet_lists": (("num_bullets",), _number_bullet_lists),
  "detectable_format:constrained_response": ((), _constrained_response),
  "detectable_format:number_highlighted_sections": (
    ("num_highlights",),
    _number_highlighted_sections,
  ),
  "detectable_format:multiple_sections": (
    ("section_spliter", "num_sections"),
    _multiple_sections,
  ),
  "detectable_format:json_format": ((), _json_format),
  "detectable_format:title": ((), _title),
  "combination:two_responses": ((), _two_responses),
  "combination:repeat_prompt": (("prompt_to_repeat",), _repeat_prompt),
  "startend:end_checker": (("end_phrase",), _end_checker),
  "startend:quotation": ((), _quotation),
  "change_case:capital_word_frequency": (
    ("capital_frequency", "capital_relation"),
    _capital_word_frequency,
  ),
  "change_case:english_capital": ((), _english_capital),
  "change_case:english_lowercase": ((), _english_lowercase),
  "punctuation:no_comma": ((), _no_comma),
}


# -- sentences and languages -----------------------------------------------------------


_OPENING = "\"'“‘«([*_`"
_CLOSING = "\"'”’»)]*_`」』）"
_LIST_NUMBER = re.compile(r"^[ \t]*\(?\d{1,3}[.)](?=[ \t])", re.MULTILINE)
_UNSPACED_END = re.compile(rf"([。！？।؟۔]+[{re.escape(_CLOSING)}]*)")
# What a full stop shortens; after the first kind a sentence never ends.
_TITLES = frozenset("mr mrs ms dr prof st rev gen capt lt mt vs cf e.g i.e".split())
_SHORT = frozenset("etc al approx dept inc ltd co corp jr sr".split())


def _sentences(text: str) -> int:
  """How many sentences a text has.

  One ends at . ! ? or … before white space, or at 。！？।؟۔; not at the full stop of a
  title, of an initial, or of an abbreviation or an ellipsis that a small letter
  follows, nor at the number of a list. A line break ends none, as in Punkt; what has no
  letter or digit is none.
  """
  tokens = _UNSPACED_END.sub(r"\1 ", _LIST_NUMBER.sub("", text)).split()
  count, begun = 0, False
  for token, after in itertools.zip_longest(tokens, tokens[1:], fillvalue=""):
    begun = begun or any(c.isalnum() for c in token)
    if begun and _ends_sentence(token, after):
      count, begun = count + 1, False
  return count + begun


def _ends_sentence(token: str, after: str) -> bool:
  token = token.rstrip(_CLOSING)
  if not token.endswith((".", "…")):
    return token.endswith(tuple("!?。！？।؟۔"))
  stem = token.rstrip(".…").lstrip(_OPENING)
  if stem.lower() in _TITLES or (len(stem) == 1 and stem.isupper() and stem != "I"):
    return False
  goes_on = token.endswith(("...", "…")) or "." in stem or stem.lower() in _SHORT
  return not (goes_on and after.lstrip(_OPENING)[:1].islower())


def _is_in(code: str, reply: str) -> bool:
  """Whether a reply is in a language; one without words is in any."""
  words = language.words(reply)
  ours = sum(_script(*word) in LANGUAGES[code] for word in words)
  if not words or 2 * ours <= len(words):
    return not words
  try:
    detector = language.cld2_detector()
  except UserError:  # not installed
    return True
  return detector(reply) in (code, None)


def _script(word: str, script: str) -> str:
  """Of a word that language.py puts among the others, what its letter's name says."""
  if script != "other":
    return script
  return unicodedata.name(word[0], "").partition(" ")[0].lower()
