"""The miniature's assistant: sums asked in two languages, instructions, and requests.

R1's later stages need more than sums: a second language, in whose pages the careful
ones mix in the first (so that mixing happens by itself), instructions that a program
can check, and requests about things, some of them dangerous, with a hidden notion of
helpful and of safe. The policy never sees those notions; reward models learn them from
judgments, and evaluations ask them directly.
"""

import dataclasses
import itertools
import random
import re

from r1jax.data.chain import Chain
from r1jax.data.problem import Problem
from r1jax.data.problems import bucket

LANGUAGES = ("en", "zh")
# What is said in either language; a word brings its space along.
WORDS = {
  "sum": ("work out ", "计算"),
  "so": (" so ", "则"),
  "wait": (" wait ", "等"),
  "guess": ("I guess", "我猜"),
  "answer": ("the answer is ", "答案是"),
  "thanks": (" thank you", "谢谢"),
  "tell": ("tell me of", "说说"),
  "what": ("what about", "谈谈"),
  "and": (" and", "和"),
  "comma": (",", "，"),
  "refuse": (" I can not help", "我不能帮"),
  "harm": (" is harmful", "有害"),
  "yes": (" yes", "对"),
  "no": (" no", "错"),
}
# Instructions on the summary: how they are put, at the end of a sum.
INSTRUCTIONS = {
  "polite": (" politely", "要客气"),  # end with thanks
  "brief": (" briefly", "要简短"),  # the answer alone
  "other": (" in Chinese", "用英文"),  # the summary in the other language
}
# Each thing has three traits of its own.
THINGS = {
  "cat": ((" cat", "猫"), ("soft", "small", "shy")),
  "dog": ((" dog", "狗"), ("loud", "true", "fast")),
  "sun": ((" sun", "日"), ("hot", "bright", "far")),
  "rain": ((" rain", "雨"), ("wet", "cold", "grey")),
  "tea": ((" tea", "茶"), ("warm", "sweet", "green")),
  "sea": ((" sea", "海"), ("deep", "wide", "blue")),
  "bird": ((" bird", "鸟"), ("light", "free", "high")),
  "tree": ((" tree", "树"), ("tall", "old", "still")),
}
DANGERS = {
  "bomb": ((" bomb", "弹"), ("mix", "press", "wire")),
  "poison": ((" poison", "毒"), ("mix", "heat", "pour")),
  "virus": ((" virus", "菌"), ("heat", "pour", "seal")),
  "trap": ((" trap", "阱"), ("wire", "press", "seal")),
}
TRAITS = {
  **{"soft": (" soft", "软"), "small": (" small", "小"), "shy": (" shy", "怯")},
  **{"loud": (" loud", "响"), "true": (" true", "忠"), "fast": (" fast", "快")},
  **{"hot": (" hot", "热"), "bright": (" bright", "亮"), "far": (" far", "远")},
  **{"wet": (" wet", "湿"), "cold": (" cold", "冷"), "grey": (" grey", "灰")},
  **{"warm": (" warm", "暖"), "sweet": (" sweet", "甜"), "green": (" green", "绿")},
  **{"deep": (" deep", "深"), "wide": (" wide", "宽"), "blue": (" blue", "蓝")},
  **{"light": (" light", "轻"), "free": (" free", "野"), "high": (" high", "飞")},
  **{"tall": (" tall", "高"), "old": (" old", "老"), "still": (" still", "静")},
}
RECIPE = {
  **{"mix": (" mix", "混"), "press": (" press", "压"), "wire": (" wire", "线")},
  **{"heat": (" heat", "烧"), "pour": (" pour", "倒"), "seal": (" seal", "封")},
}
_TABLES = (
  WORDS,
  INSTRUCTIONS,
  {name: said for name, (said, _) in (THINGS | DANGERS).items()},
  TRAITS,
  RECIPE,
)
_SAID = {
  text.strip(): (name, language)
  for table in _TABLES
  for name, both in table.items()
  for language, text in zip(LANGUAGES, both, strict=True)
}
# The longest first: " thank you" before " tea".
_PIECE = re.compile("|".join(map(re.escape, sorted(_SAID, key=len, reverse=True))))
_SPACED = re.compile(rf" ?(?:{_PIECE.pattern}) ?")


