"""Choice of experts, gates, load, both balances and replay, against NumPy loops."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sft
from r1jax.models import config, moe, policy
from r1jax.models.sequence import Sequence

choose = jax.jit(moe.choose_experts, static_argnums=2)


def sizes(**changes):
  return config.tiny(16, **{**dict(width=32, experts=12, active_experts=3), **changes})


def chosen_by_hand(scores, bias, c):
  """One token at a time; equal values go to the lower index."""
  experts, gates = [], []
  per_group = c.experts // c.expert_groups
  for s in scores:
    value = [s[e] + bias[e] for e in range(c.experts)]
    groups = [value[i : i + per_group] for i in range(0, c.experts, per_group)]
    worth = [sum(sorted(g, reverse=True)[:2]) for g in groups]
    order = sorted(range(c.expert_groups), key=lambda g: (-worth[g], g))
    kept = set(order[: c.active_groups])
    for e in range(c.experts):
      if e // per_group not in kept:
        value[e] = -np.inf
    best = sorted(range(c.experts), key=lambda e: (-value[e], e))[: c.active_experts]
    weights = np.array([s[e] for e in best], np.float64)
    if c.renormalise:
      weights = weights / weights.sum()
    experts.append(best)
    gates.append(weights * c.route_scale)
  return np.array(experts), np.array(gates)


CASES = {
  "no_groups": {},
  "no_renormalisation": dict(renormalise=False, route_scale=2.5),
  "two_of_four_groups": dict(expert_groups=4, active_groups=2, route_scale=2.5),
  "one_of_three_groups": dict(expert_groups=3, active_groups=1),
  "all_groups": dict(expert_groups=4, active_groups=4),
  "groups_of_one": dict(expert_groups=12, active_groups=4),
}


@pytest.mark.parametrize("bias_at", [0.0, -4.0], ids=["near_zero", "very_negative"])
@pytest.mark.parametrize("case", CASES)
def test_chosen_experts_and_gates_equal_a_loop_over_tokens(case, bias_at):
  c = sizes(**CASES[case])
  rng = np.random.default_rng(1)
  # Eighths: sums are exact and equal values are frequent.
  scores = (rng.integers(1, 8, size=(200, c.experts)) / 8).astype(np.float32)
  bias = (bias_at + rng.integers(-6, 7, size=c.experts) / 8).astype(np.float32)
  experts, gates = choose(jnp.asarray(scores), jnp.asarray(bias), c)
  want_experts, want_gates = chosen_by_hand(scores, bias, c)
  np.testing.assert_array_equal(experts, want_experts)
  np.testing.assert_allclose(gates, want_gates, rtol=1e-6)


def test_equal_values_go_to_the_lower_index():
  c = sizes(expert_groups=4, active_groups=2)
  experts, _ = choose(jnp.full((1, 12), 0.5), jnp.zeros(12), c)
  np.testing.assert_array_equal(experts, [[0, 1, 2]])


def test_a_dropped_group_loses_even_to_negative_values():
  """A fill of 0 instead of -inf would prefer dropped experts here."""
  c = sizes(expert_groups=4, active_groups=2, active_experts=5)
  scores = np.full((1, 12), 0.5, np.float32)
  bias = np.repeat(np.float32([-2.0, -1.0, -3.0, -1.5]), 3)
  experts, _ = choose(jnp.asarray(scores), jnp.asarray(bias), c)
  np.testing.assert_array_equal(experts, [[3, 4, 5, 9, 10]])


def test_the_bias_selects_and_never_weighs():
  c = sizes(route_scale=2.5)
  scores = np.random.default_rng(2).uniform(0.01, 0.99, (50, 12)).astype(np.float32)
  bias = np.zeros(12, np.float32)
  bias[[2, 7, 11]] = 3.0, 2.0, 1.0
  experts, gates = choose(jnp.asarray(scores), jnp.asarray(bias), c)
  np.testing.assert_array_equal(experts, np.tile([2, 7, 11], (50, 1)))
  picked = scores[:, [2, 7, 11]]
  np.testing.assert_allclose(
    gates, 2.5 * picked / picked.sum(1, keepdims=True), rtol=1e-6
  )
  # More of the same bias: the same choice, and bit for bit the same gates.
  _, again = choose(jnp.asarray(scores), jnp.asarray(bias * 2), c)
  np.testing.assert_array_equal(gates, again)


def test_gates_have_a_gradient_to_scores_and_none_to_the_bias():
  c = sizes(expert_groups=4, active_groups=2)
  scores = np.random.default_rng(3).uniform(0.1, 0.9, (20, 12)).astype(np.float32)

  def first_gates(scores, bias):
    return moe.choose_experts(scores, bias, c)[1][:, 0].sum()

  to_scores, to_bias = jax.grad(first_gates, (0, 1))(jnp.asarray(scores), jnp.zeros(12))
  assert np.abs(to_scores).max() > 0.1
  np.testing.assert_array_equal(to_bias, np.zeros(12))


def test_the_loss_has_no_gradient_to_the_router_biases(key, random_weights):
  c = sizes(layers=1, dense_layers=0, experts=4, active_experts=2, mtp_depth=1)
  network = policy.Policy(c)
  params, router = random_weights(network)
  tokens = jax.random.randint(key, (2, 6), 0, c.vocab)
  pages = sft.Pages(tokens, jnp.ones_like(tokens), jnp.ones_like(tokens, bool))

  @jax.jit
  def gradient(params, router):
    def loss(params, router):
      counts = (jnp.float32(10), jnp.float32(8))
      return sft.loss_fn(network, params, router, pages, counts=counts, mtp_coef=1.0)[0]

    return jax.grad(loss, (0, 1))(params, router)

  to_params, to_router = gradient(params, router)
  assert set(to_router) == {"moe_layers", "mtp_layer"}
  for leaf in jax.tree.leaves(to_router):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
  assert np.abs(to_params["moe_layers"]["moe"]["w_router"]).max() > 0


def layer(c, key, x, counted):
  module = moe.MoE(c)
  rng = np.random.default_rng(4)
  seq = None if counted is None else Sequence.of_mask(counted)
  shapes = nn.unbox(jax.eval_shape(module.init, key, x, seq))
  variables = jax.tree.map(  # inputs stand on the last axis but one
    lambda w: rng.normal(size=w.shape) / np.sqrt(w.shape[-2]), shapes["params"]
  )
  variables = {
    "params": variables,
    "router": {"bias": rng.normal(size=c.experts) * 0.2},
  }
  variables = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), variables)
  return variables, jax.jit(module.apply)(variables, x, seq)


@pytest.mark.parametrize("how", ["dense", "ragged"])
def test_the_layer_equals_a_loop_over_tokens_and_their_experts(how, key):
  c = sizes(
    moe=how, experts=8, expert_groups=4, active_groups=2, route_scale=2.5, expert_ffn=16
  )
  x = jax.random.normal(key, (2, 5, c.width))
  variables, (got, routing) = layer(c, key, x, None)
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), variables["params"])
  bias = np.asarray(variables["router"]["bias"], np.float64)
  flat = np.asarray(x, np.float64).reshape(-1, c.width)

  def ffn(token, gate, up, down):
    g = token @ gate
    return (g / (1 + np.exp(-g)) * (token @ up)) @ down

  experts, gates = chosen_by_hand(1 / (1 + np.exp(-flat @ p["w_router"])), bias, c)
  want = np.zeros_like(flat)
  for m, token in enumerate(flat):
    want[m] = ffn(token, *(p["shared"][w] for w in ("gate", "up", "down")))
    for e, g in zip(experts[m], gates[m], strict=True):
      want[m] += g * ffn(token, p["w_gate"][e], p["w_up"][e], p["w_down"][e])
  np.testing.assert_allclose(got.reshape(-1, c.width), want, rtol=1e-4, atol=1e-5)
  load = np.bincount(experts.reshape(-1), minlength=8)
  np.testing.assert_array_equal(routing.load, load)
  np.testing.assert_array_equal(routing.experts, experts.reshape(2, 5, -1))


def test_load_counts_the_counted_tokens_only(key):
  c = sizes(experts=8, active_experts=2, expert_ffn=16)
  x = jax.random.normal(key, (3, 6, c.width))
  counted = np.arange(6)[None] >= np.array([[0], [2], [5]])
  variables, (out, routing) = layer(c, key, x, jnp.asarray(counted))
  scores = jax.nn.sigmoid(x.reshape(-1, c.width) @ variables["params"]["w_router"])
  experts, _ = choose(scores, variables["router"]["bias"], c)
  kept = np.asarray(experts)[counted.reshape(-1)]
  load = np.bincount(kept.reshape(-1), minlength=8)
  np.testing.assert_array_equal(routing.load, load)
  assert routing.load.sum() == counted.sum() * c.active_experts
  # Padding is served by the shared expert alone.
  served = jax.jit(moe.MoE(c).apply)(variables, x, None)[0]
  np.testing.assert_array_equal(out[counted], served[counted])
  assert (out[~counted] != served[~counted]).any(axis=-1).all()


def test_balance_moves_biases_by_exactly_the_rate_against_the_load():
  rate = 0.001
  start = np.random.default_rng(5).normal(size=(2, 4)).astype(np.float32)
  load = np.float32([[10, 2, 6, 6], [0, 0, 0, 24]])  # means 6 and 6
  move = np.float32([[-1, 1, 0, 0], [1, 1, 1, -1]]) * np.float32(rate)
  router = {"moe_layers": {"moe": {"bias": jnp.asarray(start)}}}
  got = moe.balance(router, {"moe_layers": jnp.asarray(load)}, rate)
  np.testing.assert_array_equal(got["moe_layers"]["moe"]["bias"], start + move)
  zero = jax.tree.map(jnp.zeros_like, router)
  got = moe.balance(zero, {"moe_layers": jnp.asarray(load)}, rate)
  np.testing.assert_array_equal(got["moe_layers"]["moe"]["bias"], move)


def test_balance_leaves_stacks_without_a_load_alone():
  router = {
    "moe_layers": {"moe": {"bias": jnp.zeros((2, 4))}},
    "mtp_layer": {"moe": {"bias": jnp.full(4, 0.25)}},
  }
  load = jnp.asarray(np.float32([[9, 1, 5, 5], [9, 1, 5, 5]]))
  got = moe.balance(router, {"moe_layers": load}, 0.5)
  assert set(got) == set(router)
  np.testing.assert_array_equal(got["mtp_layer"]["moe"]["bias"], np.full(4, 0.25))
  assert np.abs(got["moe_layers"]["moe"]["bias"]).max() == 0.5


def test_balance_at_rate_zero_changes_nothing():
  router = {"moe_layers": {"moe": {"bias": jnp.arange(4.0)[None]}}}
  got = moe.balance(router, {"moe_layers": jnp.asarray([[4.0, 0, 0, 0]])}, 0.0)
  np.testing.assert_array_equal(got["moe_layers"]["moe"]["bias"], [[0.0, 1, 2, 3]])


# -- what the layer says of its routing ------------------------------------------------


def balance_by_hand(scores, counted, c):
  """Eq. 17-20 for one row after another; equal scores go to the lower index."""
  found = []
  for row, real in zip(scores, counted, strict=True):
    row = [s for s, r in zip(row.astype(np.float64), real, strict=True) if r]
    frequency, probability = np.zeros(c.experts), np.zeros(c.experts)
    for s in row:
      best = sorted(range(c.experts), key=lambda e: (-s[e], e))[: c.active_experts]
      for e in range(c.experts):
        frequency[e] += c.experts / (c.active_experts * len(row)) * (e in best)
        probability[e] += s[e] / s.sum() / len(row)
    found.append(sum(f * p for f, p in zip(frequency, probability, strict=True)))
  return found


COUNTED = np.arange(7)[None] >= np.array([[0], [3], [6], [7]])  # 7, 4, 1 and 0 tokens


def some_scores(c, shape=COUNTED.shape, seed=6):
  rng = np.random.default_rng(seed)
  return rng.uniform(0.02, 0.98, (*shape, c.experts)).astype(np.float32)


def test_sequence_balance_equals_loops_over_rows_and_tokens():
  c = sizes(expert_groups=4, active_groups=2)  # groups play no part in it
  scores = some_scores(c)
  got = moe.sequence_balance(jnp.asarray(scores), jnp.asarray(COUNTED), c)
  np.testing.assert_allclose(got, balance_by_hand(scores, COUNTED, c), rtol=1e-5)
  assert got[3] == 0, "a row without tokens"


def test_sequence_balance_ignores_padding_bit_for_bit():
  c = sizes()
  scores = some_scores(c)
  other = np.where(COUNTED[:, :, None], scores, np.float32(0.75))
  counted = jnp.asarray(COUNTED)
  one, two = (moe.sequence_balance(jnp.asarray(s), counted, c) for s in (scores, other))
  np.testing.assert_array_equal(one, two)


def test_sequence_balance_is_one_when_experts_serve_alike():
  """Four tokens, each other's scores turned by one expert; all numbers are exact."""
  c = sizes(experts=4, active_experts=2)
  row = np.array([np.roll([8, 4, 2, 2], t) for t in range(4)]) / 16
  scores = jnp.asarray(np.stack([row, row[::-1]]), jnp.float32)
  got = moe.sequence_balance(scores, jnp.ones((2, 4), bool), c)
  assert got.tolist() == [1.0, 1.0]
  # One token over and over: f = 2 for two experts, with 12/16 of P.
  same = jnp.broadcast_to(scores[:, :1], scores.shape)
  got = moe.sequence_balance(same, jnp.ones((2, 4), bool), c)
  assert got[0] == 2 * 12 / 16


