"""Stages are run once, continued after a kill, and run again only when asked to."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import rich.console

from r1jax.errors import UserError
from r1jax.pipeline import artefacts, graph
from r1jax.pipeline.graph import Graph, Stage


class Killed(BaseException):
  """Nobody catches it."""


class Pipeline:
  """Stages that write a line for each of their steps, and what was run.

  Each leaves `lines.txt`, its steps after its inputs' lines, and a folder `checkpoint`.
  """

  def __init__(self, workdir: pathlib.Path, stages: dict[str, str], steps: int = 3):
    """stages: name -> its inputs, as words."""
    self.workdir, self.inputs = workdir, dict(stages)
    self.config = {name: {"steps": steps, "sft": {"lr": 1.0}} for name in stages}
    self.ran, self.said, self.kill_at = [], [], None

  def work(self, folder: pathlib.Path, inputs: dict[str, pathlib.Path]) -> dict:
    name, log = folder.name, folder / "log.txt"
    self.ran.append(name)
    assert list(inputs) == self.inputs[name].split()
    assert not (folder / "manifest.json").exists()
    begun = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(begun, self.config[name]["steps"]):
      if self.kill_at == (name, step):
        raise Killed
      with log.open("a") as file:
        file.write(f"{name} {step}\n")
    read = [(path / "lines.txt").read_text() for path in inputs.values()]
    (folder / "lines.txt").write_text("".join([*read, log.read_text()]))
    deep = folder / "checkpoint" / "3"
    deep.mkdir(parents=True, exist_ok=True)
    (deep / "weights").write_text(f"{name} {self.config[name]['sft']['lr']}")
    return {"steps": self.config[name]["steps"] - begun}

  @property
  def graph(self) -> Graph:
    return Graph(
      Stage(name, tuple(ins.split()), self.config[name], self.work, LEFT, f"the {name}")
      for name, ins in self.inputs.items()
    )

  def run(self, **how) -> list[str]:
    """The names of what this call ran."""
    self.ran.clear()
    self.graph.run(self.workdir, say=self.said.append, **how)
    return list(self.ran)

  def states(self) -> str:
    return " ".join(s.state for s in self.graph.status(self.workdir).values())

  def reasons(self, name: str) -> tuple[str, ...]:
    return self.graph.status(self.workdir)[name].reasons

  def manifest(self, name: str) -> dict:
    return json.loads((self.workdir / name / "manifest.json").read_text())


LEFT = ("lines.txt", "checkpoint")
CHAIN = {"a": "", "b": "a", "c": "b"}
DIAMOND = {"a": "", "b": "a", "c": "a", "d": "b c"}


@pytest.fixture
def chain(tmp_path):
  return Pipeline(tmp_path / "run", CHAIN)


@pytest.fixture
def diamond(tmp_path):
  return Pipeline(tmp_path / "run", DIAMOND)


def tree(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file and what is in it."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit(path: pathlib.Path) -> None:
  path.write_text(path.read_text() + "an edit\n")


def stage(name, inputs=(), artefacts=(), config=None, run=lambda folder, inputs: {}):
  return Stage(name, tuple(inputs), config or {}, run, artefacts)


# What a graph is.


def test_the_declared_order_is_kept_where_it_can_be_and_inputs_come_first():
  assert list(Graph(map(stage, "bac")).stages) == ["b", "a", "c"]
  given = [stage("d", "bc"), stage("z"), stage("c", "a"), stage("a"), stage("b", "a")]
  assert list(Graph(given).stages) == ["a", "b", "c", "d", "z"]


def test_a_tall_ladder_of_diamonds_is_walked_once_a_stage():
  names = [f"s{n}" for n in range(60)]
  given = [stage(n, names[max(i - 2, 0) : i]) for i, n in enumerate(names)]
  assert list(Graph(reversed(given)).stages) == names


@pytest.mark.parametrize(
  ("stages", "said"),
  [
    ([stage("a"), stage("a")], "two stages are named 'a'"),
    ([stage("a", ["x"])], "a reads 'x', which is not a stage"),
    ([stage("a", "a")], "a <- a"),
    ([stage("z"), stage("a", "b"), stage("b", "c"), stage("c", "b")], "b <- c <- b"),
    ([stage("old")], "'old'"),
    ([stage("a/b")], "'a/b'"),
    ([stage("..")], r"'\.\.'"),
    ([stage("")], "''"),
    *(
      ([stage("a", artefacts=(path,))], "must lie in its folder")
      for path in ("../b/x", "/etc", ".", "", "manifest.json", "begun.json")
    ),
  ],
)
def test_what_is_no_graph_is_refused(stages, said):
  with pytest.raises(ValueError, match=said):
    Graph(stages)


def test_a_config_that_json_cannot_hold_is_refused():
  with pytest.raises(TypeError):
    Graph([stage("a", config={"path": pathlib.Path()})])


# Runs, and runs again.


def test_a_run_makes_everything_once_and_leaves_a_manifest(diamond):
  assert diamond.states() == "missing missing missing missing"
  assert not diamond.workdir.exists()
  assert diamond.run() == ["a", "b", "c", "d"]
  assert diamond.states() == "done done done done"
  before = tree(diamond.workdir)
  assert diamond.run() == []
  assert tree(diamond.workdir) == before
  assert [line.partition(",")[0] for line in diamond.said[-4:]] == [
    f"{name}: done before" for name in "abcd"
  ]


def test_the_manifest_says_what_was_read_and_left(diamond):
  diamond.run()
  m, folder = diamond.manifest("d"), diamond.workdir / "d"
  assert m["stage"] == "d"
  assert m["config"] == diamond.config["d"]
  assert m["figures"] == {"steps": 3}
  assert 0 <= m["seconds"] < 60
  assert set(m["artefacts"]) == {"lines.txt", "checkpoint/3/weights"}
  for path, entry in m["artefacts"].items():
    content, stat = (folder / path).read_bytes(), (folder / path).stat()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert (entry["size"], entry["mtime_ns"]) == (len(content), stat.st_mtime_ns)
  status = diamond.graph.status(diamond.workdir)
  assert m["inputs"] == {name: status[name].digest for name in "bc"}
  assert status["d"].figures == m["figures"]
  assert json.loads((folder / "begun.json").read_text()) == {
    key: m[key] for key in ("stage", "inputs", "config")
  }


def test_a_stage_gets_whole_paths_even_in_a_relative_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  got = []

  def run(folder, inputs):
    got.extend([folder, *inputs.values()])
    return {}

  Graph([stage("a", run=run), stage("b", "a", run=run)]).run(pathlib.Path("w"))
  assert got == [tmp_path / "w" / name for name in "aba"]


def test_a_broken_promise_is_an_error_and_no_manifest(tmp_path):
  made = Graph([stage("a", artefacts=("x.txt", "y"))])
  with pytest.raises(RuntimeError, match=r"a ended and did not leave .*x\.txt.*y"):
    made.run(tmp_path)
  assert made.status(tmp_path)["a"].state == "partly"


# Kills.


@pytest.mark.parametrize("step", range(3))
def test_a_killed_stage_goes_on_where_it_was(chain, tmp_path, step):
  other = Pipeline(tmp_path / "other", CHAIN)
  other.run()
  chain.kill_at = ("b", step)
  with pytest.raises(Killed):
    chain.run()
  assert chain.states() == "done partly missing"
  assert not (chain.workdir / "b" / "manifest.json").exists()
  chain.kill_at = None
  assert chain.run() == ["b", "c"]
  assert chain.manifest("b")["figures"] == {"steps": 3 - step}
  status = chain.graph.status(chain.workdir)
  assert [s.digest for s in status.values()] == [
    s.digest for s in other.graph.status(other.workdir).values()
  ]
  assert not (chain.workdir / "old").exists()


def test_a_kill_at_any_write_is_made_good_by_the_same_command(tmp_path, monkeypatch):
  """Before and after each thing that is done to files, in a run that makes, moves and
  makes again."""
  count, fatal = itertools.count(), [-1]

  def deadly(function):
    def call(*args, **kwargs):
      if next(count) == fatal[0]:
        raise Killed
      result = function(*args, **kwargs)
      if next(count) == fatal[0]:
        raise Killed
      return result

    return call

  def run(folder: pathlib.Path) -> tuple[list[str], Pipeline]:
    pipeline = Pipeline(folder, CHAIN)
    pipeline.run(only="a")
    pipeline.run(only="b")
    pipeline.config["a"]["sft"]["lr"] = 2.0
    with monkeypatch.context() as patch:
      patch.setattr(graph, "write_json", deadly(graph.write_json))
      for name in ("mkdir", "rename", "replace", "write_text"):
        patch.setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
      try:
        pipeline.run(rerun=True)
      except Killed:
        pipeline.run(rerun=True)
    return sorted(p.name for p in (folder / "old").iterdir()), pipeline

  moved, whole = run(tmp_path / "whole")
  assert moved == ["a-1", "b-1"]
  wanted = whole.graph.status(whole.workdir)
  moments = next(count)
  assert moments > 40
  for moment in range(moments):
    count, fatal[0] = itertools.count(), moment
    moved, pipeline = run(tmp_path / str(moment))
    assert moved == ["a-1", "b-1"], moment
    found = pipeline.graph.status(pipeline.workdir)
    for name in CHAIN:
      assert found[name].state == "done", (moment, name)
      assert found[name].digest == wanted[name].digest, (moment, name)


PROGRAM = """
import os, pathlib, signal, sys
from r1jax.pipeline.graph import Graph, Stage

