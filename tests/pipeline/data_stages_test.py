"""What the stages of data and SFT do around sampling and training: whom they ask, what
they keep and write, how long they tune; and weights on their way between stages."""

import contextlib
import io
import json
import random
import types

import jax
from meshes import mesh_of
from ml_collections import ConfigDict
import numpy as np
import pytest
import rich.console
from trees import assert_same, host

from experiments.configs import r1
from r1jax import optimizer
from r1jax.data import assistant, packing, traces
from r1jax.data.assistant import Assistant
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.data.traces import Trace
from r1jax.errors import UserError
from r1jax.metrics import MetricsFile
from r1jax.models import config as sizes
from r1jax.models.policy import Policy
from r1jax.models.value import Value
from r1jax.pipeline import (
  cold_start,
  filters,
  hooks,
  judging,
  rejection,
  supervised,
  training_traces,
)
from r1jax.pipeline.project import Project, load_weights, save_weights, with_changes
from r1jax.pipeline.sampling import Sampled
from r1jax.pipeline.stages import Stages
from r1jax.rewards.language import language_consistency

# -- changes of a config ---------------------------------------------------------------


def small_config():
  c = ConfigDict(
    dict(steps=4, eval=dict(every=2, deep=dict(rate=0.5, name="x")), windows=((0, 8),))
  )
  return c.lock()


def test_changes_merge_into_the_config_and_leave_it_as_it_was():
  c = small_config()
  before = c.to_dict()
  changes = {"steps": 9, "eval": {"deep": {"rate": 0.1}}, "windows": ((0, 8), (4, 16))}
  got = with_changes(c, changes)
  assert c.to_dict() == before and c.is_locked
  assert got.to_dict() == {
    "steps": 9,
    "eval": {"every": 2, "deep": {"rate": 0.1, "name": "x"}},
    "windows": ((0, 8), (4, 16)),
  }
  assert with_changes(c, ConfigDict(changes)).to_dict() == got.to_dict()
  assert with_changes(c, {}).to_dict() == before
  assert got.is_locked and got.eval.deep.is_locked
  with pytest.raises(AttributeError, match="locked"):
    got.eval.unheard = 1


@pytest.mark.parametrize(
  "changes", [{"stepz": 1}, {"eval": {"evry": 1}}, {"eval": {"deep": {"rat": 1.0}}}]
)
def test_a_key_that_the_config_does_not_have_is_refused(changes):
  with pytest.raises(KeyError, match=r"stepz|evry|rat"):
    with_changes(small_config(), changes)


def test_a_value_of_another_type_is_refused():
  with pytest.raises(TypeError):
    with_changes(small_config(), {"eval": {"deep": {"rate": "fast"}}})


def test_a_section_for_ppo_may_be_new():
  got = with_changes(small_config(), {"ppo": {"value_clip": 0.2}})
  assert got.ppo.value_clip == 0.2 and got.steps == 4


# -- weights ---------------------------------------------------------------------------

MOE = sizes.tiny(16, width=32, heads=2, layers=2, dense_ffn=16, expert_ffn=8)
DENSE = sizes.tiny_dense(
  16, width=32, heads=2, kv_heads=2, head_dim=8, layers=2, dense_ffn=16
)
NETWORKS = {"experts": Policy(MOE), "dense": Policy(DENSE), "value": Value(MOE)}


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_back_bit_for_bit_and_on_the_mesh(name, random_weights, tmp_path):
  network = NETWORKS[name]
  weights = random_weights(network, seed=1)
  assert (weights[1] == {}) == (name == "dense")
  save_weights(tmp_path / "weights", weights)
  mesh = mesh_of((2, 1, 1), jax.devices()[:2])
  back = load_weights(tmp_path / "weights", network, mesh)
  assert_same(host(back), host(weights))
  for x in jax.tree.leaves(back):
    assert x.dtype == np.float32 and x.sharding.mesh == mesh
  cut = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(back[0])]
  assert sum(cut) > len(cut) / 3  # over fsdp: its matrices


