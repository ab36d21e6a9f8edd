"""RL stage 2: every sample gets the reward of its own set, against the host's rules and
the reward models asked one reply at a time; and the order of its problems."""

import dataclasses
import functools
import json
import random

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import prompts, reward_model
from r1jax.data import corpus
from r1jax.data import world as worlds
from r1jax.data.assistant import Assistant
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.policy import Policy
from r1jax.models.value import Value, from_policy
from r1jax.pipeline.all_scenarios_rl import SQUASH, Scenarios, scenario_reward
from r1jax.reward_model import Responses
from r1jax.rewards import accuracy, format, language
from r1jax.rewards.in_graph import LanguageTable, TagTable, rule_reward
from r1jax.rewards.total import composed
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout

LANGUAGES = ("en", "zh")
P, T = 16, 28


def train():
  task, rng = Assistant(), random.Random(0)
  about = [task.problem(rng) for _ in range(40)] + task.requests()[::9]
  mix = dict(guess=0.4, checked=0.3, request=0.3)
  made = corpus.pages(
    task, about, 300, mix=mix, template="short", facts_a_page=3, seed=0
  )
  return Tokenizer.train([a + b for a, b in made], vocab=470, symbols=task.symbols)


TOKENIZER = train()
END_THINK = TOKENIZER.id("</think>")
# The requests have an answer here that rules would take, so that it shows.
ASKED = [
  Problem("work out 4 + 3", ("7",), language="en"),
  Problem("tell me of cat", ("7",), language="en", domain="helpful"),
  Problem("说说弹", ("7",), language="zh", domain="safety"),
  Problem("计算4 + 3", ("7",), language="zh"),
  Problem("说说猫和茶", ("7",), language="zh", domain="helpful"),
  Problem("tell me of bomb", ("7",), language="en", domain="safety"),
  Problem("work out 9 - 2", ("7",), language="en"),
]
SAID = [
  "<think>4 + 3 = 7 so 7</think>the answer is <answer>7</answer>",
  "<think> cat则猫</think> cat soft, bomb",
  "<think> mix弹</think>我不能帮<answer>7</answer>谢谢",
  "<think> cat soft small quick",  # never ends its thinking
  "<think>猫</think>",  # has nothing after it, and was cut there
  "<answer>7</answer>",
]
G = len(SAID)
ROWS = [4, 0, 2, 5, 1, 6, 3, 1]  # a batch: problems in any order, one of them twice
WEIGHTS = dict(accuracy=2.0, format=0.5, language=0.75)
MODEL_WEIGHT = 1.5

CONFIG = dataclasses.replace(golden.tiny_policy().config, vocab=TOKENIZER.vocab)
VALUE = Value(CONFIG)


def judge_of(seed):
  """A reward model's weights, with a head that is not zero."""
  params, router = from_policy(*golden.weights(Policy(CONFIG), seed), CONFIG.width)
  head = 0.3 * np.random.default_rng(seed).normal(size=CONFIG.width)
  return {**params, "value_head": jnp.asarray(head, jnp.float32)}, router


JUDGES = {"helpful": judge_of(1), "safety": judge_of(2)}


def batch_of(rows):
  every = worlds.encode_problems(
    ASKED, TOKENIZER, template="short", prefill_think=False, prompt_length=P
  )
  return jax.tree.map(lambda x: jnp.asarray(x[np.array(rows)]), every)


def ids_of(text):
  """Tokens of a reply; EOS where its thinking ended and something follows."""
  _, ended, after = text.rpartition("</think>")
  ended = after and (ended or "<answer>" in text)
  return TOKENIZER.encode(text) + ([TOKENIZER.eos_id] if ended else [])


def rollout_of(groups):
  """Args: groups: B lists of G texts. What is masked is garbage."""
  tokens = np.random.default_rng(0).integers(4, 60, (len(groups), G, T))
  mask = np.zeros(tokens.shape, bool)
  for b, texts in enumerate(groups):
    for g, text in enumerate(texts):
      row = ids_of(text)
      tokens[b, g, : len(row)], mask[b, g, : len(row)] = row, True
  zero = jnp.zeros(mask.shape)
  ended = jnp.ones(mask.shape[:2], bool)
  tokens = jnp.asarray(tokens, jnp.int32)
  return Rollout(tokens, jnp.asarray(mask), logprobs=zero, entropy=zero, ended=ended)


@functools.cache
def stage(squash="none"):
  rules = rule_reward(
    TagTable.of(TOKENIZER),
    accuracy_weight=WEIGHTS["accuracy"],
    format_weight=WEIGHTS["format"],
    language_weight=WEIGHTS["language"],
    prefill_think=False,
    format_style="chat",
    table=LanguageTable.of(TOKENIZER, LANGUAGES),
    targets=np.array([LANGUAGES.index(p.language) for p in ASKED]),
  )
  reward = scenario_reward(
    rules, ASKED, VALUE, TOKENIZER, model_weight=MODEL_WEIGHT, squash=squash
  )
  return jax.jit(lambda batch, rollout, judges: reward(batch, rollout, judges=judges))