workdir, kill_at = pathlib.Path(sys.argv[1]), sys.argv[2]

def die(moment):
  if moment == kill_at:
    os.kill(os.getpid(), signal.SIGKILL)

def work(folder, inputs):
  path = folder / "lines.txt"
  for step in range(len(path.read_text().splitlines()) if path.exists() else 0, 3):
    die(f"{folder.name} {step}")
    with path.open("a") as file:
      file.write(f"{folder.name} {step}\\n")
  return {}

def say(line):
  line = line.partition(" in ")[0]
  print(line, flush=True)
  die(line)

stages = [("a", ()), ("b", ("a",)), ("c", ("a", "b"))]
Graph(Stage(n, i, {}, work, ("lines.txt",)) for n, i in stages).run(workdir, say=say)
"""


def test_sigkill_between_stages_and_inside_one(tmp_path):
  root, killed = pathlib.Path(__file__).parents[2], -signal.SIGKILL
  second = ["a: done before,", "b: begins"]
  third = [second[0], "b: goes on where it was stopped", "b: done", "c: begins"]
  for moment, code, said in [
    ("a: done", killed, ["a: begins", "a: done"]),
    ("b 2", killed, second),
    ("never", 0, [*third, "c: done"]),
  ]:
    command = [sys.executable, "-c", PROGRAM, tmp_path / "run", moment]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout.splitlines()) == (code, said), done.stderr
  for name in "abc":
    lines = (tmp_path / "run" / name / "lines.txt").read_text()
    assert lines == "".join(f"{name} {step}\n" for step in range(3))


@pytest.mark.parametrize("left", ["", "{", '{"artefacts": {', "[]", "{}", "\udcff"])
def test_a_manifest_that_is_not_whole_is_none_and_is_said(chain, left):
  chain.run(only="a")
  path = chain.workdir / "a" / "manifest.json"
  path.write_bytes(left.encode(errors="surrogateescape"))
  assert chain.states() == "partly missing missing"
  assert chain.reasons("a") == ("manifest.json is not whole",)
  chain.kill_at = ("b", 0)
  with pytest.raises(Killed):
    chain.run()
  assert "a: manifest.json is not whole; goes on where it was stopped" in chain.said
  assert chain.states() == "done partly missing"


def test_a_kill_leaves_no_manifest_even_where_a_broken_one_was(chain):
  chain.run(only="a")
  (chain.workdir / "a" / "manifest.json").write_text("{")
  (chain.workdir / "a" / "log.txt").unlink()
  chain.kill_at = ("a", 1)
  with pytest.raises(Killed):
    chain.run()
  assert not (chain.workdir / "a" / "manifest.json").exists()


def test_an_empty_folder_is_missing_and_a_foreign_one_is_not_touched(chain):
  folder = chain.workdir / "a"
  folder.mkdir(parents=True)
  assert chain.states() == "missing missing missing"
  (folder / "begun.json.partial").write_text("{")
  assert chain.states() == "missing missing missing"
  (folder / "thesis.txt").write_text("mine")
  assert chain.states() == "stale missing missing"
  with pytest.raises(UserError, match="nothing says with what"):
    chain.run()
  assert chain.run(rerun=True) == ["a", "b", "c"]
  assert (chain.workdir / "old" / "a-1" / "thesis.txt").read_text() == "mine"


# Edits.


def test_an_edit_makes_the_readers_stale_and_not_the_stage(diamond):
  diamond.run()
  edit(diamond.workdir / "b" / "lines.txt")
  assert diamond.states() == "done done done stale"
  assert diamond.reasons("d") == ("input b changed",)


@pytest.mark.parametrize("change", ["edit", "new file", "renamed"])
def test_a_folder_is_read_to_its_depths(chain, change):
  chain.run()
  path = chain.workdir / "b" / "checkpoint" / "3" / "weights"
  if change == "edit":
    edit(path)
  elif change == "new file":
    (path.parent / "more").write_text("")
  else:
    path.rename(path.with_name("other"))
    assert chain.states() == "done stale stale"  # one that it left is gone
    return
  assert chain.states() == "done done stale"


def test_what_is_no_artefact_may_change(chain):
  chain.run()
  edit(chain.workdir / "a" / "log.txt")
  assert chain.states() == "done done done"


def test_a_new_time_with_the_same_content_is_no_change(diamond):
  diamond.run()
  for path in diamond.workdir.rglob("*"):
    os.utime(path, ns=(1, 1))
  assert diamond.states() == "done done done done"


def test_a_file_is_read_again_only_when_its_stat_changed(chain, monkeypatch):
  chain.run()
  read = []

  def sha256(path, *stat):
    read.append(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()

  monkeypatch.setattr(artefacts, "_sha256", sha256)
  chain.graph.status(chain.workdir)
  assert read == []
  touched = chain.workdir / "b" / "checkpoint" / "3" / "weights"
  os.utime(touched, ns=(1, 1))
  assert chain.states() == "done done done"
  assert read == [touched]


def test_a_digest_is_of_paths_and_contents(tmp_path):
  def digest(**files):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    for name, text in files.items():
      path = folder / name.replace("_", "/")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    tops = tuple(dict.fromkeys(name.partition("_")[0] for name in files))
    return artefacts.digest(artefacts.contents(folder, tops, {}))

  assert digest(a="1", b="2") == digest(b="2", a="1")
  different = [dict(a="1"), dict(a="2"), dict(b="1"), dict(a="1", b=""), dict(a_b="1")]
  different += [dict(a="1", b="2"), dict(a="2", b="1"), dict(a="12"), dict(a_b_c="1")]
  assert len({digest(**files) for files in different}) == len(different)


@pytest.mark.parametrize("gone", ["lines.txt", "checkpoint", "checkpoint/3/weights"])
def test_a_missing_artefact_makes_the_stage_itself_stale(chain, gone):
  chain.run()
  path = chain.workdir / "b" / gone
  path.rename(chain.workdir / "elsewhere")
  assert chain.states() == "done stale stale"
  assert chain.reasons("b") == (f"artefact {gone} is missing",)
  assert chain.reasons("c") == (f"input b is stale (b: artefact {gone} is missing)",)
  (chain.workdir / "elsewhere").rename(path)
  assert chain.states() == "done done done"


def test_a_missing_folder_makes_the_readers_stale(chain):
  chain.run()
  (chain.workdir / "a").rename(chain.workdir / "elsewhere")
  assert chain.states() == "missing stale stale"
  assert chain.reasons("b") == ("input a is missing",)
  assert chain.reasons("c") == ("input b is stale (b: input a is missing)",)


def test_an_edit_while_a_reader_runs_makes_that_reader_stale(chain):
  """It may have read the file before the edit."""

  def work(folder, inputs):
    figures = Pipeline.work(chain, folder, inputs)
    if folder.name == "b":
      edit(inputs["a"] / "lines.txt")
    return figures

  chain.work = work
  with pytest.raises(
    UserError, match=r"c reads b, which is stale \(b: input a changed"
  ):
    chain.run()
  assert chain.states() == "done stale missing"


def test_a_stage_is_begun_with_the_inputs_of_that_moment(tmp_path):
  """An edit of an input while something else ran is no reason to run it again."""
  pipeline = Pipeline(tmp_path, {"a": "", "other": "", "c": "a"})

  def work(folder, inputs):
    if folder.name == "other":
      edit(tmp_path / "a" / "lines.txt")
    return Pipeline.work(pipeline, folder, inputs)

  pipeline.work = work
  assert pipeline.run() == ["a", "other", "c"]
  assert "an edit" in (tmp_path / "c" / "lines.txt").read_text()
  assert pipeline.states() == "done done done"


# Configs.


def test_a_config_that_changed_makes_a_stage_stale_and_says_how(chain):
  chain.run()
  chain.config["b"]["sft"] = {"lr": 2.0, "epochs": 3}
  assert chain.states() == "done stale stale"
  assert chain.reasons("b") == (
    "config.sft.epochs: None -> 3",
    "config.sft.lr: 1.0 -> 2.0",
  )
  assert chain.reasons("c") == ("input b is stale (b: config.sft.epochs: None -> 3)",)
  chain.config["b"]["sft"] = {"lr": 1.0}
  assert chain.states() == "done done done"


def test_a_tuple_is_a_list(chain):
  chain.config["a"]["windows"] = ((0, 64), (8, 128))
  chain.run()
  chain.config["a"]["windows"] = [[0, 64], [8, 128]]
  assert chain.states() == "done done done"


def test_a_killed_run_that_was_begun_otherwise_is_stale(chain):
  chain.kill_at = ("b", 2)
  with pytest.raises(Killed):
    chain.run()
  chain.kill_at = None
  chain.config["b"]["steps"] = 4
  assert chain.states() == "done stale missing"
  with pytest.raises(UserError, match=r"b: config\.steps: 3 -> 4"):
    chain.run()
  chain.config["b"]["steps"] = 3
  assert chain.states() == "done partly missing"
  edit(chain.workdir / "a" / "lines.txt")
  assert chain.reasons("b") == ("input a changed",)
  assert chain.run(rerun=True) == ["b", "c"]
  assert (chain.workdir / "old" / "b-1" / "log.txt").read_text() == "b 0\nb 1\n"
  assert chain.manifest("b")["figures"] == {"steps": 3}


@pytest.mark.parametrize("done", [False, True])
def test_a_killed_run_goes_on_if_what_changed_comes_late(tmp_path, done):
  """A hook's file is mended while its stage is stopped; after its end that is stale."""

  def of(code):
    config = {"sft": 1, "code": code}
    return Graph([Stage("a", (), config, work, ("b",), late=("code",))])

  def work(folder, inputs):
    (folder / "b").write_text("")
    if not done:
      raise Killed

  with contextlib.nullcontext() if done else pytest.raises(Killed):
    of("broken").run(tmp_path)
  now = of("mended").status(tmp_path)["a"]
  assert now.state == ("stale" if done else "partly")
  done = True
  if now.state == "partly":
    of("mended").run(tmp_path)
    assert of("mended").status(tmp_path)["a"].state == "done"
  assert of("broken").status(tmp_path)["a"].state == (
    "done" if now.reasons else "stale"
  )


