"""The notebooks: kept without outputs, defining nothing, with configs that runs take;
and executed, each as one script, at sizes that take seconds."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from experiments import arms, by_hand, compare, curves
from experiments.claim_table import Arms
from r1jax.errors import UserError
from r1jax.pipeline.wiring import graph

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("badges", ROOT / "colab" / "badges.py")
badges = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(badges)

NAMES = (
  *("clip_ratio", "distill_vs_rl", "group_size", "grpo_from_scratch"),
  *("kl_and_reference", "language_consistency", "length_and_normalisation"),
  *("ppo_vs_grpo", "reward_hacking"),
)
SOON = ("grpo_from_scratch", "language_consistency")  # executed by default


def path_of(name: str) -> pathlib.Path:
  return ROOT / "colab" / f"{name}.ipynb"


def read(name: str) -> dict:
  return json.loads(path_of(name).read_text(encoding="utf-8"))


def sources(name: str, kind: str) -> list[str]:
  cells = read(name)["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


# -- the files -------------------------------------------------------------------------


def test_there_are_nine():
  assert tuple(sorted(p.stem for p in (ROOT / "colab").glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_as_the_command_leaves_it(name):
  text = path_of(name).read_text(encoding="utf-8")
  assert badges.text_of(name, json.loads(text)) == text, "python -m colab.badges"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_of_nbformat_4_5_and_has_no_outputs(name):
  found = read(name)
  assert set(found) == {"cells", "metadata", "nbformat", "nbformat_minor"}
  assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in found["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in found["cells"]:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"])
    keys = {"cell_type", "id", "metadata", "source"}
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
      keys |= {"outputs", "execution_count"}
    assert set(cell) == keys and cell["metadata"] == {}
    assert all(isinstance(line, str) for line in cell["source"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_its_badge_and_ends_with_a_plot_and_a_question(name):
  texts, kinds = (
    sources(name, "markdown"),
    [c["cell_type"] for c in read(name)["cells"]],
  )
  assert texts[0].startswith("# ") and badges.badge(name) in texts[0]
  assert badges.REPOSITORY.removeprefix("https://github.com/") in badges.badge(name)
  assert f"git+{badges.REPOSITORY}" in sources(name, "code")[0]
  assert "2501.12948" in texts[0]
  assert kinds[-2:] == ["code", "markdown"]
  last = ast.parse(sources(name, "code")[-1]).body[-1]
  assert isinstance(last, ast.Expr)  # a picture: its value is shown
  assert "question" in texts[-1] and "?" in texts[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing_and_calls_the_library(name):
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
  rooms = set()
  for code in sources(name, "code"):
    for node in ast.walk(ast.parse(code)):
      assert not isinstance(node, kinds), ast.unparse(node)
      if isinstance(node, ast.Import):
        rooms |= {alias.name.partition(".")[0] for alias in node.names}
      if isinstance(node, ast.ImportFrom):
        rooms.add(node.module.partition(".")[0])
  assert "experiments" in rooms
  others = rooms - sys.stdlib_module_names - {"experiments", "r1jax", "jax", "numpy"}
  assert not others


class Begun(Exception):
  pass


@pytest.fixture
def alone(monkeypatch, tmp_path):
  """A folder of one's own, and one device, as notebooks have."""
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: first)
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_its_full_sizes_are_configs_that_runs_take(name, monkeypatch, alone):
  def begin(*args, **kwargs):
    raise Begun

  monkeypatch.delenv("R1JAX_SMALL", raising=False)
  monkeypatch.setattr(arms, "run", begin)  # all arms are checked before
  monkeypatch.setattr(by_hand, "_begin", begin)
  with pytest.raises(Begun):
    exec("\n".join(sources(name, "code")), {"__name__": name})


# -- the command -----------------------------------------------------------------------


def test_the_command_strips_and_is_done_after_one_call(tmp_path, monkeypatch, capsys):
  def code(**more):
    cell = {"cell_type": "code", "metadata": {"id": "x"}, "source": ["1 + 1\n", "2"]}
    output = {"output_type": "stream", "name": "stdout", "text": ["2"]}
    return {**cell, "execution_count": 7, "outputs": [output], **more}

  title = {"cell_type": "markdown", "metadata": {}, "id": "title"}
  title["source"] = ["# Mine\n", "\n", "[![Open in Colab](old)](older)\n", "\n", "Why."]
  cells = [title, code(), code(id="a"), code(id="a"), code(id="not allowed!")]
  odd = {"cells": cells, "metadata": {"colab": {}}, "nbformat": 4, "nbformat_minor": 0}
  path = tmp_path / "mine.ipynb"
  path.write_text(json.dumps(odd))
  monkeypatch.setattr(badges, "HERE", tmp_path)
  with pytest.raises(SystemExit, match="1"):
    badges.main(["--check"])
  badges.main([])
  found = json.loads(path.read_text())
  assert capsys.readouterr().out.splitlines() == [
    "differ: mine.ipynb",
    "rewritten: mine.ipynb",
  ]
  assert "".join(found["cells"][0]["source"]) == (
    f"# Mine\n\n{badges.badge('mine')}\n\nWhy."
  )
  assert "".join(found["cells"][1]["source"]) == badges.INSTALL
  assert [c["outputs"] for c in found["cells"][1:]] == [[]] * 4
  ids = [cell["id"] for cell in found["cells"]]
  assert ids[0] == "title" and ids[2] == "a" and len(set(ids)) == 5
  badges.main(["--check"])
  assert capsys.readouterr().out == "differ: none\n"