# -- the same by hand: one reply at a time ---------------------------------------------


@jax.jit
def ask(weights, responses):
  return reward_model.score(VALUE, *weights, responses, "all", END_THINK)


@functools.cache
def model_score(kind, problem, text):
  """A reward model's number for what it is meant to see; None: it sees nothing. The
  helpful one is shown a reply that is a summary and nothing else."""
  row = ids_of(text)
  if kind == "helpful":
    if END_THINK not in row:
      return None
    row = row[len(row) - row[::-1].index(END_THINK) :]
    if not row:
      return None
  asked = prompts.encode(problem, TOKENIZER, template="short", prefill_think=False)
  tokens, mask = prompts.pad_left([asked], P, TOKENIZER.pad_id)
  said = np.zeros((1, T), np.int32)
  said[0, : len(row)] = row
  return float(
    ask(JUDGES[kind], Responses(tokens, mask, said, np.arange(T)[None] < len(row)))[0]
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def expected(problem, texts, squash=lambda s: s):
  """([parts of a reply], [total]) of a group."""
  scores = [None] * len(texts)
  if problem.domain != "reasoning":
    scores = [model_score(problem.domain, problem.problem, t) for t in texts]
    seen = [s for s in scores if s is not None]
    scores = [(min(seen) if seen else 0.0) if s is None else s for s in scores]
  parts, totals = [], []
  for text, score in zip(texts, scores, strict=True):
    found = {
      "format": format.format_reward(text, style="chat"),
      "language": language.language_consistency(text, problem.language),
    }
    weights = {k: WEIGHTS[k] for k in ("format", "language")}
    if problem.domain == "reasoning":
      found["accuracy"] = accuracy.accuracy(text, problem.answers)
      weights["accuracy"] = WEIGHTS["accuracy"]
      totals.append(composed("stage_2_reasoning", found, **weights))
    else:
      found["reward_model"] = squash(score)
      weights["reward_model"] = MODEL_WEIGHT
      totals.append(composed("stage_2_general", found, **weights))
    parts.append(found)
  return parts, totals


@pytest.mark.parametrize(
  "squash, by_hand", [("none", lambda s: s), ("sigmoid", sigmoid)]
)
def test_every_reply_gets_the_reward_of_its_own_set(squash, by_hand):
  got = stage(squash)(batch_of(ROWS), rollout_of([SAID] * len(ROWS)), JUDGES)
  assert set(got.parts) == {"accuracy", "format", "language", "reward_model"}
  assert dict(got.weights) == {**WEIGHTS, "reward_model": MODEL_WEIGHT}
  for b, place in enumerate(ROWS):
    parts, totals = expected(ASKED[place], SAID, by_hand)
    np.testing.assert_allclose(got.total[b], totals, rtol=1e-4, atol=1e-5)
    for g, found in enumerate(parts):
      for name, part in got.parts.items():
        want = found.get(name, 0.0)  # what a sample has no right to is 0
        np.testing.assert_allclose(part[b, g], want, rtol=1e-4, atol=1e-5)
  model = np.asarray(got.parts["reward_model"])
  general = [ASKED[place].domain != "reasoning" for place in ROWS]
  assert (np.std(model[general], axis=1) > 0.01).all()  # the models do tell


def test_scores_may_be_squashed_to_the_range_of_a_rule():
  assert set(SQUASH) == {"none", "sigmoid"}
  x = np.float32([-30, -1, 0, 2, 30])
  np.testing.assert_array_equal(SQUASH["none"](x), x)
  np.testing.assert_allclose(SQUASH["sigmoid"](x), sigmoid(x), rtol=1e-6)


@pytest.mark.parametrize("broken", ["helpful", "safety"])
def test_only_the_requests_of_its_set_hear_of_a_model(broken):
  nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), JUDGES[broken])
  judges = {**JUDGES, broken: nan}
  got = stage()(batch_of(ROWS), rollout_of([SAID] * len(ROWS)), judges)
  for b, place in enumerate(ROWS):
    total = np.asarray(got.total[b])
    want = ASKED[place].domain == broken
    assert np.isnan(total).any() == want, ASKED[place]
    # The safety model reads every reply, the helpful one a summary.
    if want and broken == "safety":
      assert np.isnan(total).all()


def test_before_the_window_no_model_is_asked():
  rows = [0, 3, 6, 0, 3, 6, 0, 3]
  nan = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), JUDGES)
  got = stage()(batch_of(rows), rollout_of([SAID] * len(rows)), nan)
  assert (np.asarray(got.parts["reward_model"]) == 0).all()
  for b, place in enumerate(rows):
    np.testing.assert_allclose(got.total[b], expected(ASKED[place], SAID)[1], 1e-5)


