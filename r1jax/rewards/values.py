r"""What an answer says: numbers with units, sets, tuples, intervals, matrices, words.

`reading.parse` makes a Value of LaTeX or plain text, its numbers exact rationals, and
`same` compares an answer with a gold as the gold's type demands. What is neither number
nor structure is left as an expression, and `same` asks whoever can do algebra.

The choices where checkers differ:
  number   by value: 0.5 is 1/2 is 50 %; 0.3333 is not 1/3. 1,234 is a number.
  percent  a gold of 50 % is met by 50 %, 50 and 0.5; a gold of 50 by 50 and 50 %.
  unit     a gold without one accepts any; a gold with one accepts it or none, and no
           conversion: 12 cm is not 0.12 m.
  name     `x = 5` is 5; a gold of `x = 5` is not met by `y = 5`.
  set      unordered, also as a bare list; a tuple and an interval keep their order and
           their brackets; `1 <= x < 2` is `[1, 2)`.
  words    by their letters, whatever the case.
"""

from collections.abc import Callable
import dataclasses
from fractions import Fraction
import re

MAX_ITEMS = 64  # of a list


@dataclasses.dataclass(frozen=True)
class Value:
  """`kind` says which of the rest is set.

  number: value, unit, percent, text · words: text · expression: text, unit ·
  set, list, union, matrix and brackets such as `(]`: items · nothing, equal to nothing.
  """

  kind: str
  text: str = ""
  value: Fraction | None = None
  unit: str = ""
  percent: bool = False
  name: str = ""  # x, of `x = 5`
  items: tuple["Value", ...] = ()


def same(
  gold: Value, answer: Value, algebra: Callable[[str, str], bool] | None = None
) -> bool:
  """Whether the answer says what the gold says.

  Args:
    gold: the accepted answer.
    answer: the model's.
    algebra: (gold, answer) -> whether two expressions in LaTeX are equal; None: they
      are where their text is.
  """
  if "nothing" in (gold.kind, answer.kind):
    return False
  if gold.name and answer.name and gold.name != answer.name:
    return False
  if gold.kind == "words" or answer.kind == "words":
    return gold.kind == answer.kind and gold.text == answer.text
  if gold.kind == "number" and answer.kind == "number":
    return _same_number(gold, answer)
  scalar = ("number", "expression")
  if gold.kind in scalar and answer.kind in scalar:
    both = gold.unit and answer.unit
    if gold.unit != answer.unit and (both or "degree" in answer.unit):
      return False  # an expression, of radians say, is not meant in degrees
    if SPACE.sub("", gold.text) == SPACE.sub("", answer.text):
      return True
    return bool(
      algebra and comparable(gold, answer) and algebra(gold.text, answer.text)
    )
  if gold.kind in ("set", "list") and answer.kind in ("set", "list"):
    return _same_set(gold.items, answer.items, algebra)
  if gold.kind != answer.kind or len(gold.items) != len(answer.items):
    return False
  if gold.kind == "union":
    return _same_set(gold.items, answer.items, algebra)
  pairs = zip(gold.items, answer.items, strict=True)
  return all(same(g, a, algebra) for g, a in pairs)


def comparable(gold: Value, answer: Value) -> bool:
  """Whether algebra may be asked: an answer that hedges or relates is not an
  expression, unless the gold is of that form too."""
  said, asked = _RELATION.findall(answer.text), _RELATION.findall(gold.text)
  letters = _symbols(gold.text) | _symbols(answer.text)
  if len({s.lower() for s in letters}) < len(letters):
    return False  # A and a: the library would take them for one
  marks = re.compile(r"'|\^\s*\{?\s*(?:T|\\top|\\prime|\\dagger)")  # it drops these
  if marks.findall(answer.text) != marks.findall(gold.text):
    return False
  if not re.search(r"\w", gold.text) or not re.search(r"\w", answer.text):
    return False
  if re.search(r"(?<![_\d])\d+\s+\d", answer.text):  # 4 2 is neither 42 nor 8
    return False
  based = any(re.search(r"\d_\{?\d", v.text) for v in (gold, answer))
  return said == asked and not based and not _PROSE.search(answer.text)


def _same_number(gold: Value, answer: Value) -> bool:
  if gold.unit and answer.unit and gold.unit != answer.unit:
    return False
  if gold.value == answer.value and gold.percent == answer.percent:
    return True
  if gold.percent:
    return not answer.percent and answer.value in (gold.value, gold.value / 100)
  if answer.percent:
    return gold.value in (answer.value, answer.value / 100)
  return False


def _same_set(gold, answer, algebra) -> bool:
  """Every one of each side has an equal on the other."""
  if max(len(gold), len(answer)) > MAX_ITEMS:
    return False

  def covered(side, other, flip):
    return all(
      any(same(b, a, algebra) if flip else same(a, b, algebra) for b in other)
      for a in side
    )

  return covered(gold, answer, False) and covered(answer, gold, True)


SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # all but between digits
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|in|sim|equiv|pm)(?![a-zA-Z])|[<>=?]")
# Three letters in a row that are no command: a sentence, not an expression.
_PROSE = re.compile(
  r"(?<![\\a-zA-Z])(?!(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b)[a-zA-Z]{3,}"
)


# Letters that stand for quantities: not those of commands or of functions' names.
_SYMBOL = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_NOT_SYMBOLS = re.compile(
  r"\\(?:frac|sqrt|cdot|times|div|binom|text|mathrm|operatorname|left|right|sin|cos|tan"
  r"|cot|sec|csc|arc(?:sin|cos|tan)|log|ln|exp|max|min|gcd|lcm|sum|prod|int|lim|le|ge|ne"
  r"|lfloor|rfloor|lceil|rceil|infty|cup|cap|in|pm|mp|overline|ln|lg|begin|end|circ"
  r"|emptyset|degree|to|dots|ldots|cdots|not|approx|equiv|sim|lt|gt|pmod|bmod|mod|vec"
  r"|hat|bar|dot|star|ast|angle|triangle|sinh|cosh|tanh|mid|quad)(?![a-zA-Z])"
)


def _symbols(text: str) -> frozenset[str]:
  """The variables, constants and Greek letters of an expression."""
  return frozenset(_SYMBOL.findall(_NOT_SYMBOLS.sub(" ", text)))