def test_other_inputs_make_a_stage_stale(diamond):
  diamond.run()
  diamond.inputs["d"] = "a b"
  assert diamond.reasons("d") == ("input a is new", "input c is no longer read")


def test_the_first_cause_is_named_at_the_end_of_a_long_chain(tmp_path):
  names = "abcdef"
  chain = Pipeline(tmp_path, {n: names[max(i - 1, 0) : i] for i, n in enumerate(names)})
  chain.run()
  chain.config["b"]["sft"]["lr"] = 3
  assert chain.states() == "done" + " stale" * 5
  assert chain.reasons("f") == ("input e is stale (b: config.sft.lr: 1.0 -> 3)",)


# What is done about it.


def test_stale_stages_stop_a_run_before_anything_and_all_are_named(tmp_path):
  pipeline = Pipeline(tmp_path, {"m": "", **DIAMOND, "e": "d"})
  for name in "abcd":
    pipeline.run(only=name)
  pipeline.config["b"]["sft"]["lr"] = 2.0
  before = tree(tmp_path)
  with pytest.raises(UserError) as error:
    pipeline.run()
  assert pipeline.ran == [] and tree(tmp_path) == before
  said = str(error.value).splitlines()
  assert said[1:-1] == [
    "  b: config.sft.lr: 1.0 -> 2.0",
    "  d: input b is stale (b: config.sft.lr: 1.0 -> 2.0)",
  ]
  assert "--rerun" in said[-1] and str(tmp_path / "old") in said[-1]


