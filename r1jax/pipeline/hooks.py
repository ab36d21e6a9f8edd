"""Functions of the user's that a config names: a rewriter, a judge."""

from collections import Counter
from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import pathlib
import reprlib
from typing import Any

from r1jax.errors import UserError
from r1jax.metrics import MetricsFile
from r1jax.rewards.rules import file_digests, load_rules


@dataclasses.dataclass(frozen=True)
class Form:
  """What a function has to return."""

  about: str  # in words
  holds: Callable[[Any], bool]


def load(
  spec: str,
  ours: Mapping[str, Any],
  key: str,
  form: Form,
  memory: pathlib.Path | None = None,
) -> Any:
  """The function that a spec names: one of ours, or FILE.py:function.

  Args:
    spec: the config's value.
    ours: name -> function.
    key: of the config, for the error.
    form: of what a user's function returns.
    memory: where that is kept, beside a digest of the file: it may be a model that
      takes hours, and a stage that was killed asks it nothing twice.

  Raises:
    UserError: it names none, or more than one.
  """
  if spec in ours:
    return ours[spec]
  if ":" not in spec:
    raise UserError(
      f"config.{key}={spec!r} is neither one of {', '.join(map(repr, ours))} nor"
      " FILE.py:function."
    )
  found = load_rules(spec)
  if len(found) != 1 or "=" in spec:
    raise UserError(f"config.{key}={spec!r} must name one function, without a weight.")
  function = checked(next(iter(found.values()))[1], f"config.{key}={spec}", form)
  if memory is None:
    return function
  digest = next(iter(file_digests(spec).values()))[:8]
  return remembered(function, memory.with_stem(f"{memory.stem}-{digest}"))


def checked(function: Callable, spec: str, form: Form) -> Callable:
  """The function, whose errors and odd answers say where they come from."""
  mend = "Mend it and give the same command again; what was sampled is kept."

  def call(*args: Any) -> Any:
    try:
      said = function(*args)
    except (Exception, SystemExit) as error:
      raise UserError(
        f"{spec} failed with {type(error).__name__}: {error}. {mend}"
      ) from error
    if not form.holds(said):
      raise UserError(
        f"{spec} returned {reprlib.repr(said)} for {reprlib.repr(args[0])}; it must"
        f" return {form.about}. {mend}"
      )
    return said

  return call


def remembered(function: Callable, path: pathlib.Path) -> Callable:
  """The function, whose n-th answer to a question is kept in a JSONL file and not asked
  again."""
  file, asked = MetricsFile(path), Counter()
  file.roll_back({})  # drops the half line of a kill
  known = {row["step"]: row["said"] for row in file.rows()}

  def call(*args: Any) -> Any:
    question = hashlib.sha256(repr(args).encode()).hexdigest()
    asked[question] += 1
    name = f"{question}-{asked[question]}"
    if name not in known:
      known[name] = function(*args)
      file.write({"phase": "said", "step": name, "said": known[name]})
    return known[name]

  return call
