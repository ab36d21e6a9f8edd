"""The commands and snippets of the documents run, at small sizes: all but those that
docs/limits.md lists. What they mean is checked in docs_test.py."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from docs_test import THEIRS, fault
import documents
from documents import PAGES, ROOT, Command
from flax import linen as nn
import jax
from loop_test import SMALL
import pytest

from r1jax.models import config as sizes
from r1jax.models import hf
from r1jax.models.policy import Policy, init
from tests import published

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("docs_run")]

SHORT = {"pretrain.steps": 3, "steps": 2, "eval.every": 2, "checkpoint_every": 2}
# A layer of experts alone and one level of the cache: a run's time is the compiler's.
SHORT |= {"model.layers": 1, "model.dense_layers": 0, "windows": "((0,32),)"}
# Sizes of a step that belong together: left as they are where a command sets one.
STEP = ("prompts", "grpo.", "mesh.", "pretrain.micro_batches", "pretrain.rows")
FEW = ["--problems=4", "--samples=4", "--rows=8", "--max-tokens=16"]
GIVEN = "r1_zero.py:smollm2_135m"  # a checkpoint has its own sizes


def small(arguments: list[str]) -> list[str]:
  """Flags that make a run of experiments.r1_zero or ppo short; a command's own win."""
  text = " ".join(arguments)
  keys = dict(flag.removeprefix("--config.").split("=") for flag in SMALL)
  keys |= {"grpo.reference_refresh": 2, "compilation_cache": "cache", **SHORT}
  if any(f"--config.{key}" in text for key in STEP):
    keys = {k: v for k, v in keys.items() if not k.startswith(STEP)}
  if GIVEN in text:
    keys = {k: v for k, v in keys.items() if not k.startswith(("model.", "pretrain."))}
    keys |= {"windows": "((0,8),)", "eval.problems": 4, "eval.samples": 2}
    keys = {k: v for k, v in keys.items() if not k.startswith(STEP)}
    keys |= {"grpo.reference_refresh": 0}
  if "tiny_dense" in text:  # has no experts
    del keys["model.dense_layers"]
  if "--config.profile_steps" in text:
    keys["steps"] = 24
  if "--config.grpo.minibatches=4" in text:
    keys |= {"steps": 4, "eval.every": 4, "checkpoint_every": 4}
    keys["grpo.reference_refresh"] = 4
  return [f"--config.{key}={value}" for key, value in keys.items()]


def shortened(c: Command) -> list[str]:
  """What is run in place of a command, its words after `python`."""
  arguments = list(c.arguments)
  if c.module in ("experiments.r1_zero", "experiments.ppo"):
    if "--help" in arguments:
      return ["-m", c.module, *arguments]
    seeds = "--config.seeds=2" if len(arguments) == 1 else "--config.seeds=1"
    arguments = [
      re.sub(r"^--config\.seeds=\d+", seeds, a)
      for a in arguments
      if not re.match(r"--config\.(eval\.every|pretrain\.steps|checkpoint_every)=", a)
    ]
    arguments = [re.sub(r"^(--config\.steps)=\d+", r"\1=4", a) for a in arguments]
    arguments.sort(key=lambda a: not a.startswith("--config="))  # the preset is first
    preset = arguments[:1] if "--config=" in str(arguments[:1]) else []
    return ["-m", c.module, *preset, *small(arguments), *arguments[len(preset) :]]
  if c.module in ("experiments.r1", "experiments.claims"):
    return ["-m", c.module, *arguments, "--status"]
  if c.module == "experiments.evaluate":
    return ["-m", c.module, *FEW, *arguments]
  if c.module == "experiments.generate":
    return ["-m", c.module, "--max-tokens=8", *arguments]
  if c.module == "tests.chaos":
    return ["-m", c.module, "--kills=1"]
  if c.module == "experiments.plan":
    return ["-m", c.module, *arguments, *small(arguments)]
  return ["-m", c.module, *arguments]


