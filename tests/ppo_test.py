"""PPO: advantages, token rewards and the value loss against loops in NumPy; the value
model; then properties of whole steps of the tiny policy (tests/grpo_golden.py)."""

import dataclasses
import functools
from unittest import mock

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import optax
import oracle
import pytest
from trees import assert_same, host

from r1jax import grpo, ppo
from r1jax.advantages import gae
from r1jax.dynamic_sampling import all_of
from r1jax.errors import UserError
from r1jax.experience import Rows
from r1jax.models.sequence import Sequence
from r1jax.models.value import Value, from_policy
from r1jax.objective import Objective
from r1jax.policy_loss import Totals
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout

AGGREGATIONS = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]
LENGTHS = [6, 1, 3, 1, 5]  # full, one-token and ragged outputs


def mask_of(lengths=LENGTHS, width=6):
  return np.arange(width)[None] < np.asarray(lengths)[:, None]


def training_rows(mask, *, in_loss=None, in_mean=None, **arrays) -> Rows:
  """Rows of which only `mask` and what is named matters."""
  zeros = jnp.zeros(mask.shape)
  count = mask.shape[0]
  in_loss = np.ones(count, bool) if in_loss is None else in_loss
  names = ("sampler_logprobs", "old_logprobs", "reference_logprobs", "advantages")
  return Rows(
    prompts=jnp.zeros((count, 1), jnp.int32),
    prompt_mask=jnp.ones((count, 1), bool),
    completions=jnp.zeros(mask.shape, jnp.int32),
    completion_mask=jnp.asarray(mask),
    in_loss=jnp.asarray(in_loss),
    in_mean=jnp.asarray(in_loss if in_mean is None else in_mean),
    place=jnp.arange(count, dtype=jnp.int32),
    **{name: jnp.asarray(arrays.get(name, zeros)) for name in names},
  )


# -- advantages ------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_equals_loops_on_ragged_rows(gamma, lam):
  with jax.enable_x64(True):
    for seed, lengths in enumerate([LENGTHS, [1, 1, 1], [6, 6], [2, 4, 1, 6]]):
      rng, mask = np.random.default_rng(seed), mask_of(lengths)
      rewards, values = rng.normal(size=(2, *mask.shape))
      got = gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, lam=lam)
      want = oracle.gae(rewards, values, mask, gamma=gamma, lam=lam)
      for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [1e30, -7.0, np.nan, np.inf])
def test_what_stands_outside_the_mask_has_no_say_in_gae(garbage):
  rng, mask = np.random.default_rng(0), mask_of()
  rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  how = dict(gamma=0.99, lam=0.95)
  want = gae(*map(jnp.asarray, (rewards, values, mask)), **how)
  spoilt = [np.where(mask, x, garbage).astype(np.float32) for x in (rewards, values)]
  got = gae(*map(jnp.asarray, spoilt), jnp.asarray(mask), **how)
  for a, b in zip(got, want, strict=True):
    assert np.array_equal(a, b)
    assert (np.asarray(a)[~mask] == 0).all()


def test_gamma_and_lambda_1_give_the_sum_of_later_rewards_minus_the_value():
  rng, mask = np.random.default_rng(1), mask_of()
  rewards, values = np.where(mask, rng.normal(size=(2, *mask.shape)), 0.0)
  later = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  a, returns = gae(*map(jnp.float32, (rewards, values)), mask, gamma=1.0, lam=1.0)
  np.testing.assert_allclose(a, np.where(mask, later - values, 0.0), atol=1e-5)
  np.testing.assert_allclose(returns, later, atol=1e-5)


def test_lambda_is_the_terminal_rewards_direct_weight_a_token_earlier():
  """A terminal reward has the direct weight 0.95^k in the advantage k tokens before."""
  mask, values = mask_of([6]), jnp.asarray(np.random.default_rng(2).normal(size=(1, 6)))

  def advantages(terminal):
    rewards = jnp.zeros((1, 6)).at[0, -1].set(terminal)
    return gae(rewards, values, jnp.asarray(mask), gamma=1.0, lam=0.95)[0][0]

  direct = jax.jacobian(advantages)(1.0)
  np.testing.assert_allclose(direct[::-1], 0.95 ** np.arange(6), rtol=1e-6)


