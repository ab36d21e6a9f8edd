"""GRPO: properties of whole steps and single updates (the loss: policy_loss_test.py).

The policy of the whole-step tests is one tiny layer (tests/grpo_golden.py), and
programs are compiled once a module: on a small machine compiling takes all the time.
"""

import functools
import json
import re

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from trees import assert_same, host

from r1jax import grpo, sharding
from r1jax.errors import UserError
from r1jax.experience import Rows
from r1jax.objective import Objective
from r1jax.segments import make_segments

# -- the configuration -----------------------------------------------------------------


@pytest.mark.parametrize(
  "key, value",
  [
    ("group_size", 1),
    ("reference_refresh", 401),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("micro_batches", 0),
    ("max_tokens", 0),
    ("minibatches", 0),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
  ],
)
def test_config_refuses_what_cannot_work_and_names_it(key, value):
  with pytest.raises(UserError, match=key):
    grpo.GRPOConfig(**{key: value})


@pytest.mark.parametrize("how", [dict(top_k=5), dict(top_p=0.9)])
def test_truncated_sampling_without_its_support_in_the_ratio_is_refused(how):
  with pytest.raises(UserError, match="keep_sampling_mask=False"):
    grpo.GRPOConfig(keep_sampling_mask=False, **how)
  grpo.GRPOConfig(**how)
  grpo.GRPOConfig(keep_sampling_mask=False)


def test_a_group_of_one_is_refused_with_mean_and_std():
  with pytest.raises(UserError, match=r"group_size=1.*at least 2"):
    grpo.GRPOConfig(group_size=1)
  with pytest.raises(UserError, match=r"std_ddof=2.*group_size - 1 = 1"):
    grpo.GRPOConfig(group_size=2, objective=Objective(std_ddof=2))


def test_a_kl_term_without_a_reference_is_refused():
  state = golden.new_state(POLICY, reference=False)
  step = golden.make_step(POLICY)
  with pytest.raises(UserError, match=r"kl_coef=0\.04 needs a reference"):
    jax.eval_shape(step, state, golden.prompt_batch(), jax.random.key(7))


@pytest.mark.parametrize("buffer", [7.0, 0.01])
def test_an_overlong_buffer_that_does_not_fit_the_window_is_refused(buffer):
  with pytest.raises(UserError, match=r"overlong_buffer=.*1\.\.6"):
    grpo.GRPOConfig(max_tokens=6, objective=Objective(overlong_buffer=buffer))


# -- whole steps -----------------------------------------------------------------------

POLICY = golden.tiny_policy()
K = golden.CONFIG.minibatches


@pytest.fixture(scope="module")
def program():
  """The jitted whole step, its state donated."""
  return jax.jit(golden.counted(golden.make_step(POLICY)), donate_argnums=0)


@pytest.fixture(scope="module")
def history(program):
  """Three steps: the states (host copies, the first included), rollouts, metrics, and
  the donated states, traces."""
  state = golden.new_state(POLICY)
  states, rollouts, metrics, donated, traces = [host(state)], [], [], [], []
  for _ in range(3):
    donated.append(state)
    state, rollout, figures, trace = program(
      state, golden.prompt_batch(), jax.random.key(7)
    )
    states.append(host(state))
    rollouts.append(host(rollout))
    metrics.append(golden.figures(figures))
    traces.append(host(trace))
  return states, rollouts, metrics, donated, traces


def test_three_steps_compile_once(program, history):
  assert len(program.__wrapped__.traces) == 1


def test_the_donated_state_is_gone(history):
  for state in history[3]:
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_the_program_never_talks_to_the_host(program, history):
  args = golden.new_state(POLICY), golden.prompt_batch(), jax.random.key(7)
  text = program.lower(*args).compile().as_text().lower()
  targets = re.findall(r'custom_call_target="([^"]*)"', text)
  assert not [t for t in targets if "callback" in t]
  assert not re.findall(r"\b(infeed|outfeed|send|recv)(?:-start|-done)?\(", text)
  assert "while(" in text  # the text is HLO and the search means something