def test_sequence_balance_has_its_gradient_through_the_probabilities_alone():
  c = sizes()
  scores = some_scores(c)
  weights = np.array([1.0, -2.0, 0.5, 3.0], np.float32)  # of the rows

  def weighted(scores):
    return jnp.dot(
      moe.sequence_balance(scores, jnp.asarray(COUNTED), c), jnp.asarray(weights)
    )

  got = jax.grad(weighted)(jnp.asarray(scores))
  want = np.zeros(scores.shape)
  for b in range(4):
    real = [t for t in range(7) if COUNTED[b, t]]
    frequency = np.zeros(c.experts)
    for t in real:
      best = np.argsort(-scores[b, t], kind="stable")[: c.active_experts]
      frequency[best] += c.experts / (c.active_experts * len(real))
    for t in real:  # d/ds_j of sum_i f_i s_i / S, f held fixed
      total = scores[b, t].sum(dtype=np.float64)
      mean = frequency @ scores[b, t] / total
      want[b, t] = weights[b] * (frequency - mean) / total / len(real)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  assert not got[~COUNTED].any()


@pytest.mark.parametrize("renormalise", [True, False])
def test_gate_values_are_the_scores_of_the_experts_that_are_named(renormalise):
  c = sizes(renormalise=renormalise, route_scale=2.5)
  scores = some_scores(c, (20,))
  rng = np.random.default_rng(7)
  experts = np.array([rng.permutation(c.experts)[: c.active_experts] for _ in scores])
  got = moe.gate_values(jnp.asarray(scores), jnp.asarray(experts), c)
  for m, chosen in enumerate(experts):
    want = np.array([scores[m, e] for e in chosen], np.float64)
    want = 2.5 * (want / want.sum() if renormalise else want)
    np.testing.assert_allclose(got[m], want, rtol=1e-6)