# -- a reward a token ------------------------------------------------------------------


@pytest.mark.parametrize("kl_coef", [0.0, 0.04, 1.0])
def test_token_rewards_equal_loops(kl_coef):
  rng, mask = np.random.default_rng(3), mask_of()
  old, reference = rng.normal(size=(2, *mask.shape))
  score = rng.normal(size=len(mask))
  with jax.enable_x64(True):
    rows = training_rows(mask, old_logprobs=old, reference_logprobs=reference)
    got = ppo.token_rewards(jnp.asarray(score), rows, kl_coef)
  want = oracle.token_rewards(score, old, reference, mask, kl_coef=kl_coef)
  np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_token_pays_for_its_kl_and_the_last_one_for_its_own_too():
  mask = mask_of([3, 1])
  rows = training_rows(mask, old_logprobs=jnp.full(mask.shape, 0.5))
  got = ppo.token_rewards(jnp.float32([1.0, 2.0]), rows, 0.1)
  want = [[-0.05, -0.05, 0.95, 0, 0, 0], [1.95, 0, 0, 0, 0, 0]]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def integer_casts(function, *args) -> list[str]:
  """Where a function's program turns floats into integers."""
  found = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "convert_element_type":
        before, after = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
        if jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.integer):
          found.append(str(eqn))
      for inner in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
      ):
        if hasattr(inner, "eqns"):
          walk(inner)
        elif hasattr(inner, "jaxpr"):
          walk(inner.jaxpr)

  walk(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def test_a_fractional_reward_is_not_cut_to_an_integer():
  """Put into an array of the token ids' type, 0.9 would be 0: a bug that trains on."""
  mask, scores = mask_of([6, 1, 3]), np.float32([0.9, -0.5, 0.5])
  rows = training_rows(mask)
  for coef in (0.0, 0.1):  # with KL as well: here the policies agree
    got = ppo.token_rewards(jnp.asarray(scores), rows, coef)
    assert got.dtype == jnp.float32
    assert np.array_equal(np.asarray(got)[range(3), mask.sum(1) - 1], scores)
    assert np.array_equal(np.asarray(got).sum(1), scores)

  def chain(scores, values):
    rewards = ppo.token_rewards(scores, rows, 0.1)
    a, returns = gae(rewards, values, rows.completion_mask, gamma=1.0, lam=1.0)
    return rewards, a, returns, ppo.whitened(a, rows.mask)

  args = jnp.asarray(scores), jnp.zeros(mask.shape)
  assert [x.dtype for x in jax.eval_shape(chain, *args)] == [jnp.float32] * 4
  assert not integer_casts(chain, *args)
  assert integer_casts(lambda x: jnp.zeros(3, jnp.int32) + x.astype(int), args[0])
  whole = jnp.asarray([1, 0, -2])  # of a rule that counts
  assert ppo.token_rewards(whole, rows, 0.0).dtype == jnp.float32


SCORES = jnp.float32([[0.9, -0.5], [0.5, 0.1]])


def scored_slots():
  """Two groups of two outputs with SCORES; the sampler was certain of every token."""
  mask = jnp.asarray(mask_of([6, 1, 3, 2]).reshape(2, 2, 6))
  zeros = jnp.zeros(mask.shape)
  rollout = Rollout(
    tokens=jnp.where(mask, 7, golden.PAD),
    mask=mask,
    logprobs=zeros,
    entropy=zeros,
    ended=jnp.ones((2, 2), bool),
  )
  return all_of(golden.prompt_batch(2), rollout, Rewards.of(score=(1.0, SCORES)))


def returns_of(objective, *, reference, **changes):
  """(batch, metrics, a token's return without KL) of `ppo.experience`, with V = 0."""
  config = ppo_config(
    minibatches=1, objective=objective, group_size=2, micro_batches=1, **changes
  )
  program = jax.jit(functools.partial(ppo.experience, policy=POLICY, config=config))
  state = new_state(reference=reference)
  batch, metrics = program(state, scored_slots(), jax.random.key(7))
  place = np.asarray(batch.rows.place)[0]
  want = np.where(batch.rows.mask[0], np.asarray(SCORES).reshape(-1)[place, None], 0.0)
  return batch, metrics, want


def test_fractional_rewards_reach_the_value_models_targets_unchanged():
  """The whole way: shaping, token rewards, GAE, shuffle. V = 0 and no KL, so that each
  token's return is its output's reward."""
  batch, metrics, want = returns_of(OBJECTIVE_WITHOUT_KL, reference=False)
  assert batch.returns.dtype == batch.rows.advantages.dtype == jnp.float32
  assert np.array_equal(batch.returns[0], want)
  assert np.array_equal(batch.rows.advantages[0], want)
  np.testing.assert_allclose(
    [metrics["advantage_max"], metrics["advantage_min"]], [0.9, -0.5], rtol=1e-6
  )


def test_whitening_scales_advantages_and_leaves_returns():
  batch, _, want = returns_of(OBJECTIVE_WITHOUT_KL, reference=False, whiten=True)
  mask = np.asarray(batch.rows.mask[0])
  kept = want[mask]
  assert np.array_equal(batch.returns[0], want)
  np.testing.assert_allclose(
    np.asarray(batch.rows.advantages[0])[mask],
    (kept - kept.mean()) / kept.std(ddof=1),
    rtol=1e-5,
  )


def test_kl_is_paid_once_in_the_reward_or_in_the_loss():
  """With kl='k3' the policy's loss has the term, and the token rewards have none."""
  base = dataclasses.replace(OBJECTIVE_WITHOUT_KL, kl_coef=0.1)
  batch, _, want = returns_of(base, reference=True)
  assert base.kl == "k3" and np.array_equal(batch.returns[0], want)
  in_reward = dataclasses.replace(base, kl="k1-in-reward")
  batch, _, want = returns_of(in_reward, reference=True)
  assert not np.allclose(batch.returns[0], want)


# -- the value loss --------------------------------------------------------------------


def value_case(seed=0):
  """(v, v_old, returns, mask): errors and steps on both sides of every bound."""
  rng, mask = np.random.default_rng(seed), mask_of()
  old = rng.normal(size=mask.shape)
  step = rng.choice([-0.5, -0.1, 0.05, 0.15, 0.4], mask.shape)
  return old + step, old, rng.normal(size=mask.shape), mask


def value_loss_of(v, old, returns, rows, **how):
  o = Objective(aggregation=how["aggregation"], sum_norm=how.get("sum_norm", 0.0))
  batch = ppo.ValueRows(rows, jnp.asarray(old), jnp.asarray(returns))
  totals = how.get("totals") or Totals.of(rows)

  def loss_fn(x):
    return ppo.value_loss(
      x, batch, o, totals, value_clip=how["value_clip"], window=rows.mask.shape[1]
    )

  grad = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, metrics), gradient = grad(jnp.asarray(v))
  return float(loss), np.asarray(gradient), {k: float(x) for k, x in metrics.items()}


