"""Your own rewards: a function from text to number, named on the command line.

  def short(completion, problem):
    return float(len(completion) < 200)

`FILE.py:short` names it, `FILE.py:short=0.5` with a weight.
"""

from collections.abc import Callable
import hashlib
import importlib.util
import math
import numbers
import pathlib
import re
import sys

from r1jax.data.problem import Problem
from r1jax.errors import UserError

Rule = Callable[[str, Problem], float]
# Names that stand for something else in the figures of a step or a sample.
RESERVED = re.compile(
  r"accuracy|format|language|total|detail|entropy|overlong|loss|samples|step|phase|waves"
  r"|(?:reward|outcome|length|trunc|kl|clip|advantage|groups|equal|ratio|sampler|value"
  r"|balance|mtp|experts|load|grad|reflection|dropped|surplus)\w*"
)


def load_rules(spec: str) -> dict[str, tuple[float, Rule]]:
  """Reads `FILE.py:function=weight`, several of them between commas.

  Returns:
    name -> (weight, function, as it stands in the file; the scorer checks it).

  Raises:
    UserError: what cannot be read, and why.
  """
  rules = {}
  for entry in filter(None, (e.strip() for e in spec.split(","))):
    place, weighted, weight = entry.partition("=")
    path, colon, name = place.rpartition(":")
    try:
      value = float(weight) if weighted else 1.0
    except ValueError:
      value = math.nan
    if not colon or not name.isidentifier() or not math.isfinite(value):
      raise UserError(
        f"{entry!r} does not name a rule; it is FILE.py:function or"
        " FILE.py:function=weight."
      )
    if name in rules:
      raise UserError(f"two rules are called {name!r}; rename one of them.")
    rules[name] = value, _load(pathlib.Path(path), name)
  return rules


def rule_files(spec: str) -> list[str]:
  """The files that a spec names."""
  entries = (e.partition("=")[0].strip() for e in spec.split(","))
  return [e.rpartition(":")[0] for e in entries if ":" in e]


def file_digests(*specs: str) -> dict[str, str]:
  """{"sha256 of FILE": ...} of the files that specs, FILE or FILE.py:function, name:
  what a run or a stage has to share with one that it continues."""
  files = [file for spec in specs for file in (spec, *rule_files(spec))]
  return {
    f"sha256 of {file}": hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
    for file in files
    if pathlib.Path(file).is_file()
  }


def _load(path: pathlib.Path, name: str) -> Callable:
  if not path.is_file():
    raise UserError(f"{path}: there is no such file of rules.")
  module_spec = importlib.util.spec_from_file_location(f"rules_{path.stem}", path)
  if module_spec is None:
    raise UserError(f"{path} is not a Python file.")
  module = importlib.util.module_from_spec(module_spec)
  sys.modules[module_spec.name] = module  # dataclasses look there
  try:
    module_spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise UserError(f"{path} does not load: {type(error).__name__}: {error}") from error
  function = getattr(module, name, None)
  if not callable(function):
    raise UserError(f"{path} has no function {name!r}.")
  return function


def checked(function: Callable, name: str) -> Rule:
  """The rule, refusing what is not a finite number.

  Its errors are UserErrors that say what the rule did and to which completion.

  Raises:
    UserError: the name is one of RESERVED.
  """
  if RESERVED.fullmatch(name):
    raise UserError(
      f"a rule must not be called {name!r}: that stands for something else in the"
      " figures. Rename the function."
    )

  def rule(completion: str, problem: Problem) -> float:
    shown = f"on the completion {completion[:60]!r}"
    try:
      said = function(completion, problem)
    except UserError:
      raise
    except (Exception, SystemExit) as error:
      raise UserError(
        f"the rule {name!r} raised {type(error).__name__}: {error}, {shown}. A rule"
        " returns a number for any text."
      ) from error
    try:
      number = float(said) if isinstance(said, numbers.Real) else math.nan
    except OverflowError:
      number = math.inf
    if not math.isfinite(number):
      raise UserError(
        f"the rule {name!r} returned {said!r:.60} {shown}. It must return one finite"
        " number."
      )
    return number

  return rule
