"""Where the time of a run went, over all of its processes: sums over its events.

  goodput = seconds of work that was kept / seconds from the first event to the last

Work is rollouts, rewards, updates and training. What a restarted process did again was
not kept the first time.
"""

from collections.abc import Iterable
import dataclasses
from typing import Self

# What a run does beside its work; every other phase is work (events.py has the names).
OVERHEAD = ("init", "compile", "data", "corpus", "restore", "save", "evaluate")
OVERHEAD += ("profile", "restart")
RL = ("rollout", "reward", "update", "step")  # of one count of updates


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Sums over a run, in seconds."""

  wall: float  # from its first event to the end of its last
  kept: float  # work that was kept
  again: float  # work that was lost: a later process began before it
  steps_again: int  # and its steps
  restarts: int
  seconds: dict[str, float]  # by name, all events; `restart`: between two processes

  @property
  def goodput(self) -> float:
    """Kept work's share of the wall time; 0 where no time has passed."""
    return self.kept / self.wall if self.wall else 0.0

  @property
  def unnamed(self) -> float:
    """Seconds that no event stands for."""
    return max(self.wall - sum(self.seconds.values()), 0.0)

  @classmethod
  def of(cls, events: list[dict]) -> Self:
    """Of a run's events in the order of their file (events.read); one or more."""
    processes = by_process(events)
    begun = [first_steps(process) for process in processes]
    kept, again, lost = 0.0, 0.0, set()
    for i, process in enumerate(processes):
      for event in filter(is_work, process):
        place = kind(event), event.get("step")
        later = [first[place[0]] for first in begun[i + 1 :] if place[0] in first]
        if later and place[1] is not None and place[1] >= min(later):
          again += event["seconds"]
          lost.add(place)
        else:
          kept += event["seconds"]
    seconds: dict[str, float] = {}
    for event in events:
      name = event["name"]
      seconds[name] = seconds.get(name, 0.0) + event["seconds"]
    ends = max(event["time"] + event["seconds"] for event in events)
    wall = ends - min(event["time"] for event in events)
    return cls(wall, kept, again, len(lost), len(processes) - 1, seconds)

  @classmethod
  def total(cls, runs: Iterable[Self]) -> Self:
    """Of several runs, each with its own wall time."""
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run.seconds)
    seconds = {name: sum(run.seconds.get(name, 0.0) for run in runs) for name in names}
    sums = {
      field.name: sum(getattr(run, field.name) for run in runs)
      for field in dataclasses.fields(cls)
      if field.name != "seconds"
    }
    return cls(**sums, seconds=seconds)

  def as_dict(self) -> dict:
    """For JSON."""
    return {
      "goodput": self.goodput,
      "wall_seconds": self.wall,
      "kept_seconds": self.kept,
      "again_seconds": self.again,
      "steps_again": self.steps_again,
      "restarts": self.restarts,
      "between_processes_seconds": self.seconds.get("restart", 0.0),
      "unnamed_seconds": self.unnamed,
      "seconds": self.seconds,
    }


def is_work(event: dict) -> bool:
  return event["name"] not in OVERHEAD


def kind(event: dict) -> str:
  """What counts the event's steps."""
  return "rl" if event["name"] in RL else event["name"]


def by_process(events: list[dict]) -> list[list[dict]]:
  """The events of each process: `restart` is the first of the next one."""
  found: list[list[dict]] = [[]]
  for event in events:
    if event["name"] == "restart" and found != [[]]:
      found.append([])
    found[-1].append(event)
  return found


def first_steps(process: list[dict]) -> dict[str, int]:
  """{kind of work: the least step that a process worked on}."""
  found: dict[str, int] = {}
  for event in filter(is_work, process):
    if "step" in event:
      found[kind(event)] = min(event["step"], found.get(kind(event), event["step"]))
  return found