@pytest.mark.parametrize("rows_masked", ["none", "count", "drop"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("value_clip", [0.0, 0.2])
def test_value_loss_and_gradient_equal_loops(value_clip, aggregation, rows_masked):
  ones = np.ones(len(LENGTHS), bool)
  in_loss = ones if rows_masked == "none" else np.array([1, 0, 1, 1, 0], bool)
  in_mean = ones if rows_masked == "count" else in_loss
  for seed, sum_norm in ((0, 0.0), (1, 2.5)):
    v, old, returns, mask = value_case(seed)
    want_loss, want_gradient = oracle.value_loss_and_gradient(
      *(v, old, returns, mask, in_loss, in_mean),
      value_clip=value_clip,
      aggregation=aggregation,
      sum_norm=sum_norm or mask.shape[1],
    )
    with jax.enable_x64(True):
      rows = training_rows(mask, in_loss=in_loss, in_mean=in_mean)
      loss, gradient, metrics = value_loss_of(
        *(v, old, returns, rows),
        value_clip=value_clip,
        aggregation=aggregation,
        sum_norm=sum_norm,
      )
    np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-12, atol=1e-15)
    kept = mask & in_loss[:, None]
    np.testing.assert_allclose(metrics["value_loss"], want_loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["value_mean"], v[kept].mean(), rtol=1e-12)
    error = np.abs(v - returns)[kept].mean()
    np.testing.assert_allclose(metrics["value_error"], error, rtol=1e-12)


def test_outside_the_mask_values_have_no_say_and_no_gradient():
  v, old, returns, mask = value_case()
  how = dict(value_clip=0.2, aggregation="seq-mean-token-mean")
  rows = training_rows(mask)
  loss, gradient, metrics = value_loss_of(v, old, returns, rows, **how)
  spoilt = [np.where(mask, x, garbage) for x, garbage in ((v, 9e3), (old, -5), (v, 7))]
  spoilt[2] = np.where(mask, returns, 1e6)
  again = value_loss_of(*spoilt, rows, **how)
  assert again[0] == loss and again[2] == metrics
  assert np.array_equal(again[1], gradient)
  assert (gradient[~mask] == 0).all()


def test_a_value_that_left_the_clip_towards_its_target_has_no_gradient():
  """v_old 0, clip 0.2; targets on either side of the values."""
  mask = mask_of([4], 4)
  v, returns = np.array([[0.5, 0.5, 0.1, -0.5]]), np.array([[2.0, 0.0, 2.0, -2.0]])
  _, gradient, metrics = value_loss_of(
    *(v, np.zeros((1, 4)), returns, training_rows(mask)),
    value_clip=0.2,
    aggregation="token-mean",
  )
  np.testing.assert_allclose(gradient, [[0, 0.125, -1.9 / 4, 0]], rtol=1e-6)
  assert metrics["value_clip_fraction"] == 0.5


def test_values_inside_the_clip_do_not_count_as_clipped():
  rng, mask = np.random.default_rng(5), mask_of([64] * 64, 64)
  old = np.float32(0.05 * rng.normal(size=mask.shape))
  v = np.float32(old + rng.uniform(-0.1, 0.1, mask.shape))
  returns = np.float32(rng.normal(size=mask.shape))
  how = dict(value_clip=0.2, aggregation="token-mean")
  _, _, metrics = value_loss_of(v, old, returns, training_rows(mask), **how)
  assert metrics["value_clip_fraction"] == 0


def test_losses_of_micro_batches_add_up():
  v, old, returns, mask = value_case()
  rows = training_rows(mask)
  for aggregation in AGGREGATIONS:
    how = dict(value_clip=0.2, aggregation=aggregation)
    loss, gradient, metrics = value_loss_of(v, old, returns, rows, **how)
    parts = [
      value_loss_of(
        *(x[i::2] for x in (v, old, returns)),
        training_rows(mask[i::2]),
        totals=Totals.of(rows),
        **how,
      )
      for i in range(2)
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), loss, rtol=1e-5)
    for i, part in enumerate(parts):
      np.testing.assert_allclose(part[1], gradient[i::2], rtol=1e-5)
    for name, want in metrics.items():
      got = sum(p[2][name] for p in parts)
      np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 2], [6]])
