"""The evaluation command on a small checkpoint: what it keeps, resumes and refuses."""

import json
import os
import shutil

from flax import linen as nn
import jax
import pytest

from experiments import command as commands
from experiments import evaluate
from r1jax import rollout, trained
from r1jax.evals import evaluation, room
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
  config = {"max_position_embeddings": 65_536}
  hf.save(folder, policy, params, router, dtype="float32", config=config)
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


@pytest.fixture
def speaks(monkeypatch):
  """Lets the policy say what a function (prompt, sample) returns; gives the prompts."""
  prompts = []

  def put(reply):
    def generate(*args, samples, **_):
      prompts.extend(args[4])
      said = [[reply(prompt, g) for g in range(samples)] for prompt in args[4]]
      return [
        [rollout.Completion(x, [1, 2], [0.0, 0.0], True) for x in row] for row in said
      ]

    monkeypatch.setattr(rollout, "generate", generate)
    return prompts

  return put


@pytest.fixture
def file(tmp_path):
  """Five problems whose answers are 0 to 4; the first stands twice."""
  path = tmp_path / "five.jsonl"
  rows = [{"problem": f"{i} + 0?", "answer": str(i)} for i in (0, 1, 2, 3, 4, 0)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def of_file(file):
  return ["--benchmark=jsonl", f"--file={file}", "--maths=exact", "--json"]


def right_in_the_first(counts):
  """A reply to `{i} + 0?` that is right in the first counts[i] samples, else 9."""

  def reply(prompt, sample):
    i = int(prompt.partition(" + 0?")[0][-1])
    return f"\\boxed{{{i if sample < counts[i] else 9}}}"

  return reply


def test_the_figures_are_those_of_the_verdicts(
  checkpoint, file, tmp_path, capsys, speaks
):
  counts = [4, 3, 2, 1, 0]
  speaks(right_in_the_first(counts))
  out = tmp_path / "out"
  flags = [*of_file(file), "--samples=4", "--k=2", f"--out={out}"]
  found = run(capsys, checkpoint, *flags)
  verdicts = rows(out / "verdicts.jsonl")
  right = [sum(o == "correct" for o in row["outcomes"]) for row in verdicts]
  assert right == [*counts, 4]
  figures = {name: row["value"] for name, row in found["figures"].items()}
  assert figures["pass@1"] == pytest.approx(14 / 24)
  # 1 - C(4 - c, 2) / 6 for c = 4, 3, 2, 1, 0, 4
  assert figures["pass@2"] == pytest.approx((1 + 1 + 5 / 6 + 1 / 2 + 0 + 1) / 6)
  assert figures["pass@4"] == pytest.approx(5 / 6)
  assert figures["cons@4"] == pytest.approx((1 + 1 + 1 / 2 + 0 + 0 + 1) / 6)
  assert figures["tokens"] == 2 and figures["truncated"] == figures["lost"] == 0
  for row in found["figures"].values():
    assert row["low"] <= row["value"] <= row["high"]
  assert [row["samples"] for row in found["majority"]] == [1, 2, 4]
  assert found["majority"][-1]["value"] == figures["cons@4"]
  assert (out / "scaling.png").stat().st_size > 1000
  assert json.loads((out / "evaluation.json").read_text()) == found


def test_samples_without_a_box_are_counted(checkpoint, file, tmp_path, capsys, speaks):
  speaks(lambda prompt, g: "it is 1" if g else r"\boxed{1}")
  flags = [*of_file(file), "--samples=4", f"--out={tmp_path / 'out'}"]
  figures = run(capsys, checkpoint, *flags)["figures"]
  assert figures["no answer"]["value"] == 3 / 4 and figures["lost"]["value"] == 0


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
  kept = [(row["step"], row["problem"]) for row in rows(folder / "samples.jsonl")]
  assert len(set(kept)) == len(kept)  # nor written
  pair = (rows(place / "verdicts.jsonl") for place in (finished, folder))
  assert next(pair) == next(pair)


def test_it_is_compared_on_the_same_problems(
  checkpoint, file, tmp_path, capsys, speaks
):
  """Also where one of them stands twice: each time is compared with its like."""
  flags = [*of_file(file), "--samples=4"]
  speaks(right_in_the_first([4, 0, 0, 0, 0]))
  run(capsys, checkpoint, *flags, f"--out={tmp_path / 'weak'}")
  speaks(right_in_the_first([4, 4, 2, 0, 0]))
  how = [*flags, f"--out={tmp_path / 'strong'}", f"--against={tmp_path / 'weak'}"]
  found = run(capsys, checkpoint, *how)
  against = found["against"]
  assert against["problems"] == 6 and against["mean"] == pytest.approx(1.5 / 6)
  assert against["folder"] == str(tmp_path / "weak")
  assert against["p"] == pytest.approx(2 / 4)  # two of six differ, and could be lost
  assert json.loads((tmp_path / "strong/evaluation.json").read_text()) == found
  back = evaluation.against(tmp_path / "weak", tmp_path / "strong")
  assert back["mean"] == -against["mean"]


def test_what_is_no_evaluation_is_not_compared(
  checkpoint, file, tmp_path, capsys, speaks
):
  speaks(right_in_the_first([4] * 5))
  out, flags = tmp_path / "out", [*of_file(file), "--samples=2"]
  run(capsys, checkpoint, *flags, f"--out={out}")
  with pytest.raises(SystemExit, match="2"):
    verdicts = (out / "verdicts.jsonl").read_text()
    (out / "verdicts.jsonl").write_text(verdicts + '{"step": 1}\n')
    run(capsys, checkpoint, *flags, f"--against={out}", f"--out={tmp_path / 'new'}")
  assert 'verdicts.jsonl:7 has no "problem"' in capsys.readouterr().err
  (out / "evaluation.json").unlink()
  with pytest.raises(SystemExit, match="2"):
    run(capsys, checkpoint, *flags, f"--against={out}", f"--out={tmp_path / 'new'}")
  assert "has ended" in capsys.readouterr().err


def test_a_benchmarks_file_is_asked_in_its_words(checkpoint, tmp_path, capsys, speaks):
  file = tmp_path / "gsm8k.jsonl"
  file.write_text(json.dumps({"question": "1 + 1?", "answer": "It is #### 2"}) + "\n")
  prompts = speaks(lambda prompt, sample: "Two: \\boxed{2}")
  flags = ["--benchmark=gsm8k", f"--file={file}", "--maths=exact", "--json"]
  found = run(capsys, checkpoint, *flags, f"--out={tmp_path / 'out'}")
  assert found["figures"]["pass@1"]["value"] == 1.0
  assert found["samples"] == 4 and found["temperature"] == 0.6
  assert found["top_p"] == 0.95 and found["max_tokens"] == 32_768
  assert "1 + 1?" in prompts[0] and "\\boxed{}" in prompts[0]
  assert "format" not in found["figures"]  # no form was asked for


def opened(checkpoint, folder):
  """The checkpoint with a template that opens the thinking, as R1's does."""
  shutil.copytree(checkpoint, folder)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config["chat_template"] += "{{ '<think>\\n' }}"
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize("flags", [[], ["--prefill-think"]])
def test_a_template_that_opens_the_thinking_is_seen(
  checkpoint, file, tmp_path, capsys, speaks, flags
):
  """An answer inside the thinking is none, with or without the flag."""
  folder = opened(checkpoint, tmp_path / "r1")
  inside, after = "so \\boxed{0}", "so.</think> \\boxed{0}"
  prompts = speaks(lambda prompt, sample: after if sample else inside)
  flags = [*of_file(file), *flags, "--samples=2", "--problems=1"]
  found = run(capsys, folder, *flags, f"--out={tmp_path / 'out'}")
  assert found["figures"]["pass@1"]["value"] == 0.5 and found["prefill_think"]
  assert prompts[0].endswith("<think>\n") and prompts[0].count("<think>") == 1


def test_thinking_that_the_template_does_not_open_is_opened_when_asked(
  checkpoint, file, tmp_path, capsys, speaks
):
  prompts = speaks(lambda prompt, sample: "\\boxed{0}")
  flags = [*of_file(file), "--samples=1", "--problems=1"]
  first = run(capsys, checkpoint, *flags, f"--out={tmp_path / 'a'}")
  then = run(capsys, checkpoint, *flags, "--prefill-think", f"--out={tmp_path / 'b'}")
  assert [x["figures"]["pass@1"]["value"] for x in (first, then)] == [1.0, 0.0]
  assert ["<think>" in prompt for prompt in prompts] == [False, True]


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
    (["--task=chain", "--base"], ["--base", "is no run"]),
    (["--task=chain", "--problems=-1"], ["--problems=-1", "100 of --task"]),
  ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, capsys, monkeypatch, flags, words):
  monkeypatch.setattr(trained, "load", None)  # it is told before
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