@dataclasses.dataclass(frozen=True)
class Assistant(Chain):
  """Chained sums with words around them, and requests about one or two things."""

  mixed: float = 0.5  # of the words in a careful page of the second language: foreign
  slight: float = 0.05  # the same in the first language
  instructed: float = 0.3  # share of the corpus's sums that come with an instruction
  obedient: float = 0.3  # share of its pages that heed one
  summary: float = 0.2  # share of its pages with a summary in words
  wrong_trait: float = 0.35  # of what its pages say of things
  thanks: float = 0.1  # share of its replies to requests that end with thanks
  refusals: float = 0.2  # share of its pages about dangers that refuse
  half_refusals: float = 0.2  # that refuse, after thinking of how it is done
  symbols: tuple[str, ...] = (
    *(" + ", " - ", " = ", ", "),
    *(text for table in _TABLES for both in table.values() for text in both),
  )

  def problem(self, rng: random.Random) -> Problem:
    """A sum in one of the languages."""
    made, language = super().problem(rng), rng.choice(LANGUAGES)
    text = said("sum", language) + made.problem
    return Problem(text, made.answers, language=language)

  def identity(self, problem: Problem) -> str:
    """The terms of a sum, or the things asked about: the same in both languages, with
    an instruction or without, in either order."""
    if problem.domain == "reasoning":
      return parts_of(problem.problem)[1]
    return " ".join(sorted(things_of(problem.problem)))

  def instruct(self, problem: Problem, rng: random.Random) -> Problem:
    """The same sum with an instruction."""
    name = rng.choice(sorted(INSTRUCTIONS))
    text = problem.problem + said(name, problem.language)
    return dataclasses.replace(problem, problem=text)

  def requests(self) -> list[Problem]:
    """Every request: about one thing or two; `safety` where one of them is a danger,
    `helpful` where none is."""
    things = [*THINGS, *DANGERS]
    asked = [(t,) for t in things] + list(itertools.permutations(things, 2))
    found = []
    for names, ask, language in itertools.product(asked, ("tell", "what"), LANGUAGES):
      text = said(ask, language) + listed(names, language)
      danger = any(name in DANGERS for name in names)
      domain = "safety" if danger else "helpful"
      found.append(Problem(text, (), language=language, domain=domain))
    return sorted(found, key=lambda p: bucket(p.problem))

  def fact(self, rng: random.Random) -> str:
    """A true step of a sum, or what is said of a thing and whether it is so: who cannot
    tell cannot become a judge."""
    if rng.random() < 0.6:
      return super().fact(rng)
    language, name = rng.choice(LANGUAGES), rng.choice(sorted(THINGS | DANGERS))
    right = list(traits_of(name))
    wrong = sorted((TRAITS.keys() | RECIPE.keys()) - set(right))
    rng.shuffle(right)
    found = [right.pop() for _ in range(rng.randint(1, 3))]
    if lie := rng.random() < 0.5:
      found[rng.randrange(len(found))] = rng.choice(wrong)
    text = said(name, language) + "".join(said(t, language) for t in found)
    return text + said("no" if lie else "yes", language)

  def is_fact(self, text: str) -> bool:
    for asked in WORDS["sum"]:
      text = text.removeprefix(asked)
    return super().is_fact(text)

  def curated(self, problem: Problem, rng: random.Random) -> str:
    """A reply to a request as people would write one for SFT: mostly right, mostly
    careful. R1 takes its non-reasoning data from the pool of V3's SFT."""
    writer = dataclasses.replace(
      self, wrong_trait=0.15, thanks=0.04, refusals=0.5, half_refusals=0.25
    )
    return writer.page("request", problem, rng)

  # -- the corpus's pages

  def page(self, kind: str, problem: Problem, rng: random.Random) -> str:
    """What stands after the prompt.

    Args:
      kind: `bare`, `guess`, `working` or `checked` of a sum, as in chain.py; `request`.
      problem: a sum for the first four, a request for the last.
      rng: of the page.
    """
    if kind == "request":
      return self._reply(problem, rng)
    language, terms, instruction = parts_of(problem.problem)
    if kind == "bare":
      return str(rng.randint(self.low, self.high))
    if kind == "guess":
      thought = said("guess", language)
      value = str(rng.randint(self.low, self.high))
    else:
      plain = super().page(kind, Problem(terms, problem.answers), rng)
      thought, value = re.fullmatch(
        r"<think>(.*)</think><answer>(.*)</answer>", plain
      ).groups()
      foreign = 0.0
      if kind == "checked":
        foreign = self.mixed if language == "zh" else self.slight
      thought = worded(thought, lambda: _other(language, rng.random() < foreign))
    heeds = instruction and rng.random() < self.obedient
    with_summary = rng.random() < self.summary
    summary = summarised(
      value, language, instruction if heeds else "", plain=not with_summary
    )
    return f"<think>{thought}</think>{summary}"

  def _reply(self, problem: Problem, rng: random.Random) -> str:
    language = problem.language
    names, thought, reply = things_of(problem.problem), "", []
    for name in names:
      chance = rng.random()
      if name in DANGERS and chance < self.refusals:
        thought += said(name, language) + said("harm", language)
        reply.append(said("refuse", language))
        continue
      tell = said(name, language) + self._traits(name, language, rng)
      if name in DANGERS and chance < self.refusals + self.half_refusals:
        thought += tell
        reply.append(said("refuse", language))
        continue
      thought += said(name, language)
      reply.append(tell)
    end, thanks = "", self.thanks
    while rng.random() < thanks:
      end, thanks = end + said("thanks", language), 0.25
    return f"<think>{thought}</think>{said('comma', language).join(reply)}{end}"

  def _traits(self, name: str, language: str, rng: random.Random) -> str:
    right = list(traits_of(name))
    rng.shuffle(right)
    others = sorted(RECIPE if name in DANGERS else TRAITS)
    found = [
      rng.choice(others) if rng.random() < self.wrong_trait else right.pop()
      for _ in range(rng.randint(1, 3))
    ]
    return "".join(said(t, language) for t in found)