def test_whitened_equals_numpy(lengths):
  mask = mask_of(lengths)
  x = np.float32(3 + 2 * np.random.default_rng(6).normal(size=mask.shape))
  got = np.asarray(ppo.whitened(jnp.asarray(x), jnp.asarray(mask)))
  kept = x[mask].astype(np.float64)
  want = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-8)
  np.testing.assert_allclose(got[mask], want, rtol=1e-4, atol=1e-5)
  assert (got[~mask] == 0).all()
  spoilt = jnp.asarray(np.where(mask, x, np.nan))
  assert np.array_equal(ppo.whitened(spoilt, jnp.asarray(mask)), got)


def test_whitening_nothing_or_one_token_gives_zeros():
  for lengths in ([0, 0], [1, 0]):
    x, mask = jnp.full((2, 6), 3.0), jnp.asarray(mask_of(lengths))
    assert np.array_equal(ppo.whitened(x, mask), np.zeros((2, 6)))


# -- configs ---------------------------------------------------------------------------

OBJECTIVE = Objective(
  advantage="gae",
  kl="k1-in-reward",
  kl_coef=0.04,
  clip_low=0.2,
  clip_high=0.2,
  gamma=1.0,
  lam=0.95,
)
OBJECTIVE_WITHOUT_KL = Objective(
  advantage="gae", kl_coef=0.0, clip_low=0.2, clip_high=0.2
)
POLICY = golden.tiny_policy()
K = 2


