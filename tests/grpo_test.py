"""GRPO: loss and gradient against loops in NumPy, then properties of whole steps.

The policy of the whole-step tests is one tiny layer (tests/grpo_golden.py), and
programs are compiled once a module: on a small machine compiling takes all the time.
"""

import functools
import json
import re

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import grpo
from r1jax.errors import UserError
from r1jax.segments import make_segments

# -- the loss against loops ------------------------------------------------------------


def loss_by_hand(logprobs, old, reference, lengths, advantages, *, clip_eps, kl_coef):
  """(loss, gradient, metrics) with loops; the gradient is that of r1_facts 1.3.

  Differs: outside +-20 the log-ratios are clamped, so there the gradient of that term
  is 0 (m rho A and r - 1 would be e^20 or so).
  """
  rows = len(lengths)
  loss, gradient = 0.0, np.zeros_like(logprobs)
  kl_mean, clipped = 0.0, 0.0
  ratios = [1.0]
  for i, (count, a) in enumerate(zip(lengths, advantages, strict=True)):
    share = 1.0 / (max(count, 1) * rows)
    for t in range(count):
      log_ratio = logprobs[i, t] - old[i, t]
      rho = np.exp(min(max(log_ratio, -20.0), 20.0))
      bounded = min(max(rho, 1 - clip_eps), 1 + clip_eps)
      binds = (a > 0 and rho > 1 + clip_eps) or (a < 0 and rho < 1 - clip_eps)
      d = reference[i, t] - logprobs[i, t]
      r = np.exp(min(max(d, -20.0), 20.0))
      k3 = r - min(max(d, -20.0), 20.0) - 1
      loss -= share * (min(rho * a, bounded * a) - kl_coef * k3)
      push = 0.0 if binds or abs(log_ratio) > 20 else rho * a
      pull = 0.0 if abs(d) > 20 else r - 1
      gradient[i, t] = -share * (push + kl_coef * pull)
      kl_mean += share * k3
      clipped += share * binds
      ratios.append(rho)
  return loss, gradient, dict(kl=kl_mean, clip_fraction=clipped, ratio_max=max(ratios))


def loss_of(logprobs, old, reference, lengths, advantages, *, total=None, **how):
  """r1jax's (loss, gradient, metrics) for the same inputs; padding holds garbage."""
  width = logprobs.shape[1]
  rows = grpo.Rows(
    prompts=jnp.zeros((len(lengths), 1), jnp.int32),
    prompt_mask=jnp.ones((len(lengths), 1), bool),
    completions=jnp.zeros(logprobs.shape, jnp.int32),
    completion_mask=jnp.asarray(np.arange(width)[None] < np.asarray(lengths)[:, None]),
    old_logprobs=jnp.asarray(old),
    reference_logprobs=jnp.asarray(reference),
    advantages=jnp.asarray(advantages),
  )

  def loss_fn(x):
    return grpo.grpo_loss(x, rows, total_rows=total or len(lengths), **how)

  (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    jnp.asarray(logprobs)
  )
  return float(loss), np.asarray(gradient), {k: float(v) for k, v in metrics.items()}


def ragged(seed, spread, lengths):
  rng = np.random.default_rng(seed)
  shape = (len(lengths), 6)
  logprobs = -rng.gamma(2.0, 1.0, shape)
  old = logprobs + spread * rng.normal(size=shape)
  reference = logprobs + spread * rng.normal(size=shape)
  return logprobs, old, reference, np.asarray(lengths), rng.normal(size=len(lengths))