def test_weights_are_known_by_what_they_hold(random_weights, tmp_path):
  mesh = mesh_of((1, 1, 1), jax.devices()[:1])
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    save_weights(tmp_path / name, random_weights(NETWORKS["dense"], seed=seed))
  a, b, c = ((tmp_path / n / "weights.json").read_bytes() for n in "abc")
  assert a == b != c
  (tmp_path / "a" / "weights.json").write_bytes(c)
  with pytest.raises(UserError, match=r"not those that weights\.json names"):
    load_weights(tmp_path / "a", NETWORKS["dense"], mesh)


def test_weights_of_another_shape_or_none_are_refused(random_weights, tmp_path):
  mesh = mesh_of((1, 1, 1), jax.devices()[:1])
  save_weights(tmp_path / "weights", random_weights(NETWORKS["dense"]))
  with pytest.raises(UserError, match=f"{tmp_path}/weights cannot be read"):
    load_weights(tmp_path / "weights", NETWORKS["experts"], mesh)
  with pytest.raises(UserError, match=f"{tmp_path}/none cannot be read"):
    load_weights(tmp_path / "none", NETWORKS["dense"], mesh)


# -- a world ---------------------------------------------------------------------------


def make_project(workdir, **changes):
  c = with_changes(
    r1.get_config("tiny"),
    {"counts": dict(pretrain=200, train=40, held_out=20), **changes},
  )
  console = rich.console.Console(file=io.StringIO())
  mesh = mesh_of((1, 1, 1), jax.devices()[:1])
  return Project(c, workdir, mesh, console)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  made = make_project(tmp_path_factory.mktemp("project"))
  symbols = made.world.task.symbols
  (made.workdir / "world").mkdir()
  tokenizer = Tokenizer.train(
    [a + b for a, b in made.pages[:500]], vocab=500, symbols=symbols
  )
  tokenizer.save(made.workdir / "world" / "tokenizer.model")
  return made


@pytest.fixture
def this(project):
  return types.SimpleNamespace(config=project.config)


# -- whom they ask ---------------------------------------------------------------------


@pytest.mark.parametrize("instructed", [0.0, 0.5, 1.0])
def test_training_problems_are_asked_and_a_share_of_them_with_an_instruction(
  project, instructed
):
  count, train = 30, project.world.train
  asked = training_traces.asked(project, count, instructed, seed=3)
  plain = {p.problem: p for p in train}
  with_one = 0
  for p in asked:
    language, terms, instruction = assistant.parts_of(p.problem)
    origin = plain[assistant.said("sum", language) + terms]
    assert (p.answers, p.language) == (origin.answers, origin.language)
    with_one += bool(instruction)
  assert len({assistant.parts_of(p.problem)[:2] for p in asked}) == count
  assert with_one == instructed * count if instructed != 0.5 else 5 < with_one < 25
  assert asked == training_traces.asked(project, count, instructed, seed=3)
  assert asked != training_traces.asked(project, count, instructed, seed=4)


def test_all_of_them_are_asked_where_there_are_fewer_and_no_held_out_one(project):
  asked = training_traces.asked(project, 10_000, 0.0, seed=0)
  assert sorted(p.problem for p in asked) == sorted(
    p.problem for p in project.world.train
  )


# -- what they keep --------------------------------------------------------------------


def test_of_each_problem_some_are_kept_and_no_text_twice():
  p, q = Problem("p", ()), Problem("q", ())
  said = [(p, "a"), (q, "a"), (p, "a"), (p, "b"), (p, "c"), (q, "a"), (p, "b")]
  rows = [Trace(problem, text) for problem, text in said]
  for most, want in ((1, "a a"), (2, "ab a"), (3, "abc a"), (9, "abc a")):
    got = training_traces.first_of_each(rows, most)
    texts = ["".join(t.completion for t in got if t.problem == x) for x in (p, q)]
    assert " ".join(texts) == want and len(got) == len(want) - 1
  assert training_traces.first_of_each([], 2) == []


THOUGHT = "<think>3 + 4 = 7</think>"
SUM = Problem("work out 3 + 4", ("7",), language="en")
READ = dict(most_repetition=0.2, least_consistency=0.6)
FAULTS = {
  "wrong": f"{THOUGHT}<answer>8</answer>",
  "misformatted": f"{THOUGHT}{THOUGHT}<answer>7</answer>",
  "repetitive": "<think>" + "so it is 7 " * 20 + "</think><answer>7</answer>",
  "mixed": "<think>计算 3 + 4 则 so 7</think><answer>7</answer>",
  "long_paragraph": "<think>" + " ".join(map(str, range(200))) + "</think>\\boxed{7}",
  "code_block": "<think>```\n3 + 4\n```</think><answer>7</answer>",
  "judged_bad": "<think>so it may be</think>I bet <answer>7</answer>",
}


