"""What is shown of a step: single tokens as the update saw them, percentiles, extremes,
and the page of tokens."""

import dataclasses
import functools
import json

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from r1jax import diagnostics, dynamic_sampling, grpo, token_report
from r1jax.data.tokenizer import Tokenizer
from r1jax.dynamic_sampling import all_of
from r1jax.experience import completion_logprobs, rows_of
from r1jax.html_report import excerpt
from r1jax.objective import Objective
from r1jax.policy_loss import Totals, policy_loss
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout

POLICY = golden.tiny_policy()
G, K, TRACED = 4, 2, 2
# Bounds so near to 1 that the second update clips many tokens on both sides.
CLIPS = dict(clip_low=0.01, clip_high=0.01)
CONFIG = grpo.GRPOConfig(
  group_size=G,
  minibatches=K,
  max_tokens=6,
  reference_refresh=0,
  traced_groups=TRACED,
  objective=Objective(kl_coef=0.0, dual_clip=1.02, **CLIPS),
)


def fake_rollout(mask, seed=0) -> Rollout:
  """Random tokens under a mask [B, G, T]."""
  rng = np.random.default_rng(seed)
  tokens = np.where(mask, rng.integers(4, golden.VOCAB, mask.shape), golden.PAD)
  near = np.where(mask, -2.7 + 0.02 * rng.normal(size=mask.shape), 0.0)
  return Rollout(
    tokens=jnp.asarray(tokens, jnp.int32),
    mask=jnp.asarray(mask),
    logprobs=jnp.asarray(near, jnp.float32),
    entropy=jnp.zeros(mask.shape),
    ended=jnp.ones(mask.shape[:2], bool),
  )


def ragged(batch, group, width, seed=0):
  lengths = np.random.default_rng(seed).integers(1, width + 1, (batch, group))
  return np.arange(width) < lengths[..., None]


# -- single tokens ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
  """(trace, what direct calls of the policy loss say of each output): a step's updates
  on random tokens, whose old log-probabilities are those of the policy and some noise.
  """
  prompts = golden.prompt_batch()
  rollout = fake_rollout(ragged(4, G, 6))
  rewards = golden.reward_fn(prompts, rollout)
  state = golden.new_state(POLICY, reference=False)
  experience = functools.partial(grpo.experience, policy=POLICY, config=CONFIG)
  update = functools.partial(
    grpo.update, policy=POLICY, optimizer=golden.optimizer(), config=CONFIG
  )

  @jax.jit
  def direct(state, rows):
    logprobs, _ = completion_logprobs(POLICY, state.params, state.router, rows, 1.0)
    o, totals = CONFIG.objective, Totals.of(rows)
    _, (_, per_token) = policy_loss(logprobs, rows, o, totals, window=6)
    return logprobs, per_token["clipped"]

  slots = all_of(prompts, rollout, rewards)
  rows, _ = jax.jit(experience)(state, slots, jax.random.key(7))
  update, per_token, want = jax.jit(update), [], {}
  for i in range(K):
    part = jax.tree.map(lambda x, i=i: x[i], rows)
    logprobs, clipped = direct(state, part)
    state, _, found = update(state, part)
    per_token.append(found)
    for j, place in enumerate(part.place.tolist()):
      row = jax.tree.map(lambda x, j=j: np.asarray(x[j]), part)
      want[place] = row, np.asarray(logprobs[j]), np.asarray(clipped[j])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *per_token)
  trace = diagnostics.trace(rows, stacked, slots, TRACED * G)
  return jax.tree.map(np.asarray, trace), want, slots


def test_a_trace_holds_the_first_groups_in_their_order(traced):
  trace, _, slots = traced
  assert np.array_equal(trace.place, np.arange(TRACED * G))
  first = jax.tree.map(
    lambda x: np.asarray(x)[:TRACED].reshape(TRACED * G, *x.shape[2:]), slots.rollout
  )
  assert np.array_equal(trace.tokens, first.tokens)
  assert np.array_equal(trace.mask, first.mask)
  assert np.array_equal(trace.old_logprobs, first.logprobs)
  asked = np.repeat(np.asarray(slots.prompts.tokens)[:TRACED], G, axis=0)
  assert np.array_equal(trace.prompts, asked)


