"""Choice of experts, gates, load and the aux-loss-free balance, against NumPy loops."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sft
from r1jax.models import config, moe, policy

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
  variables = nn.unbox(jax.jit(module.init)(key, x, counted))
  variables["router"]["bias"] = jnp.asarray(
    np.random.default_rng(4).normal(size=c.experts) * 0.2, jnp.float32
  )
  return variables, jax.jit(module.apply)(variables, x, counted)


@pytest.mark.parametrize("how", ["dense", "ragged"])
def test_the_layer_equals_a_loop_over_tokens_and_their_experts(how, key):
  c = sizes(
    moe=how, experts=8, expert_groups=4, active_groups=2, route_scale=2.5, expert_ffn=16
  )
  x = jax.random.normal(key, (2, 5, c.width))
  variables, (got, load) = layer(c, key, x, None)
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
  np.testing.assert_array_equal(load, np.bincount(experts.reshape(-1), minlength=8))


def test_load_counts_the_counted_tokens_only(key):
  c = sizes(experts=8, active_experts=2, expert_ffn=16)
  x = jax.random.normal(key, (3, 6, c.width))
  counted = np.arange(6)[None] >= np.array([[0], [2], [5]])
  variables, (out, load) = layer(c, key, x, jnp.asarray(counted))
  scores = jax.nn.sigmoid(x.reshape(-1, c.width) @ variables["params"]["w_router"])
  experts, _ = choose(scores, variables["router"]["bias"], c)
  kept = np.asarray(experts)[counted.reshape(-1)]
  np.testing.assert_array_equal(load, np.bincount(kept.reshape(-1), minlength=8))
  assert load.sum() == counted.sum() * c.active_experts
  # Uncounted tokens are served all the same.
  served = jax.jit(moe.MoE(c).apply)(variables, x, None)[0]
  np.testing.assert_array_equal(out, served)


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