def test_metrics_of_one_step_are_the_golden_ones(history):
  """If this fails: see the docstring of tests/grpo_golden.py."""
  want = json.loads(golden.PATH.read_text())
  got = history[2][0]
  assert set(got) == set(want)
  noise = {name for name in want if name.startswith("sampler_")}  # of rounding
  for name in sorted(set(want) - noise):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-3, err_msg=name)


def test_sampler_and_trainer_agree_on_logprobs(history):
  assert all(0 <= m["sampler_gap_max"] < 1e-4 for m in history[2])


def test_a_rollout_has_ended_and_truncated_rows(history):
  """What the other tests rest on: ragged rows of both kinds."""
  ended = history[1][0].ended
  assert ended.any() and not ended.all()
  assert len(set(history[1][0].mask.sum(-1).flatten().tolist())) > 2


def test_the_step_counts_updates(history):
  assert [int(s.step) for s in history[0]] == [0, K, 2 * K, 3 * K]


def test_the_reference_is_refreshed_every_n_updates_and_only_then(history):
  states = history[0]
  assert golden.CONFIG.reference_refresh == 2 * K
  assert_same(states[1].reference, states[0].reference)
  assert_same(states[2].reference.params, states[2].params)
  assert_same(states[2].reference.router, states[2].router)
  assert_same(states[3].reference, states[2].reference)
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states[2:]), strict=True)
  ]
  assert all(moved)


def test_kl_is_zero_right_after_a_refresh_and_positive_before(history):
  kl = [m["kl"] for m in history[2]]
  assert kl[0] > 0.01 and kl[1] > 0.01
  assert 0 < kl[2] < kl[1]  # zero in the first of the two updates, not in the second


def test_whole_step_is_a_pure_function(program, history):
  args = golden.prompt_batch(), jax.random.key(7)
  state, rollout, metrics, _ = program(golden.new_state(POLICY), *args)
  assert_same(host(state), history[0][1])
  assert_same(host(rollout), history[1][0])
  assert golden.figures(metrics) == history[2][0]


def test_another_key_or_another_step_gives_another_rollout(program, history):
  _, rollout, *_ = program(
    golden.new_state(POLICY), golden.prompt_batch(), jax.random.key(8)
  )
  assert not np.array_equal(rollout.tokens, history[1][0].tokens)
  later = golden.new_state(POLICY)
  later = later.replace(step=jnp.asarray(K, jnp.int32))
  _, rollout, *_ = program(later, golden.prompt_batch(), jax.random.key(7))
  assert not np.array_equal(rollout.tokens, history[1][0].tokens)


def test_a_problems_rollout_does_not_depend_on_its_place_in_the_batch(program, history):
  order = np.array([2, 0, 3, 1])
  batch = jax.tree.map(lambda x: x[order], golden.prompt_batch())
  _, rollout, *_ = program(golden.new_state(POLICY), batch, jax.random.key(7))
  assert np.array_equal(rollout.tokens, history[1][0].tokens[order])
  assert np.array_equal(rollout.ended, history[1][0].ended[order])


def test_segments_give_the_numbers_of_the_whole_step(history):
  pieces = make_segments(
    policy=POLICY,
    optimizer=golden.optimizer(),
    reward_fn=golden.reward_fn,
    config=golden.CONFIG,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
    segment_tokens=4,  # the last segment is shorter
  )
  state = golden.new_state(POLICY)
  for i in range(2):  # the second one refreshes the reference
    state, rollout, metrics, trace = pieces(
      state, golden.prompt_batch(), jax.random.key(7)
    )
    assert np.array_equal(rollout.tokens, history[1][i].tokens)
    assert np.array_equal(rollout.mask, history[1][i].mask)
    assert np.array_equal(rollout.ended, history[1][i].ended)
    assert_same(host(rollout), history[1][i], rtol=1e-4, atol=1e-5)
    assert_same(host(trace), history[4][i], rtol=1e-3, atol=1e-4)
    got = golden.figures(metrics)
    assert got.keys() == history[2][i].keys()
    for name, want in history[2][i].items():
      np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-5, err_msg=name)
  after = history[0][2]
  assert int(state.step) == 2 * K
  assert_same(host(state.router), after.router)
  assert_same(host(state.params), after.params, rtol=1e-3, atol=1e-3)
  assert_same(host(state.reference.params), host(state.params))


