"""Reward models: what is read, losses and gradients against NumPy, updates of a tiny
network (tests/grpo_golden.py), and a preference that is learned."""

import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_same, host

from r1jax import reward_model, train_state
from r1jax.errors import UserError
from r1jax.evals import calibration
from r1jax.models.sequence import Sequence
from r1jax.models.value import Value, from_policy
from r1jax.reward_model import Labelled, Pairs, Responses

END, STOP, PAD = 3, 2, golden.PAD  # "</think>", end of the answer, padding
P, T, M = 4, 8, 8
POLICY = golden.tiny_policy()
VALUE = Value(POLICY.config)
HIDDEN = jax.jit(lambda *args: POLICY.apply(*args).hidden)
WEIGHTS = from_policy(*golden.weights(POLICY), POLICY.config.width)
VIEWS = ["all", "summary"]


def responses_of(rows):
  """Responses from (prompt tokens, completion tokens); what is masked is garbage."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, golden.VOCAB, (len(rows), P + T)).astype(np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, (prompt, completion) in enumerate(rows):
    here = slice(P - len(prompt), P + len(completion))
    tokens[i, here], mask[i, here] = [*prompt, *completion], True
  parts = tokens[:, :P], mask[:, :P], tokens[:, P:], mask[:, P:]
  return Responses(*map(jnp.asarray, parts))


# (prompt, completion, the completion's tokens that a summary keeps)
CASES = [
  ([5, 6], [7, END, 8, 9, STOP], [0, 0, 1, 1, 1]),
  ([5, 6, 7, 8], [7, 7, 9, 9, END, END, 8, STOP], [0, 0, 0, 0, 0, 0, 1, 1]),
  ([5], [END, 8, END, 9], [0, 0, 0, 1]),  # the last one counts
  ([9, 9, 9], [END, END, STOP], [0, 0, 1]),
  ([5, END, 6], [7, 8, 9], [0, 0, 0]),  # one in the prompt does not
  ([5, 6], [7, 8, END], [0, 0, 0]),  # nothing follows
  ([5, 6], [], []),
  ([4], [STOP], [0]),
]
SOME = responses_of([case[:2] for case in CASES])


def with_head(seed=4):
  """The weights with a head that is not zero."""
  head = 0.2 * np.random.default_rng(seed).normal(size=POLICY.config.width)
  return {**WEIGHTS[0], "value_head": jnp.asarray(head, jnp.float32)}


@pytest.fixture(scope="module")
def scores_of():
  """(params, responses, view) -> [M]."""

  def scores(params, responses, view):
    return reward_model.score(VALUE, params, WEIGHTS[1], responses, view, END)

  return jax.jit(scores, static_argnums=2)


# -- what is read ----------------------------------------------------------------------


def test_a_summary_is_what_follows_the_last_end_of_thinking():
  every, summary = (np.asarray(reward_model.read(SOME, v, END)) for v in VIEWS)
  for i, (prompt, completion, kept) in enumerate(CASES):
    left, right = [False] * (P - len(prompt)), [False] * (T - len(completion))
    both = [True] * len(prompt)
    assert [*every[i]] == [*left, *both, *[True] * len(completion), *right]
    assert [*summary[i]] == [*left, *both, *map(bool, kept), *right]


def test_an_end_of_thinking_after_the_completion_does_not_count():
  padded = jnp.where(SOME.completion_mask, SOME.completions, END)
  got = reward_model.read(SOME.replace(completions=padded), "summary", END)
  assert np.array_equal(got, reward_model.read(SOME, "summary", END))


def test_there_are_two_views():
  with pytest.raises(UserError, match=r"'answer'.*not one of all, summary.*'summary'"):
    reward_model.read(SOME, "answer", END)


# -- scores ----------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_a_score_is_the_heads_product_with_the_last_hidden_state_of_what_is_read(
  view, scores_of
):
  """Against the policy on rows that hold the kept tokens alone."""
  rows = []
  for prompt, completion, kept in CASES:
    keep = kept if view == "summary" else [1] * len(completion)
    rows.append([*prompt, *(t for t, k in zip(completion, keep, strict=True) if k)])
  tokens, mask = np.full((M, P + T), PAD), np.zeros((M, P + T), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  params = with_head()
  variables = {"params": params["policy"], "router": WEIGHTS[1]["policy"]}
  seq = Sequence.of_mask(jnp.asarray(mask))
  hidden = HIDDEN(variables, jnp.asarray(tokens, jnp.int32), seq)
  last = np.asarray(hidden, np.float64)[range(M), mask.sum(1) - 1]
  got = scores_of(params, SOME, view)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, last @ np.asarray(params["value_head"]), rtol=1e-4, atol=1e-5
  )


def test_every_score_is_0_at_first(scores_of):
  assert np.array_equal(scores_of(WEIGHTS[0], SOME, "all"), np.zeros(M))


def test_a_summarys_score_is_the_same_whatever_was_thought(scores_of):
  summary = [8, 9, STOP]
  thoughts = [[END], [4, END], [9, 9, END], [12, END, 4, END], [5, 5, 6, 7, END]]
  thoughts += [[END, END], [15, END], [4, 4, END]]
  rows = responses_of([([5, 6], [*thought, *summary]) for thought in thoughts])
  got = np.asarray(scores_of(with_head(), rows, "summary"))
  np.testing.assert_allclose(got, got[0], rtol=1e-5)
  everything = np.asarray(scores_of(with_head(), rows, "all"))
  assert min(np.diff(np.unique(everything))) > 1e-4
  assert len(np.unique(everything)) == len(thoughts)


def test_changing_the_thinking_changes_no_bit_of_a_summarys_score(scores_of):
  dropped = ~reward_model.read(SOME, "summary", END)[:, P:]
  other = dropped & (SOME.completions != END)
  changed = SOME.replace(completions=jnp.where(other, 15, SOME.completions))
  before, after = (scores_of(with_head(), r, "summary") for r in (SOME, changed))
  assert np.array_equal(before, after)
  before, after = (scores_of(with_head(), r, "all") for r in (SOME, changed))
  thought = (other & SOME.completion_mask).any(axis=1)
  assert np.array_equal(np.abs(before - after) > 1e-4, thought)


# -- losses ----------------------------------------------------------------------------


def sigmoid(x):
  return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))


def loss_case(seed=0, n=9):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(2, n)) * [[3.0], [1.0]]
  scores[1, 2] = scores[0, 2]  # a tie
  valid = rng.random(n) < 0.7
  valid[2] = True
  return *scores, rng.random(n) < 0.5, valid


def test_the_pairwise_loss_and_its_gradient_equal_numpy():
  for seed in range(3):
    chosen, rejected, _, valid = loss_case(seed)
    n, gap = valid.sum(), chosen - rejected
    with jax.enable_x64(True):
      grad = jax.value_and_grad(reward_model.pairwise_loss, (0, 1), has_aux=True)
      arrays = map(jnp.asarray, (chosen, rejected, valid, n))
      (loss, metrics), (to_chosen, to_rejected) = grad(*arrays)
    np.testing.assert_allclose(loss, -np.log(sigmoid(gap))[valid].mean(), rtol=1e-12)
    want = np.where(valid, -sigmoid(-gap) / n, 0.0)  # d/dx -log sigmoid(x)
    np.testing.assert_allclose(to_chosen, want, rtol=1e-12)
    np.testing.assert_allclose(to_rejected, -want, rtol=1e-12)
    assert metrics["loss"] == loss
    np.testing.assert_allclose(metrics["margin"], gap[valid].mean(), rtol=1e-12)
    accuracy = calibration.pairwise_accuracy(chosen[valid], rejected[valid])
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-12)
    mean_score = np.concatenate([chosen[valid], rejected[valid]]).mean()
    np.testing.assert_allclose(metrics["score_mean"], mean_score, rtol=1e-12)


def test_the_pointwise_loss_and_its_gradient_equal_numpy():
  for seed in range(3):
    scores, _, safe, valid = loss_case(seed)
    scores[2], p = 0.0, sigmoid(scores)
    p[2] = 0.5
    with jax.enable_x64(True):
      grad = jax.value_and_grad(reward_model.pointwise_loss, has_aux=True)
      arrays = map(jnp.asarray, (scores, safe, valid, valid.sum()))
      (loss, metrics), gradient = grad(*arrays)
    entropy = -(safe * np.log(p) + (1 - safe) * np.log(1 - p))
    np.testing.assert_allclose(loss, entropy[valid].mean(), rtol=1e-10)
    want = np.where(valid, (p - safe) / valid.sum(), 0.0)
    np.testing.assert_allclose(gradient, want, rtol=1e-10, atol=1e-16)
    right = np.where(p == 0.5, 0.5, (p > 0.5) == safe)[valid].mean()
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-12)
    np.testing.assert_allclose(metrics["score_mean"], scores[valid].mean(), rtol=1e-12)
    margin = ((2 * safe - 1) * scores)[valid].mean()
    np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-12)


def losses(big, valid=True):
  """Both losses of a margin, (value, gradient), in float32."""
  one, valid = jnp.ones(1), jnp.full(1, valid)
  pair = jax.value_and_grad(
    lambda x: reward_model.pairwise_loss(x * one, -x * one, valid, 1)[0]
  )
  point = jax.value_and_grad(
    lambda x: reward_model.pointwise_loss(2 * x * one, one > 0, valid, 1)[0]
  )
  return [pair(big / 2), point(big / 2)]


@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_losses_stay_numbers_at_any_size(size):
  for loss, gradient in losses(size):
    assert (loss, gradient) == (0.0, 0.0)
  for loss, gradient in losses(-size):
    np.testing.assert_allclose([loss, gradient], [size, -2.0], rtol=1e-6)


def test_a_score_of_a_row_without_a_loss_has_no_say_even_if_it_is_no_number():
  assert [loss for loss, _ in losses(jnp.nan, valid=False)] == [0.0, 0.0]
  chosen, rejected, safe, valid = map(jnp.asarray, loss_case())
  spoilt = jnp.where(valid, chosen, jnp.nan)
  count = valid.sum()
  for function, other in (
    (reward_model.pairwise_loss, rejected),
    (reward_model.pointwise_loss, safe),
  ):
    grad = jax.value_and_grad(function, has_aux=True)
    assert_same(grad(chosen, other, valid, count), grad(spoilt, other, valid, count))


# -- updates ---------------------------------------------------------------------------

RATE = 0.3
OPTIMIZER = optax.sgd(RATE, momentum=0.5)
GOOD, BAD = 10, 11  # what the trivial preference is about


def responses(seed, good):
  """M responses that think, at random, and say GOOD or BAD among other things."""
  rng, rows = np.random.default_rng(seed), []
  for i in range(M):
    thought = rng.integers(4, 12, rng.integers(0, 3))
    said = [*rng.integers(4, 10, rng.integers(1, 3)), GOOD if good[i] else BAD, STOP]
    rows.append((rng.integers(4, 10, rng.integers(1, P + 1)), [*thought, END, *said]))
  return responses_of(rows)


VALID = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
SAFE = np.array([1, 0, 0, 1, 1, 0, 0, 1], bool)


def pairs(seed=0, valid=VALID):
  yes, no = np.ones(M, bool), np.zeros(M, bool)
  return Pairs(responses(seed, yes), responses(seed, no), jnp.asarray(valid))


def labelled(seed=0, valid=VALID):
  return Labelled(responses(seed, SAFE), jnp.asarray(SAFE), jnp.asarray(valid))


def new_state(params=None):
  params = WEIGHTS[0] if params is None else params
  return train_state.restart(params, WEIGHTS[1], OPTIMIZER, reference=False)


KINDS = {
  "pairwise": (reward_model.pairwise_step, pairs, "summary"),
  "pointwise": (reward_model.pointwise_step, labelled, "all"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
  """(step, its batches): the step takes (state, batch, micro_batches)."""
  step, batch, view = KINDS[request.param]
  how = dict(value=VALUE, optimizer=OPTIMIZER, view=view, end_think_id=END)

  @functools.partial(jax.jit, static_argnums=2)
  def program(state, batch, micro_batches):
    return step(state, batch, **how, micro_batches=micro_batches)

  return lambda state, batch, n=1: program(state, batch, n), batch


def gradient(before, after):
  """Of a first step of SGD."""
  return jax.tree.map(
    lambda a, b: (a - b) / RATE, host(before.params), host(after.params)
  )


def test_parts_of_a_batch_add_up(kind):
  """Invalid rows fall into the parts unevenly: 5 and 7 are of the second one."""
  step, batch = kind
  state = new_state(with_head())
  whole, in_two = (step(state, batch(), n) for n in (1, 2))
  assert_same(*(gradient(state, x[0]) for x in (in_two, whole)), rtol=1e-4, atol=1e-5)
  assert_same(in_two[1], whole[1], rtol=1e-4)
  assert whole[1]["grad_norm"] > 0.1


def test_rows_that_fill_up_a_batch_have_no_say(kind):
  step, batch = kind
  state, other = new_state(with_head()), batch(seed=1)
  mixed = jax.tree.map(
    lambda a, b: jnp.where(VALID.reshape(-1, *[1] * (a.ndim - 1)), a, b), batch(), other
  ).replace(valid=jnp.asarray(VALID))
  assert not np.array_equal(*(jax.tree.leaves(b)[0] for b in (mixed, batch())))
  assert_same(step(state, mixed), step(state, batch()))


def test_a_batch_without_a_loss_moves_nothing(kind):
  step, batch = kind
  state, _ = step(new_state(with_head()), batch())
  after, metrics = step(state, batch(valid=np.zeros(M, bool)))
  assert_same(after.replace(step=state.step), state)  # nor does momentum
  assert all(x == 0 for x in metrics.values()) and after.step == 2


def test_at_first_a_model_is_as_good_as_a_coin_and_its_head_alone_moves(kind):
  step, batch = kind
  state = new_state()
  after, metrics = step(state, batch())
  np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
  assert [metrics[k] for k in ("accuracy", "margin", "score_mean")] == [0.5, 0, 0]
  assert_same(after.params["policy"], state.params["policy"])
  assert np.abs(gradient(state, after)["value_head"]).max() > 0.01
  assert_same(after.router, state.router)
  assert after.reference is None and after.step == 1


def test_the_gradient_of_the_whole_network_predicts_its_loss(kind):
  """Central differences along the gradient g, whose slope is |g|^2."""
  step, batch = kind
  state = new_state(with_head())
  after, metrics = step(state, batch())
  g = gradient(state, after)
  size = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(g)))
  np.testing.assert_allclose(metrics["grad_norm"], size, rtol=1e-3)
  eps = 1e-3 / size

  def loss_at(by):
    moved = jax.tree.map(lambda x, d: x + np.float32(by) * d, host(state.params), g)
    return float(step(new_state(moved), batch())[1]["loss"])

  slope = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
  np.testing.assert_allclose(slope, size**2, rtol=1e-2)


def test_the_heads_gradient_equals_a_linear_models(kind):
  """In closed form, with the last hidden states for features."""
  step, batch = kind
  state, b = new_state(with_head()), batch()
  variables = {"params": state.params["policy"], "router": WEIGHTS[1]["policy"]}

  def features(responses, view):
    keep = np.asarray(reward_model.read(responses, view, END))
    tokens = jnp.concatenate([responses.prompts, responses.completions], axis=1)
    hidden = HIDDEN(variables, tokens, Sequence.of_mask(jnp.asarray(keep)))
    last = [row.nonzero()[0][-1] for row in keep]
    return np.asarray(hidden, np.float64)[range(M), last]

  head, n = np.asarray(state.params["value_head"], np.float64), VALID.sum()
  if isinstance(b, Pairs):
    x = features(b.chosen, "summary") - features(b.rejected, "summary")
    pull = -sigmoid(-x @ head)
  else:
    x = features(b.responses, "all")
    pull = sigmoid(x @ head) - SAFE
  want = (VALID * pull / n) @ x
  got = gradient(state, step(state, b)[0])["value_head"]
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_an_embedding_has_a_gradient_where_its_token_is_read_and_nowhere_else(kind):
  """Token 15 is thought alone; padding and rows without a loss hold others."""
  step, batch = kind
  b, state = batch(), new_state(with_head())
  view = "summary" if isinstance(b, Pairs) else "all"
  read = set()

  def thinking(responses):
    thought = ~reward_model.read(responses, "summary", END)[:, P:]
    thought &= responses.completion_mask & (responses.completions != END)
    completions = jnp.where(thought, 15, responses.completions)
    tokens = np.concatenate([responses.prompts, completions], axis=1)
    keep = np.asarray(reward_model.read(responses, view, END)) & VALID[:, None]
    read.update(tokens[keep].tolist())
    return responses.replace(completions=completions)

  if view == "summary":
    b = b.replace(chosen=thinking(b.chosen), rejected=thinking(b.rejected))
  else:
    b = b.replace(responses=thinking(b.responses))
  embedding = gradient(state, step(state, b)[0])["policy"]["embedding"]
  moved = np.abs(embedding).max(axis=1).nonzero()[0]
  assert set(moved.tolist()) == read
  assert {GOOD, BAD, STOP} <= read and ({15, END} <= read) == (view == "all")


def test_a_trivial_preference_is_learned_and_holds_for_new_responses(kind):
  step, batch = kind
  everything, state, history = np.ones(M, bool), new_state(), []
  for i in range(40):
    state, metrics = step(state, batch(seed=i, valid=everything))
    history.append(golden.figures(metrics))
  _, unseen = step(state, batch(seed=99, valid=everything))
  assert history[0]["accuracy"] == 0.5
  assert unseen["accuracy"] == 1.0 and unseen["loss"] < 0.2 and unseen["margin"] > 1.5
  assert_same(host(state.router), host(WEIGHTS[1]))
