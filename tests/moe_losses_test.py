"""What a V3-type policy adds to an update: MTP, both balances, changed experts."""

import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax import experience, grpo, moe_losses, train_state
from r1jax.models.sequence import Sequence
from r1jax.objective import Objective
from r1jax.rollout import sample

# One layer of experts, and the MTP module.
POLICY = golden.tiny_policy(mtp_depth=1)
EXPERTS = POLICY.config.experts


def weights():
  """Router biases are 64ths, so that moving them by a quarter is exact."""
  params, router = golden.weights(POLICY)
  bias = jnp.arange(EXPERTS, dtype=jnp.float32) / 64 - 1 / 64
  return params, jax.tree.map(lambda b: jnp.broadcast_to(bias, b.shape), router)


WEIGHTS = weights()
M, P, T = 8, 5, 6
SGD = optax.sgd(1.0)  # the parameters move by the gradient itself


def random_rows(seed=0):
  """Ragged rows: prompts of 1 to 5 tokens, completions of 1 to 6, one without loss."""
  rng = np.random.default_rng(seed)
  prompt_mask = np.arange(P)[None] >= P - (1 + np.arange(M) % P)[:, None]
  mask = np.arange(T)[None] < np.array([6, 1, 2, 6, 3, 5, 4, 2])[:, None]
  old = -rng.gamma(2.0, 1.0, (M, T))
  floats = dict(
    sampler_logprobs=old,
    old_logprobs=old,
    reference_logprobs=np.zeros((M, T)),
    advantages=np.repeat(rng.normal(size=(M, 1)), T, axis=1),
  )
  return experience.Rows(
    prompts=jnp.asarray(rng.integers(1, golden.VOCAB, (M, P)), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask),
    completions=jnp.asarray(rng.integers(1, golden.VOCAB, (M, T)), jnp.int32),
    completion_mask=jnp.asarray(mask),
    in_loss=jnp.asarray(np.arange(M) != 3),
    in_mean=jnp.ones(M, bool),
    place=jnp.arange(M, dtype=jnp.int32),
    **{name: jnp.asarray(x, jnp.float32) for name, x in floats.items()},
  )


ROWS = random_rows()


def variables_of(weights):
  return dict(zip(("params", "router"), weights, strict=True))


def config(**changes):
  plain = Objective(clip="none", kl_coef=0.0)
  return grpo.GRPOConfig(
    **{
      **dict(group_size=2, minibatches=1, max_tokens=T, reference_refresh=0),
      **dict(router_bias_rate=0.25, objective=plain),
      **changes,
    }
  )


@functools.cache
def updated(**changes):
  """(state before, state after, metrics) of one update on ROWS."""
  state = train_state.restart(*WEIGHTS, SGD, reference=False)
  update = functools.partial(
    grpo.update, policy=POLICY, optimizer=SGD, config=config(**changes)
  )
  after, metrics, _ = jax.jit(update)(state, ROWS)
  return state, after, metrics


