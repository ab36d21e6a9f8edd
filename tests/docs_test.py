"""The documents are true of the code: commands, keys, links, references and lists.

What runs their commands and snippets is docs_run_test.py.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import math
import pathlib
import re
import runpy
import sys
import warnings

from absl import flags
import documents
from documents import PAGES, ROOT
from ml_collections import ConfigDict
import pytest
import yaml

from experiments import command as commands
from experiments import reference
from experiments.configs import ppo, r1, r1_zero
import r1jax
from r1jax import config_checks, grpo, plan, settings

pages = pytest.mark.parametrize("page", PAGES, ids=documents.name_of)
# What a reader puts there: a word in capitals, or dots.
THEIRS = re.compile(r"\b[A-Z]{3,}\b(?!_)|\.\.\.|…")


def test_the_readme_leads_to_every_page():
  text = documents.text_of(ROOT / "README.md")
  for page in PAGES[1:]:
    assert f"({documents.name_of(page)})" in text, page


def test_the_readmes_figures_are_the_means_of_the_results():
  results = documents.text_of(ROOT / "docs" / "results.md")
  readme = documents.text_of(ROOT / "README.md")
  (mean,) = re.findall(r"^\| mean \| (.+ → \S+) \|$", results, re.MULTILINE)
  figures = r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
  rows = re.findall(figures, readme, re.MULTILINE)
  assert " | ".join(map(" → ".join, rows)) == mean


# -- commands --------------------------------------------------------------------------


class Taken(BaseException):
  """A command's own parser has taken its words."""

  def __init__(self, found, parser=None):
    self.found, self.parser = found, parser


def take(module: str, arguments: list[str]) -> Taken:
  """Starts a module as `python -m` does, as far as its parser.

  Raises:
    SystemExit, UserError: as the command would end.
  """
  known, parse_args = set(flags.FLAGS), argparse.ArgumentParser.parse_args
  was_parsed = flags.FLAGS.is_parsed()

  def parse(self, args=None, namespace=None):
    raise Taken(parse_args(self, args, namespace), self)

  def run(main, config_file):
    raise Taken(commands.parse(sys.argv, config_file)[0])

  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it has been imported before
    patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    patch.setattr(commands, "run", run)
    patch.setattr(sys, "argv", [module, *arguments])
    try:
      runpy.run_module(module, run_name="__main__")
    except Taken as taken:
      return taken
    finally:
      flags.FLAGS.unparse_flags()
      for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
      if was_parsed:
        flags.FLAGS.mark_as_parsed()
  return Taken(None)


def unknown_flags(module: str, arguments: list[str]) -> list[str]:
  """Flags that a module does not have, whatever their values are."""
  names = [a.partition("=")[0] for a in arguments if re.match(r"--[a-z]", a)]
  keys = [n for n in names if n.startswith("--config.") and not THEIRS.search(n)]
  names = [n for n in names if not re.match(r"--(config\b|workdir$|help$)", n)]
  missing = [n for n in names if n.removeprefix("--") not in flags_of(module)]
  return missing + [k for k in keys if not is_key(k.removeprefix("--config."))]


@functools.cache
def flags_of(module: str) -> str:
  """The help and the source of a module and, of bench, of its parts."""
  path = ROOT / (module.replace(".", "/") + ".py")
  parts = [path, *(path.parent / "benches").glob("*.py")]
  source = "\n".join(p.read_text() for p in parts if "bench" in module or p == path)
  return " ".join(re.findall(r"[\"'](?:--)?([a-z][\w-]*)[\"']", source)).split()


def is_key(key: str) -> bool:
  """Whether some config has it, or a section of that name."""
  for config in configs():
    with contextlib.suppress(KeyError, AttributeError, TypeError):
      settings.config_get(config, key.rstrip("."))
      return True
  return False


@functools.cache
def configs() -> list[ConfigDict]:
  return [*(m.get_config("tiny") for m in (r1_zero, r1, ppo)), r1.get_config("paper")]


def checked(config: ConfigDict, c: documents.Command) -> None:
  """What the experiment itself checks before it compiles, on the devices that the
  command names, or on as many as its mesh wants."""
  if config.model.folder and not pathlib.Path(config.model.folder).exists():
    config = config.copy_and_resolve_references()
    config.model.folder, config.data.template, config.data.examples = "", "short", 0
    config.pretrain.steps = config.pretrain.steps or 1
  config = plan.of_preset(config)
  wanted = math.prod(n for n in config.mesh.values() if n != -1)
  said = re.findall(r"--topology=cpu:(\d+)", c.text)  # the last is taken
  count = int(([dict(c.env).get("JAX_NUM_CPU_DEVICES", wanted), *said])[-1])
  if c.module == "experiments.plan":
    config = config.copy_and_resolve_references()
    config.pretrain.steps = 0
  config_checks.check(config, count)


