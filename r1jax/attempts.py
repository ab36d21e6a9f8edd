"""A brake: a run that is started again and again and gets nowhere is stopped.

attempts.jsonl in the workdir has a line for every start, with what had been reached by
then, and one for every end that could still be written.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import time

import jax

from r1jax.errors import NumericalError, UserError
from r1jax.events import whole_lines
from r1jax.metrics import MetricsFile

NAME = "attempts.jsonl"
PLACE = "checkpoints"
MOST = 3  # attempts without a new checkpoint


@contextlib.contextmanager
def counted(workdir: pathlib.Path) -> Iterator[None]:
  """Counts what is done in it as an attempt. A user's mistake and Ctrl-C are none.

  Raises:
    NumericalError: three attempts have ended, or been killed, without a new checkpoint.
  """
  path = workdir / NAME
  if jax.process_index() > 0:
    yield
    return
  now = reached(workdir)
  failed = vain(MetricsFile.rows_of(path), now)
  if len(failed) >= MOST:
    told = [f"  {row['end'] or 'killed'}" for row in failed[-MOST:]]
    raise NumericalError(
      f"{MOST} attempts have ended without a new checkpoint in {workdir}; they stand at"
      f" {now or 'nothing'}. Remove {path} to try again.\n" + "\n".join(told)
    )
  whole_lines(path)
  with path.open("a") as file:
    file.write(json.dumps({"began": time.time(), "reached": now}) + "\n")
  end = "done"
  try:
    yield
  except (UserError, KeyboardInterrupt):
    end = "stopped"
    raise
  except BaseException as error:
    end = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise
  finally:
    with contextlib.suppress(OSError), path.open("a") as file:  # of a full disk
      file.write(json.dumps({"end": end}) + "\n")


def reached(workdir: pathlib.Path) -> dict[str, int]:
  """{"rl": its newest checkpoint}; of a pipeline {"zero/rl": its newest checkpoint,
  "rejection": the lines that the stage has left}."""
  found: dict[str, int] = {}
  for path in (*workdir.glob("checkpoints/*/*"), *workdir.glob("*/checkpoints/*/*")):
    if path.name.isdigit():
      stage = "/".join(p for p in path.relative_to(workdir).parts[:-1] if p != PLACE)
      found[stage] = max(found.get(stage, 0), int(path.name))
  for path in workdir.glob("*/*.jsonl"):
    if path.name not in ("events.jsonl", "metrics.jsonl"):  # those have checkpoints
      stage = path.parent.name
      found[stage] = found.get(stage, 0) + path.read_bytes().count(b"\n")
  return found


def vain(rows: list[dict], now: dict[str, int]) -> list[dict]:
  """The last attempts that began where the run still stands, with how each ended ("":
  nobody could say)."""
  attempts: list[dict] = []
  for row in rows:
    if "began" in row:
      attempts.append({"reached": row["reached"], "end": ""})
    elif attempts:
      attempts[-1]["end"] = row.get("end", "")
  found: list[dict] = []
  for attempt in reversed(attempts):
    if attempt["reached"] != now:
      break
    if attempt["end"] not in ("stopped", "done"):
      found.append(attempt)
  return found[::-1]