def runnable() -> dict[str, Command]:
  """By what is run: every command once, of those that no row of docs/limits.md has."""
  found = {}
  for said in documents.commands():
    if any(said.text.startswith(beginning) for beginning in documents.unrunnable()):
      continue
    if not said.module or any(THEIRS.search(a) for a in said.arguments):
      continue
    if [f for f in said.flags if "=" not in f and f not in ("--help", "--status")]:
      continue  # a flag that is talked about
    found.setdefault(said.text, said)
  # Flags that stood alone and are all in a longer command run there.
  kept: list[Command] = []
  for c in sorted(found.values(), key=lambda c: -len(c.arguments)):
    same = [k for k in kept if k.module == c.module and "gym" not in k.text]
    longer = [set(k.arguments) for k in same]
    if not (c.flags and any(set(c.flags) <= words for words in longer)):
      kept.append(c)
  return {text: c for text, c in found.items() if c in kept}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
  """A folder with what a reader has there: the repository, the files of the pages, a
  finished run, one with adapters, and a published model, all of them small."""
  folder = tmp_path_factory.mktemp("scene")
  for path in ROOT.iterdir():
    if path.name not in ("runs", "models", ".git"):
      (folder / path.name).symlink_to(path)
  for page in PAGES:
    for _, source in documents.snippets(page):
      if name := documents.file_of(source):
        (folder / name).write_text(source)
  model = published.small(folder / "models" / "smollm2_135m")
  policy = Policy(sizes.tiny_dense(262, qkv_bias=False, width=32, layers=1))
  params, router = nn.unbox(init(policy, jax.random.key(0)))
  hf.save(model, policy, params, router, dtype="float32")
  line = {"completion": "<think>a</think><answer>2</answer>", "answer": "2"}
  (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
  sums = [(f"{n} + 1 - 2", n - 1) for n in range(2, 30)]
  rows = [json.dumps({"problem": p, "answer": str(a)}) for p, a in sums]
  for name in ("chain_sum.jsonl", "problems.jsonl"):
    (folder / name).write_text("\n".join(rows) + "\n")
  golds = [{"question": p, "answer": f"It is #### {a}"} for p, a in sums]
  (folder / "test.jsonl").write_text("\n".join(map(json.dumps, golds)) + "\n")
  one = ["-m", "experiments.r1_zero", *small([])]
  run(folder, [*one, "--workdir=runs/r1_zero-tiny-seed0"])
  lora = ["--config.lora.rank=2", "--config.init_from=runs/r1_zero-tiny-seed0"]
  run(folder, [*one, *lora, "--workdir=runs/mine"])
  (folder / "runs" / "r1_zero-smollm2_135m-seed0").symlink_to(folder / "runs" / "mine")
  run(folder, ["-m", "experiments.evaluate", "--base", *FEW])
  return folder


def run(folder: pathlib.Path, words: list[str], env: dict | None = None) -> str:
  """What a command printed. It must end with 0."""
  own = {"BROWSER": "true", "XDG_CACHE_HOME": str(folder / "cache")}
  done = subprocess.run(
    [sys.executable, *words],
    cwd=folder,
    env=os.environ | own | (env or {}),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
  return done.stdout


@pytest.mark.parametrize("text", runnable())
def test_a_command_runs(text, scene, monkeypatch):
  c = runnable()[text]
  monkeypatch.chdir(scene)  # where its own checks look for files
  c = next(reading for reading in c.readings if not fault(reading))
  if c.text.startswith(tuple(documents.unrunnable())):
    pytest.skip("docs/limits.md says why")
  if "reasoning_gym" in c.text:
    pytest.importorskip("reasoning_gym")
  shutil.rmtree(scene / "out", ignore_errors=True)
  printed = run(scene, shortened(c), dict(c.env))
  if c.module == "experiments.report":
    assert "report.html" in printed
  if c.module in ("experiments.generate", "experiments.score"):
    assert printed.strip()


@pytest.mark.parametrize("page", PAGES, ids=documents.name_of)
def test_the_snippets_of_a_page_run(page, scene):
  """In their order, in one process: later ones use what earlier ones made."""
  sources = [s for _, s in documents.snippets(page) if not documents.file_of(s)]
  if not sources:
    pytest.skip("the page has none")
  for out in ("out", "adapter", "merged"):
    shutil.rmtree(scene / out, ignore_errors=True)
  run(scene, ["-c", "\n".join(sources)])


def test_lines_of_a_shell_write_the_files_that_they_say(tmp_path):
  """echo and printf; what they write is what the next command reads."""
  lines = {c.shell for c in documents.commands() if c.words[0] in ("echo", "printf")}
  assert lines
  for line in lines:
    subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
  for path in tmp_path.iterdir():
    for row in path.read_text().splitlines():
      json.loads(row)