def gradients(**changes):
  before, after, _ = updated(**changes)
  moved = jax.tree.map(lambda a, b: np.asarray(a - b), before.params, after.params)
  return {
    jax.tree_util.keystr(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(moved)
  }


def assert_same_gradient(one, two, tolerance=1e-5):
  assert one.keys() == two.keys()
  for name, x in one.items():
    atol = tolerance * max(np.abs(x).max(), 1e-2)
    np.testing.assert_allclose(two[name], x, rtol=0, atol=atol, err_msg=name)


# -- MTP -------------------------------------------------------------------------------

MTP, BALANCE = dict(mtp_coef=0.5), dict(balance_coef=0.5)


def test_the_mtp_loss_trains_the_mtp_module_alone():
  without, with_it = gradients(**BALANCE), gradients(**BALANCE, **MTP)
  own = {name for name in without if name.startswith("['mtp_")}
  assert len(own) > 10
  for name in own:
    assert not without[name].any(), name
    assert np.isfinite(with_it[name]).all() and np.abs(with_it[name]).max() > 0, name
  trunk = [{n: x for n, x in g.items() if n not in own} for g in (without, with_it)]
  assert max(np.abs(x).max() for x in trunk[0].values()) > 0.01
  assert_same_gradient(*trunk, tolerance=1e-6)


@jax.jit
def mtp_logits(weights, rows):
  tokens = jnp.concatenate([rows.prompts, rows.completions], axis=1)
  mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
  variables, seq = variables_of(weights), Sequence.of_mask(mask)
  out = POLICY.apply(variables, tokens, seq)
  hidden, _ = POLICY.apply(variables, out.hidden, tokens, seq, method="mtp")
  return POLICY.apply(variables, hidden, method="logits"), tokens, mask


def nll_by_hand(rows):
  """(sum, count) of -log P(token i + 2 | tokens to i + 1), one token at a time."""
  logits, tokens, mask = (np.asarray(x) for x in mtp_logits(WEIGHTS, rows))
  total, count = 0.0, 0
  for m in range(M):
    for t in range(T):
      place = P + t  # of the token that is predicted
      known = bool(mask[m, place - 2] and mask[m, place - 1] and mask[m, place])
      if known and rows.in_loss[m]:
        row = logits[m, place - 2].astype(np.float64)
        total -= row[tokens[m, place]] - np.log(np.exp(row).sum())
        count += 1
  return total, count


@jax.jit
def extra(weights, rows, batch):
  """The auxiliary losses of a part of a batch, at coefficients 0.5 and 0.25."""
  _, out = experience.completion_logprobs(POLICY, *weights, rows, 1.0)
  return moe_losses.auxiliary_losses(
    POLICY, *weights, rows, out, batch=batch, balance_coef=0.5, mtp_coef=0.25
  )


def test_the_mtp_loss_equals_a_loop_over_tokens():
  total, count = nll_by_hand(ROWS)
  tokens = int(ROWS.mask.sum())
  assert 0 < count < tokens, "after a prompt of one token nothing foresees the first"
  loss, metrics, load = extra(WEIGHTS, ROWS, ROWS)
  np.testing.assert_allclose(metrics["mtp_nll"], total / tokens, rtol=1e-5)
  want = 0.5 * metrics["balance_loss"] + 0.25 * metrics["mtp_nll"]
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  # The module serves every real token that another one follows.
  real = np.concatenate([ROWS.prompt_mask, ROWS.completion_mask], axis=1)
  active = POLICY.config.active_experts
  assert load["moe_layers"].sum() == real.sum() * active
  assert load["mtp_layer"].sum() == (real.sum() - M) * active


@pytest.mark.parametrize("kept", [[], [1], [2, 5]], ids=str)
def test_rows_out_of_the_loss_have_no_mtp_loss(kept):
  rows = ROWS.replace(in_loss=jnp.asarray(np.isin(np.arange(M), kept)))
  _, metrics, _ = extra(WEIGHTS, rows, rows)
  total, _ = nll_by_hand(rows)
  want = total / max(int(rows.mask.sum()), 1)
  np.testing.assert_allclose(metrics["mtp_nll"], want, rtol=1e-5)
  assert kept or metrics["mtp_nll"] == 0


# -- the sequence-wise balance loss ----------------------------------------------------


def balances(policy, weights, tokens, mask):
  variables = variables_of(weights)
  return policy.apply(variables, tokens, Sequence.of_mask(mask)).balance


def test_the_balance_loss_is_the_mean_over_outputs():
  tokens = jnp.concatenate([ROWS.prompts, ROWS.completions], axis=1)
  mask = jnp.concatenate([ROWS.prompt_mask, ROWS.completion_mask], axis=1)
  a_row = jax.jit(functools.partial(balances, POLICY))(WEIGHTS, tokens, mask)
  assert np.ptp(a_row) > 0.01
  _, metrics, _ = extra(WEIGHTS, ROWS, ROWS)
  np.testing.assert_allclose(metrics["balance_loss"], np.mean(a_row), rtol=1e-5)


def test_an_undecided_router_has_a_balance_loss_of_one_a_layer():
  """All scores 1/2: two of four experts get all tokens, f = 2, and P = 1/4 each."""
  two = golden.tiny_policy(layers=2)
  params, router = golden.weights(two)
  params["moe_layers"]["moe"]["w_router"] *= 0
  tokens, mask = ROWS.completions, ROWS.completion_mask
  found = jax.jit(functools.partial(balances, two))((params, router), tokens, mask)
  np.testing.assert_allclose(found, np.full(M, 2.0), rtol=1e-6)


def test_padding_changes_no_auxiliary_loss():
  loss, metrics, load = extra(WEIGHTS, ROWS, ROWS)
  # Other tokens in the padding.
  other = ROWS.replace(
    prompts=jnp.where(ROWS.prompt_mask, ROWS.prompts, 9),
    completions=jnp.where(ROWS.completion_mask, ROWS.completions, 9),
  )
  # And more of it, on both sides.
  left, right = ((0, 0), (3, 0)), ((0, 0), (0, 2))
  sides = dict(prompts=left, prompt_mask=left, completions=right, completion_mask=right)
  wider = other.replace(
    **{name: jnp.pad(getattr(other, name), at) for name, at in sides.items()}
  )
  for rows in (other, wider):
    again, same, loads = extra(WEIGHTS, rows, rows)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for name in metrics:
      np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5, err_msg=name)
    for name in load:
      np.testing.assert_array_equal(loads[name], load[name])