def fault(c: documents.Command) -> str:
  """What is wrong with a command, or ""."""
  words, module = c.words, c.module
  if words[0] in ("echo", "printf", "cd") or words[:2] == ("git", "clone"):
    return ""
  if words[:2] == ("apt", "install"):
    return "" if words[2:] == ("bubblewrap",) else "another package of the system"
  if words[:2] == ("pip", "install"):
    return fault_of_pip(words[2:])
  if words[:2] == ("python", "-c"):
    compile(words[2], str(c), "exec")
    return ""
  if module == "pytest":
    return fault_of_pytest(c.arguments)
  path = ROOT / (module.replace(".", "/") + ".py")
  if not module or not path.exists():
    return f"no module {module!r}"
  if missing := unknown_flags(module, c.arguments):
    return f"no flag {missing[0]}"
  only_said = [f for f in c.flags if "=" not in f] and len(c.flags) == 1
  parses = re.search(r"parse_args\(|command\.run\(", path.read_text())
  if any(THEIRS.search(a) for a in c.arguments) or only_said or not parses:
    return ""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      found = take(module, c.arguments).found
      if isinstance(found, ConfigDict):
        checked(found, c)
  except SystemExit as end:
    return said.getvalue().strip()[-300:] if end.code else ""
  except commands.UserError as error:
    return str(error)
  return ""


def fault_of_pip(words: tuple[str, ...]) -> str:
  for word in words:
    package = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
    if package and package[1]:
      for extra in package[1].split(","):
        if extra not in extras():
          return f"no extra {extra!r}"
    elif not package and word != "-e" and word not in str(extras().values()):
      return f"{word!r} is in no extra"
  return ""


@functools.cache
def extras() -> dict[str, list[str]]:
  tree = ast.parse((ROOT / "setup.py").read_text())
  (found,) = (
    keyword.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    for keyword in node.keywords
    if keyword.arg == "extras_require"
  )
  pairs = zip(found.keys, found.values, strict=True)
  return {
    key.value: [x.value for x in ast.walk(value) if isinstance(x, ast.Constant)]
    for key, value in pairs
  }


def fault_of_pytest(arguments: list[str]) -> str:
  known = documents.text_of(ROOT / "pytest.ini")
  for flag, word in zip(["", *arguments], [*arguments, ""], strict=True):
    if flag == "-m" and f"\n  {word}:" not in known:
      return f"no marker {word!r}"
    if word.startswith("tests") and not (ROOT / word).exists():
      return f"no file {word!r}"
  return ""


@pytest.fixture
def scene(tmp_path, monkeypatch):
  """A folder with what a reader has there: the repository, and files of the pages."""
  for path in ROOT.iterdir():
    if path.name not in ("runs", "models", ".git"):
      (tmp_path / path.name).symlink_to(path)
  for page in PAGES:
    for _, source in documents.snippets(page):
      if name := documents.file_of(source):
        (tmp_path / name).write_text(source)
  monkeypatch.chdir(tmp_path)


@pages
def test_every_command_is_understood(page, scene):
  """By its own parser; a config passes the experiment's own checks."""
  name, wrong = documents.name_of(page), []
  for c in documents.commands():
    if c.page.startswith(f"{name}:"):
      found = [fault(reading) for reading in c.readings]
      if all(found):
        wrong.append(f"{c}: {found[0]}")
  assert not wrong, "\n".join(wrong)


def test_what_is_wrong_is_seen(scene):
  """The checks above, of commands that are wrong."""
  for line in (
    "python -m experiments.r1_zer",
    "python -m experiments.r1_zero --config.grpo.g=1",
    *("python -m experiments.r1_zero --config.steps=many", "pip install -e '.[tpus]'"),
    *("python -m experiments.r1_zero --config.steps=3", "python -m pytest -m fast"),
    *("python -m experiments.bench rolout", "python -m experiments.score"),
    *("python -m experiments.report runs/x --opn", "python -m pytest tests/no_test.py"),
    "python -m experiments.r1_zero --config=experiments/configs/r1_zero.py:tinier",
    "python -m experiments.r1 --config.cold_start.keeep=1",
    "python -m experiments.distill --form=x",
  ):
    (c,) = documents.split(line, "here")
    assert fault(c), line
  for line in ("python -m experiments.r1 --status", "python -m experiments.r1_zero"):
    (c,) = documents.split(line, "here")
    assert not fault(c), line


