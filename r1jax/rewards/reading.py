r"""From LaTeX or plain text to a Value (values.py)."""

import dataclasses
from fractions import Fraction
import functools
import re

from r1jax.rewards.units import unit_of, without_unit
from r1jax.rewards.values import MAX_ITEMS, Value

MAX_CHARS = 400  # a longer answer is not read
_NESTING = 12  # of brackets


def parse(text: str) -> Value | None:
  """Reads an answer; None where it is empty, too long or its brackets do not match."""
  return _parse(text) if len(text) <= MAX_CHARS else None


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Value | None:
  clean = normalise(text)
  if not clean or _split(clean, ",") is None:
    return None
  return _value(clean, depth=0)


_SYMBOLS = {
  **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "∪": r"\cup "},
  **{"∞": r"\infty ", "π": r"\pi ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge "},
  **{"½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34", "²": "^2", "³": "^3"},
  **{"≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "±": r"\pm ", "∅": r"\emptyset "},
}
_WRAPPERS = (
  *((r"\$\$", r"\$\$"), (r"\$", r"\$"), (r"\\\(", r"\\\)"), (r"\\\[", r"\\\]")),
  *((r"\*\*", r"\*\*"), (r"`", r"`")),
)
_WRAPPED = re.compile(
  "|".join(rf"{a}(?!.*{a}.*{b})(.*){b}" for a, b in _WRAPPERS), re.S
)
_SPACING = re.compile(
  r"\\(?:left|right)(?![a-zA-Z])\.?|(?<!\\)\\!|(?<!\\)\\,(?=\d{3}(?!\d))"
)
_STYLE = re.compile(r"\\(?:displaystyle|textstyle|limits|quad|qquad)(?![a-zA-Z])")
_TEXT = re.compile(
  r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|rm)\s*\{([^{}]*)\}"
)
_RENAMED = (
  (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
  (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
  (r"\\(?:leq|leqslant|le)(?![a-zA-Z])", r"\\le "),
  (r"\\(?:geq|geqslant|ge)(?![a-zA-Z])", r"\\ge "),
  (r"\\lt(?![a-zA-Z])", "<"),
  (r"\\gt(?![a-zA-Z])", ">"),
  (r"<=", r"\\le "),
  (r">=", r"\\ge "),
  (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne "),
  (r"\\(?:varnothing|emptyset)(?![a-zA-Z])", r"\\emptyset "),
  (r"\{,\}", ","),
  (r"\\lbrace(?![a-zA-Z])", r"\\{"),
  (r"\\rbrace(?![a-zA-Z])", r"\\}"),
  (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
  (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
  (r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}"),
  (r"\^\s*\{?\s*\\circ\s*\}?", " degrees "),
  (r"\\%", "%"),
  (r"\\\$", "$"),
)


def normalise(text: str) -> str:
  """One spelling: no wrapping, spacing or styling commands, LaTeX for symbols."""
  text = text.strip()
  for symbol, latex in _SYMBOLS.items():
    text = text.replace(symbol, latex)
  for _ in range(4):
    text = text.strip().removesuffix(".").strip()
    box = re.fullmatch(r"\\boxed\{(.*)\}", text, re.DOTALL)
    wrapped = _WRAPPED.fullmatch(text)
    if box:
      text = box[1]
    elif wrapped and text != "$":
      text = next(part for part in wrapped.groups() if part is not None)
  text = re.sub(r"(?<!\\)\\[ ,;:]|~", " ", _SPACING.sub("", text))
  text = _STYLE.sub(" ", text)
  for pattern, plain in _RENAMED:
    text = re.sub(pattern, plain, text)
  text = _TEXT.sub(r" \1 ", text)
  return re.sub(r"\s+", " ", text).strip()


def _value(text: str, depth: int) -> Value:
  text = text.strip().removesuffix(".").strip()
  if not text:
    return Value("nothing")
  for read in (_empty_set, _number, _words, _inequality, _matrix, _structure, _named):
    value = read(text, depth)
    if value is not None:
      return value
  whole, unit = without_unit(text)
  return Value("expression", text=latex(whole), unit=unit)


def _empty_set(text: str, depth: int) -> Value | None:
  return Value("set") if text in (r"\emptyset", r"\{\}", r"\{ \}", "{}") else None


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_PART = r"(?:\{\s*([+-]?\d+)\s*\}|(\d))"
_PLAIN = re.compile(
  rf"([+-]?)\s*([$€£]?)\s*([+-]?)\s*(?:"
  rf"(?P<mixed>\d+)?\s*\\frac\s*{_PART}\s*{_PART}"
  rf"|(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+)"
  rf"|(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})"
  rf"|(?P<decimal>{_DECIMAL})(?:e(?P<exp>[+-]?\d{{1,3}})"
  rf"|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([+-]?\d{{1,3}})\s*\}}|(\d)))?)",
  re.ASCII | re.IGNORECASE,
)


_CURRENCIES = {"$": "dollar", "€": "euro", "£": "£"}
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", re.ASCII)


def _repeating(text: str) -> Value | None:
  """0.1\\overline{6}."""
  found = _REPEATING.fullmatch(text)
  if not found:
    return None
  whole, still, again = found.groups()
  tail = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(still))
  return Value("number", text=text, value=Fraction(f"{whole or 0}.{still or 0}") + tail)


def _number(text: str, depth: int) -> Value | None:
  if "overline" in text:
    return _repeating(text)
  found = _PLAIN.match(text)
  if not found or (found[1] and found[3]):
    return None
  try:
    value = _rational(found)
  except (ValueError, ZeroDivisionError):
    return None
  if "-" in (found[1], found[3]):
    value = -value
  rest, percent = text[found.end() :], False
  unit = _CURRENCIES.get(found[2], "")
  if rest.strip() in ("%", "percent", "percentage"):
    rest, percent = "", True
  if rest.strip() in _CURRENCIES and not unit:
    rest, unit = "", _CURRENCIES[rest.strip()]
  if rest:
    named = unit_of(rest)
    if not named or (unit and named != unit):
      return None
    unit = named
  number = latex(text[: found.end()].strip("$€£ "))
  return Value("number", text=number, value=value, unit=unit, percent=percent)


def _rational(found: re.Match) -> Fraction:
  a, b, c, d = found.groups()[4:8]
  if a or b:
    fraction = Fraction(int(a or b), int(c or d))
    return fraction + int(found["mixed"] or 0)
  if found["whole"]:
    return int(found["whole"]) + Fraction(int(found["part"]), int(found["parts"]))
  if found["over"]:
    over, under = (int(found[k].replace(",", "")) for k in ("over", "under"))
    return Fraction(over, under)
  exponent = next((e for e in (found["exp"], *found.groups()[-2:]) if e), "0")
  return Fraction(found["decimal"].replace(",", "")) * Fraction(10) ** int(exponent)


_LETTERS = re.compile(r"[^\W\d_]+(?:[ '’-]+[^\W\d_]+)*[.!]?")
_FUNCTIONS = frozenset(
  "pi sqrt sin cos tan log ln exp sec csc cot arcsin arccos arctan infinity inf".split()
)
_SHORT_WORDS = frozenset("no up ok".split())


def _words(text: str, depth: int) -> Value | None:
  if not _LETTERS.fullmatch(text):
    return None
  found = [w.lower() for w in re.findall(r"[^\W\d_]+", text)]
  if all(len(w) < 3 and w not in _SHORT_WORDS for w in found):
    return None  # x, xy, p q: letters that are quantities
  if any(w in _FUNCTIONS for w in found):
    return None
  return Value("words", text=" ".join(found))


_VARIABLE = r"[a-zA-Z](?:_\{?\w+\}?)?"
_CHAIN = re.compile(r"(\\le|\\ge|<|>)(?![a-zA-Z])")


def _inequality(text: str, depth: int) -> Value | None:
  parts = re.split(r"\s+or\s+", text)
  if len(parts) > 1:
    found = [_inequality(p.strip(), depth) for p in parts]
    return Value("union", items=tuple(found)) if all(found) else None
  pieces = [p.strip() for p in _CHAIN.split(text)]
  if len(pieces) not in (3, 5) or depth > _NESTING:
    return None
  ends, signs = pieces[0::2], pieces[1::2]
  if len({s in ("<", r"\le") for s in signs}) > 1:
    return None
  if signs[0] in (">", r"\ge"):
    turned = {">": "<", r"\ge": r"\le"}
    ends, signs = ends[::-1], [turned[s] for s in signs[::-1]]
  if len(ends) == 2:
    if re.fullmatch(_VARIABLE, ends[0]):
      ends, signs = [r"-\infty", *ends], ["<", *signs]
    else:
      ends, signs = [*ends, r"\infty"], [*signs, "<"]
  low, name, high = ends
  bounds = [_value(e, depth + 1) for e in (low, high) if e]
  if not re.fullmatch(_VARIABLE, name) or len(bounds) < 2:
    return None
  if any(re.search(r"[=<>]", b.text) for b in bounds):
    return None
  kind = "".join("(" if s == "<" else "[" for s in signs[:1])
  kind += ")" if signs[1] == "<" else "]"
  return Value(kind, items=tuple(bounds), name=name)


_ENVIRONMENT = re.compile(
  r"\\begin\s*\{([pbvB]?matrix|array)\}(?:\s*\{[clr|]+\})?(.*)\\end\s*\{\1\}", re.DOTALL
)


def _matrix(text: str, depth: int) -> Value | None:
  found = _ENVIRONMENT.fullmatch(text.strip("() "))
  if found:
    lines = [r for r in re.split(r"\\\\(?:\[[^\]]*\])?", found[2]) if r.strip()]
    rows = [[c.strip() for c in line.split("&")] for line in lines]
  elif re.fullmatch(r"\[\s*\[.*\]\s*\]", text):
    inner = _split(text[1:-1], ",") or []
    rows = [_split(r.strip()[1:-1], ",") or [] for r in inner]
    if not all(r.strip().startswith("[") and r.strip().endswith("]") for r in inner):
      return None
  else:
    return None
  if not rows or not all(cell for row in rows for cell in row) or depth > _NESTING:
    return None
  if len(rows) * max(map(len, rows)) > MAX_ITEMS:
    return None
  return Value(
    "matrix",
    items=tuple(
      Value("row", items=tuple(_value(cell, depth + 1) for cell in row)) for row in rows
    ),
  )


def _structure(text: str, depth: int) -> Value | None:
  if depth > _NESTING:
    return None
  member = re.match(rf"({_VARIABLE})\s*\\in(?![a-zA-Z])\s*", text)
  if member:
    value = _value(text[member.end() :], depth + 1)
    return dataclasses.replace(value, name=member[1])
  sides = _split(text, r"\cup")
  if sides and len(sides) > 1:
    parts = [_value(s, depth + 1) for s in sides]
    return Value("union", items=tuple(parts))
  if text.startswith(r"\{") and text.endswith(r"\}"):
    return _of_items("set", _split(text[2:-2], ","), depth)
  if text[0] == "{" and _closes_at_end(text):
    items = _split(text[1:-1], ",")  # of one item: LaTeX's grouping, no set
    if items and len(items) == 1 and items[0].strip():
      return _value(items[0], depth + 1)
    return _of_items("set", items, depth)
  if text[0] in "([" and text[-1] in ")]" and _closes_at_end(text):
    items = _split(text[1:-1], ",")
    if items and len(items) > 1:
      return _of_items(text[0] + text[-1], items, depth)
  items = _split(text, ",")
  if items and len(items) > 1:
    items = [*items[:-1], items[-1].strip().removeprefix("and ")]
    return _of_items("list", items, depth)
  both = re.split(r"\s+and\s+", text)
  if len(both) == 2:
    return _of_items("list", both, depth)
  plus_minus = text.count(r"\pm") == 1 and re.fullmatch(
    r"((?:.*[^\s\\])?)\s*\\pm(?![a-zA-Z])\s*(.+)", text
  )
  if plus_minus:
    first, second = plus_minus[1], plus_minus[2]
    return _of_items("list", [f"{first} + {second}", f"{first} - {second}"], depth)
  return None


def _of_items(kind: str, items: list[str] | None, depth: int) -> Value | None:
  if not items or len(items) > MAX_ITEMS or not all(i.strip() for i in items):
    return None
  return Value(kind, items=tuple(_value(i.strip(), depth + 1) for i in items))


def _named(text: str, depth: int) -> Value | None:
  """`x = 5`, `f(x) = 2x`: the right side, and the name."""
  left, equals, right = text.partition("=")
  left = left.strip()
  if not equals or "=" in right or not right.strip() or depth > _NESTING:
    return None
  if not re.fullmatch(rf"{_VARIABLE}(?:\s*\(\s*[a-zA-Z]\s*\))?|\\theta|\\alpha", left):
    return None
  value = _value(right, depth + 1)
  name = re.sub(r"[\s{}]", "", left)
  return dataclasses.replace(value, name=name)


def _split(text: str, at: str) -> list[str] | None:
  """The parts between separators outside all brackets; None where they do not match."""
  parts, depth, start, i = [], 0, 0, 0
  while i < len(text):
    if text.startswith(at, i) and depth == 0:
      parts.append(text[start:i])
      i += len(at)
      start = i
      continue
    if text[i] == "\\" and text[i + 1 : i + 2] not in ("{", "}"):
      i += 1 if text[i + 1 : i + 2].isalpha() else 2
      continue
    depth += (text[i] in "([{") - (text[i] in ")]}")
    if depth < 0:
      return None
    i += 1
  return [*parts, text[start:]] if depth == 0 else None


def _closes_at_end(text: str) -> bool:
  """Whether the first bracket is closed by the last character."""
  depth = 0
  for i, c in enumerate(text):
    depth += (c in "([{") - (c in ")]}")
    if depth == 0:
      return i == len(text) - 1
  return False


def latex(text: str) -> str:
  """Plain `sqrt(2)`, `2*pi`, `x^10`, `(x+2)/7` in LaTeX."""
  text = re.sub(
    r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1", text
  )
  text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
  text = re.sub(r"\*\*", "^", text)
  text = re.sub(r"\s*\*\s*", r" \\cdot ", text)
  text = re.sub(r"(\d)_\{(\d+)\}", r"\1_\2", text)
  return re.sub(r"\^\s*(-?\d\d+|\d*\.\d+|-\d+|\d+\.\d+)", r"^{\1}", text)