def fault_of(text, found):
  return next((name for name, keeps in found if not keeps(Trace(SUM, text))), None)


def test_cold_start_drops_what_is_wrong_or_hard_to_read():
  found = cold_start.readable(READ)
  assert [name for name, _ in found] == ["wrong", "misformatted", "repetitive", "mixed"]
  for name, _ in found:
    assert fault_of(FAULTS[name], found) == name
  assert fault_of(f"{THOUGHT}<answer>7</answer>", found) is None


def test_rejection_drops_more_and_asks_a_judge_last(tmp_path):
  (tmp_path / "mine.py").write_text(
    "def judge(completion, problem):\n"
    "  assert problem.answers == ('7',)\n"
    "  return 'bet' not in completion\n"
  )
  section = READ | dict(most_paragraph=400, judge=f"{tmp_path}/mine.py:judge")
  memory = tmp_path / "judged.jsonl"
  found = rejection.accepted(section, memory)
  names = [name for name, _ in found]
  assert sorted(names) == sorted(FAULTS) and names[-1] == "judged_bad"
  for name in names:
    assert fault_of(FAULTS[name], found) == name
  assert fault_of(f"{THOUGHT}<answer>7</answer>", found) is None
  unjudged = rejection.accepted(section | dict(judge="none"), memory)
  assert [name for name, _ in unjudged] == names[:-1]
  with pytest.raises(UserError, match=r"config\.rejection\.judge='nobody'"):
    rejection.accepted(section | dict(judge="nobody"), memory)


READABLE = {
  "plain": f"{THOUGHT}<answer>7</answer>",
  "two lines": "<think>3 + 4\n= 7</think><answer>7</answer>",
  "lines in the answer": f"{THOUGHT}<answer>\n7\n</answer>",
}


@pytest.mark.parametrize("name", READABLE)
def test_what_cold_start_keeps_the_miniatures_rule_can_rewrite(name):
  found = cold_start.readable(READ)
  trace = Trace(SUM, READABLE[name])
  assert fault_of(trace.completion, found) is None
  again = cold_start._refined(trace, assistant.rewritten)
  assert filters.formatted("chat")(again) and filters.correct(again)
  assert filters.in_one_language(1.0)(again)
  assert fault_of(f"{THOUGHT}it is \\boxed{{7}}", found) == "misformatted"
  assert again.problem == SUM and again.source == "zero, rewritten"


ODD = [None, 7, "", " \n", b"7", ["7"], 0.5]


@pytest.mark.parametrize(
  "stage, form, right",
  [
    ("cold_start.rewriter", cold_start.FORM, ["a", " a"]),
    ("rejection.judge", rejection.FORM, [True, False, 1, 0]),
    ("judging.judge", judging.FORM, ["A>>B", "B>A", "A=B"]),
  ],
)
def test_what_a_users_function_returns_has_a_form_and_nothing_else_is_kept(
  stage, form, right, tmp_path
):
  (tmp_path / "mine.py").write_text("def mine(said, problem):\n  return said\n")
  spec, memory = f"{tmp_path}/mine.py:mine", tmp_path / "said.jsonl"
  function = hooks.load(spec, {}, stage, form, memory)
  assert [function(value, SUM) for value in right] == right
  rest = [*ODD, "incorrect", "no", 2, " A>B"]
  for value in (x for x in rest if not form.holds(x)):
    with pytest.raises(
      UserError, match=f"{stage}=.*returned .*must return {form.about}"
    ):
      function(value, SUM)
  (kept,) = tmp_path.glob("said*.jsonl")
  assert len(kept.read_text().splitlines()) == len(right)
  assert sum(map(form.holds, rest)) == {"cold_start": 3}.get(stage.split(".")[0], 0)


# -- the stages ------------------------------------------------------------------------


