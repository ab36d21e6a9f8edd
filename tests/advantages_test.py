"""Advantages against tests/oracle.py, and the values that the rules imply."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from r1jax.advantages import ADVANTAGES, group_relative
from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.rewards.in_graph import Rewards


def advantage(rewards, name="grpo", **choices):
  """Of one reward [B, G], as NumPy."""
  rewards = Rewards.of(rule=(1.0, jnp.asarray(rewards)))
  o = Objective(advantage=name, **choices)
  return np.asarray(group_relative(rewards, jnp.ones(len(rewards.total), bool), o))


def random_parts(seed=0, batch=5, group=7):
  rng = np.random.default_rng(seed)
  parts = rng.normal(size=(3, batch, group))
  parts[1] = rng.integers(0, 2, (batch, group))
  parts[0, 1], parts[1, 1], parts[2, 1] = 0.1, 1.0, 1 / 3  # equal in every part
  parts[1, 2] = 0.0  # equal in one part
  return parts


@pytest.mark.parametrize("eps", [1e-9, 1e-6, 1e-4, 0.5])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("group", [2, 3, 7])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_estimator_equals_the_oracle(name, group, ddof, eps):
  parts, weights = random_parts(group, group=group), [1.0, 0.5, 2.0]
  with jax.enable_x64(True):
    named = {
      f"part{i}": (w, jnp.asarray(x))
      for i, (w, x) in enumerate(zip(weights, parts, strict=True))
    }
    o = Objective(advantage=name, std_ddof=ddof, std_eps=eps)
    got = group_relative(Rewards.of(**named), jnp.ones(len(parts[0]), bool), o)
  want = oracle.advantages(name, parts, weights, std_ddof=ddof, std_eps=eps)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
  "right, of_right, of_wrong",
  [(1, 3.873, -0.258), (4, 1.732, -0.577), (8, 1.0, -1.0), (15, 0.258, -3.873)],
)
def test_binary_rewards_of_16_give_the_values_of_the_rule(right, of_right, of_wrong):
  rewards = [[1.0] * right + [0.0] * (16 - right)]
  a = advantage(rewards, std_ddof=0)[0]
  np.testing.assert_allclose(a[:right], of_right, atol=6e-4)
  np.testing.assert_allclose(a[right:], of_wrong, atol=6e-4)
  sample = advantage(rewards, std_ddof=1)[0]
  np.testing.assert_allclose(sample, a * np.sqrt(15 / 16), rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e-8, -2.3, 1e6])
def test_equal_rewards_give_exactly_zero(name, value, eps):
  """Not rounding noise over an epsilon."""
  for group in (2, 3, 7, 16):
    rewards = np.full((3, group), value, np.float32)
    a = advantage(rewards, name, std_eps=eps)
    assert np.array_equal(a, np.zeros((3, group)))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_touch_each_other(name):
  rewards = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
  alone = [advantage(row[None], name)[0] for row in rewards]
  np.testing.assert_allclose(advantage(rewards, name), np.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_equal_group_beside_a_mixed_one_stays_zero(name):
  a = advantage(np.float32([[0.1, 0.1, 0.1], [0.1, 0.1, 0.4]]), name)
  assert np.array_equal(a[0], np.zeros(3))
  assert a[1, 2] > 0 > a[1, 0] == a[1, 1]


def test_shifting_or_scaling_rewards_changes_nothing():
  rewards = np.float32([[0.0, 1.0, 1.5, 3.0]])
  want = advantage(rewards, std_eps=0.0)
  got = advantage(8 * rewards - 4, std_eps=0.0)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_fractional_rewards_are_not_lost(name):
  a = advantage(np.float32([[0.9, -0.5, 0.5, 0.25], [0.0, 0.0, 1.0, 0.0]]), name)
  assert len(set(a[0].tolist())) == 4 and a.dtype == np.float32


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_empty_slot_has_no_share_in_any_statistic(name):
  rewards = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
  filled = np.array([True, False, True, False, True])
  o = Objective(advantage=name)
  both = [
    Rewards.of(a=(1.0, jnp.asarray(x)), b=(0.5, jnp.asarray(x**2)))
    for x in (np.where(filled[:, None], rewards, 7.0), rewards[filled])
  ]
  got = group_relative(both[0], jnp.asarray(filled), o)
  want = group_relative(both[1], jnp.ones(3, bool), o)
  np.testing.assert_allclose(got[filled], want, rtol=1e-5)


def test_gdpo_gives_a_reward_the_say_of_its_weight():
  """A coefficient is the weight of a normalised part: it must not cancel."""
  rule = jnp.asarray(np.float32([[1, 0, 0, 1]]))
  kl = jnp.asarray(np.float32([[0, 3, 0, 3]]))
  o, there = Objective(advantage="gdpo"), jnp.ones(1, bool)
  light, heavy = (
    group_relative(Rewards.of(rule=(1.0, rule)).plus("kl", w, -kl), there, o)
    for w in (1e-3, 1.0)
  )
  np.testing.assert_allclose(light, [[0.866, -0.866, -0.866, 0.866]], atol=5e-3)
  assert abs(float(heavy[0, 3])) < 1e-3 < float(light[0, 3])


def test_leave_one_out_is_the_mean_of_the_others():
  rewards = np.float32([[1.0, 0.0, 0.5, 0.25]])
  a = advantage(rewards, "rloo")[0]
  for i, r in enumerate(rewards[0]):
    np.testing.assert_allclose(a[i], r - np.delete(rewards[0], i).mean(), rtol=1e-6)


def test_gdpo_keeps_rewards_apart_that_a_sum_confuses():
  """Two outputs of equal total, one right without form, one with form and wrong: the
  sum sees no difference, and the rarer of the two parts weighs more in GDPO."""
  right = jnp.asarray(np.float32([[1, 0, 0, 0, 0]]))
  form = jnp.asarray(np.float32([[0, 1, 1, 1, 0]]))
  rewards = Rewards.of(accuracy=(1.0, right), format=(1.0, form))
  there = jnp.ones(1, bool)
  together = group_relative(rewards, there, Objective(advantage="grpo"))
  apart = group_relative(rewards, there, Objective(advantage="gdpo"))
  assert together[0, 0] == together[0, 1]
  assert apart[0, 0] > apart[0, 1] > apart[0, 4]


def test_an_unknown_estimator_is_refused_with_what_there_is():
  with pytest.raises(UserError, match=r"advantage='vine'.*dr_grpo.*rloo"):
    advantage([[0.0, 1.0]], "vine")
