"""Every key of every config, as docs/configs.md: default, and the comment beside it.

  python -m experiments.reference             # prints the page
  python -m experiments.reference --write     # puts it into docs/configs.md

Defaults are those of the presets themselves; comments are read off
experiments/configs/*.py, and those of the objective off r1jax/objective.py.
"""

import argparse
import ast
from collections.abc import Iterable, Iterator
import inspect
import io
import pathlib
import sys
import tokenize
import types

from ml_collections import ConfigDict

from experiments.configs import ppo, r1, r1_zero
from r1jax import objective

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "configs.md"
BASE = "experiments/configs/r1_zero.py"
HEAD = """# Configs

Made by `python -m experiments.reference --write` from `experiments/configs/*.py`; a
test compares. Any key is set on the command line as `--config.SECTION.KEY=VALUE`,
tuples in quotes: `--config.data.stop="('</answer>',)"`. Where the default is None, the
preset that the section names decides, if the row says nothing else. What presets of the
objective choose: [algorithms.md](algorithms.md). Of a preset those keys are listed that
differ from `:tiny`, with the source where the file names one.
"""


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.reference",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--write", action="store_true", help="into docs/configs.md")
  options = parser.parse_args(argv)
  if options.write:
    PAGE.write_text(page(), encoding="utf-8")
  else:
    print(page(), end="")


def page() -> str:
  zero, whole, rival = (module.get_config("tiny") for module in (r1_zero, r1, ppo))
  notes = read(r1_zero, "tiny")
  lines = [HEAD, "## `experiments/configs/r1_zero.py`", docstring(r1_zero)]
  lines += sections(leaves(zero), notes)
  for preset in r1_zero.PRESETS[1:]:
    said = merged(*(read(r1_zero, name) for name in (*_shared(preset), preset)))
    lines += presets(r1_zero, preset, leaves(zero), said, notes)
  for module, config in ((r1, whole), (ppo, rival)):
    name = module.__name__.rpartition(".")[2]
    lines += [f"## `experiments/configs/{name}.py`", docstring(module)]
    said = merged(notes, read(module, "tiny" if module is r1 else "get_config"))
    before, now = leaves(zero), leaves(config)
    changed = {k: now[k] for k in in_order(before, said) if now[k] != before[k]}
    lines += [f"All keys of `{BASE}`, of which these have another default:\n"]
    lines += [table(changed, said)]
    lines += sections({k: v for k, v in now.items() if k not in before}, said)
    if module is r1:
      of_paper = merged(read(r1_zero, "paper"), read(r1, "paper"))
      lines += presets(r1, "paper", now, of_paper, said)
  return "\n".join(lines)


def _shared(preset: str) -> tuple[str, ...]:
  """The functions of r1_zero.py that a preset's keys are set by before its own."""
  if preset not in r1_zero.GIVEN:
    return ()
  calls = "word_problems(c)" in inspect.getsource(r1_zero.GIVEN[preset])
  return ("given", *["word_problems"] * calls)


# -- markdown --------------------------------------------------------------------------


def docstring(module: types.ModuleType) -> str:
  return f"```text\n{inspect.getdoc(module)}\n```\n"


def sections(values: dict, notes: dict[str, str]) -> list[str]:
  """A table for each section, in the file's order; the first has the keys outside of
  any."""
  found = {"": {}}
  for key in in_order(values, notes):
    found.setdefault(key.rpartition(".")[0], {})[key] = values[key]
  lines = []
  for name, rows in found.items():
    if not rows:
      continue
    about = notes.get(name, "")
    lines.append(f"### {f'`{name}`' if name else 'The run'}\n")
    lines += [about[:1].upper() + about[1:] + ".\n"] if about else []
    lines.append(table(rows, notes))
  return lines


def in_order(keys: Iterable[str], order: Iterable[str]) -> list[str]:
  """Keys as they follow each other in another list; those that it lacks come last."""
  places = {key: i for i, key in enumerate(order)}
  return sorted(keys, key=lambda key: places.get(key, len(places)))


def table(values: dict, notes: dict[str, str]) -> str:
  rows = ["| key | default | |", "|---|---|---|"]
  for key, value in values.items():
    note = notes.get(key, "").replace("|", "\\|").replace("<", "&lt;")
    rows.append(f"| `{key}` | `{value!r}` | {note} |")
  return "\n".join(rows) + "\n"


def presets(
  module: types.ModuleType,
  preset: str,
  usual: dict,
  notes: dict[str, str],
  order: Iterable[str],
) -> list[str]:
  """What a preset says of itself and what it changes, in this order of keys."""
  now = leaves(module.get_config(preset))
  changed = {k: v for k, v in now.items() if usual.get(k, module) != v}
  changed.pop("preset")
  place = module.__name__.replace(".", "/")
  about = inspect.getdoc(getattr(module, preset))
  head = f"### `{place}.py:{preset}`\n\n```text\n{about}\n```\n"
  rows = {key: changed[key] for key in in_order(changed, order)}
  return [head, table(rows, notes).replace("| default |", "| value |")]