def test_equal_rewards_give_no_policy_gradient():
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    max_tokens=6,
    reference_refresh=0,
    objective=Objective(kl_coef=0.0),
  )
  step = jax.jit(golden.make_step(POLICY, config))
  batch = golden.prompt_batch()
  equal = batch.replace(answers=jnp.full_like(batch.answers, -1))
  before = golden.new_state(POLICY, reference=False)
  after, _, metrics, _ = step(before, equal, jax.random.key(7))
  assert float(metrics["equal_groups"]) == 1.0
  assert float(metrics["grad_norm"]) == 0.0
  np.testing.assert_allclose(float(metrics["reward"]), 0.1, rtol=1e-6)
  assert_same(host(after.params), host(before.params))  # weight decay is 0
  after, _, metrics, _ = step(before, batch, jax.random.key(7))
  assert float(metrics["equal_groups"]) < 1.0
  assert float(metrics["grad_norm"]) > 0.01


def test_without_a_kl_term_there_is_no_reference_to_refresh():
  """As the loop sets it up: kl_coef 0 means that the state's reference is None."""
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    max_tokens=6,
    reference_refresh=4,
    objective=Objective(kl_coef=0.0),
  )
  state = golden.new_state(POLICY, reference=False)
  step = golden.make_step(POLICY, config)
  after, *_ = jax.eval_shape(step, state, golden.prompt_batch(), jax.random.key(7))
  assert after.reference is None


# -- one update ------------------------------------------------------------------------


def training_rows(count=8, prompt=5, tokens=6, seed=0):
  """Rows with every raggedness: full and one-token completions, short prompts."""
  rng = np.random.default_rng(seed)
  prompt_lengths = 1 + np.arange(count) % prompt
  lengths = np.array([tokens, 1, 3, 2, tokens, 4, 1, 5])[:count]
  prompt_mask = np.arange(prompt)[None] >= prompt - prompt_lengths[:, None]
  mask = np.arange(tokens)[None] < lengths[:, None]
  near = np.where(mask, -2.7 + 0.3 * rng.normal(size=mask.shape), 0.0)
  other = np.where(mask, -2.7 + 0.3 * rng.normal(size=mask.shape), 0.0)
  draw = functools.partial(rng.integers, 3, golden.VOCAB)
  return Rows(
    prompts=jnp.asarray(np.where(prompt_mask, draw((count, prompt)), 0), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(np.where(mask, draw((count, tokens)), 0), jnp.int32),
    completion_mask=jnp.asarray(mask),
    in_loss=jnp.asarray(np.arange(count) != 4),  # a truncated output without a loss
    in_mean=jnp.ones(count, bool),
    sampler_logprobs=jnp.asarray(near, jnp.float32),
    old_logprobs=jnp.asarray(near, jnp.float32),
    reference_logprobs=jnp.asarray(other, jnp.float32),
    advantages=jnp.asarray(
      np.repeat(rng.normal(size=(count, 1)), tokens, 1), jnp.float32
    ),
    place=jnp.arange(count, dtype=jnp.int32),
  )


AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")


def update_program(micro_batches=1, aggregation="seq-mean-token-mean"):
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    micro_batches=micro_batches,
    max_tokens=6,
    reference_refresh=0,
    router_bias_rate=0.5,
    balance_coef=0.1,
    objective=Objective(
      clip_low=0.2, clip_high=0.2, kl_coef=0.04, aggregation=aggregation
    ),
  )
  # plain descent: AdamW would blow rounding of tiny gradients up to its step size
  return jax.jit(
    functools.partial(
      grpo.update, policy=POLICY, optimizer=PLAIN_DESCENT, config=config
    )
  )


class _Descent:
  """params - gradient, as an optax transformation."""

  @staticmethod
  def init(params):
    return ()

  @staticmethod
  def update(grads, state, params):
    return jax.tree.map(jnp.negative, grads), state


