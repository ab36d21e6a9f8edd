"""What the documents say, as data: commands, snippets, references, links.

A command is what stands in a fence without a language, or in backticks. Flags alone, in
backticks, follow the command before them in their table or paragraph, and without one
experiments.r1_zero. Words in capitals stand for what a reader puts there.
"""

import dataclasses
import functools
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
  *sorted((ROOT / "docs").glob("*.md")),
  ROOT / "experiments" / "pods" / "README.md",
]
DEFAULT = ("python", "-m", "experiments.r1_zero")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"(?:[A-Z0-9_]+=\S+ )*(?:python\d? -|pip install|apt |git clone)")
UNRUN = "## Commands that no test runs"
FLAG = re.compile(r"--[a-z]")
ENDS = ("&&", "||", "|", ";", "&", ">", ">>")


@dataclasses.dataclass(frozen=True)
class Command:
  """One process: variables in front of it, its words, and the line of a shell."""

  page: str  # and line
  words: tuple[str, ...]
  env: tuple[tuple[str, str], ...] = ()
  shell: str = ""  # the whole line, where it has more than this command
  flags: tuple[str, ...] = ()  # that stood alone, after this command

  @property
  def module(self) -> str:
    """Of python -m, else ""."""
    words = [w for w in self.words if w not in ("-u",)]
    return words[2] if words[:2] == ["python", "-m"] and len(words) > 2 else ""

  @property
  def arguments(self) -> list[str]:
    words = [*self.words, *self.flags]
    return [w for w in words[words.index(self.module) + 1 :] if w != "…"]

  @property
  def readings(self) -> list["Command"]:
    """What flags that stood alone may follow, the likeliest first: the command before
    them, its module alone, or one that the reader was told of elsewhere."""
    if not self.flags:
      return [self]
    modules = (self.module, "experiments.r1_zero", "experiments.r1", "experiments.plan")
    bare = [("python", "-m", module) for module in dict.fromkeys(modules)]
    return [self, *(dataclasses.replace(self, words=words) for words in bare)]

  @property
  def text(self) -> str:
    return shlex.join((*self.words, *self.flags))

  def __str__(self) -> str:
    return f"{self.page}: {self.text}"


def text_of(page: pathlib.Path) -> str:
  return page.read_text(encoding="utf-8")


def name_of(page: pathlib.Path) -> str:
  return str(page.relative_to(ROOT))


def line_of(text: str, at: int) -> int:
  return text.count("\n", 0, at) + 1


def prose(text: str) -> str:
  """The text with its fences blanked, every letter in its place."""
  return FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def fences(text: str) -> list[tuple[int, str, str]]:
  """(line, language, content)."""
  return [(line_of(text, m.start()), m[1], m[2]) for m in FENCE.finditer(text)]


def spans(text: str) -> list[tuple[int, str]]:
  """(place, content on one line) of what stands in backticks in one paragraph."""
  plain = prose(text)
  found = [(m.start(), m[1]) for m in SPAN.finditer(plain)]
  return [(at, " ".join(s.split())) for at, s in found if "\n\n" not in s]


def shell_lines(content: str) -> list[str]:
  """Lines of a shell, those joined that a backslash or an open quote continues."""
  lines, open_line = [], ""
  for line in content.splitlines():
    open_line = f"{open_line}\n{line}" if open_line else line
    try:
      whole = not open_line.endswith("\\")
      shlex.split(open_line, comments=True)
    except ValueError:  # a quote is open
      whole = False
    if whole:
      lines.append(re.sub(r"\s*\\\n\s*", " ", open_line))
      open_line = ""
  assert not open_line, open_line
  return [line for line in lines if line.strip()]


def split(line: str, page: str) -> list[Command]:
  """The commands of a line of a shell."""
  lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
  lexer.whitespace_split = True
  found, words, before = [], [], ""
  for word in [*lexer, ";"]:
    if word not in ENDS:
      words += [word] if before not in (">", ">>") else []
      before = word
      continue
    before, env = word, []
    while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
      env.append(tuple(words.pop(0).split("=", 1)))
    if words:
      found.append((tuple(words), tuple(env)))
    words = []
  several = line if len(found) > 1 or ">" in line else ""
  return [Command(page, words, env, several) for words, env in found]


@functools.cache
def commands() -> tuple[Command, ...]:
  """Of all pages, in their order; but for the beginnings that `unrunnable` names."""
  found = []
  for page in PAGES:
    text = text_of(page)
    if page.name == "limits.md":
      text = text.partition(UNRUN)[0]
    found += commands_of(text, name_of(page))
  return tuple(found)


def commands_of(text: str, name: str) -> list[Command]:
  """The commands of a page, fences and prose in the order in which they stand."""
  found = []
  for m in FENCE.finditer(text):
    for line in shell_lines(m[2]) if m[1] in ("", "bash", "sh") else ():
      if COMMAND.match(line) or re.match(r"(echo|printf) ", line):
        found.append((m.start(), line, False))
  for at, span in spans(text):
    if COMMAND.match(span) or FLAG.match(span):
      found.append((at, span, bool(FLAG.match(span))))
  made, last, end = [], None, 0
  for at, line, flags in sorted(found, key=lambda one: one[0]):
    place = f"{name}:{line_of(text, at)}"
    if "\n#" in text[end:at]:
      last = None
    if flags:
      base = last or Command(place, DEFAULT)
      made.append(dataclasses.replace(base, page=place, flags=tuple(shlex.split(line))))
    else:
      new = split(line, place)
      made += new
      last = next((c for c in reversed(new) if c.module), last)
    end = at
  return made


def snippets(page: pathlib.Path) -> list[tuple[str, str]]:
  """(place, source) of the Python of a page."""
  text, name = text_of(page), name_of(page)
  return [(f"{name}:{n}", body) for n, lang, body in fences(text) if lang == "python"]


def file_of(source: str) -> str:
  """The file that a snippet is the content of: its first line says `# FILE.py`."""
  found = re.match(r"# (\w+\.py)\n", source)
  return found[1] if found else ""


def unrunnable() -> dict[str, str]:
  """What docs/limits.md says that no test runs: how a command begins -> why."""
  text = text_of(ROOT / "docs" / "limits.md")
  section = text.partition(UNRUN)[2].partition("\n## ")[0]
  rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
  return dict(rows)


def anchors(text: str) -> set[str]:
  """Of the headings, as GitHub makes them."""
  found: set[str] = set()
  for title in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
    base = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
    n, name = 0, base
    while name in found:
      n, name = n + 1, f"{base}-{n + 1}"
    found.add(name)
  return found