def compare(case, **how):
  loss, gradient, metrics = loss_of(*case, **how)
  want_loss, want_gradient, want_metrics = loss_by_hand(*case, **how)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-12)
  for name, want in want_metrics.items():
    # clip_fraction is counted in float32
    np.testing.assert_allclose(metrics[name], want, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("clip_eps", [10.0, 0.2])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_loss_and_gradient_equal_loops_on_ragged_rows(spread, clip_eps, kl_coef):
  with jax.enable_x64(True):
    for seed, lengths in enumerate([[6, 1, 3, 5], [1, 1, 1], [2, 6, 4, 1, 1]]):
      case = ragged(seed, spread, lengths)
      compare(case, clip_eps=clip_eps, kl_coef=kl_coef)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("clip_eps", [10.0, 0.2])
@pytest.mark.parametrize("advantage", [1.5, -0.7, 0.0])
@pytest.mark.parametrize("gap", [19.0, -19.0, 21.0, -21.0])
def test_extreme_log_ratios_equal_loops(gap, advantage, clip_eps, kl_coef):
  logprobs = np.full((1, 6), -1.0)
  case = (
    logprobs,
    logprobs - gap,
    logprobs + gap,
    np.array([2]),
    np.array([advantage]),
  )
  with jax.enable_x64(True):
    compare(case, clip_eps=clip_eps, kl_coef=kl_coef)


@pytest.mark.parametrize("gap", [21.0, -21.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_beyond_the_clamp_a_token_has_no_gradient_and_a_finite_loss(gap, advantage):
  logprobs = np.full((1, 6), -1.0, np.float32)
  how = dict(clip_eps=10.0, kl_coef=0.04)
  case = (
    logprobs,
    logprobs - gap,
    logprobs + gap,
    np.array([6]),
    np.array([advantage]),
  )
  loss, gradient, metrics = loss_of(*map(np.float32, case[:3]), *case[3:], **how)
  assert np.isfinite(loss)
  assert np.array_equal(gradient, np.zeros_like(gradient))
  assert metrics["sampler_gap_max"] == 21.0  # the gap itself is shown unclamped


def test_padding_has_no_say_and_no_gradient():
  case = ragged(0, 0.3, [2, 4, 1])
  with jax.enable_x64(True):
    how = dict(clip_eps=0.2, kl_coef=0.04)
    loss, gradient, _ = loss_of(*case, **how)
    outside = np.arange(6)[None] >= case[3][:, None]
    for garbage in (1e4, -1e4, -1e30):
      other = [np.where(outside, garbage, x) for x in case[1:3]]
      again = loss_of(case[0], *other, *case[3:], **how)
      assert again[0] == loss
      assert np.array_equal(again[1], gradient)
  assert np.array_equal(gradient[outside], np.zeros(outside.sum()))


def test_on_policy_loss_is_minus_the_mean_advantage_and_its_gradient_is_not_zero():
  logprobs = np.full((2, 6), -2.0)
  case = (logprobs, logprobs, logprobs, np.array([6, 2]), np.array([1.0, -1.0]))
  with jax.enable_x64(True):
    loss, gradient, _ = loss_of(*case, clip_eps=10.0, kl_coef=0.001)
  assert loss == 0
  np.testing.assert_allclose(gradient[0], -1 / 12)
  np.testing.assert_allclose(gradient[1, :2], 1 / 4)


@pytest.mark.parametrize(
  "advantage, ratio, clip_eps, fraction",
  [
    (1.0, 1.3, 0.2, 1.0),  # A > 0: only above 1 + eps
    (1.0, 0.7, 0.2, 0.0),
    (-1.0, 0.7, 0.2, 1.0),  # A < 0: only below 1 - eps
    (-1.0, 1.3, 0.2, 0.0),
    (0.0, 1.3, 0.2, 0.0),
    (1.0, 11.5, 10.0, 1.0),  # eps 10 has an upper side alone
    (1.0, 10.5, 10.0, 0.0),
    (-1.0, 1e-6, 10.0, 0.0),
    (-1.0, 1e6, 10.0, 0.0),
  ],
)
def test_clip_fraction_counts_the_side_that_binds(advantage, ratio, clip_eps, fraction):
  logprobs = np.zeros((1, 2), np.float32)
  old = logprobs - np.log(np.float32(ratio))
  case = (logprobs, old, logprobs, np.array([2]), np.array([advantage], np.float32))
  _, gradient, metrics = loss_of(*case, clip_eps=clip_eps, kl_coef=0.0)
  assert metrics["clip_fraction"] == fraction
  assert (gradient == 0).all() == (fraction == 1 or advantage == 0)


def test_micro_batches_losses_and_shares_add_up():
  case = ragged(3, 0.5, [6, 1, 3, 5])
  how = dict(clip_eps=0.2, kl_coef=0.04)
  with jax.enable_x64(True):
    loss, gradient, metrics = loss_of(*case, **how)
    parts = [loss_of(*(x[i::2] for x in case), total=4, **how) for i in range(2)]
  np.testing.assert_allclose(sum(p[0] for p in parts), loss)
  np.testing.assert_allclose(parts[0][1], gradient[0::2])
  np.testing.assert_allclose(parts[1][1], gradient[1::2])
  for name in ("loss", "kl", "clip_fraction"):
    np.testing.assert_allclose(sum(p[2][name] for p in parts), metrics[name], rtol=1e-6)
  for name in ("ratio_max", "sampler_gap_max"):
    assert max(p[2][name] for p in parts) == metrics[name]


def test_k3_is_never_negative_and_zero_where_the_policies_agree():
  d = jnp.linspace(-30.0, 30.0, 241)
  values = grpo.k3(jnp.zeros_like(d), d)
  assert (values >= 0).all() and np.isfinite(values).all()
  assert values[120] == 0


def test_over_minibatches_takes_means_maxima_and_the_first_gap():
  stacked = {
    "loss": jnp.array([1.0, 3.0]),
    "ratio_max": jnp.array([1.0, 5.0]),
    "sampler_gap_max": jnp.array([0.25, 9.0]),
    "grad_norm": jnp.array([2.0, 4.0]),
  }
  got = {k: float(v) for k, v in grpo.over_minibatches(stacked).items()}
  assert got == {
    "loss": 2.0,
    "ratio_max": 5.0,
    "sampler_gap_max": 0.25,
    "grad_norm": 3.0,
  }


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
  ],
)
def test_config_refuses_what_cannot_work_and_names_it(key, value):
  with pytest.raises(UserError, match=key):
    grpo.GRPOConfig(**{key: value})


# -- whole steps -----------------------------------------------------------------------

POLICY = golden.tiny_policy()
K = golden.CONFIG.minibatches


def host(tree):
  """Numbers that outlive donation."""
  return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(a, b, **tolerance):
  """Equal trees; bit for bit unless a tolerance is given."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    name = jax.tree_util.keystr(path)
    if tolerance:
      np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
    else:
      assert np.array_equal(x, y), name


@pytest.fixture(scope="module")
def program():
  """The jitted whole step, its state donated."""
  return jax.jit(golden.make_step(POLICY), donate_argnums=0)


@pytest.fixture(scope="module")
def history(program):
  """Three steps: the states (host copies, the first included), rollouts, metrics, and
  the donated states."""
  state = golden.new_state(POLICY)
  states, rollouts, metrics, donated = [host(state)], [], [], []
  for _ in range(3):
    donated.append(state)
    state, rollout, figures = program(state, golden.prompt_batch(), jax.random.key(7))
    states.append(host(state))
    rollouts.append(host(rollout))
    metrics.append(golden.figures(figures))
  return states, rollouts, metrics, donated


def test_three_steps_compile_once(program, history):
  assert program._cache_size() == 1


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
  for name in sorted(set(want) - {"sampler_gap_max"}):  # rounding noise
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
  state, rollout, metrics = program(golden.new_state(POLICY), *args)
  assert_same(host(state), history[0][1])
  assert_same(host(rollout), history[1][0])
  assert golden.figures(metrics) == history[2][0]


def test_another_key_or_another_step_gives_another_rollout(program, history):
  _, rollout, _ = program(
    golden.new_state(POLICY), golden.prompt_batch(), jax.random.key(8)
  )
  assert not np.array_equal(rollout.tokens, history[1][0].tokens)
  later = golden.new_state(POLICY)
  later = later.replace(step=jnp.asarray(K, jnp.int32))
  _, rollout, _ = program(later, golden.prompt_batch(), jax.random.key(7))
  assert not np.array_equal(rollout.tokens, history[1][0].tokens)


def test_a_problems_rollout_does_not_depend_on_its_place_in_the_batch(program, history):
  order = np.array([2, 0, 3, 1])
  batch = jax.tree.map(lambda x: x[order], golden.prompt_batch())
  _, rollout, _ = program(golden.new_state(POLICY), batch, jax.random.key(7))
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
    state, rollout, metrics = pieces(state, golden.prompt_batch(), jax.random.key(7))
    assert np.array_equal(rollout.tokens, history[1][i].tokens)
    assert np.array_equal(rollout.mask, history[1][i].mask)
    assert np.array_equal(rollout.ended, history[1][i].ended)
    assert_same(host(rollout), history[1][i], rtol=1e-4, atol=1e-5)
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
    group_size=4, minibatches=2, max_tokens=6, kl_coef=0.0, reference_refresh=0
  )
  step = jax.jit(golden.make_step(POLICY, config))
  batch = golden.prompt_batch()
  equal = batch.replace(answers=jnp.full_like(batch.answers, -1))
  before = golden.new_state(POLICY, reference=False)
  after, _, metrics = step(before, equal, jax.random.key(7))
  assert float(metrics["equal_groups"]) == 1.0
  assert float(metrics["grad_norm"]) == 0.0
  np.testing.assert_allclose(float(metrics["reward"]), 0.1, rtol=1e-6)
  assert_same(host(after.params), host(before.params))  # weight decay is 0
  after, _, metrics = step(before, batch, jax.random.key(7))
  assert float(metrics["equal_groups"]) < 1.0
  assert float(metrics["grad_norm"]) > 0.01


def test_without_a_kl_term_there_is_no_reference_to_refresh():
  """As the loop sets it up: kl_coef 0 means that the state's reference is None."""
  config = grpo.GRPOConfig(
    group_size=4, minibatches=2, max_tokens=6, kl_coef=0.0, reference_refresh=4
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
  return grpo.Rows(
    prompts=jnp.asarray(np.where(prompt_mask, draw((count, prompt)), 0), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(np.where(mask, draw((count, tokens)), 0), jnp.int32),
    completion_mask=jnp.asarray(mask),
    old_logprobs=jnp.asarray(near, jnp.float32),
    reference_logprobs=jnp.asarray(other, jnp.float32),
    advantages=jnp.asarray(rng.normal(size=count), jnp.float32),
  )


def update_program(micro_batches=1):
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    micro_batches=micro_batches,
    max_tokens=6,
    clip_eps=0.2,
    kl_coef=0.04,
    reference_refresh=0,
    router_bias_rate=0.5,
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


@pytest.fixture(scope="module")
def updated():
  program = update_program()
  state, metrics = program(update_state(), training_rows())
  return program, host(state), golden.figures(metrics)


def same_update(got, want_state, want_metrics):
  state, metrics = got
  assert_same(host(state.params), want_state.params, rtol=1e-4, atol=2e-5)
  assert_same(host(state.router), want_state.router)
  for name, x in golden.figures(metrics).items():
    np.testing.assert_allclose(
      x, want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_an_update_is_invariant_to_micro_batches(updated, micro_batches):
  got = update_program(micro_batches)(update_state(), training_rows())
  same_update(got, *updated[1:])


def test_an_update_is_invariant_to_the_order_of_rows(updated):
  order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
  rows = jax.tree.map(lambda x: x[order], training_rows())
  same_update(updated[0](update_state(), rows), *updated[1:])


def test_an_update_is_invariant_to_padding_on_both_sides(updated):
  def pad(x, left, right, value=0):
    return jnp.pad(x, ((0, 0), (left, right)), constant_values=value)

  rows = training_rows()
  padded = rows.replace(
    prompts=pad(rows.prompts, 3, 0, 9),
    prompt_mask=pad(rows.prompt_mask, 3, 0),
    completions=pad(rows.completions, 0, 2, 9),
    completion_mask=pad(rows.completion_mask, 0, 2),
    old_logprobs=pad(rows.old_logprobs, 0, 2, -5),
    reference_logprobs=pad(rows.reference_logprobs, 0, 2, -5),
  )
  same_update(updated[0](update_state(), padded), *updated[1:])


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