def test_what_no_test_runs_is_among_the_commands():
  said = [reading.text for c in documents.commands() for reading in c.readings]
  for beginning, why in documents.unrunnable().items():
    assert why and any(text.startswith(beginning) for text in said), beginning


# -- keys, references, links -----------------------------------------------------------


@pages
def test_keys_in_the_text_are_keys(page):
  """`grpo.slots`, `config.model.folder=FOLDER`: of a config; or of a module or file."""
  sections = {name for config in configs() for name in config}
  wrong = []
  for _, span in documents.spans(documents.text_of(page)):
    found = re.fullmatch(r"(config\.)?([a-z]\w*(?:\.\w+)+)(?:[ =].*)?", span)
    if not found or found[2].partition(".")[0] not in sections:
      continue
    first, _, rest = found[2].partition(".")
    if is_key(found[2]) or THEIRS.search(found[2]) or (ROOT / found[2]).exists():
      continue
    if rest in ("html", "json", "md", "png", "py", "jsonl"):
      continue
    path = ROOT / "r1jax" / f"{first}.py"
    if not path.exists() or rest not in names_of(path):
      wrong.append(span)
  assert not wrong


@functools.cache
def names_of(path: pathlib.Path) -> set[str]:
  """What a file defines at its top, and in its classes as Class.name."""
  found = set()

  def add(body, prefix=""):
    for node in body:
      targets = node.targets if isinstance(node, ast.Assign) else []
      if isinstance(node, ast.AnnAssign):
        targets = [node.target]
      found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        found.add(prefix + node.name)
      if isinstance(node, ast.ClassDef):
        add(node.body, f"{node.name}.")

  add(ast.parse(path.read_text()).body)
  return found


@pages
def test_references_to_the_code_exist(page):
  """`FILE.py:name` and `FILE.py::name`, and files alone, from the root or r1jax/."""
  text, wrong = documents.text_of(page), []
  places = [page.parent, *(ROOT / p for p in ("", "r1jax", "kernels"))]
  places += [ROOT / "r1jax" / p for p in ("rewards", "data", "models")]
  written = {documents.file_of(s) for p in PAGES for _, s in documents.snippets(p)}
  for _, span in documents.spans(text):
    found = re.fullmatch(r"([\w/]+\.py)(?:::?([A-Za-z_][\w.]*))?", span)
    if not found or THEIRS.search(span) or found[1] in written:
      continue
    path = next((p / found[1] for p in places if (p / found[1]).exists()), None)
    preset = path and path.parent.name == "configs" and found[2]
    known = () if path is None else names_of(path)
    if preset:  # PATH:preset
      known = path.read_text().split('"')
    if path is None or (found[2] and found[2] not in known):
      wrong.append(span)
  assert not wrong


@pages
def test_links_and_anchors_lead_somewhere(page):
  text, wrong = documents.prose(documents.text_of(page)), []
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"https?://", target):
      continue
    place, _, anchor = target.partition("#")
    path = (page.parent / place).resolve() if place else page
    path = path / "README.md" if path.is_dir() else path
    known = (
      path.exists()
      and path.suffix == ".md"
      and documents.anchors(documents.text_of(path))
    )
    if not path.exists() or (anchor and anchor not in known):
      wrong.append(target)
  assert not wrong


@pages
def test_snippets_are_python_and_import_what_there_is(page):
  imported = {}
  for place, source in documents.snippets(page):
    for node in ast.walk(ast.parse(source, place)):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module)
        for alias in node.names:
          whole = f"{node.module}.{alias.name}"
          there = hasattr(module, alias.name) or importlib.util.find_spec(whole)
          assert there, f"{place}: {whole}"
          imported[alias.name] = getattr(module, alias.name, None)
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        of = imported.get(node.value.id)
        if inspect.ismodule(of):
          assert hasattr(of, node.attr), f"{place}: {ast.unparse(node)}"


# -- pages that are lists --------------------------------------------------------------


def test_the_walk_through_has_every_equation_once():
  text = documents.text_of(ROOT / "docs" / "walk_through.md")
  body = text.partition("## The equations")[2].partition("\n## ")[0]
  rows = re.findall(
    r"^\| \[(.+?)\]\(#(.+?)\) \| `(.+?)` \| `(tests/.+?)` \|$", body, re.M
  )
  parts = re.split(r"^### (.+)$", body, flags=re.MULTILINE)[1:]
  sections = dict(zip(parts[::2], parts[1::2], strict=True))
  assert len(rows) == len(sections)
  for (said, anchor, place, _), title in zip(rows, sections, strict=True):
    assert title.startswith(said) and anchor in documents.anchors(f"# {title}"), said
    assert sections[title].count("$$") == 2, title
    _, formula, _ = sections[title].split("$$")
    assert formula.count("{") == formula.count("}") and "\n\n" not in formula, title
    assert not re.search(r"\\[^a-zA-Z]", formula), title  # Markdown's escapes
    assert place in sections[title] or place in body.partition("### ")[0], place
  numbers = [row[0] for row in rows if row[0].startswith("Eq. ")]
  assert numbers == [f"Eq. {n}" for n in range(1, 11)]  # the paper's of the main text


