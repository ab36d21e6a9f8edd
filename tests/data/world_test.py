"""The three sides never mix, and no page states what the evaluation asks."""

import json

import pytest

from r1jax.data import corpus
from r1jax.data import world as worlds
from r1jax.data.chain import Chain
from r1jax.data.problems import squeeze
from r1jax.data.puzzle import Puzzle
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError

COUNTS = {"pretrain": 300, "train": 200, "held_out": 60}
SOURCE = dict(counts=COUNTS, seed=0)


def given(problems):
  return dict(problems=problems, source="jsonl", skip_malformed=False, held_out=0.5)


MIX = dict(facts=0.3, bare=0.1, guess=0.2, working=0.2, checked=0.2)
TASKS = [Chain(), Chain(min_terms=2, max_terms=5, low=-9, high=20), Puzzle()]


def sums_file(path, count=80):
  """Sums of two to four terms, some without spaces."""
  task, rows = Chain(min_terms=2, max_terms=4, low=-9, high=20), []
  made = worlds.make_world(task, given=given(""), **SOURCE)
  for i, p in enumerate((made.train + made.pretrain)[:count]):
    text = squeeze(p.problem) if i % 3 == 0 else p.problem
    rows.append(json.dumps({"problem": text, "answer": p.answers[0]}))
  path.write_text("\n".join(rows))
  return task


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_sides_of_generated_problems_never_mix(task):
  world = worlds.make_world(task, given=given(""), **SOURCE)
  sides = [
    {p.problem for p in s} for s in (world.pretrain, world.train, world.held_out)
  ]
  assert all(sides)
  assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_no_page_is_about_a_problem_of_the_file_however_it_is_spaced(tmp_path):
  task = sums_file(tmp_path / "sums.jsonl")
  world = worlds.make_world(task, given=given(tmp_path / "sums.jsonl"), **SOURCE)
  about = {squeeze(p.problem) for p in world.pretrain}
  assert about
  assert not about & {squeeze(p.problem) for p in world.train + world.held_out}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_no_page_states_a_held_out_problem_with_its_answer(task):
  world = worlds.make_world(task, given=given(""), **SOURCE)
  how = dict(mix=MIX, template="short", facts_a_page=4, seed=0)
  pages = corpus.pages(task, world.pretrain, 3000, **how)
  text = "\n".join(prompt + page for prompt, page in pages)
  assert "wait" in text
  for p in world.held_out:
    assert f"|>{p.problem}<|" not in text, p
    assert f"{p.problem} = {p.answers[0]}" not in text, p


def test_a_single_step_is_not_evaluated_on(tmp_path):
  task = sums_file(tmp_path / "sums.jsonl")
  world = worlds.make_world(task, given=given(tmp_path / "sums.jsonl"), **SOURCE)
  assert any(task.is_fact(p.problem) for p in world.train)
  assert not any(task.is_fact(p.problem) for p in world.held_out)


def test_a_word_is_accepted_with_and_without_its_space():
  tokenizer = Tokenizer.train(["the answer is Paris now Paris"] * 30, vocab=400)
  problem = worlds.Problem("capital?", ("Paris",))
  batch = worlds.encode_problems(
    [problem], tokenizer, template="short", prefill_think=False, prompt_length=40
  )
  said = {tokenizer.decode([t for t in row if t >= 0]) for row in batch.answers[0]}
  assert said == {"Paris", " Paris"}


def test_an_unknown_task_is_refused_with_the_known_ones():
  with pytest.raises(UserError, match=r"'chess'.*chain.*puzzle"):
    worlds.make_task("chess", {})


def test_sums_of_the_assistant_are_as_long_as_those_of_the_chain():
  options = dict(chain=dict(min_terms=5, max_terms=6), assistant=dict(mixed=0.0))
  assistant, chain = (
    worlds.make_task(name, options) for name in ("assistant", "chain")
  )
  assert (assistant.min_terms, assistant.max_terms, assistant.mixed) == (5, 6, 0.0)
  assert (chain.min_terms, chain.max_terms) == (5, 6)
