"""Group-relative advantages against NumPy, and the values that the rule implies."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.advantages import group_relative


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-6, 1e-4, 0.5])
def test_equals_numpy(ddof, eps):
  rewards = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  got = group_relative(jnp.asarray(rewards), std_ddof=ddof, std_eps=eps)
  for row, group in zip(np.asarray(got), rewards.astype(np.float64), strict=True):
    want = (group - group.mean()) / (group.std(ddof=ddof) + eps)
    np.testing.assert_allclose(row, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  "right, of_right, of_wrong",
  [(1, 3.873, -0.258), (4, 1.732, -0.577), (8, 1.0, -1.0), (15, 0.258, -3.873)],
)
def test_binary_rewards_of_16_give_the_values_of_the_rule(right, of_right, of_wrong):
  rewards = jnp.asarray([[1.0] * right + [0.0] * (16 - right)])
  a = np.asarray(group_relative(rewards, std_ddof=0))[0]
  np.testing.assert_allclose(a[:right], of_right, atol=6e-4)
  np.testing.assert_allclose(a[right:], of_wrong, atol=6e-4)
  sample = np.asarray(group_relative(rewards, std_ddof=1))[0]
  np.testing.assert_allclose(sample, a * np.sqrt(15 / 16), rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e-8, -2.3, 1e6])
@pytest.mark.parametrize("group", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(value, group):
  rewards = jnp.full((3, group), value, jnp.float32)
  assert np.array_equal(group_relative(rewards, std_eps=1e-9), np.zeros((3, group)))


def test_groups_do_not_touch_each_other():
  rewards = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
  alone = [group_relative(jnp.asarray(row[None]))[0] for row in rewards]
  np.testing.assert_allclose(
    group_relative(jnp.asarray(rewards)), np.stack(alone), rtol=1e-6
  )


def test_an_equal_group_beside_a_mixed_one_stays_zero():
  a = group_relative(jnp.asarray([[0.1, 0.1, 0.1], [0.1, 0.1, 0.4]]))
  assert np.array_equal(a[0], np.zeros(3))
  assert a[1, 2] > 0 > a[1, 0] == a[1, 1]


def test_shifting_or_scaling_rewards_changes_nothing():
  rewards = jnp.asarray([[0.0, 1.0, 1.5, 3.0]])
  want = group_relative(rewards, std_eps=0.0)
  np.testing.assert_allclose(
    group_relative(8 * rewards - 4, std_eps=0.0), want, rtol=1e-5
  )


def test_fractional_rewards_are_not_lost():
  a = group_relative(jnp.asarray([[0.9, -0.5, 0.5, 0.25]]))
  assert len(set(np.asarray(a)[0].tolist())) == 4