def ppo_config(**changes) -> ppo.PPOConfig:
  sizes = dict(
    group_size=4,
    minibatches=K,
    micro_batches=2,
    max_tokens=6,
    reference_refresh=0,
    objective=OBJECTIVE,
    whiten=False,  # advantages as the equations have them
  )
  return ppo.PPOConfig(**{**sizes, **changes})


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "gdpo"])
def test_ppo_refuses_a_group_relative_advantage(advantage):
  with pytest.raises(UserError, match=rf"advantage='{advantage}'.*r1_zero"):
    ppo.PPOConfig(objective=Objective(advantage=advantage))


def test_grpo_refuses_gae_and_says_where_it_is():
  with pytest.raises(UserError, match=r"'gae' needs a value model.*experiments\.ppo"):
    grpo.GRPOConfig(objective=OBJECTIVE)


@pytest.mark.parametrize("key, value", [("group_size", 0), ("value_clip", -0.1)])
def test_ppo_refuses_what_cannot_work_and_names_it(key, value):
  with pytest.raises(UserError, match=f"{key}={value}"):
    ppo_config(**{key: value})


def test_a_group_of_one_is_refused_with_dynamic_sampling():
  """It never differs from itself, so nothing would ever be trained on."""
  pooled = dataclasses.replace(OBJECTIVE, pool=3)
  with pytest.raises(UserError, match=r"pool=3 with grpo\.group_size=1"):
    ppo_config(group_size=1, objective=pooled)
  ppo_config(group_size=2, objective=pooled)


def test_a_policy_without_experts_can_be_trained():
  """The value model's router has the structure of its shardings: none."""
  policy = golden.tiny_policy(dense_layers=1, dense_ffn=16)
  params, router = golden.weights(policy)
  state = ppo.restart(
    params, router, golden.optimizer(), golden.optimizer(), reference=True
  )
  mesh = mesh_of((1, 1, 1), jax.devices()[:1])
  laid_out = ppo.shardings(
    policy, golden.optimizer(), golden.optimizer(), mesh, reference=True
  )
  assert jax.tree.structure(state) == jax.tree.structure(laid_out)
  step = make_step(ppo_config(), policy=policy)
  after, *_ = jax.eval_shape(step, state, golden.prompt_batch(), jax.random.key(7))
  assert jax.tree.structure(after) == jax.tree.structure(state)


def test_one_output_a_prompt_is_enough_for_ppo():
  assert ppo_config(group_size=1).group_size == 1


# -- the value model -------------------------------------------------------------------


def new_state(*, reference=True, optimizer=None, value_optimizer=None) -> ppo.PPOState:
  """Step 0; the reference differs from the policy a little, so that there is a KL."""
  optimizer = optimizer or golden.optimizer()
  state = ppo.restart(
    *golden.weights(POLICY),
    optimizer,
    value_optimizer or optimizer,
    reference=reference,
  )
  if not reference:
    return state
  other = golden.weights(POLICY, seed=1)[0]
  moved = jax.tree.map(lambda a, b: a + 0.1 * b, state.params, other)
  policy = state.policy
  return state.replace(
    policy=policy.replace(reference=policy.reference.replace(params=moved))
  )