def changed_weights(folder, file):
  path = folder / "model.safetensors"
  os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def changed_prompts(folder, file):
  path = folder / "tokenizer_config.json"
  path.write_text(path.read_text().replace("{{ m.content", " {{ m.content"))


def changed_answers(folder, file):
  file.write_text(file.read_text().replace('"answer": "4"', '"answer": "5"'))


@pytest.mark.parametrize(
  "change, word",
  [
    (changed_weights, "weights: "),
    (changed_prompts, "asked: "),
    (changed_answers, "asked: "),
  ],
)
def test_samples_of_other_weights_prompts_or_answers_are_not_reused(
  checkpoint, file, tmp_path, capsys, speaks, change, word
):
  folder = shutil.copytree(checkpoint, tmp_path / "model")
  speaks(right_in_the_first([1] * 5))
  flags = [*of_file(file), "--samples=1", f"--out={tmp_path / 'out'}"]
  run(capsys, folder, *flags)
  change(folder, file)
  with pytest.raises(SystemExit, match="2"):
    run(capsys, folder, *flags)
  assert word in capsys.readouterr().err


def test_what_is_done_is_neither_drawn_nor_judged_nor_loaded_again(
  checkpoint, file, tmp_path, capsys, speaks, monkeypatch
):
  speaks(right_in_the_first([2, 1, 0, 0, 0]))
  flags = [*of_file(file), "--samples=2", f"--out={tmp_path / 'out'}"]
  found = run(capsys, checkpoint, *flags)
  monkeypatch.setattr(trained, "load", None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, "Scorer", None)
    assert run(capsys, checkpoint, *flags) == found
    assert run(capsys, checkpoint, *flags, "--k=2") == found
  (tmp_path / "out/evaluation.json").unlink()  # killed while it was judged
  assert run(capsys, checkpoint, *flags) == found


