"""The host loop: a whole small run, killed and resumed, and what a workdir refuses."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from r1jax import events, trained
from r1jax.goodput import Goodput
from tests import forked

pytestmark = pytest.mark.xdist_group("loop")  # they share runs

SMALL = [
  "--config.model.width=32",
  "--config.model.heads=2",
  "--config.model.layers=1",
  "--config.model.dense_layers=0",
  "--config.pretrain.steps=9",
  "--config.pretrain.rows=8",
  "--config.pretrain.micro_batches=2",
  "--config.prompts=4",
  "--config.grpo.group_size=4",
  "--config.grpo.micro_batches=2",
  "--config.grpo.reference_refresh=4",
  "--config.eval.problems=8",
  "--config.eval.samples=4",
  "--config.eval.every=6",
  "--config.checkpoint_every=4",
  "--config.steps=12",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def command(workdir: pathlib.Path, cache: pathlib.Path, *more: str) -> list[str]:
  base = [sys.executable, "-m", "experiments.r1_zero", f"--workdir={workdir}"]
  return [*base, f"--config.compilation_cache={cache}", *SMALL, *more]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
  _, _, *line = command(*args, **kwargs)
  return forked.run(*line, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
  """A run that nothing disturbed: (workdir, what it printed)."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  done = run(workdir, cache, "--config.profile_steps=(3,4)")
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def said(workdir: pathlib.Path) -> str:
  metrics = workdir / "metrics.jsonl"
  return metrics.read_text() if metrics.exists() else ""


def until(true, process: subprocess.Popen) -> None:
  """Waits for it, as long as the process lives and no longer than four minutes."""
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None and not true():
    time.sleep(0.02)


def rows(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(r) for r in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_summary_curves_and_groups(finished):
  workdir, printed = finished
  summary = json.loads((workdir / "summary.json").read_text())
  figures = {"pass_at_1", "cons_at_4", "pass_at_4", "mean_length", "reflection_rate"}
  for column in ("base", "half_way", "final"):
    assert figures | {"format_rate"} <= set(summary[column])
  assert (summary["base"]["step"], summary["final"]["step"]) == (0, 12)
  for name, found in summary["intervals"].items():
    base, final = summary["base"][name], summary["final"][name]
    for column, value in (("base", base), ("final", final), ("change", final - base)):
      low, high = found[column]
      assert low - 1e-9 <= value <= high + 1e-9, (name, column)
  assert summary["compilations"] == {
    "next_token_step": 1,
    "evaluate": 1,
    "whole_step": 1,
  }
  assert {"compile", "pretrain", "rl", "evaluate", "total"} <= set(summary["seconds"])
  assert summary["seed"] == 0 and len(summary["config_sha256"]) == 64
  assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
  report = (workdir / "report.html").read_text()
  assert len(report) < 5_000_000 and "Content-Security-Policy" in report
  assert "Before RL" in printed and "After RL" in printed and "pass@1" in printed


def test_metrics_have_a_row_a_rollout(finished):
  steps = [r["step"] for r in rows(finished[0]) if r["phase"] == "rl"]
  assert steps == [2, 4, 6, 8, 10, 12]


def test_every_phase_leaves_an_event(finished):
  found = events.read(finished[0] / "events.jsonl")
  steps = [e["step"] for e in found if e["name"] == "step"]
  assert steps == [2, 4, 6, 8, 10, 12]
  trained = [e["step"] for e in found if e["name"] == "pretrain"]
  assert trained == list(range(1, 10))
  expected = {"init", "compile", "corpus", "pretrain", "save", "evaluate", "data"}
  run = Goodput.of(found)
  assert set(run.seconds) == expected | {"step", "profile"}
  assert run.restarts == 0 and 0 < run.goodput < 1
  assert run.unnamed < 0.2 * run.wall


def test_a_profile_has_the_names_of_the_code(finished):
  workdir, printed = finished
  assert "profile of updates 3 to 4" in printed
  assert f"xprof --logdir={workdir / 'profile'}" in printed.replace("\n", "")
  (profile,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
  assert profile.with_name("perfetto_trace.json.gz").exists()
  traced = profile.read_bytes()
  for name in (
    *("rollout/prefill/", "rollout/decode/", "sampling/", "slots/", "reward/"),
    *("experience/reference/", "experience/advantages/", "update/optimizer/"),
    *("update/while/", "/jvp(logprobs)/", "/transpose(jvp(logprobs))/", "(loss)/"),
    *("/mla/attention/", "/ffn/moe/"),
  ):
    assert name.encode() in traced, name


def test_a_run_begins_from_what_another_has_learned(finished, cache, tmp_path):
  begun = f"--config.init_from={finished[0]}"
  done = run(tmp_path / "next", cache, begun, "--config.steps=2", "--config.seed=1")
  assert done.returncode == 0, done.stderr
  assert {row["phase"] for row in rows(tmp_path / "next")} == {"eval", "rl"}
  before, after = trained.load(finished[0]), trained.load(tmp_path / "next", base=True)
  both = jax.tree.leaves(before[-2:]), jax.tree.leaves(after[-2:])
  for x, y in zip(*both, strict=True):
    assert np.array_equal(x, y)
  assert before.tokenizer.model == after.tokenizer.model


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--config.init_from=nowhere"], ["nowhere", "config.json"]),
    (["--config.init_from={run}", "--config.model.width=64"], ["params/", "64"]),
  ],
)
def test_a_beginning_that_cannot_be_is_refused(finished, cache, tmp_path, flags, words):
  done = run(tmp_path / "next", cache, *(f.format(run=finished[0]) for f in flags))
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def small_disk(tmp_path):
  """A folder with a file system of 24 MB to itself."""
  place = tmp_path / "disk"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("needs the right to mount a file system")
  yield place
  subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [200_000, 0])  # bytes: for figures, or for nothing