def sampled_rows(seed=0) -> Rows:
  """Four rows of random tokens, ragged on both sides."""
  rng, mask = np.random.default_rng(seed), mask_of([6, 1, 3, 5])
  prompts = golden.prompt_batch(4)
  tokens = rng.integers(4, golden.VOCAB, mask.shape)
  return training_rows(mask).replace(
    prompts=prompts.tokens,
    prompt_mask=prompts.mask,
    completions=jnp.asarray(np.where(mask, tokens, golden.PAD), jnp.int32),
  )


@pytest.fixture(scope="module")
def values_of():
  """(params, rows) -> V before each token."""
  value = Value(POLICY.config)
  _, router = from_policy(*golden.weights(POLICY), POLICY.config.width)
  return jax.jit(lambda params, rows: ppo.token_values(value, params, router, rows)[0])


def with_head(seed=4):
  """The value model's weights with a head that is not zero."""
  params, _ = from_policy(*golden.weights(POLICY), POLICY.config.width)
  head = np.random.default_rng(seed).normal(size=POLICY.config.width)
  return {**params, "value_head": jnp.asarray(head, jnp.float32)}


def test_a_new_value_model_is_a_copy_of_the_policy_and_expects_nothing(values_of):
  state = new_state()
  assert_same(state.value.params["policy"], state.params)
  assert_same(state.value.router["policy"], state.router)
  head = state.value.params["value_head"]
  assert np.array_equal(head, np.zeros(POLICY.config.width))
  assert state.value.reference is None
  values = values_of(state.value.params, sampled_rows())
  assert values.dtype == jnp.float32
  assert np.array_equal(values, np.zeros((4, 6)))
  pointers = [
    {x.unsafe_buffer_pointer() for x in jax.tree.leaves(part)}
    for part in (state.params, state.value.params)
  ]
  assert not pointers[0] & pointers[1]  # else a donated state would be spent twice


def test_a_value_is_the_heads_product_with_the_policys_hidden_state(values_of):
  rows, params = sampled_rows(), with_head()
  tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
  mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
  weights, router = golden.weights(POLICY)
  out = jax.jit(POLICY.apply)(
    {"params": weights, "router": router}, tokens, Sequence.of_mask(mask)
  )
  want = np.asarray(out.hidden, np.float64) @ np.asarray(params["value_head"])
  got = values_of(params, rows)
  at = rows.prompts.shape[1] - 1  # the prompt's last token gives V before the first
  kept = np.asarray(rows.mask)
  np.testing.assert_allclose(
    np.asarray(got)[kept], want[:, at:-1][kept], rtol=1e-4, atol=1e-5
  )


def test_a_value_knows_the_tokens_before_it_and_none_after(values_of):
  rows, params = sampled_rows(), with_head()
  before = np.asarray(values_of(params, rows))
  full = 0  # the row whose six tokens are all real
  for t in range(6):
    token = (rows.completions[full, t] + 1 - 4) % (golden.VOCAB - 4) + 4
    changed = rows.replace(completions=rows.completions.at[full, t].set(token))
    after = np.asarray(values_of(params, changed))
    assert np.array_equal(after[full, : t + 1], before[full, : t + 1])
    assert (np.abs(after[full, t + 1 :] - before[full, t + 1 :]) > 1e-4).all()
    assert np.array_equal(np.delete(after, full, 0), np.delete(before, full, 0))


def test_shardings_have_the_states_structure():
  mesh = jax.make_mesh(
    *((1, 1, 1), ("fsdp", "expert", "tensor")),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )
  optimizer = golden.optimizer()
  got = ppo.shardings(POLICY, optimizer, optimizer, mesh, reference=True)
  assert jax.tree.structure(got) == jax.tree.structure(jax.eval_shape(new_state))


# -- whole steps -----------------------------------------------------------------------


def make_step(config, *, optimizer=None, value_optimizer=None, **changes):
  optimizer = optimizer or golden.optimizer()
  return functools.partial(
    ppo.whole_step,
    **{
      **dict(
        policy=POLICY,
        optimizer=optimizer,
        value_optimizer=value_optimizer or optimizer,
        reward_fn=golden.reward_fn,
        config=config,
        stop_ids=golden.STOP_IDS,
        pad_id=golden.PAD,
      ),
      **changes,
    },
  )