def leaves(config: ConfigDict, prefix: str = "") -> dict:
  """Dotted key -> value."""
  found = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      found |= leaves(value, f"{prefix}{key}.")
    else:
      found[prefix + key] = value
  return found


# -- comments --------------------------------------------------------------------------


def merged(*some: dict[str, str]) -> dict[str, str]:
  """Notes by key, in the order in which keys come first; later ones win that say
  something."""
  found: dict[str, str] = {}
  for key, note in (pair for notes in some for pair in notes.items()):
    found[key] = note or found.get(key, "")
  return found


def read(module: types.ModuleType, function: str) -> dict[str, str]:
  """Dotted key -> the comment beside its assignment, in a function of the module and
  in those that it takes whole sections from."""
  tree = ast.parse(inspect.getsource(module))
  made = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
  pairs = _of_body(made[function].body, {}, module, comments(module))
  return merged(*({key: note} for key, note in pairs))


def _of_body(
  body: list[ast.stmt],
  names: dict[str, list[str]],
  module: types.ModuleType,
  said: dict[int, str],
) -> Iterator[tuple[str, str]]:
  """(key, comment). Args: names: what a loop's variable stands for."""
  for node in body:
    if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
      stands = [path for x in node.iter.elts for path in _paths(x, names)]
      inside = names | {node.target.id: stands}
      yield from _of_body(node.body, inside, module, said)
    elif isinstance(node, ast.For):  # over the fields of a dataclass
      yield from comments_of_fields()
    elif isinstance(node, ast.Assign):
      note = said.get(node.lineno, "")
      for target in node.targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        for path in (path for part in parts for path in _paths(part, names)):
          yield from _taken(path, node.value, module)
          yield path, note


def _paths(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
  """Keys that an expression names: c.a.b, m[size], section.epochs in a loop."""
  if isinstance(node, ast.Constant):
    return [node.value]
  if isinstance(node, ast.Name):
    return names.get(node.id, [""])
  if isinstance(node, ast.Subscript):
    return _paths(node.slice, names)
  return [f"{p}.{node.attr}".lstrip(".") for p in _paths(node.value, names)]


def _taken(
  path: str, value: ast.expr, module: types.ModuleType
) -> Iterator[tuple[str, str]]:
  """The keys of a section that a call makes."""
  if not isinstance(value, ast.Call):
    return
  name = ast.unparse(value.func)
  module = r1_zero if name.startswith("r1_zero.") else module
  name = name.rpartition(".")[2]
  if isinstance(getattr(module, name, None), types.FunctionType):
    if module.__dict__[name].__module__ != module.__name__:
      return
    for key, note in read(module, name).items():
      yield f"{path}.{key}".strip("."), note


def comments_of_fields() -> Iterator[tuple[str, str]]:
  """Of the Objective's choices."""
  said = comments(objective)
  (made,) = (
    node
    for node in ast.parse(inspect.getsource(objective)).body
    if isinstance(node, ast.ClassDef)
  )
  for node in made.body:
    if isinstance(node, ast.AnnAssign):
      yield node.target.id, said.get(node.lineno, "")


def comments(module: types.ModuleType) -> dict[int, str]:
  """First line of a statement -> its comment: what stands behind any of its lines and
  goes on below, or else what stands above. A banner (`# --`) is of no statement."""
  source = inspect.getsource(module)
  behind, alone = {}, {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      whole = not token.line[: token.start[1]].strip()
      (alone if whole else behind)[token.start[0]] = token.string.lstrip("# ")
  banners = {n for n, text in alone.items() if text.startswith("--")}
  found, used = {}, set(banners)
  statements = [
    node
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Assign | ast.AnnAssign)
  ]
  for node in sorted(statements, key=lambda node: node.lineno):
    lines = [n for n in range(node.lineno, node.end_lineno + 1) if n in behind]
    if lines:
      n = node.end_lineno + 1
      while n in alone and n not in banners:
        lines, n = [*lines, n], n + 1
    else:
      n = node.lineno - 1
      while n in alone and n not in used:
        lines, n = [n, *lines], n - 1
    used |= set(lines)
    text = ""
    for n in lines:
      said = (behind | alone)[n]
      text = f"{text}{'; ' if n in behind else ' '}{said}" if text else said
    if text:
      found[node.lineno] = text
  return found


if __name__ == "__main__":
  main(sys.argv[1:])