def test_a_full_disk_stops_it_and_costs_nothing(finished, cache, small_disk, left):
  workdir, filler = small_disk / "run", small_disk / "filler"
  first = workdir / "checkpoints" / "rl" / "4"
  pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
  with subprocess.Popen(command(workdir, cache), **pipes) as process:
    until(first.is_dir, process)
    with contextlib.suppress(OSError):  # what the run wrote meanwhile: full as well
      filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    _, err = process.communicate(timeout=240)
  assert process.returncode == 42 and "Traceback" not in err, err
  assert "Make room" in err and "same command" in err
  assert trained.load(workdir).params
  filler.unlink()
  again = run(workdir, cache)
  assert again.returncode == 0, again.stderr
  mine, other = (trained.load(path)[-2:] for path in (workdir, finished[0]))
  both = jax.tree.leaves(mine), jax.tree.leaves(other)
  assert all(np.array_equal(x, y) for x, y in zip(*both, strict=True))


@pytest.mark.slow
def test_segments_give_the_run_the_same_figures(finished, cache, tmp_path):
  done = run(tmp_path / "segments", cache, "--config.segment_tokens=16")
  assert done.returncode == 0, done.stderr
  found = events.read(tmp_path / "segments" / "events.jsonl")
  for name in ("rollout", "reward", "update"):
    steps = [e["step"] for e in found if e["name"] == name]
    assert steps == [2, 4, 6, 8, 10, 12], name
  for ours, theirs in zip(rows(tmp_path / "segments"), rows(finished[0]), strict=True):
    assert ours.pop("phase") == theirs.pop("phase")
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_the_run_the_same_figures(finished, cache, tmp_path):
  """Eight CPU devices as (fsdp, expert, tensor); the first rollout, before rounding has
  had updates to grow in."""
  arguments = [
    "--config.pretrain.micro_batches=1",
    "--config.grpo.micro_batches=1",
    "--config.pretrain.steps=3",
    "--config.steps=2",
    "--config.eval.every=2",
    "--config.checkpoint_every=2",
  ]
  runs = {}
  three = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "expert", "tensor")]
  for devices, mesh in ((8, three), (1, [])):
    folder = tmp_path / str(devices)
    done = subprocess.run(
      command(folder, cache, *arguments, *mesh),
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )
    assert done.returncode == 0, done.stderr
    runs[devices] = [r for r in rows(folder) if r["phase"] in ("pretrain", "rl")]
  for ours, theirs in zip(runs[8], runs[1], strict=True):
    assert ours.pop("phase") == theirs.pop("phase")
    assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4)


