"""The evaluation command on a small checkpoint: what it keeps, resumes and refuses."""

import json
import shutil

from flax import linen as nn
import jax
import numpy as np
import pytest

from experiments import command as commands
from experiments import evaluate
from r1jax import rollout
from r1jax.evals.pass_at_k import pass_at_k
from r1jax.models import config as sizes
from r1jax.models import hf
from r1jax.models.policy import Policy, init
from tests import published

ASKED = ["--task=chain", "--problems=5", "--max-tokens=12", "--temperature=1"]
MORE = ["--samples=4", "--rows=8", "--k=2", "--json"]


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
  monkeypatch.setattr(commands, "use_compilation_cache", lambda folder: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Llama of 0.1 M parameters with a tokenizer of bytes."""
  folder = published.small(tmp_path_factory.mktemp("model"))
  policy = Policy(sizes.tiny_dense(262, qkv_bias=False, width=32, layers=1))
  params, router = nn.unbox(init(policy, jax.random.key(0)))
  hf.save(folder, policy, params, router, dtype="float32")
  return folder


def run(capsys, checkpoint, *flags):
  evaluate.main([f"--from={checkpoint}", *flags])
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
  """The folder of an evaluation."""
  folder = tmp_path_factory.mktemp("evaluations") / "one"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(commands, "use_compilation_cache", lambda folder: None)
    evaluate.main([f"--from={checkpoint}", *ASKED, *MORE, f"--out={folder}"])
  return folder


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_problem_has_all_its_samples_and_verdicts(finished):
  verdicts = rows(finished / "verdicts.jsonl")
  assert len(verdicts) == 5 and len({row["problem"] for row in verdicts}) == 5
  for row in verdicts:
    assert {len(row[key]) for key in ("texts", "lengths", "outcomes")} == {4}
    assert max(row["lengths"]) <= 12 and row["answers"]
  # Drawn at temperature 1, in three chunks of which the last is not full.
  assert len({text for row in verdicts for text in row["texts"]}) > 10


def test_the_figures_are_those_of_the_verdicts(finished):
  found = json.loads((finished / "evaluation.json").read_text())
  right = np.array(
    [[o == "correct" for o in r["outcomes"]] for r in rows(finished / "verdicts.jsonl")]
  )
  figures = found["figures"]
  assert figures["pass@1"]["value"] == pytest.approx(right.mean())
  assert figures["pass@2"]["value"] == pytest.approx(pass_at_k(right, 2))
  assert {"cons@4", "pass@4", "tokens", "truncated"} <= set(figures)
  for row in figures.values():
    assert row["low"] <= row["value"] <= row["high"]
  assert [row["samples"] for row in found["majority"]] == [1, 2, 4]
  assert (finished / "scaling.png").stat().st_size > 1000


def test_what_was_drawn_is_not_drawn_again(
  finished, checkpoint, tmp_path, capsys, monkeypatch
):
  folder = shutil.copytree(finished, tmp_path / "killed")
  lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
  (folder / "samples.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
  (folder / "evaluation.json").unlink()
  asked = []

  def generate(*args, **settings):
    asked.append(args[4])
    return real(*args, **settings)

  real = rollout.generate
  monkeypatch.setattr(rollout, "generate", generate)
  found = run(capsys, checkpoint, *ASKED, *MORE, f"--out={folder}")
  assert len(asked) == 2 and len(asked[0]) == 2  # of three
  assert found == json.loads((finished / "evaluation.json").read_text())
  pair = (rows(place / "verdicts.jsonl") for place in (finished, folder))
  assert next(pair) == next(pair)


def test_it_is_compared_on_the_same_problems(finished, checkpoint, capsys):
  flags = [*ASKED, *MORE, f"--out={finished}", f"--against={finished}"]
  against = run(capsys, checkpoint, *flags)["against"]
  assert against == {"problems": 5, "mean": 0, "low": 0, "high": 0, "p": 1}


def test_a_benchmarks_file_is_asked_in_its_words(
  checkpoint, tmp_path, capsys, monkeypatch
):
  file = tmp_path / "gsm8k.jsonl"
  file.write_text(json.dumps({"question": "1 + 1?", "answer": "It is #### 2"}) + "\n")
  prompts = []

  def generate(*args, samples, **_):
    prompts.extend(args[4])
    one = rollout.Completion("Two: \\boxed{2}", [1, 2], [0.0, 0.0], True)
    return [[one] * samples] * len(args[4])

  monkeypatch.setattr(rollout, "generate", generate)
  flags = ["--benchmark=gsm8k", f"--file={file}", "--maths=exact", "--json"]
  found = run(capsys, checkpoint, *flags, f"--out={tmp_path / 'out'}")
  assert found["figures"]["pass@1"]["value"] == 1.0
  assert found["samples"] == 4 and found["temperature"] == 0.6
  assert found["top_p"] == 0.95 and found["max_tokens"] == 32_768
  assert "1 + 1?" in prompts[0] and "\\boxed{}" in prompts[0]


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--task=chain", "--k=0"], ["--k=0", "--samples"]),
    (["--task=chain", "--samples=2", "--k=3"], ["--k=3", "drawn, 2"]),
    (["--task=chain", "--samples=-1"], ["--samples=-1", "1 or more"]),
    (["--task=chess"], ["'chess'", "chain"]),
    (["--task=gum:maze"], ["gum:maze", "gym:NAME"]),
    (["--benchmark=aime"], ["--file"]),
    (["--benchmark=aimee", "--file=x.jsonl"], ["aimee", "aime, math500"]),
    (["--benchmark=aime", "--file=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    ([], ["--benchmark=NAME", "--task=NAME"]),
    (["--task=chain", "--against=nowhere"], ["nowhere", "experiments.evaluate"]),
    (["--from=nowhere"], ["nowhere", "config.json"]),
  ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, capsys, flags, words):
  with pytest.raises(SystemExit, match="2"):
    evaluate.main([f"--from={checkpoint}", f"--out={tmp_path / 'new'}", *flags])
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith("error: ") and all(word in line for word in words), line
  assert not (tmp_path / "new").exists()


def test_a_file_of_other_fields_names_its_line(checkpoint, tmp_path, capsys):
  file = tmp_path / "aime.jsonl"
  file.write_text('{"problem": "1 + 1", "solution": "2"}\n')
  with pytest.raises(SystemExit, match="2"):
    run(capsys, checkpoint, "--benchmark=aime", f"--file={file}")
  said = capsys.readouterr().err
  assert ":1:" in said and "answer" in said


def test_a_checkpoint_without_its_tokenizer_is_refused(checkpoint, tmp_path, capsys):
  bare = shutil.copytree(checkpoint, tmp_path / "bare")
  for path in bare.glob("tokenizer*"):
    path.unlink()
  with pytest.raises(SystemExit, match="2"):
    run(capsys, bare, "--task=chain")
  assert "tokenizer" in capsys.readouterr().err


def test_another_evaluation_in_the_folder_is_refused(finished, checkpoint, capsys):
  before = (finished / "evaluation.json").read_bytes()
  with pytest.raises(SystemExit, match="2"):
    run(capsys, checkpoint, *ASKED, *MORE, f"--out={finished}", "--top-p=0.5")
  assert "top_p: 0.95 -> 0.5" in capsys.readouterr().err
  assert (finished / "evaluation.json").read_bytes() == before