def test_gate_values_of_the_routers_choice_are_its_gates():
  c = sizes(expert_groups=4, active_groups=2)
  scores, bias = some_scores(c, (20,)), np.linspace(-1, 1, c.experts, dtype=np.float32)
  experts, gates = moe.choose_experts(jnp.asarray(scores), jnp.asarray(bias), c)
  again = moe.gate_values(jnp.asarray(scores), experts, c)
  np.testing.assert_array_equal(gates, again)


# -- replay ----------------------------------------------------------------------------


@functools.cache
def replayed(how):
  """(config, module, variables, x, the layer's own (out, routing))."""
  c = sizes(moe=how, experts=8, active_experts=2, expert_ffn=16, route_scale=2.5)
  key = jax.random.key(0)
  x = jax.random.normal(key, (2, 5, c.width))
  variables, found = layer(c, key, x, None)
  return c, moe.MoE(c), variables, x, found


def other_experts(own, c):
  """As many experts a token, all different, none of them the router's."""
  rng = np.random.default_rng(8)
  flat = np.asarray(own).reshape(-1, own.shape[-1])
  picked = [
    rng.permutation(np.setdiff1d(np.arange(c.experts), row))[: len(row)] for row in flat
  ]
  return np.array(picked, np.int32).reshape(own.shape)