def sampler(write):
  """In place of `sampling.sample`: `write(problem, number)` is what the policy says."""

  def sample(project, this, weights, problems, path, *, samples, decoding):
    assert decoding.temperature == 1.0
    texts = [[write(p, n) for n in range(samples)] for p in problems]
    return Sampled(texts, [[True] * samples for _ in problems], 1234)

  return sample


def written_by_the_corpus(problem, n):
  """Right and wrong pages of the task, one of them twice."""
  rng = random.Random(f"{problem.problem} {n % 3}")
  kind = rng.choice(["bare", "guess", "working", "checked", "checked"])
  return Assistant().page(kind, problem, rng)


def check_card(card, folder, counts):
  assert card == json.loads((folder / "card.json").read_text())
  assert card["tokens"] == 1234
  assert counts["sampled"] == sum(counts.values()) - counts["sampled"]
  assert 0 < counts["kept"] < counts["sampled"]


def test_cold_start_writes_right_readable_traces_in_the_askers_language(
  project, this, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_traces, "sample", sampler(written_by_the_corpus))
  section = project.config.cold_start.to_dict() | dict(keep=2, most=30)
  card = cold_start.collect(project, this, None, section, tmp_path)
  check_card(card, tmp_path, card["counts"])
  assert card["counts"]["sampled"] == section["samples"] * len(project.world.train)
  rows = traces.read(tmp_path / "traces.jsonl")
  assert card["rewritten"]["sampled"] == card["rewritten"]["kept"] == len(rows) == 30
  found = cold_start.readable(section)
  for row in rows:
    assert row.source == "zero, rewritten"
    assert all(keeps(row) for name, keeps in found if name != "misformatted")
    assert filters.formatted("chat")(row)
    assert language_consistency(row.completion, row.problem.language) == 1.0
  problems = [row.problem.problem for row in rows]
  assert max(map(problems.count, problems)) <= 2


def test_cold_start_without_a_rewriter_writes_what_was_sampled(
  project, this, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_traces, "sample", sampler(written_by_the_corpus))
  section = project.config.cold_start.to_dict() | dict(rewriter="none")
  cold_start.collect(project, this, None, section, tmp_path)
  for row in traces.read(tmp_path / "traces.jsonl"):
    assert row.source == "zero"
    assert row.completion in [written_by_the_corpus(row.problem, n) for n in range(3)]


def test_cold_start_drops_what_a_rewriter_made_wrong(
  project, this, tmp_path, monkeypatch
):
  (tmp_path / "mine.py").write_text(
    "def rewrite(completion, problem):\n"
    "  answer = 99 if problem.language == 'zh' else problem.answers[0]\n"
    "  return f'<think>1 = 1</think><answer>{answer}</answer>'\n"
  )
  monkeypatch.setattr(training_traces, "sample", sampler(written_by_the_corpus))
  section = project.config.cold_start.to_dict()
  section["rewriter"] = f"{tmp_path}/mine.py:rewrite"
  counts = cold_start.collect(project, this, None, section, tmp_path)["rewritten"]
  rows = traces.read(tmp_path / "traces.jsonl")
  assert {row.problem.language for row in rows} == {"en"}
  assert counts["kept"] == len(rows) and counts["still_wrong"] > 0
  assert counts["sampled"] == sum(counts.values()) - counts["sampled"]