def test_a_reply_without_a_summary_is_as_helpful_as_the_least_of_its_group():
  got = stage()(batch_of(ROWS), rollout_of([SAID] * len(ROWS)), JUDGES)
  silent = [ids_of(t)[-1] == END_THINK or END_THINK not in ids_of(t) for t in SAID]
  assert silent == [False, False, False, True, True, True]
  for b, place in enumerate(ROWS):
    score = np.asarray(got.parts["reward_model"][b])
    if ASKED[place].domain == "helpful":
      assert (score[silent] == score[:3].min()).all()
      assert len(set(score[:3])) == 3
    elif ASKED[place].domain == "safety":  # that one reads the thinking
      assert len(set(score)) == G


def test_a_group_without_any_summary_has_nothing_to_choose_between():
  groups = [[SAID[3], SAID[4], SAID[5]] * 2] * len(ROWS)
  got = stage()(batch_of(ROWS), rollout_of(groups), JUDGES)
  for b, place in enumerate(ROWS):
    if ASKED[place].domain == "helpful":
      assert got.parts["reward_model"][b].tolist() == [0.0] * G
  assert np.isfinite(got.total).all()


def test_outcomes_and_means_know_their_problems():
  got = stage()(batch_of(ROWS), rollout_of([SAID] * len(ROWS)), JUDGES)
  reasoning = np.array([ASKED[place].domain == "reasoning" for place in ROWS])
  right = np.array([accuracy.accuracy(text, ["7"]) for text in SAID])
  names = np.array(OUTCOMES)[np.asarray(got.outcome)]
  assert (names[~reasoning] == "judged").all()
  assert ((names[reasoning] == "correct") == right.astype(bool)).all()
  assert (names[reasoning] != "judged").all()
  means = {name: float(got.mean(part, name)) for name, part in got.parts.items()}
  assert means["accuracy"] == pytest.approx(right.mean())
  model = np.asarray(got.parts["reward_model"])
  assert means["reward_model"] == pytest.approx(model[~reasoning].mean(), rel=1e-5)
  assert means["format"] == pytest.approx(np.mean(got.parts["format"]))
  assert got.valid.all()


# -- the order of problems -------------------------------------------------------------

REASONING, REQUESTS, B = 100, 30, 8


def scenarios(**changes):
  how = dict(prompts=B, share=0.25, window_from=5, seed=3)
  return Scenarios(REASONING, REQUESTS, **(how | changes))


def taken(stream, count):
  return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("share, asked", [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
@pytest.mark.parametrize("window_from", [0, 3])
def test_requests_come_in_the_window_alone_and_as_many_as_said(
  share, asked, window_from
):
  stream = scenarios(share=share, window_from=window_from)
  for i, rows in enumerate(taken(stream, 6)):
    assert rows.shape == (B,)
    assert ((rows >= 0) & (rows < REASONING + REQUESTS)).all()
    assert (rows >= REASONING).sum() == (asked if i >= window_from else 0)


def test_every_problem_comes_once_before_any_comes_again():
  """Of each kind, after any number of rollouts, no problem is a lap ahead."""
  stream, seen = scenarios(share=0.5), np.zeros(REASONING + REQUESTS, int)
  for rows in taken(stream, 60):
    np.add.at(seen, rows, 1)
    for kind in (seen[:REASONING], seen[REASONING:]):
      assert kind.max() - kind.min() <= 1
  assert seen.min() == 2 and seen[:REASONING].max() == 3


def test_laps_are_in_different_orders_and_depend_on_the_seed():
  def laps(seed):
    stream = scenarios(prompts=1, window_from=999, seed=seed)
    return np.concatenate(taken(stream, 3 * REASONING)).reshape(3, -1).tolist()

  ours = laps(3)
  assert all(sorted(lap) == list(range(REASONING)) for lap in ours)
  assert ours[0] != ours[1] != ours[2]
  assert ours == laps(3) != laps(4)


def test_requests_stand_anywhere_in_a_rollout():
  rows = np.array(taken(scenarios(window_from=0), 60))
  share = (rows >= REASONING).mean(axis=0)
  assert share.min() > 0.05 and share.max() < 0.6


@pytest.mark.parametrize("steps", [0, 4, 9])
def test_it_goes_on_exactly_from_its_state(steps):
  first = scenarios()
  taken(first, steps)
  kept = json.loads(json.dumps(first.get_state()))  # as a checkpoint holds it
  want = taken(first, 8)
  other = scenarios()
  taken(other, 7)  # wherever it stands
  other.set_state(kept)
  assert np.array_equal(taken(other, 8), want)
  assert other.get_state() == first.get_state()


def test_a_state_does_not_move_with_its_stream():
  stream = scenarios()
  taken(stream, 3)
  state = stream.get_state()
  before = json.dumps(state)
  taken(stream, 6)
  assert json.dumps(state) == before
  stream.set_state(state)
  taken(stream, 6)
  assert json.dumps(state) == before