def test_starting_a_finished_run_again_shows_its_result(finished, cache):
  workdir, _ = finished
  before = (workdir / "summary.json").read_bytes()
  again = run(workdir, cache)
  assert again.returncode == 0
  assert "This run has ended" in again.stdout and "pass@1" in again.stdout
  assert (workdir / "summary.json").read_bytes() == before


def test_a_finished_run_sends_its_figures_to_a_new_sink(finished, cache, tmp_path):
  workdir = pathlib.Path(shutil.copytree(finished[0], tmp_path / "sent"))
  again = run(workdir, cache, "--config.sinks=('tensorboard',)")
  assert again.returncode == 0, again.stderr
  text = again.stdout.replace("\n", " ")
  assert f"tensorboard gets {len(rows(workdir))} earlier rows" in text
  assert list(workdir.glob("tensorboard/rl/*tfevents*"))


def test_a_workdir_of_another_config_is_refused_and_kept(finished, cache):
  workdir, _ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  other = run(workdir, cache, "--config.objective.clip_high=0.2")
  assert other.returncode == 2
  assert "objective.clip_high: None -> 0.2" in other.stderr
  assert len(other.stderr.strip().splitlines()) == 1
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_run_that_has_ended_can_be_extended_and_keeps_what_it_was(
  finished, cache, tmp_path
):
  """On another mesh, too."""
  workdir = pathlib.Path(shutil.copytree(finished[0], tmp_path / "longer"))
  more = ["--config.steps=14", "--config.checkpoint_every=2", "--config.mesh.fsdp=2"]
  done = subprocess.run(
    command(workdir, cache, *more, "--config.mesh.data=1"),
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
  )
  assert done.returncode == 0, done.stderr
  text = done.stdout.replace("\n", " ")
  assert "checkpoint_every: 4 -> 2; mesh.fsdp: -1 -> 2; steps: 12 -> 14" in text
  assert "continuing from update 12" in text
  assert json.loads((workdir / "summary.json").read_text())["final"]["step"] == 14
  before = [r for r in rows(finished[0]) if r["phase"] == "rl"]
  assert [r for r in rows(workdir) if r["phase"] == "rl"][:-1] == before
  again = run(workdir, cache, "--config.steps=14", "--config.checkpoint_every=2")
  assert "This run has ended" in again.stdout


@pytest.mark.parametrize(
  "number, code",
  [(signal.SIGTERM, 42), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
  ids=["TERM", "INT"],
)
def test_a_run_that_is_asked_to_stop_saves_its_last_step(
  number, code, finished, cache, tmp_path
):
  """In the middle of RL, where no checkpoint is due; it ends where it would have."""
  workdir = tmp_path / "stopped"
  long = command(workdir, cache, "--config.checkpoint_every=1000")
  with subprocess.Popen(
    long, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    until(lambda: '"phase": "rl", "step": 4' in said(workdir), process)
    process.send_signal(number)
    process.communicate(timeout=120)
  assert process.returncode == code
  (saved,) = (workdir / "checkpoints" / "rl").iterdir()
  assert 4 <= int(saved.name) < 12
  if number == signal.SIGINT:
    return  # the same from here on
  again = run(workdir, cache)
  assert again.returncode == 0, again.stderr
  text = again.stdout.replace("\n", " ")
  assert f"continuing from update {saved.name}" in text
  assert rows(workdir) == rows(finished[0])


@pytest.mark.slow  # tests/chaos.py kills one at random, by default
def test_a_killed_run_ends_where_it_would_have_ended(finished, cache, tmp_path):
  """SIGKILL in the middle of RL; the same command again gives the same metrics."""
  workdir = tmp_path / "killed"
  process = subprocess.Popen(
    command(workdir, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  saved = workdir / "checkpoints" / "rl" / "4"
  until(lambda: '"step": 6' in said(workdir) and saved.exists(), process)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not (workdir / "summary.json").exists(), "the run ended before it was killed"
  again = run(workdir, cache)
  assert again.returncode == 0, again.stderr
  assert "continuing from update 4" in again.stdout.replace("\n", " ")
  assert rows(workdir) == rows(finished[0])
  time_of = Goodput.of(events.read(workdir / "events.jsonl"))
  assert time_of.restarts == 1 and time_of.seconds["restart"] > 0
  assert "restore" in time_of.seconds and time_of.steps_again <= 1  # update 6