def layer_by_hand(x, params, experts, c):
  """Shared expert plus the named ones, gates from the present scores, in float64."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  flat = np.asarray(x, np.float64).reshape(-1, c.width)

  def ffn(token, gate, up, down):
    g = token @ gate
    return (g / (1 + np.exp(-g)) * (token @ up)) @ down

  want = np.zeros_like(flat)
  named = np.asarray(experts).reshape(len(flat), -1)
  for m, token in enumerate(flat):
    want[m] = ffn(token, *(p["shared"][w] for w in ("gate", "up", "down")))
    score = [1 / (1 + np.exp(-token @ p["w_router"][:, e])) for e in named[m]]
    for e, s in zip(named[m], score, strict=True):
      g = c.route_scale * s / sum(score)
      want[m] += g * ffn(token, p["w_gate"][e], p["w_up"][e], p["w_down"][e])
  return want.reshape(x.shape)


HOW = pytest.mark.parametrize("how", ["dense", "ragged"])


@HOW
def test_replaying_the_routers_own_choice_changes_nothing(how):
  _, module, variables, x, own = replayed(how)
  for dtype in (jnp.int32, jnp.uint8):
    experts = own[1].experts.astype(dtype)
    again = jax.jit(module.apply)(variables, x, None, experts)
    for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(again), strict=True):
      np.testing.assert_array_equal(one, two)


@HOW
def test_replaying_other_experts_uses_exactly_these(how):
  c, module, variables, x, (_, routing) = replayed(how)
  others = other_experts(routing.experts, c)
  counted = np.arange(5)[None] >= np.array([[0], [3]])
  seq = Sequence.of_mask(jnp.asarray(counted))
  out, found = jax.jit(module.apply)(variables, x, seq, jnp.asarray(others))
  want = layer_by_hand(x, variables["params"], others, c)
  np.testing.assert_allclose(out[counted], want[counted], rtol=1e-4, atol=1e-5)
  load = np.bincount(others[counted].reshape(-1), minlength=c.experts)
  np.testing.assert_array_equal(found.load, load)
  # What the router would have done is reported all the same.
  np.testing.assert_array_equal(found.experts, routing.experts)
  scores = jax.nn.sigmoid(x @ variables["params"]["w_router"])
  want = balance_by_hand(np.asarray(scores), counted, c)
  np.testing.assert_allclose(found.balance, want, rtol=1e-5)


@functools.cache
def gradient_under_replay(how):
  """(output, routing, gradient of a random projection of the output), projection."""
  c, module, variables, x, (_, routing) = replayed(how)
  others = jnp.asarray(other_experts(routing.experts, c))
  way = np.random.default_rng(9).normal(size=x.shape)

  @jax.jit
  def gradient(params):
    def loss(params):
      out, found = module.apply({**variables, "params": params}, x, None, others)
      return jnp.sum(out * jnp.asarray(way, jnp.float32)), (out, found)

    grads, found = jax.grad(loss, has_aux=True)(params)
    return *found, grads

  return gradient(variables["params"]), way


@HOW
def test_the_router_gets_the_gradient_of_the_replayed_gates(how):
  """Against central differences of the loops in NumPy, in float64."""
  c, _, variables, x, (_, routing) = replayed(how)
  others = other_experts(routing.experts, c)
  (_, _, grads), way = gradient_under_replay(how)
  params = jax.tree.map(np.asarray, variables["params"])
  step = np.random.default_rng(10).normal(size=params["w_router"].shape)

  def loss(h):
    w_router = params["w_router"].astype(np.float64) + h * step
    moved = {**params, "w_router": w_router}
    return (layer_by_hand(x, moved, others, c) * way).sum()

  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  assert abs(slope) > 0.1
  np.testing.assert_allclose((grads["w_router"] * step).sum(), slope, rtol=1e-3)


def test_dense_and_sorted_tokens_agree_under_replay():
  found = [gradient_under_replay(how)[0] for how in ("dense", "ragged")]
  one, two = map(jax.tree_util.tree_leaves_with_path, found)
  for (path, a), (_, b) in zip(one, two, strict=True):
    atol = 1e-5 * max(np.abs(a).max(), 1.0)
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def test_a_policy_replays_layer_by_layer(key, random_weights):
  c = sizes(layers=3, dense_layers=1, experts=4, active_experts=2)
  network = policy.Policy(c)
  params, router = random_weights(network)
  variables = {"params": params, "router": router}
  tokens = jax.random.randint(key, (2, 6), 0, c.vocab)
  seq = moe_sequence(tokens)
  forward = jax.jit(network.apply)
  own = forward(variables, tokens, seq)
  assert own.experts.shape == (2, 2, 6, 2)
  again = forward(variables, tokens, seq, own.experts)
  np.testing.assert_array_equal(again.hidden, own.hidden)
  np.testing.assert_array_equal(again.experts, own.experts)
  # Other experts in the last layer alone: the layers before it stay as they were.
  others = own.experts.at[1].set(other_experts(own.experts[1], c))
  moved = forward(variables, tokens, seq, others)
  loads = [np.bincount(np.ravel(x), minlength=4) for x in others]
  np.testing.assert_array_equal(moved.load["moe_layers"], loads)
  np.testing.assert_array_equal(moved.experts[0], own.experts[0])
  assert (moved.hidden != own.hidden).any()


def moe_sequence(tokens):
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  return Sequence(positions=at, segments=jnp.ones_like(tokens))


# -- figures ---------------------------------------------------------------------------


def test_changed_ignores_the_order_of_experts_and_sees_one_layer():
  rng = np.random.default_rng(11)
  experts = np.array(
    [[[rng.permutation(8)[:3] for _ in range(5)] for _ in range(4)] for _ in range(3)],
    np.int32,
  )
  assert experts.shape == (3, 4, 5, 3)
  turned = jnp.asarray(experts[..., [2, 0, 1]].astype(np.uint8))
  assert not moe.changed(jnp.asarray(experts), turned).any()
  other = experts.copy()
  other[1, 2, 3, 0] = next(e for e in range(8) if e not in experts[1, 2, 3])
  want = np.zeros((4, 5), bool)
  want[2, 3] = True
  np.testing.assert_array_equal(moe.changed(jnp.asarray(other), turned), want)
  np.testing.assert_array_equal(moe.changed(turned, jnp.asarray(other)), want)


def test_changed_counts_a_token_once_however_many_layers_differ():
  experts = jnp.zeros((3, 1, 2, 1), jnp.int32)
  other = experts.at[:, 0, 1].set(1)
  np.testing.assert_array_equal(moe.changed(experts, other), [[False, True]])


def test_load_imbalance_is_one_for_a_balanced_load_and_the_mean_over_layers():
  balanced = {"moe_layers": jnp.full((3, 4), 7.0), "mtp_layer": jnp.full(4, 2.0)}
  assert moe.load_imbalance(balanced) == 1
  load = {
    "moe_layers": jnp.asarray([[4.0, 0, 0, 0], [3.0, 1, 2, 2]]),
    "mtp_layer": jnp.asarray([2.0, 2, 2, 2]),
  }
  np.testing.assert_allclose(moe.load_imbalance(load), (4 + 1.5 + 1) / 3, rtol=1e-6)
  assert moe.load_imbalance({}) == 1, "no experts"