def test_a_trace_has_what_each_output_was_rewarded_for(traced):
  trace, _, slots = traced
  rewards = slots.rewards
  assert np.array_equal(trace.reward, np.ravel(rewards.total[:TRACED]))
  assert set(trace.parts) == set(rewards.parts) and trace.parts
  for name, part in rewards.parts.items():
    assert np.array_equal(trace.parts[name], np.ravel(part[:TRACED]))


def test_a_trace_says_what_the_loss_said(traced):
  trace, want, _ = traced
  for i, place in enumerate(trace.place.tolist()):
    row, logprobs, clipped = want[place]
    kept = row.completion_mask & row.in_loss
    assert np.array_equal(trace.mask[i], kept)
    np.testing.assert_allclose(
      trace.logprobs[i][kept], logprobs[kept], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      trace.ratio[i][kept], np.exp(logprobs - row.old_logprobs)[kept], rtol=1e-5
    )
    assert np.array_equal(trace.advantages[i], row.advantages)
    assert np.array_equal(trace.clipped[i], clipped)
    assert (trace.logprobs[i][~kept] == 0).all() and (
      trace.clipped[i][~kept] == 0
    ).all()


def test_clip_flags_are_those_of_the_oracle(traced):
  trace = traced[0]
  flags = oracle.clip_flags(
    *(trace.logprobs, trace.old_logprobs, trace.mask, np.ones(TRACED * G, bool)),
    trace.advantages,
    dual_clip=1.02,
    **CLIPS,
  )
  want = np.zeros(trace.mask.shape, int)
  for code, side in enumerate(("low", "high", "cap"), start=1):
    want[flags[side]] = code
    assert flags[side].any()  # else it is no test
  assert np.array_equal(trace.clipped, want)
  assert trace.clipped.dtype == np.int8


def test_no_traced_group_is_an_empty_trace():
  mask = ragged(1, 2, 3)
  slots = all_of(
    golden.prompt_batch(1), fake_rollout(mask), Rewards.of(x=(1.0, jnp.zeros((1, 2))))
  )
  rows = jax.tree.map(lambda x: x[None], rows_of(slots.prompts, slots.rollout))
  zeros = {name: jnp.zeros((1, 2, 3)) for name in ("logprobs", "ratio", "clipped")}
  assert diagnostics.trace(rows, zeros, slots, 0).tokens.shape == (0, 3)
  everything = diagnostics.trace(rows, zeros, slots, 100)  # more than there is
  assert np.array_equal(everything.place, [0, 1])


# -- a batch ---------------------------------------------------------------------------


def batch_of(filled, seed=0, added=True):
  """(slots, rewards after shaping, advantages) of B groups; empty slots are zeros."""
  rng, filled = np.random.default_rng(seed), np.asarray(filled)
  batch = len(filled)
  mask = ragged(batch, 3, 7, seed)
  reward = jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32)
  slots = all_of(
    golden.prompt_batch(batch), fake_rollout(mask, seed), Rewards.of(rule=(1.0, reward))
  )

  def blank(x):
    keep = filled.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep, x, jnp.zeros((), x.dtype))

  slots = slots.replace(
    prompts=jax.tree.map(blank, slots.prompts),
    rollout=jax.tree.map(blank, slots.rollout),
    rewards=jax.tree.map(blank, slots.rewards),
    filled=jnp.asarray(filled),
    waves=jnp.asarray(3),
    dropped=jnp.asarray(5),
    surplus=jnp.asarray(2),
  )
  extra = jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32)
  rewards = slots.rewards.plus("overlong", 1.0, extra) if added else slots.rewards
  advantages = np.float32(rng.normal(size=(batch * 3, 7)))
  return slots, rewards, advantages