def test_cold_start_says_which_rewriter_failed(project, this, tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text("def rewrite(completion, problem):\n  return 1 / 0")
  monkeypatch.setattr(training_traces, "sample", sampler(written_by_the_corpus))
  section = project.config.cold_start.to_dict()
  section["rewriter"] = spec = f"{tmp_path}/mine.py:rewrite"
  with pytest.raises(UserError, match=f"{spec} failed with ZeroDivisionError"):
    cold_start.collect(project, this, None, section, tmp_path)
  assert not (tmp_path / "traces.jsonl").exists()


def test_rejection_mixes_accepted_traces_with_replies_by_weight(
  project, this, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_traces, "sample", sampler(written_by_the_corpus))
  section = project.config.rejection.to_dict() | dict(least_consistency=0.9, keep=2)
  card = rejection.collect(project, this, None, section, tmp_path)
  check_card(card, tmp_path, card["counts"])
  rows = traces.read(tmp_path / "traces.jsonl")
  reasoning = [r for r in rows if r.problem.domain == "reasoning"]
  assert card["reasoning"] == len(reasoning)
  assert card["non_reasoning"] == len(rows) - len(reasoning)
  assert card["non_reasoning"] == round(len(reasoning) / 3)
  assert {r.source for r in reasoning} == {"rl_1"}
  found = rejection.accepted(section, tmp_path / "judged.jsonl")
  assert all(keeps(row) for row in reasoning for _, keeps in found)
  kept = [(r.problem.problem, r.completion) for r in reasoning]
  assert len(set(kept)) == len(kept)
  asked = {p.problem for p in project.world.requests}
  for row in rows:
    if row.problem.domain != "reasoning":
      assert row.source == "pool" and row.problem.problem in asked
      assert filters.formatted("chat")(row)
  places = [r.problem.domain == "reasoning" for r in rows]
  assert places != sorted(places, reverse=True)  # shuffled


def test_rejection_hears_where_nothing_is_accepted(
  project, this, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_traces, "sample", sampler(lambda p, n: "I do not know"))
  section = project.config.rejection.to_dict()
  with pytest.raises(UserError, match=r"rejection sampling: .*wrong 160.*kept 0"):
    rejection.collect(project, this, None, section, tmp_path)


# -- non-reasoning data ----------------------------------------------------------------

MIXED = dict(general_weight=0.5, general_data="")


def test_replies_come_from_a_users_file_if_there_is_one(project, tmp_path):
  pool = [Trace(Problem(f"hello {i}", (), domain="helpful"), "hi") for i in range(3)]
  traces.write(tmp_path / "pool.jsonl", pool)
  section = MIXED | dict(general_data=str(tmp_path / "pool.jsonl"))
  got = rejection.non_reasoning(project, section, 40, random.Random(0))
  assert len(got) == 20 and {t.problem for t in got} == {t.problem for t in pool}
  section["general_data"] = str(tmp_path / "none.jsonl")
  with pytest.raises(UserError, match=r"none\.jsonl: there is no such file"):
    rejection.non_reasoning(project, section, 40, random.Random(0))


def test_without_weight_there_are_none(project):
  none = MIXED | dict(general_weight=0.0)
  assert rejection.non_reasoning(project, none, 40, random.Random(0)) == []


def test_what_a_users_function_said_is_not_asked_again_until_it_is_another(tmp_path):
  """Yet the n-th answer to the same question may differ from the first."""
  code = (
    "said = []\n"
    "def judge(completion, problem):\n"
    "  said.append(completion)\n"
    "  return len(said)\n"
  )
  (tmp_path / "mine.py").write_text(code)
  spec, memory = f"{tmp_path}/mine.py:judge", tmp_path / "said.jsonl"
  form = hooks.Form("a number", lambda said: said > 0)

  def load():
    return hooks.load(spec, {}, "rejection.judge", form, memory)

  first = load()
  assert [first(x, SUM) for x in "aab"] == [1, 2, 3]
  (kept,) = tmp_path.glob("said*.jsonl")
  with kept.open("a") as file:
    file.write('{"phase": "sa')  # a kill
  again = load()
  assert [again(x, SUM) for x in "aabb"] == [1, 2, 3, 1]  # the last one is new
  (tmp_path / "mine.py").write_text(code.replace("len(said)", "9"))
  assert load()("a", SUM) == 9


# -- SFT -------------------------------------------------------------------------------


def some_traces(project, count=30):
  rng, task = random.Random(0), project.world.task
  chosen = [rng.choice(project.world.train) for _ in range(count)]
  return [Trace(p, task.page("checked", p, rng)) for p in chosen]


@pytest.mark.parametrize("width", [0, 48])
def test_traces_are_packed_into_rows_of_the_stages_width(project, width):
  rows = some_traces(project)
  packed = supervised.pack_traces(project, rows, width)
  tokens, segments, targets = (
    packed.pages.tokens,
    packed.pages.segments,
    packed.pages.targets,
  )
  assert tokens.shape[1] == (width or project.page)
  template, tokenizer = project.config.data.template, project.tokenizer
  alone = traces.examples(rows, tokenizer, template=template)
  longer = sum(len(e.tokens) > tokens.shape[1] for e in alone)
  assert packed.too_long == longer and bool(longer) == bool(width)
  for r, row in enumerate(packed.rows):
    for n, i in enumerate(row, 1):
      here = segments[r] == n
      assert tokens[r][here].tolist() == alone[i].tokens
      said = tokens[r][here & targets[r]].tolist()
      assert said[-1] == tokenizer.eos_id
      assert tokenizer.decode(said) == rows[i].completion


def packed_rows(count):
  return packing.Packed(None, [[i] for i in range(count)], 0)


@pytest.mark.parametrize(
  "count, epochs, rows, steps", [(64, 2, 32, 4), (65, 2, 32, 5), (3, 1, 32, 1)]
)
def test_a_stage_tunes_for_whole_epochs_down_to_a_tenth_of_its_rate(
  count, epochs, rows, steps
):
  """R1, supplement B.4.2: a cosine from 5e-5 to 5e-6."""
  sft = r1.sft().to_dict() | dict(epochs=epochs, rows=rows, learning_rate=5e-5)
  config = supervised.tuning_config(packed_rows(count), sft)
  assert config.optimizer.steps == steps >= count * epochs / rows > steps - 1
  assert (config.rows, config.micro_batches) == (rows, sft["micro_batches"])
  rate = optimizer.learning_rate(config.optimizer)
  rates = np.array([float(rate(i)) for i in range(steps + 1)])
  assert rates.max() <= 5e-5 * (1 + 1e-6)
  np.testing.assert_allclose(rates[steps], 5e-6, rtol=1e-5)


def test_the_rate_rises_over_the_warm_up_and_falls_from_then_on():
  sft = r1.sft().to_dict() | dict(learning_rate=5e-5, rows=1, epochs=40)
  config = supervised.tuning_config(packed_rows(1), sft)
  rate = optimizer.learning_rate(config.optimizer)
  rates = np.array([float(rate(i)) for i in range(40)])
  assert (np.diff(rates[: sft["warmup_steps"]]) > 0).all()
  assert (np.diff(rates[sft["warmup_steps"] :]) < 0).all()
  np.testing.assert_allclose(rates.max(), 5e-5, rtol=1e-5)
  np.testing.assert_allclose(rates[-1], 5e-6, rtol=0.1)


def test_a_stage_says_what_it_learned_from_and_leaves_its_weights(
  project, random_weights, tmp_path, monkeypatch
):
  start, seen = random_weights(NETWORKS["dense"]), {}

  def tune(this, pages, config, *, start, seed):
    seen.update(pages=pages(), config=config, start=start, seed=seed)
    for step, nll in ((10, 2.0), (12, 1.5)):
      this.metrics.write({"phase": "sft", "step": step, "nll": nll})
    return start

  monkeypatch.setattr(supervised, "tune", tune)
  this = types.SimpleNamespace(
    config=project.config, metrics=MetricsFile(tmp_path / "metrics.jsonl")
  )
  rows, sft = some_traces(project), r1.sft().to_dict() | dict(width=48)
  figures = supervised.fine_tune(project, this, start, rows, sft, tmp_path)
  pages = seen["pages"]
  assert seen["start"] is start and seen["seed"] == project.config.seed
  assert figures == {
    "examples": len(rows),
    "too_long": len(rows) - sum(int(row.max()) for row in pages.segments),
    "rows": len(pages.tokens),
    "filled": round(float((pages.segments > 0).mean()), 3),
    "updates": seen["config"].optimizer.steps,
    "nll": 1.5,
  }
  back = load_weights(tmp_path, NETWORKS["dense"], project.mesh)
  assert_same(host(back), host(start))


@pytest.mark.parametrize(
  "third, writers", [("sft_3", ["base", "sft_3"]), ("base", ["base"])]
)
def test_the_base_writes_once_where_it_stands_for_dev3(
  third, writers, tmp_path, monkeypatch
):
  asked = []
  monkeypatch.setattr(Stages, "weights", lambda self, folder: folder.name)
  monkeypatch.setattr(judging, "collect", lambda *args: asked.append(dict(args[2])))
  project = types.SimpleNamespace(
    run=lambda *_: contextlib.nullcontext(),
    config=types.SimpleNamespace(judging={}),
  )
  inputs = {"base": tmp_path / "base", "sft_3": tmp_path / third}
  Stages(project).judging(tmp_path / "judging", inputs)
  assert asked == [{name: name for name in writers}]