@pytest.fixture(scope="module")
def program():
  """The jitted whole step, its state donated."""
  return jax.jit(golden.counted(make_step(ppo_config())), donate_argnums=0)


@pytest.fixture(scope="module")
def history(program):
  """Three steps: states (host copies, the first included), rollouts, metrics, traces,
  and the donated states."""
  state = new_state()
  found = dict(states=[host(state)], rollouts=[], metrics=[], traces=[], donated=[])
  for _ in range(3):
    found["donated"].append(state)
    state, rollout, figures, trace = program(
      state, golden.prompt_batch(), jax.random.key(7)
    )
    found["states"].append(host(state))
    found["rollouts"].append(host(rollout))
    found["metrics"].append(golden.figures(figures))
    found["traces"].append(host(trace))
  return found


def test_three_steps_compile_once_and_spend_their_states(program, history):
  assert len(program.__wrapped__.traces) == 1
  for state in history["donated"]:
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_a_step_is_a_pure_function(program, history):
  out = program(new_state(), golden.prompt_batch(), jax.random.key(7))
  state, rollout, figures, trace = out
  assert_same(host(state), history["states"][1])
  assert_same(host(rollout), history["rollouts"][0])
  assert golden.figures(figures) == history["metrics"][0]
  assert_same(host(trace), history["traces"][0])


def test_policy_and_value_model_count_their_updates(history):
  for i, state in enumerate(history["states"]):
    assert int(state.step) == i * K
    assert int(state.policy.step) == int(state.value.step) == i * K


def test_every_weight_that_speaks_moves(history):
  """The value model's head over the vocabulary alone says nothing."""
  before, after = (s for s in history["states"][:2])
  for name in ("policy", "value"):
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(getattr(before, name).params),
      jax.tree.leaves(getattr(after, name).params),
      strict=True,
    ):
      unused = name == "value" and path[-1].key == "head"
      assert np.array_equal(x, y) == unused, (name, jax.tree_util.keystr(path))


def test_router_biases_of_both_move_by_their_rate_after_every_update(history):
  rate = ppo_config().router_bias_rate
  for name in ("policy", "value"):
    biases = [
      np.concatenate([x.ravel() for x in jax.tree.leaves(getattr(s, name).router)])
      for s in history["states"]
    ]
    assert (biases[0] == 0).all()
    moves = np.diff(np.stack(biases), axis=0) / rate
    np.testing.assert_allclose(moves, np.round(moves), atol=1e-3)
    assert (np.abs(moves) < K + 1e-3).all()
    assert (np.abs(moves) > 1.5).any()  # both minibatches of a step moved it


def test_metrics_are_finite_and_name_both_models(history):
  for metrics in history["metrics"]:
    assert all(np.isfinite(x) for x in metrics.values())
    assert {"value_loss", "value_clip_fraction", "value_mean"} < set(metrics)
    assert {"value_error", "value_grad_norm", "grad_norm", "kl"} < set(metrics)
    assert metrics["sampler_gap_max"] < 1e-4
    assert metrics["value_grad_norm"] > 0


