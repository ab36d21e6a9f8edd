"""Units of measure after a number, in one spelling."""

import re

# Words after a number that are no unit: they change what is said.
_NO_UNIT = frozenset(
  "is isn are was not or and nor but if to of the a an than then maybe wrong right at"
  " hundred thousand million billion trillion dozen percent percentage mod factorial"
  " squared cubed times plus minus over pi sqrt sin cos tan log ln exp i e x y z n k t"
  " infinity inf half halve third quarter fifth tenth negative positive incorrect"
  " correct false true divided base recurring repeating score gross pair couple by"
  " with without except only about almost nearly more less each double triple twice"
  " as power root inverse opposite modulo no none never error exactly around or so"
  " zero two three four five six seven eight nine ten twenty thirty forty fifty"
  " hundredth thousandth below above under hex hexadecimal binary octal permille ppm"
  " tau approximately undefined unknown".split()
)
_SHORT = frozenset(
  "mm cm dm km kg mg lb lbs oz ft in yd mi mph kph ml cl dl kl ha hz khz mhz kj kw kwh"
  " mv ma pa kpa sec min hr hrs deg cents cent inches inch feet foot miles mile yards"
  " meters metres grams degrees degree dollars hours minutes seconds days years".split()
)
_LETTERS = frozenset("mgshlLNJWVAKCF")
_UNIT = re.compile(
  r"(\s*)((?:(?:sq\.?|square|cubic|cu\.?)\s+)?[a-zA-Z]+(?:[ -][a-zA-Z]+){0,3})"
  r"\.?\s*(?:\^\s*\{?\s*([23])\s*\}?)?(?:\s*/\s*([a-zA-Z]+)(?:\s*\^\s*\{?([23])\}?)?)?\s*",
  re.ASCII,
)
_SAME_UNIT = {
  **{"inch": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi"},
  **{"centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "gram": "g"},
  **{"millimeter": "mm", "millimetre": "mm", "kilometer": "km", "kilometre": "km"},
  **{"kilogram": "kg", "hour": "h", "hr": "h", "second": "s", "sec": "s"},
  **{"minute": "min", "deg": "degree", "liter": "l", "litre": "l", "pound": "lb"},
  **{"ounce": "oz", "dollar": "dollar", "usd": "dollar", "cent": "cent"},
}


def unit_of(text: str) -> str:
  """The unit that stands after a number, in one spelling, or ""."""
  found = _UNIT.fullmatch(text)
  if not found:
    return ""
  space, words, power, under, under_power = found.groups()
  parts = words.lower().replace("-", " ").split()
  if any(w in _NO_UNIT or _singular(w) in _NO_UNIT for w in parts):
    return ""
  if len(words) == 1 and words not in _LETTERS:
    return ""
  if not space and not (len(parts) == 1 and parts[0] in _SHORT):
    return ""
  for word, exponent in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
    if parts[0].rstrip(".") == word and len(parts) > 1:
      parts, power = parts[1:], exponent
  name = " ".join(_singular(w) for w in parts)
  below = f"/{_singular(under.lower())}" if under else ""
  return name + (f"^{power}" if power else "") + below + (under_power or "")


def without_unit(text: str) -> tuple[str, str]:
  """An expression such as `12\\pi cm^2` as (`12\\pi`, its unit or "")."""
  whole, _, last = text.partition(" ")
  while last:
    unit = unit_of(" " + last)
    if unit and re.match(r"[a-zA-Z]{2}", last):
      return whole, unit
    more, _, last = last.partition(" ")
    whole = f"{whole} {more}"
  return text, ""


def _singular(word: str) -> str:
  alone = word[:-1] if len(word) > 2 and word.endswith("s") else word
  alone = {"inche": "inch"}.get(alone, alone)
  return _SAME_UNIT.get(alone, alone)