def test_a_mistaken_command_does_not_claim_the_folder(
  checkpoint, file, tmp_path, capsys, speaks, monkeypatch
):
  """Nor one that fails before it has drawn anything."""
  out = tmp_path / "out"
  flags = [*of_file(file), "--samples=1", f"--out={out}"]
  for wrong in ("--top-p=0", "--temperature=-1", "--stop="):
    with pytest.raises(SystemExit, match="2"):
      run(capsys, checkpoint, *flags, wrong)
    assert not out.exists()

  def full(*_, **__):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

  monkeypatch.setattr(rollout, "generate", full)
  capsys.readouterr()
  with pytest.raises(SystemExit, match="2"):
    run(capsys, checkpoint, *flags, "--rows=6")
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert "123 bytes" in line and "--rows" in line and "config" not in line
  speaks(right_in_the_first([1] * 5))
  assert run(capsys, checkpoint, *flags, "--rows=2")["rows"] == 2


class JaxRuntimeError(RuntimeError):
  """By the name of JAX's own."""


def test_rows_are_as_many_as_there_is_room_for(
  checkpoint, file, tmp_path, capsys, speaks, monkeypatch
):
  """And an evaluation that goes on keeps those that it was begun with."""
  speaks(right_in_the_first([1] * 5))
  flags = [*of_file(file), "--samples=2"]
  out = f"--out={tmp_path / 'much'}"
  assert run(capsys, checkpoint, *flags, out)["rows"] == 12  # all, which are few
  monkeypatch.setattr(room, "memory", lambda: 0)
  assert run(capsys, checkpoint, *flags, out)["rows"] == 12
  out = f"--out={tmp_path / 'none'}"
  assert run(capsys, checkpoint, *flags, out)["rows"] == 1
  monkeypatch.setattr(room, "memory", lambda: 2**34)
  monkeypatch.setattr(evaluate, "FEW", 2)
  out = f"--out={tmp_path / 'parts'}"
  assert run(capsys, checkpoint, *flags, out)["rows"] == 2  # an eighth


def test_a_checkpoint_is_not_asked_for_more_tokens_than_it_is_made_for(
  checkpoint, file, tmp_path, capsys, speaks
):
  folder = shutil.copytree(checkpoint, tmp_path / "short")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps(config | {"max_position_embeddings": 200})
  )
  prompts = speaks(right_in_the_first([1] * 5))
  flags = [*of_file(file), "--samples=1", f"--out={tmp_path / 'out'}"]
  found = run(capsys, folder, *flags)
  assert 0 < found["max_tokens"] <= 200 - max(map(len, prompts)) + 40  # few controls
  for flag in ("--max-tokens=199", f"--max-tokens={found['max_tokens'] + 1}"):
    with pytest.raises(SystemExit, match="2"):
      run(capsys, folder, *flags, flag)
    assert f"Give {found['max_tokens']} or less" in capsys.readouterr().err


@pytest.mark.parametrize(
  "backend, speaks, dtype",
  [("cpu", True, "float32"), ("gpu", True, "bfloat16"), ("gpu", False, "float32")],
)
def test_weights_that_only_speak_are_half_as_large_on_accelerators(
  checkpoint, monkeypatch, backend, speaks, dtype
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  kept = trained.load(checkpoint, speaks=speaks)
  assert {str(x.dtype) for x in jax.tree.leaves(kept.params)} == {dtype}