def test_micro_batches_change_no_auxiliary_gradient_and_no_figure():
  both = {**BALANCE, **MTP}
  one, two = gradients(**both), gradients(**both, micro_batches=4)
  assert_same_gradient(one, two)
  (_, state, metrics), (_, other, same) = (
    updated(**both),
    updated(**both, micro_batches=4),
  )
  for name in ("balance_loss", "mtp_nll", "load_imbalance", "grad_norm"):
    np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, (state.router, other.router)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_balance_loss_reaches_the_router_and_what_stands_before_it():
  tokens, mask = ROWS.completions, ROWS.completion_mask

  @jax.jit
  def gradient(params, router):
    return jax.grad(lambda p: balances(POLICY, (p, router), tokens, mask).sum())(params)

  grads = gradient(*WEIGHTS)
  reached = {
    jax.tree_util.keystr(path)
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if np.abs(g).max() > 0
  }
  before = {name for name in reached if "['attention" in name or "ffn_norm" in name}
  router = {"['moe_layers']['moe']['w_router']"}
  assert len(before) > 5
  assert reached == before | router | {"['embedding']"}


# -- changed experts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled():
  draw = functools.partial(
    sample,
    POLICY,
    group_size=2,
    max_tokens=T,
    temperature=1.0,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
  )
  prompts = golden.prompt_batch()
  drawn = jax.jit(draw)(*WEIGHTS, prompts, jax.random.key(0))
  return experience.rows_of(prompts, drawn)


@jax.jit
def share_changed(weights, rows):
  _, out = experience.completion_logprobs(POLICY, *weights, rows, 1.0)
  _, metrics, _ = moe_losses.auxiliary_losses(
    POLICY, *weights, rows, out, batch=rows, balance_coef=0.0, mtp_coef=0.0
  )
  return metrics["experts_changed"], out.experts