PLAIN_DESCENT = _Descent()


def update_state():
  params, router = golden.weights(POLICY)
  return grpo.TrainState(jnp.zeros((), jnp.int32), params, router, (), None)


@pytest.fixture(scope="module", params=AGGREGATIONS)
def updated(request):
  program = update_program(aggregation=request.param)
  state, metrics, per_token = program(update_state(), training_rows())
  return (
    program,
    host(state),
    golden.figures(metrics),
    host(per_token["logprobs"]),
    request.param,
  )


def same_update(got, want_state, want_metrics, want_logprobs):
  """Parameters, router biases and metrics; per-token figures where both have them."""
  state, metrics, per_token = got
  assert_same(host(state.params), want_state.params, rtol=1e-4, atol=2e-5)
  assert_same(host(state.router), want_state.router)
  for name, x in golden.figures(metrics).items():
    np.testing.assert_allclose(
      x, want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )
  width = want_logprobs.shape[1]
  np.testing.assert_allclose(
    per_token["logprobs"][:, :width], want_logprobs, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_an_update_is_invariant_to_micro_batches(updated, micro_batches):
  """8x1, 4x2, 2x4 and 1x8 rows: the same gradient, for every aggregation."""
  got = update_program(micro_batches, updated[4])(update_state(), training_rows())
  same_update(got, *updated[1:4])


def test_an_update_is_invariant_to_the_order_of_rows(updated):
  order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
  rows = jax.tree.map(lambda x: x[order], training_rows())
  program, state, metrics, logprobs, _ = updated
  same_update(program(update_state(), rows), state, metrics, logprobs[order])


def test_an_update_is_invariant_to_padding_on_both_sides(updated):
  def pad(x, left, right, value=0):
    return jnp.pad(x, ((0, 0), (left, right)), constant_values=value)

  rows = training_rows()
  padded = rows.replace(
    prompts=pad(rows.prompts, 3, 0, 9),
    prompt_mask=pad(rows.prompt_mask, 3, 0),
    completions=pad(rows.completions, 0, 2, 9),
    completion_mask=pad(rows.completion_mask, 0, 2),
    sampler_logprobs=pad(rows.sampler_logprobs, 0, 2, -5),
    old_logprobs=pad(rows.old_logprobs, 0, 2, -5),
    reference_logprobs=pad(rows.reference_logprobs, 0, 2, -5),
    advantages=pad(rows.advantages, 0, 2, 7),
  )
  same_update(updated[0](update_state(), padded), *updated[1:4])


@pytest.mark.parametrize("cut", [2, 8])
def test_an_update_is_invariant_to_the_number_of_devices(updated, cut):
  program, want, metrics, logprobs, _ = updated
  mesh = mesh_of((cut, 1, 1), jax.devices()[:cut])
  with jax.set_mesh(mesh):
    rows = jax.device_put(training_rows(), sharding.batch_sharding(mesh))
    state = jax.device_put(update_state(), sharding.replicated(mesh))
    got = program(state, rows)
  same_update(got, want, metrics, logprobs)


def test_router_biases_move_by_the_load_and_the_optimizer_leaves_them(updated):
  """Every bias moves by the rate, up or down (or not, at the mean load)."""
  moved = np.concatenate([x.ravel() for x in jax.tree.leaves(updated[1].router)])
  assert set(np.abs(moved).tolist()) <= {0.0, 0.5}
  assert (moved > 0).any() and (moved < 0).any()


def test_router_biases_move_after_every_minibatch(history):
  rate = golden.CONFIG.router_bias_rate
  biases = [
    np.concatenate([x.ravel() for x in jax.tree.leaves(s.router)]) for s in history[0]
  ]
  assert (biases[0] == 0).all()
  steps = np.diff(np.stack(biases), axis=0) / rate  # over K = 2 minibatches
  assert (np.abs(steps) < K + 1e-3).all()
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
  assert (np.abs(steps) > 1.5).any()  # both minibatches of a step moved it


def test_adam_keeps_no_moments_of_router_biases(history):
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(history[0][0].opt_state)
  ]
  assert names and not [n for n in names if "bias" in n]
