"""Schedules, AdamW with clipping by hand, and gradients summed over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax import optimizer
from r1jax.errors import UserError
from r1jax.models import config, policy


def settings(**changes):
  return optimizer.OptimizerConfig(**{**dict(learning_rate=0.5, steps=20), **changes})


def rates(c, steps):
  schedule = optimizer.learning_rate(c)
  return [float(schedule(i)) for i in steps]


def test_without_warmup_the_rate_is_the_peak_from_the_first_update():
  np.testing.assert_allclose(rates(settings(), (0, 1, 19, 500)), [0.5] * 4, rtol=1e-6)


def test_warmup_rises_evenly_and_the_first_update_already_moves():
  got = rates(settings(warmup_steps=4), range(6))
  want = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [1, 2])
def test_short_warmups_end_at_the_peak(warmup):
  got = rates(settings(warmup_steps=warmup), range(3))
  want = [0.5 * min((i + 1) / warmup, 1) for i in range(3)]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_falls_from_the_peak_to_the_final_fraction(warmup):
  c = settings(warmup_steps=warmup, schedule="cosine", final_fraction=0.2)
  steps = np.arange(warmup, 21)
  done = (steps - warmup) / (20 - warmup)
  want = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2)
  np.testing.assert_allclose(rates(c, steps), want, rtol=1e-5)
  np.testing.assert_allclose(rates(c, (20, 21, 900)), [0.1] * 3, rtol=1e-5)


def test_moments_in_bfloat16_take_half_and_move_weights_nearly_alike():
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
  grads = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), params) for i in range(4)]
  ends, sizes = [], []
  for moments in ("float32", "bfloat16"):
    how = settings(learning_rate=0.1, steps=4, moments=moments)
    chosen, now = optimizer.make_optimizer(how), params
    state = chosen.init(params)
    sizes.append(sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim))
    for g in grads:
      updates, state = chosen.update(g, state, now)
      now = jax.tree.map(jnp.add, now, updates)
    ends.append(now["w"])
  assert sizes[0] == 2 * sizes[1]
  np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=0.02)
  assert (ends[0] != ends[1]).any()
  with pytest.raises(UserError, match="moments='float16'"):
    optimizer.make_optimizer(settings(moments="float16"))


def test_an_unknown_schedule_is_refused_by_name():
  with pytest.raises(UserError, match="'linear'"):
    optimizer.learning_rate(settings(schedule="linear"))


def test_weight_decay_shrinks_every_weight_except_the_scales_of_norms(random_weights):
  params, _ = random_weights(policy.Policy(config.tiny(16, width=32, mtp_depth=1)))
  tx = optimizer.make_optimizer(settings(weight_decay=0.1))
  zeros = jax.tree.map(jnp.zeros_like, params)

  @jax.jit
  def decay(params):
    return tx.update(zeros, tx.init(params), params)[0]

  updates = decay(params)
  scales = 0
  for (path, w), update in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True
  ):
    where = jax.tree_util.keystr(path)
    is_norm = where.endswith("norm']['scale']")
    scales += is_norm
    want = np.zeros(w.shape) if is_norm else -0.5 * 0.1 * np.asarray(w)
    np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=where)
  # Four a stack of blocks, the final norm, three of the MTP module.
  assert scales == 3 * 4 + 1 + 3


def test_updates_equal_clipped_adamw_by_hand():
  c = settings(learning_rate=0.1, warmup_steps=2, weight_decay=0.01, clip_norm=1.0)
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 2))
  tx = optimizer.make_optimizer(c)
  params = {"w": jnp.asarray(w, jnp.float32)}
  state = tx.init(params)
  m = v = np.zeros_like(w)
  for t, size in enumerate([5.0, 0.01, 1.0], start=1):
    g = rng.normal(size=w.shape)
    g *= size / np.sqrt((g**2).sum())
    updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    clipped = g / max(size, 1.0)
    m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
    adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    w = w - 0.1 * min(t / 2, 1) * (adam + 0.01 * w)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_batch(parts):
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(8, 3)), rng.normal(size=8)
  w = rng.normal(size=3)

  def loss_fn(params, part):
    inputs, target = part
    error = inputs @ params["w"] - target
    metrics = {"square": jnp.sum(error**2), "error_max": jnp.max(jnp.abs(error))}
    counts = {"signs": jnp.sum(jnp.sign(error))}
    per_row = {"error": error, "double": 2 * inputs}
    return jnp.sum(error**2), (metrics, counts, per_row)

  batch = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  params = {"w": jnp.asarray(w, jnp.float32)}
  found = optimizer.accumulate(loss_fn, params, batch, parts)
  grads, metrics, counts, per_row = found
  error = x @ w - y
  np.testing.assert_allclose(grads["w"], 2 * x.T @ error, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(metrics["square"], (error**2).sum(), rtol=1e-5)
  np.testing.assert_allclose(metrics["error_max"], np.abs(error).max(), rtol=1e-5)
  np.testing.assert_array_equal(counts["signs"], np.sign(error).sum())
  # What is kept a row stands in the order of the batch, not of the parts.
  np.testing.assert_allclose(per_row["error"], error, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(per_row["double"], 2 * np.float32(x))


def test_part_i_takes_rows_i_and_every_nth_after_it():
  def loss_fn(params, rows):
    ends = jnp.stack([rows[0], rows[-1]])
    return params * 0.0, ({"rows_max": jnp.max(rows)}, ends, rows)

  batch = jnp.arange(8.0)
  found = optimizer.accumulate(loss_fn, jnp.float32(1.0), batch, 4)
  _, metrics, ends, rows = found
  # Parts (0, 4), (1, 5), (2, 6), (3, 7): their first and last rows, summed.
  np.testing.assert_array_equal(ends, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])
  assert metrics["rows_max"] == 7
  np.testing.assert_array_equal(rows, batch)


def test_rows_that_do_not_divide_into_the_parts_are_refused():
  def loss_fn(params, rows):
    return params * rows.sum(), ({}, (), ())

  with pytest.raises(ValueError, match="6 rows do not divide into micro_batches=4"):
    optimizer.accumulate(loss_fn, jnp.float32(1.0), jnp.arange(6.0), 4)


# -- one update ------------------------------------------------------------------------


def test_a_batch_without_a_loss_moves_nothing_not_even_by_momentum():
  adamw, descend = optimizer.make_optimizer(settings()), optimizer.descend
  params = {"w": jnp.asarray([1.0, -2.0])}
  start = adamw.init(params)
  params, state, _ = descend(adamw, {"w": jnp.asarray([1.0, 1.0])}, params, start)
  zero = {"w": jnp.zeros(2)}
  same, kept, _ = descend(adamw, zero, params, state, learnt=jnp.asarray(False))
  assert jax.tree.all(jax.tree.map(np.array_equal, (same, kept), (params, state)))
  moved, later, _ = descend(adamw, zero, params, state, learnt=jnp.asarray(True))
  assert not np.array_equal(moved["w"], params["w"])  # what momentum would have done
  always, also, _ = descend(adamw, zero, params, state)
  assert jax.tree.all(jax.tree.map(np.array_equal, (moved, later), (always, also)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_gradient_that_is_not_finite_moves_nothing_however_often_it_comes(bad):
  """1e30: its square overflows, and so would the norm that it is clipped by."""
  adamw, descend = optimizer.make_optimizer(settings()), optimizer.descend
  params = {"w": jnp.asarray([1.0, -2.0])}
  params, state, finite = descend(
    adamw, {"w": jnp.asarray([1.0, 1.0])}, params, adamw.init(params)
  )
  assert finite
  now = params, state
  for _ in range(5):
    *now, finite = descend(adamw, {"w": jnp.asarray([1.0, bad])}, *now)
    assert not finite
  assert jax.tree.all(jax.tree.map(np.array_equal, tuple(now), (params, state)))