def test_rerun_moves_the_old_folder_and_runs_what_is_stale_alone(diamond):
  diamond.run()
  for n in (1, 2, 3):
    diamond.config["b"]["sft"]["lr"] += 1
    edit(diamond.workdir / "d" / "lines.txt")
    edit(diamond.workdir / "b" / "checkpoint" / "3" / "weights")
    before = {name: tree(diamond.workdir / name) for name in "bd"}
    assert diamond.run(rerun=True) == ["b", "d"]
    assert diamond.states() == "done done done done"
    for name in "bd":
      assert tree(diamond.workdir / "old" / f"{name}-{n}") == before[name]
  assert len(list((diamond.workdir / "old").iterdir())) == 6


def test_the_same_outcome_makes_no_reader_stale(chain):
  chain.run()
  chain.config["a"]["note"] = "changes nothing"
  assert chain.states() == "stale stale stale"
  assert chain.run(rerun=True) == ["a"]
  assert chain.states() == "done done done"


def test_rerun_without_anything_stale_runs_nothing_again(chain):
  chain.run()
  assert chain.run(rerun=True) == []
  assert not (chain.workdir / "old").exists()


def test_rerun_goes_on_with_what_was_stopped(chain):
  chain.run()
  chain.config["a"]["sft"]["lr"], chain.kill_at = 2.0, ("b", 1)
  with pytest.raises(Killed):
    chain.run(rerun=True)
  assert chain.states() == "done partly stale"
  assert chain.reasons("c") == ("input b is not finished",)
  chain.kill_at = None
  # b does not read what changed in a, so it comes out as it was, and c stays.
  assert chain.run(rerun=True) == ["b"]
  assert chain.manifest("b")["figures"] == {"steps": 2}
  assert chain.states() == "done done done"
  assert len(list((chain.workdir / "old").iterdir())) == 2


