"""events.jsonl: one JSON object a line for every phase of a run that has ended.

  {"time": 1767225600.5, "seconds": 3.25, "name": "step", "step": 8}

`time`: unix seconds at its beginning. `seconds`: without those of phases inside it,
which have lines of their own. `step`: the update that it led up to, where there is one.

`name` is one of: init (a process's first line to its run's first phase), compile, data
(a batch on its way to the devices), corpus (pages in the making), restore, save,
evaluate, profile; rollout, reward and update (the rest of a step, where it runs in
segments), or step (all of it, where it is one program); pretrain, sft and the other
trainings by their own names; restart (from the last line of an earlier process to the
first one of the next: what it was at when it was killed, and the time until then).
"""

import json
import math
import pathlib


def append(path: pathlib.Path, event: dict) -> None:
  """One more line; it is in the file when this returns."""
  with path.open("a") as file:
    file.write(json.dumps(event) + "\n")


def read(path: pathlib.Path) -> list[dict]:
  """Every whole line, in their order; half of one, which a killed writer left, and what
  is no event is passed over. [] without a file."""
  if not path.exists():
    return []
  found = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      event = json.loads(line)
    except ValueError:
      continue
    if is_event(event):
      found.append(event)
  return found


def is_event(value: object) -> bool:
  """Whether it has a name, a time and seconds, and its step is a number or none."""
  if not isinstance(value, dict) or not isinstance(value.get("name"), str):
    return False
  numbers = [value.get("time"), value.get("seconds"), value.get("step", 0)]
  return all(type(n) in (int, float) and math.isfinite(n) for n in numbers)


def end_of(events: list[dict]) -> float:
  """Unix seconds when the last of them ended. Args: one or more."""
  return max(event["time"] + event["seconds"] for event in events)


def whole_lines(path: pathlib.Path) -> None:
  """What is appended next begins a line of its own, also after half of one."""
  if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
    with path.open("a") as file:
      file.write("\n")


def resume(path: pathlib.Path) -> list[dict]:
  """The events so far; what is appended next begins a line of its own."""
  whole_lines(path)
  return read(path)