def test_the_first_value_loss_is_that_of_a_model_that_says_0(history):
  """Half the mean square of what GAE expects of V = 0, over the first minibatch alone;
  here bounded from the trace, whose advantages are the returns."""
  trace = history["traces"][0]
  assert (trace.place == np.arange(8)).all()
  assert history["metrics"][0]["value_loss"] > 0
  last = trace.mask.sum(1) - 1
  rewards = np.asarray(history["rollouts"][0].tokens)[:2].reshape(8, -1)
  counted = ((rewards >= golden.VOCAB // 2) & trace.mask).sum(1)
  at_last = trace.advantages[np.arange(8), last]
  assert np.abs(at_last - counted).max() < 0.5  # all but the token's KL
  k = (last > 1) & (counted > 0)
  before = trace.advantages[np.arange(8), last - 1][k]
  assert (np.abs(before / at_last[k] - 0.95) < 0.3).all()


def test_another_key_gives_another_rollout(program, history):
  _, rollout, *_ = program(new_state(), golden.prompt_batch(), jax.random.key(8))
  assert not np.array_equal(rollout.tokens, history["rollouts"][0].tokens)


# One output a prompt, no KL, and plain gradient descent: AdamW would blow rounding of
# tiny gradients up to its step size.
LEAN = dict(group_size=1, objective=OBJECTIVE_WITHOUT_KL, reference_refresh=4)
DESCENT = dict(optimizer=optax.sgd(0.5), value_optimizer=optax.sgd(0.02))


@pytest.fixture(scope="module")
def lean():
  """The whole step in one micro-batch."""
  return jax.jit(make_step(ppo_config(micro_batches=1, **LEAN), **DESCENT))


@pytest.fixture(scope="module")
def constant(lean):
  """Ten steps with the reward 0.1 for all: (states before and after, metrics)."""
  prompts = golden.prompt_batch(8)
  prompts = prompts.replace(answers=jnp.full_like(prompts.answers, -1))
  before = state = new_state(reference=False, **DESCENT)
  metrics = []
  for _ in range(10):
    state, _, figures, _ = lean(state, prompts, jax.random.key(7))
    metrics.append(golden.figures(figures))
  return before, state, metrics


def test_the_value_model_learns_a_constant_reward(constant):
  losses = [m["value_loss"] for m in constant[2]]
  assert 0.001 < losses[0] <= 0.005  # 0.1^2 / 2 while it says 0
  assert np.mean(losses[-3:]) < 0.3 * losses[0]
  first, last = constant[2][0], constant[2][-1]
  assert last["value_error"] < 0.5 * first["value_error"]
  assert 0.05 < last["value_mean"] < 0.12
  assert first["advantage_max"] == first["advantage_min"] == np.float32(0.1)


def test_without_kl_there_is_no_reference(constant):
  before, after, metrics = constant
  assert before.policy.reference is after.policy.reference is None
  assert after.value.reference is None
  assert "kl" not in metrics[0]


def test_kl_without_a_reference_is_refused():
  step = make_step(ppo_config())
  args = new_state(reference=False), golden.prompt_batch(), jax.random.key(7)
  with pytest.raises(UserError, match=r"kl_coef=0\.04 needs a reference"):
    jax.eval_shape(step, *args)


@pytest.fixture(scope="module")
def undivided(lean):
  """One step in one micro-batch: (state, metrics, what it sampled)."""
  prompts = golden.prompt_batch(8)
  state = new_state(reference=False, **DESCENT)
  state, rollout, metrics, _ = lean(state, prompts, jax.random.key(7))
  slots = all_of(prompts, rollout, golden.reward_fn(prompts, rollout))
  return state, golden.figures(metrics), slots


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_is_invariant_to_micro_batches(undivided, micro_batches):
  want_state, want_metrics, slots = undivided

  def learn(state, slots, key):
    """The step without its rollout, which takes long to compile."""
    with mock.patch.object(ppo, "collect", lambda *_: slots):
      config = ppo_config(micro_batches=micro_batches, **LEAN)
      return make_step(config, **DESCENT)(state, slots.prompts, key)

  state = new_state(reference=False, **DESCENT)
  state, _, metrics, _ = jax.jit(learn)(state, slots, jax.random.key(7))
  for name in ("policy", "value"):
    got, want = getattr(state, name), getattr(want_state, name)
    assert_same(got.params, want.params, rtol=1e-4, atol=2e-5)
    assert_same(got.router, want.router)
  metrics = golden.figures(metrics)
  for name in metrics.keys() - {"sampler_gap_max", "sampler_gap_mean", "sampler_kl"}:
    np.testing.assert_allclose(
      metrics[name], want_metrics[name], rtol=2e-4, atol=2e-6, err_msg=name
    )
  assert want_metrics.keys() - metrics.keys() == {"experts_changed"}  # not recorded
