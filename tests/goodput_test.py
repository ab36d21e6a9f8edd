"""Goodput by hand: runs that were stopped, and what a file of events may hold."""

import json

import pytest

from experiments import goodput as command
from r1jax import events
from r1jax.goodput import Goodput
from r1jax.progress import Clock


def event(time, seconds, name, step=None):
  found = {"time": time, "seconds": seconds, "name": name}
  return found if step is None else {**found, "step": step}


def write(folder, rows):
  folder.mkdir(exist_ok=True)
  (folder / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return folder


WHOLE = [
  event(100, 10, "init"),
  event(110, 20, "compile"),
  event(130, 30, "pretrain", 1),
  event(160, 5, "save", 1),
  event(165, 10, "step", 2),
  event(175, 10, "step", 4),
  event(185, 5, "evaluate", 4),
]
# Saved at update 2 of RL; killed in update 6.
STOPPED = [
  event(0, 5, "init"),
  event(5, 10, "step", 2),
  event(15, 1, "save", 2),
  event(16, 10, "step", 4),
]
RESUMED = [
  *STOPPED,
  event(26, 44, "restart"),
  event(70, 5, "init"),
  event(75, 1, "restore", 2),
  event(76, 12, "step", 4),
  event(88, 12, "step", 6),
]


def test_an_undisturbed_run():
  run = Goodput.of(WHOLE)
  assert (run.wall, run.kept, run.again, run.restarts) == (90, 50, 0, 0)
  assert run.goodput == pytest.approx(50 / 90)
  assert run.seconds["step"] == 20 and run.unnamed == 0


def test_a_restart_loses_the_gap_and_the_steps_done_again():
  run = Goodput.of(RESUMED)
  assert (run.wall, run.restarts, run.seconds["restart"]) == (100, 1, 44)
  assert (run.kept, run.again, run.steps_again) == (10 + 12 + 12, 10, 1)
  assert run.unnamed == 0


def test_work_is_lost_when_the_next_process_began_before_it():
  """Also where that one was killed too, before it came as far."""
  rows = [event(t, 1, "step", t) for t in (2, 4, 6, 8)]
  rows += [event(9, 1, "restart"), event(10, 1, "step", 4)]
  rows += [event(11, 1, "restart"), event(12, 1, "step", 4), event(13, 1, "step", 6)]
  run = Goodput.of(rows)
  assert (run.kept, run.again, run.restarts) == (1 + 2, 3 + 1, 2)
  assert run.steps_again == 3  # 4, 6 and 8


def test_a_process_that_has_not_worked_yet_loses_nothing():
  assert Goodput.of([*STOPPED, event(26, 4, "restart")]).kept == 20


def test_trainings_count_their_own_steps():
  rows = [event(0, 5, "pretrain", 6), event(5, 5, "step", 2), event(10, 1, "restart")]
  run = Goodput.of([*rows, event(11, 5, "step", 4)])
  assert (run.kept, run.again) == (15, 0)


def test_the_parts_of_a_step_in_segments_are_lost_together():
  rows = [
    event(t, 1, name, 2) for t, name in enumerate(("rollout", "reward", "update"))
  ]
  run = Goodput.of([*rows, event(3, 1, "restart"), event(4, 1, "rollout", 2)])
  assert (run.kept, run.again, run.steps_again) == (1, 3, 1)


def test_a_total_adds_walls_and_works():
  both = Goodput.total([Goodput.of(WHOLE), Goodput.of(RESUMED)])
  assert (both.wall, both.kept, both.restarts) == (190, 84, 1)
  assert both.seconds["init"] == 20


def test_half_lines_and_strange_ones_are_passed_over(tmp_path):
  path = write(tmp_path / "run", WHOLE) / "events.jsonl"
  with path.open("a") as file:
    file.write('7\nnull\n{"name": "step"}\n{"time": NaN, "seconds": 1, "name": "a"}\n')
    file.write('{"time": 200, "seco')
  assert events.read(path) == WHOLE
  assert events.resume(path) == WHOLE
  events.append(path, event(190, 3, "restart"))  # not behind the half line
  assert events.read(path)[-1]["name"] == "restart"


def test_a_clock_writes_own_seconds_and_a_restart(tmp_path):
  path = tmp_path / "events.jsonl"
  clock = Clock()
  with clock.phase("prepare"):
    pass
  clock.record(path)
  with clock.phase("rl", event="update", step=2), clock.phase("rollout"):
    pass
  Clock().record(path)
  found = events.read(path)
  names = ["init", "rollout", "update", "restart", "init"]
  assert [e["name"] for e in found] == names
  assert [e.get("step") for e in found] == [None, 2, 2, None, None]
  assert clock.seconds["rl"] + clock.seconds["rollout"] <= clock.elapsed
  run = Goodput.of(found)
  assert run.restarts == 1 and run.unnamed < 0.1


def test_the_command_reads_runs_and_folders_of_runs(tmp_path, capsys):
  write(tmp_path / "a", WHOLE)
  write(tmp_path / "b", RESUMED)
  command.main([str(tmp_path / "a"), "--json"])
  told = json.loads(capsys.readouterr().out)
  assert list(told) == [str(tmp_path / "a")]
  assert told[str(tmp_path / "a")]["goodput"] == pytest.approx(50 / 90)
  command.main([str(tmp_path), "--json"])
  told = json.loads(capsys.readouterr().out)
  assert told["all"]["wall_seconds"] == 190
  assert told[str(tmp_path / "b")]["between_processes_seconds"] == 44
  command.main([str(tmp_path / "b")])
  shown = capsys.readouterr().out
  assert "34.0%" in shown and "between processes" in shown


@pytest.mark.parametrize("make", [None, lambda f: f.mkdir(), lambda f: write(f, [])])
def test_a_folder_without_events_is_a_mistake_in_one_line(tmp_path, capsys, make):
  if make:
    make(tmp_path / "run")
  with pytest.raises(SystemExit) as stopped:
    command.main([str(tmp_path / "run")])
  said = capsys.readouterr()
  assert stopped.value.code == 2 and not said.out
  assert said.err.startswith("error: ") and len(said.err.strip().splitlines()) == 1
  assert str(tmp_path / "run") in said.err