def test_experts_changed_is_zero_until_the_router_moves(sampled):
  share, _ = share_changed(WEIGHTS, sampled)
  assert share == 0
  params, router = WEIGHTS
  real = np.concatenate([sampled.prompt_mask, sampled.completion_mask], axis=1)
  recorded = np.sort(np.asarray(sampled.experts)[:, 0], axis=-1)
  for size in (0.05, 1.0):
    rng = np.random.default_rng(1)

    def move(path, x, size=size, rng=rng):
      is_router = path[-1].key == "w_router"
      return x + is_router * size * jnp.asarray(rng.normal(size=x.shape), x.dtype)

    moved = jax.tree_util.tree_map_with_path(move, params)
    share, experts = share_changed((moved, router), sampled)
    now = np.sort(np.asarray(experts)[0], axis=-1)
    want = (now != recorded).any(axis=-1)[real].mean()
    np.testing.assert_allclose(share, want, rtol=1e-6)
    assert 0 < share < 1


def test_without_recorded_experts_nothing_is_said_of_them():
  _, metrics, _ = extra(WEIGHTS, ROWS, ROWS)
  assert set(metrics) == {"balance_loss", "mtp_nll", "tokens_dropped_max"}


# -- router biases ---------------------------------------------------------------------


def test_router_biases_move_by_the_rate_against_the_load():
  before, after, _ = updated(**BALANCE)
  tokens = jnp.concatenate([ROWS.prompts, ROWS.completions], axis=1)
  mask = jnp.concatenate([ROWS.prompt_mask, ROWS.completion_mask], axis=1)
  variables = variables_of(WEIGHTS)
  apply = jax.jit(POLICY.apply)
  experts = np.asarray(apply(variables, tokens, Sequence.of_mask(mask)).experts)
  load = np.bincount(experts[0][np.asarray(mask)].reshape(-1), minlength=EXPERTS)
  want = 0.25 * np.sign(load.mean() - load)
  assert np.abs(want).max() == 0.25
  bias = after.router["moe_layers"]["moe"]["bias"]
  np.testing.assert_array_equal(
    bias - before.router["moe_layers"]["moe"]["bias"], [want]
  )
  # The MTP module was not run: its biases stay.
  own = [x.router["mtp_layer"]["moe"]["bias"] for x in (before, after)]
  np.testing.assert_array_equal(*own)


def test_the_mtp_modules_biases_move_with_its_loss():
  before, after, _ = updated(**BALANCE, **MTP)
  own = [x.router["mtp_layer"]["moe"]["bias"] for x in (before, after)]
  moved = np.unique(np.abs(own[1] - own[0]))
  assert set(moved) <= {0, 0.25} and 0.25 in moved


def test_a_frozen_bias_has_rate_zero():
  assert config(freeze_router_bias=True).bias_rate == 0
  assert config().bias_rate == 0.25


# -- replay, and frozen biases ---------------------------------------------------------


def test_an_update_replays_the_samplers_experts_and_leaves_frozen_biases(sampled):
  """Every token on experts 0 and 1; the router gets its gradient all the same."""
  rows = sampled.replace(
    experts=jnp.broadcast_to(jnp.arange(2), sampled.experts.shape),
    advantages=ROWS.advantages,
  )
  state = train_state.restart(*WEIGHTS, SGD, reference=False)
  frozen = config(routing_replay=True, freeze_router_bias=True)
  update = functools.partial(grpo.update, policy=POLICY, optimizer=SGD, config=frozen)
  after, metrics, _ = jax.jit(update)(state, rows)
  np.testing.assert_allclose(metrics["load_imbalance"], 2.0, rtol=1e-6)
  assert metrics["experts_changed"] > 0
  old, new = (x.params["moe_layers"]["moe"] for x in (state, after))
  for name in ("w_gate", "w_up", "w_down"):
    moved = np.abs(np.asarray(new[name] - old[name])).max(axis=(0, 2, 3))
    assert (moved[:2] > 0).all() and not moved[2:].any(), name
  moved = np.abs(np.asarray(new["w_router"] - old["w_router"])).max(axis=(0, 1))
  assert (moved[:2] > 0).all() and not moved[2:].any()
  for a, b in zip(*map(jax.tree.leaves, (state.router, after.router)), strict=True):
    np.testing.assert_array_equal(a, b)