# One stage.


def test_a_stage_alone_needs_its_inputs_and_says_how_to_make_them(diamond):
  for names, said in [
    ("", r"d reads b, which is missing\. Run it first: --stage=b,"),
    ("ab", r"d reads c, which is missing\. Run it first: --stage=c,"),
  ]:
    for name in names:
      diamond.run(only=name)
    before = tree(diamond.workdir)
    with pytest.raises(UserError, match=said):
      diamond.run(only="d")
    assert diamond.ran == [] and tree(diamond.workdir) == before
  diamond.kill_at = ("c", 1)
  with pytest.raises(Killed):
    diamond.run(only="c")
  with pytest.raises(UserError, match="reads c, which is not finished"):
    diamond.run(only="d", rerun=True)
  diamond.kill_at = None
  assert diamond.run(only="c") == ["c"]
  assert diamond.run(only="d") == ["d"]


def test_a_stage_alone_refuses_a_stale_input_with_the_reason(chain):
  chain.run()
  chain.config["a"]["steps"] = 5
  for rerun in (False, True):
    with pytest.raises(UserError) as error:
      chain.run(only="c", rerun=rerun)
    assert "b, which is stale (a: config.steps: 3 -> 5)" in str(error.value)
    assert "--stage=b --rerun" in str(error.value)
  assert chain.ran == []
  assert chain.run(only="a", rerun=True) == ["a"]
  assert chain.states() == "done stale stale"


