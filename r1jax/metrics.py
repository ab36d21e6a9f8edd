"""metrics.jsonl: one JSON object a line, appended; and how a run reads it back."""

from collections.abc import Iterable
import json
import math
import pathlib

from r1jax.sinks import Sinks


class MetricsFile:
  """Rows of {"phase", "step", ...}, in the order they happened.

  Of several processes one writes the file. The others keep the same rows in memory: a
  file on its way over a network must not decide what they do next.
  """

  def __init__(
    self, path: pathlib.Path, *, writes: bool = True, sinks: Sinks | None = None
  ):
    """Args: writes: whether this process does; the others have to open the file before
    it changes. sinks: get every row that this process writes, and those before that
    they have not got."""
    self.path, self.sinks = path, sinks or Sinks()
    self._memory = None if writes else self.rows_of(path)
    if sinks and writes:
      sinks.catch_up(self.rows_of(path))

  def write(self, row: dict) -> None:
    clean = {
      k: (None if isinstance(v, float) and not math.isfinite(v) else v)
      for k, v in row.items()
    }
    if self._memory is not None:
      self._memory.append(clean)
      return
    with self.path.open("a") as file:
      file.write(json.dumps(clean) + "\n")
    self.sinks.write(clean)

  def rows(self) -> list[dict]:
    """Every whole line; a half line that a killed run left is passed over."""
    return self.rows_of(self.path) if self._memory is None else list(self._memory)

  @staticmethod
  def rows_of(path: pathlib.Path) -> list[dict]:
    if not path.exists():
      return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
      try:
        found.append(json.loads(line))
      except json.JSONDecodeError:
        continue
    return found

  def phase(self, name: str) -> list[dict]:
    return [row for row in self.rows() if row["phase"] == name]

  def roll_back(self, last_steps: dict[str, int]) -> None:
    """Drops rows that a resumed run will write again.

    Args:
      last_steps: phase -> the last step that counts; a phase not named keeps all.
    """
    kept = [
      r for r in self.rows() if r["step"] <= last_steps.get(r["phase"], r["step"])
    ]
    if self._memory is not None:
      self._memory = kept
      return
    _replace(self.path, (json.dumps(r) for r in kept))
    self.sinks.roll_back(last_steps)


def write_json(path: pathlib.Path, value: dict) -> None:
  _replace(path, [json.dumps(value, indent=2)])


def write_lines(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """Writes a whole file of rows anew."""
  _replace(path, map(json.dumps, rows))


def _replace(path: pathlib.Path, lines: Iterable[str]) -> None:
  """All or nothing: a kill leaves the old file."""
  partial = path.with_suffix(path.suffix + ".partial")
  partial.write_text("".join(line + "\n" for line in lines))
  partial.replace(path)
