"""What the host's rewards have said since the last checkpoints.

A rollout that is drawn again after a kill is the same, and so must be its rewards: a
program that missed its deadline once may keep it the next time. Every verdict is
written down before the update that uses it, and read instead of asking again:

  rewards/STEP-PROCESS.jsonl   what process PROCESS scored after the checkpoint of STEP
"""

from collections import defaultdict, deque
from collections.abc import Sequence
import hashlib
import json
import pathlib
import threading

from r1jax.data.problem import Problem
from r1jax.rewards.total import Breakdown

KEPT = 4  # files: as many as there are checkpoints to go back to, and one


class Journal:
  """The verdicts of one process. Threads may ask at once."""

  def __init__(self, folder: pathlib.Path, process: int = 0):
    """Args: folder: rewards/ of the workdir; process: this one's number."""
    self.folder, self.process = folder, process
    self._said: dict[str, deque[Breakdown]] = defaultdict(deque)
    self._lock = threading.Lock()
    self._path: pathlib.Path | None = None  # of what is written down; None: nothing is

  def resume(self, step: int) -> None:
    """Reads what was said after the checkpoint of `step`, from which the run goes on;
    half a line, which a killed writer left, is passed over."""
    for number, path in self._files():
      if number >= step:
        for line in path.read_text(errors="replace").splitlines():
          try:
            row = json.loads(line)
            said = Breakdown(row["total"], row["parts"], row["outcome"], row["detail"])
            self._said[row["key"]].append(said)
          except (ValueError, KeyError, TypeError):
            continue
    self.begin(step)

  def begin(self, step: int) -> None:
    """What is said from now on follows the checkpoint of `step`."""
    self.folder.mkdir(exist_ok=True)
    files = [path for number, path in self._files() if number != step]
    for path in files[: 1 - KEPT]:
      path.unlink(missing_ok=True)
    with self._lock:
      self._path = self.folder / f"{step}-{self.process}.jsonl"
      with self._path.open("a") as file:
        if file.tell():
          file.write("\n")  # after half a line

  def recall(self, text: str, problem: Problem) -> Breakdown | None:
    """What was said of a completion, once for each time that it was scored."""
    with self._lock:
      said = self._said.get(_key(text, problem))
      return said.popleft() if said else None

  def keep(
    self, samples: Sequence[tuple[str, Problem]], said: Sequence[Breakdown]
  ) -> None:
    """Writes down what has been said of completions."""
    if self._path is None:
      return
    lines = [
      json.dumps(
        {
          "key": _key(text, problem),
          "total": one.total,
          "parts": dict(one.parts),
          "outcome": one.outcome,
          "detail": one.detail,
        }
      )
      for (text, problem), one in zip(samples, said, strict=True)
    ]
    with self._lock, self._path.open("a") as file:
      file.writelines(line + "\n" for line in lines)

  def _files(self) -> list[tuple[int, pathlib.Path]]:
    """(step, file) of this process, from the oldest on."""
    found = []
    for path in self.folder.glob(f"*-{self.process}.jsonl"):
      step = path.name.partition("-")[0]
      if step.isdigit():
        found.append((int(step), path))
    return sorted(found)


def _key(text: str, problem: Problem) -> str:
  """Of a completion and what was asked."""
  asked = f"{problem.kind}\0{problem.problem}\0{text}"
  return hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()[:32]