def test_a_stage_alone_leaves_other_stale_ones_alone(diamond):
  diamond.run()
  diamond.config["b"]["sft"]["lr"] = diamond.config["c"]["sft"]["lr"] = 2.0
  with pytest.raises(UserError) as error:
    diamond.run(only="c")
  assert "  c: config" in str(error.value) and "  b: config" not in str(error.value)
  assert diamond.run(only="c", rerun=True) == ["c"]
  assert diamond.states() == "done stale done stale"


def test_a_stage_that_is_done_is_run_again_only_when_asked(chain):
  chain.run()
  assert chain.run(only="b") == []
  assert chain.said[-1].startswith("b: done before")
  assert chain.run(only="b", rerun=True) == ["b"]
  assert chain.run(only="b", rerun=True) == ["b"]
  assert [p.name for p in sorted((chain.workdir / "old").iterdir())] == ["b-1", "b-2"]
  assert chain.states() == "done done done"


def test_an_unknown_stage_is_answered_with_all_names(diamond):
  with pytest.raises(UserError, match="'rejektion' is not one of a, b, c, d"):
    diamond.run(only="rejektion")
  with pytest.raises(UserError, match="'' is not one of"):
    diamond.run(only="")
  assert not diamond.workdir.exists()


# What is shown.


def test_the_table_shows_states_seconds_and_reasons(chain):
  chain.config["b"]["note"] = ["[bold]"]
  chain.run(only="a")
  chain.run(only="b")
  chain.config["b"]["note"] = ["[/red]"]
  console = rich.console.Console(width=120, file=io.StringIO())
  console.print(chain.graph.table(chain.workdir))
  said = console.file.getvalue().splitlines()
  rows = [line for line in said if line.startswith("│")]
  seconds = f"{chain.manifest('a')['seconds']:.1f}"
  assert [[cell.strip() for cell in row.strip("│").split("│")] for row in rows] == [
    ["a", "done", seconds, "the a"],
    ["b", "stale", seconds, "config.note: ['[bold]'] -> ['[/red]']"],
    ["c", "missing", "", "the c"],
  ]


def test_a_status_is_a_value(chain):
  chain.run()
  one, two = (chain.graph.status(chain.workdir) for _ in range(2))
  assert one == two
  with pytest.raises(dataclasses.FrozenInstanceError):
    one["a"].state = "stale"