def test_the_walk_through_follows_the_step():
  """Its numbered pieces call each other in that order, in whole_step and in update."""
  text = documents.text_of(ROOT / "docs" / "walk_through.md")
  steps = text.partition("## What happens in a step")[2].partition("**Figures.**")[0]
  named = re.findall(r"`r1jax/[\w/]+\.py:(\w+)`", steps)

  def calls(node):
    """In the order in which they are made: arguments come first."""
    for child in ast.iter_child_nodes(node):
      yield from calls(child)
    if isinstance(node, ast.Call):
      yield ast.unparse(node.func).rpartition(".")[2]

  for function in (grpo.whole_step, grpo.experience, grpo.update):
    found = calls(ast.parse(inspect.getsource(function)))
    called = list(dict.fromkeys(name for name in found if name in named))
    assert len(called) >= 3, function
    assert called == sorted(called, key=named.index), function


def test_the_contents_of_how_to_are_its_sections():
  text = documents.text_of(ROOT / "docs" / "how_to.md")
  head, *_ = text.partition("\n## ")
  sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
  assert re.findall(r"\[([^]]+)\]\(#", head) == sections and len(sections) >= 12
  for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
    title = part.partition("\n")[0]
    assert "Place:" in part or "| flags |" in part, title
    assert re.search(r"[Ll]ook at|goes on|gets no more rows", part), title


def test_the_reference_of_configs_is_what_the_command_makes():
  """To renew it: python -m experiments.reference --write"""
  assert documents.text_of(reference.PAGE) == reference.page()


def test_every_key_says_what_it_is():
  whole = reference.page()
  for part in whole.split("\n### ")[1:]:
    if ".py:" not in part.partition("\n")[0]:
      assert not re.findall(r"^\| `.*\|  \|$", part, re.MULTILINE), part[:40]


def test_comments_are_read_off_the_lines_that_they_belong_to():
  notes = reference.read(r1_zero, "tiny")
  assert notes["data.source"].startswith("or gsm8k, math500")
  assert notes["data.source"].endswith("made by that library")  # the next line's
  assert notes["model.kv_heads"] == notes["model.width"] == "None keeps the preset's"
  assert notes["objective.kl_coef"] == "beta"
  assert notes["reward.maths"].startswith('or "exact"')  # within brackets
  assert reference.read(r1, "tiny")["sft_3.warmup_steps"] == "not stated"
  assert reference.read(r1_zero, "paper")["mesh.expert"].startswith("2,048 chips")


def test_an_objectives_row_says_what_stands_beside_it_and_nothing_else():
  """Read off the source by a pattern of its own: each comment there is of one line."""
  source = documents.text_of(ROOT / "r1jax" / "objective.py")
  said = re.findall(r"^  (\w+): \w+ = [^#\n]+  # (.+)$", source, re.MULTILINE)
  page = documents.text_of(reference.PAGE)
  assert len(said) > 20
  for key, note in said:
    note = note.replace("<", "&lt;")
    assert f"| `objective.{key}` | `None` | {note} |" in page, key


def test_the_map_has_every_file():
  text = documents.text_of(ROOT / "docs" / "rooms.md")
  words = {re.split("/", s.strip("/"))[-1] for _, s in documents.spans(text)}
  words = {word.removesuffix(".py") for word in words}
  for path in [*(ROOT / "r1jax").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
    name = path.parent.name if path.name == "__init__.py" else path.stem
    known = words | {"r1jax", "inside", "kernels"}
    assert name in known, f"{path} is not in docs/rooms.md"


def test_the_citation_is_of_this_version_and_names_nobody():
  said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert said["cff-version"] == "1.2.0" and said["version"] == r1jax.__version__
  assert said["authors"] == [{"name": "The r1jax authors"}]
  assert f'REPOSITORY = "{said["repository-code"]}"' in (ROOT / "setup.py").read_text()
  readme = documents.text_of(ROOT / "README.md")
  assert f"git clone {said['repository-code']} && cd r1jax" in readme
  assert said["license"] == "Apache-2.0" and said["title"] and said["message"]
  (paper,) = said["references"]
  assert "arXiv:2501.12948" in str(paper["identifiers"])