def test_a_notebook_without_a_title_is_refused():
  cells = [
    {"cell_type": "markdown", "source": "no title"},
    {"cell_type": "code", "source": ""},
  ]
  with pytest.raises(ValueError, match="no title"):
    badges.kept("mine", {"cells": cells})
  with pytest.raises(ValueError, match="not a title and a code cell"):
    badges.kept("mine", {"cells": cells[:1]})


# -- what notebooks call ---------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
  """Two runs that have ended, as their files would be."""
  names = {"a": "x/a-1", "b": "x/b-2"}
  for i, name in enumerate(names.values()):
    folder = arms.folder_of(tmp_path, name, 0)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"final": {"pass_at_1": 0.9}}))
    rows = [{"phase": "eval", "step": s, "pass_at_1": s / 10} for s in (0, 4, 8)]
    rows += [{"phase": "rl", "step": s, "reward": s + i, "kl": None} for s in range(8)]
    rows += [{"phase": "rl", "step": 8, "kl": 0.5}] if i else []
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
  return compare.Runs("x", names, Arms(tmp_path, 0))


def test_a_table_has_beginnings_and_ends(two):
  lines = curves.table(two, ["pass_at_1", "reward", "kl"]).splitlines()
  assert lines[0].split() == ["pass_at_1", "reward", "kl"]
  assert lines[1].split() == [*"a 0 -> 0.8 0.5 -> 6.5".split(), "none"]
  assert lines[2].split() == "b 0 -> 0.8 1.5 -> 7.5 0.5 -> 0.5".split()
  with pytest.raises(UserError, match=r"'klx'; one of kl, pass_at_1"):
    curves.table(two, ["klx"])


def test_pictures_are_pngs(two, tmp_path, monkeypatch):
  monkeypatch.setattr(compare, "ROOT", tmp_path)
  for made in (
    curves.plot(two, ["pass_at_1", "reward", "kl"]),
    curves.bars("x", {"pass@1": {"a": 0.5, "b": 1.0}}),
  ):
    assert made._repr_png_()[:4] == b"\x89PNG" and made.path.parent == tmp_path / "x"


def test_another_config_is_another_run(monkeypatch):
  one, two = compare.arm({}), compare.arm({"grpo.group_size": 8})
  names = {
    compare.named("x", "G", made, seed) for made in (one, two) for seed in (0, 1)
  }
  assert len(names) == 4
  monkeypatch.setenv("R1JAX_SMALL", "1")
  assert compare.arm({"steps": 20}).config(0).steps == 20
  assert compare.arm({}, sizes={"steps": 20}).config(0).steps == 8


@pytest.mark.parametrize(
  "changes, module, words",
  [
    ({"grpo.grup_size": 8}, "r1_zero", r"config\.grpo\.grup_size"),
    ({"grpo.group_size": 1}, "r1_zero", "group_size=1.*at least 2"),
    ({"objective.lam": 2.0}, "ppo", "lam=2.0"),
    ({}, "zero", "module='zero' is not one of r1_zero, ppo, r1"),
  ],
)
def test_a_mistake_is_said_before_anything_begins(changes, module, words):
  with pytest.raises(UserError, match=words):
    compare.arm(changes, module)


def test_a_run_that_fails_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(compare, "ROOT", tmp_path)
  monkeypatch.setattr(arms, "run", lambda *args: ["x/a, seed 0: exit code 3, a.log"])
  with pytest.raises(UserError, match=r"1 of 1 runs failed: x/a.*a\.log"):
    compare.run("x", {"a": {}})


def test_stages_are_left_out_and_others_read_in_their_place(monkeypatch, alone):
  monkeypatch.setattr(by_hand, "_begin", lambda config: None)
  project = by_hand.open_pipeline("x")
  made = graph(project).part(["distill"], {"sft_1": "base"}).stages
  reads = {name: stage.inputs for name, stage in made.items()}
  assert reads == {
    **{"world": (), "base": ("world",), "rl_1": ("base",), "rejection": ("rl_1",)},
    **{"student_base": ("world",), "distill": ("student_base", "rejection")},
  }
  with pytest.raises(ValueError, match="'sft_9' is not one of world, base"):
    graph(project).part(["rl_1"], {"sft_1": "sft_9"})


# -- executed --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize(
  "name",
  [n if n in SOON else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_a_notebook_runs_to_its_plot(name, folder):
  script = folder / f"{name}.py"
  script.write_text("\n\n".join(sources(name, "code")), encoding="utf-8")
  more = {"R1JAX_SMALL": "1", "XDG_CACHE_HOME": str(folder / "cache")}
  done = subprocess.run(
    [sys.executable, script.name],
    cwd=folder,
    env=os.environ | more,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
  drawn = [*(folder / "runs" / "notebooks" / name).rglob("*.png")]
  assert drawn and all(p.read_bytes()[:4] == b"\x89PNG" for p in drawn)