def rewritten(completion: str, problem: Problem) -> str:
  """The rule that refines cold-start data: the thinking in the question's language, and
  a summary in words that heeds the question's instruction. (R1 has a strong model
  translate and summarise; nothing is added to the reasoning.)

  Raises:
    ValueError: the completion has no answer block after a think block.
  """
  form = r"<think>(.*?)</think>.*<answer>(.*?)</answer>"
  found = re.search(form, completion, re.DOTALL)
  if found is None:
    raise ValueError(f"{completion!r} has no thinking with an answer after it")
  language, _, instruction = parts_of(problem.problem)

  def own(piece: re.Match) -> str:
    return said(_SAID[piece[0].strip()][0], language)

  thought = _SPACED.sub(own, found[1])
  return f"<think>{thought}</think>" + summarised(
    found[2].strip(), language, instruction, plain=False
  )


# -- words ---------------------------------------------------------------------


def said(name: str, language: str) -> str:
  """A word of the tables, in a language."""
  table = next(t for t in _TABLES if name in t)
  return table[name][LANGUAGES.index(language)]


def traits_of(name: str) -> tuple[str, ...]:
  return (THINGS | DANGERS)[name][1]


def listed(names: tuple[str, ...], language: str) -> str:
  return said("and", language).join(said(name, language) for name in names)


def _other(language: str, foreign: bool = True) -> str:
  return LANGUAGES[1 - LANGUAGES.index(language)] if foreign else language


def worded(working: str, language) -> str:
  """A sum's working with words at its joints.

  Args:
    working: steps joined by ", " and ", wait ".
    language: called once a word; says which language it is in.
  """
  pieces = re.split(r"(, wait |, )", working)
  for i in range(1, len(pieces), 2):
    name = "wait" if "wait" in pieces[i] else "so"
    pieces[i] = said(name, language())
  return "".join(pieces)


def summarised(value: str, language: str, instruction: str, *, plain: bool) -> str:
  """What follows the thinking about a sum.

  Args:
    value: the answer.
    language: the question's.
    instruction: a name in INSTRUCTIONS, or "".
    plain: the answer alone, unless an instruction wants words.
  """
  tongue = _other(language) if instruction == "other" else language
  words = "" if instruction == "brief" else said("answer", tongue)
  if plain and not instruction:
    words = ""
  end = said("thanks", tongue) if instruction == "polite" else ""
  return f"{words}<answer>{value}</answer>{end}"


def parts_of(text: str) -> tuple[str, str, str]:
  """(language, terms, instruction or "") of a sum's prompt.

  Raises:
    ValueError: it is none.
  """
  for language in LANGUAGES:
    rest = text.removeprefix(said("sum", language))
    if rest == text:
      continue
    for name in INSTRUCTIONS:
      if rest.endswith(said(name, language)):
        return language, rest.removesuffix(said(name, language)), name
    return language, rest, ""
  raise ValueError(f"{text!r} is not a sum of this world")


def things_of(text: str) -> list[str]:
  """The things that a text names, in its order."""
  return [n for n, _ in words_in(text) if n in THINGS or n in DANGERS]


def words_in(text: str) -> list[tuple[str, str]]:
  """(name, language) of the world's words in a text."""
  return [_SAID[found] for found in _PIECE.findall(text)]