FILLS = [[True] * 5, [True, True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("filled", FILLS, ids=sum)
def test_percentiles_are_numpys_over_the_groups_that_are_trained_on(filled):
  slots, rewards, advantages = batch_of(filled)
  got = diagnostics.of_batch(slots, rewards, jnp.asarray(advantages))
  lengths = np.asarray(slots.rollout.lengths)[filled]
  for name, x in (("length", lengths), ("reward", np.asarray(rewards.total)[filled])):
    for percent in (10, 50, 90):
      np.testing.assert_allclose(
        got[f"{name}_p{percent}"], np.percentile(x, percent), rtol=1e-5, atol=1e-6
      )
  extra = np.asarray(rewards.parts["overlong"])[filled]
  np.testing.assert_allclose(got["overlong"], extra.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filled", FILLS, ids=sum)
def test_advantage_extremes_are_of_real_tokens_alone(filled):
  slots, rewards, advantages = batch_of(filled)
  mask = np.asarray(slots.rollout.mask).reshape(advantages.shape)
  spoilt = np.where(mask, advantages, 99.0 * np.sign(advantages))
  got = diagnostics.of_batch(slots, rewards, jnp.asarray(spoilt))
  assert got["advantage_max"] == advantages[mask].max()
  assert got["advantage_min"] == advantages[mask].min()


def test_what_dynamic_sampling_left_out_is_counted():
  slots, rewards, advantages = batch_of(FILLS[1])
  got = diagnostics.of_batch(slots, rewards, jnp.asarray(advantages))
  names = ("waves", "groups_dropped", "groups_surplus", "groups_empty")
  assert [float(got[name]) for name in names] == [3, 5, 2, 2]
  assert all(x.dtype == jnp.float32 and x.shape == () for x in got.values())


def test_means_over_all_that_was_sampled_are_kept_as_they_are():
  slots, rewards, advantages = batch_of(FILLS[1], added=False)
  got = diagnostics.of_batch(slots, rewards, jnp.asarray(advantages))
  for name, want in slots.figures.items():
    assert got[name] == want
  assert "rule" in slots.figures and "overlong" not in got


def test_a_batch_without_any_group_has_finite_figures():
  slots, rewards, advantages = batch_of([False] * 4)
  got = diagnostics.of_batch(slots, rewards, jnp.asarray(advantages))
  assert all(np.isfinite(x) for x in got.values())


def test_over_updates_takes_means_maxima_and_the_first_gap():
  per_update = {
    "loss": jnp.array([1.0, 3.0]),
    "ratio_max": jnp.array([1.0, 5.0]),
    "sampler_gap_max": jnp.array([0.25, 9.0]),
    "sampler_kl": jnp.array([0.5, 7.0]),
    "grad_norm": jnp.array([2.0, 4.0]),
  }
  got = {k: float(x) for k, x in diagnostics.over_updates(per_update).items()}
  assert got == {
    "loss": 2.0,
    "ratio_max": 5.0,
    "sampler_gap_max": 0.25,
    "sampler_kl": 0.5,
    "grad_norm": 3.0,
  }


def test_figures_are_of_a_whole_rollout():
  mask = ragged(3, 4, 6, seed=2)
  rollout = fake_rollout(mask)
  entropy = np.where(mask, np.random.default_rng(3).uniform(size=mask.shape), 0.0)
  ended = np.random.default_rng(4).uniform(size=(3, 4)) < 0.6
  rollout = rollout.replace(entropy=jnp.float32(entropy), ended=jnp.asarray(ended))
  part = np.float32([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
  rewards = Rewards.of(a=(0.5, jnp.asarray(part)), b=(2.0, jnp.ones((3, 4))))
  want = {
    "reward": 0.5 * part.mean() + 2,
    "a": part.mean(),
    "b": 1.0,
    "length": mask.sum(-1).mean(),
    "entropy": entropy[mask].mean(),
    "truncated": 1 - ended.mean(),
    "equal_groups": 2 / 3,
  }
  got = dynamic_sampling.figures(rollout, rewards)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-6, err_msg=name)


# -- the page of tokens ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
  texts = [f"<think>{i} & 7 = 'a' \"b\"</think><answer>{i}</answer>" for i in range(40)]
  return Tokenizer.train(texts, vocab=340, symbols=("<script>", "</script>"))


@pytest.fixture(scope="module")
def trace(tokenizer):
  """Two groups of two outputs: ragged, one ended by EOS, one without a loss."""
  texts = ["<script>alert(1)</script>", "<think>7 & 7</think>", "'\"", "<answer>9"]
  ids = [tokenizer.encode(text) for text in texts]
  ids[1].append(tokenizer.eos_id)
  width = max(map(len, ids))
  tokens, mask = np.zeros((4, width), np.int32), np.zeros((4, width), bool)
  for i, row in enumerate(ids):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  mask[3] = False  # masked out of the loss
  rng = np.random.default_rng(0)
  old = np.float32(-rng.gamma(2.0, 1.0, mask.shape))
  clipped = np.where(mask, rng.integers(0, 4, mask.shape), 0)
  assert set(clipped[mask]) == {0, 1, 2, 3}
  return diagnostics.Trace(
    tokens=tokens,
    mask=mask,
    logprobs=np.float32(old + 0.3 * rng.normal(size=mask.shape)),
    old_logprobs=old,
    ratio=np.float32(np.exp(rng.normal(size=mask.shape))),  # as of a whole output
    advantages=np.float32(rng.normal(size=(4, 1)) * np.ones(mask.shape)),
    clipped=clipped.astype(np.int8),
    place=np.arange(4, dtype=np.int32) + 2,  # groups 1 and 2
    reference_logprobs=np.float32(old + 0.2),
    prompts=np.array([[0, *tokenizer.encode("7")[-1:]]] * 4),
    prompt_mask=np.array([[False, True]] * 4),
    reward=np.float32([0.5, 1.0, 2.0, 0.0]),
    parts={"accuracy": np.float32([0, 1, 1, 0])},
    outcome=np.int32([1, 0, 0, 2]),
  )


@pytest.fixture(scope="module")
def asked(trace, tokenizer):
  """Two problems; the outputs are of the second."""
  prompts = trace.prompts[:2].copy()
  prompts[0, -1] += 1
  answers = np.full((2, 3, 16), -1, np.int32)
  for k, text in enumerate(("14", " 14", "7 + 7")):
    ids = tokenizer.encode(text)
    answers[1, k, : len(ids)] = ids
  ids = np.arange(2, dtype=np.int32)
  return PromptBatch(prompts, trace.prompt_mask[:2], answers, ids)


@pytest.fixture(scope="module")
def rows(trace, tokenizer, asked):
  return list(token_report.rows(trace, tokenizer, 2, asked))


def test_rows_say_which_output_they_are(rows):
  assert [(r["group"], r["sample"]) for r in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_rows_hold_every_token_of_the_loss_with_its_numbers(rows, trace):
  sides = ["", "low", "high", "cap"]
  for i, row in enumerate(rows):
    mask = trace.mask[i]
    columns = ("tokens", "logprob", "ratio", "advantage", "clipped")
    assert {len(row[c]) for c in columns} == {mask.sum()}
    for name, want in [
      ("logprob", trace.logprobs[i]),
      ("ratio", trace.ratio[i]),
      ("advantage", trace.advantages[i]),
    ]:
      np.testing.assert_allclose(row[name], want[mask], atol=6e-5)
    assert row["clipped"] == [sides[c] for c in trace.clipped[i][mask]]


def test_rows_say_what_was_asked_and_what_was_paid(rows):
  assert [row["reward"] for row in rows] == [0.5, 1.0, 2.0, 0.0]
  assert [row["parts"]["accuracy"] for row in rows] == [0, 1, 1, 0]
  outcomes = ["wrong", "correct", "correct", "unparsable"]
  assert [row["outcome"] for row in rows] == outcomes
  assert {row["problem"].strip() for row in rows} == {"7"}


def test_the_page_shows_the_accepted_answers_of_a_group(rows, tmp_path):
  assert {tuple(row["answers"]) for row in rows} == {("14", "7 + 7")}
  path = tmp_path / "tokens.jsonl"
  path.write_text("".join(json.dumps({"step": 2, **row}) + "\n" for row in rows))
  shown = excerpt.groups(path)["list"]
  assert [group["answers"] for group in shown] == [["14", "7 + 7"]] * 2


def test_kl_is_the_third_estimator_of_each_token(rows, trace, tokenizer, asked):
  for row, mask, logprobs, reference in zip(
    rows, trace.mask, trace.logprobs, trace.reference_logprobs, strict=True
  ):
    gap = np.float64(reference - logprobs)[mask]
    np.testing.assert_allclose(row.get("kl", []), np.expm1(gap) - gap, atol=1e-4)
  alone = dataclasses.replace(trace, reference_logprobs=0 * trace.logprobs)
  assert "kl" not in next(token_report.rows(alone, tokenizer, 2, asked))


def test_rows_come_back_through_json_and_their_texts_join(rows):
  assert json.loads(json.dumps(rows)) == rows
  assert "".join(rows[0]["tokens"]) == "<script>alert(1)</script>"
  assert "".join(rows[1]["tokens"]) == "<think>7 & 7</think></s>"  # EOS by its name
  assert rows[0]["tokens"][0] == "<script>"
  assert rows[3]["tokens"] == []


def test_rows_are_written_with_four_decimals(rows):
  for row in rows:
    for name in ("logprob", "ratio", "advantage"):
      assert all(len(str(x).partition(".")[2]) <= 4 for x in row[name])
