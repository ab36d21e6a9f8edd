"""Pages: packing, targets, loss by hand, and sums over parts of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import optimizer, sft, train_state
from r1jax.models import config, policy
from r1jax.models.sequence import Sequence

VOCAB, WIDTH, ROWS = 16, 12, 7
SIZES = dict(
  width=32,
  layers=2,
  heads=2,
  q_latent=None,
  kv_latent=10,
  nope_dim=6,
  rope_dim=8,
  v_dim=5,
  dense_ffn=24,
  expert_ffn=12,
  rope_theta=20.0,
)
NETWORK = policy.Policy(config.tiny(VOCAB, **SIZES, mtp_depth=1))
LENGTHS = [[5, 4, 2], [7, 5], [1, 3]]  # of pages, row by row; the last row has padding


def pages_of(rows, height=ROWS):
  """[height, WIDTH] Pages from rows of (tokens, targets); missing rows are padding."""
  tokens, segments = np.zeros((2, height, WIDTH), np.int32)
  targets = np.zeros((height, WIDTH), bool)
  for i, row in enumerate(rows):
    at = 0
    for number, (page, wanted) in enumerate(row, start=1):
      here = slice(at, at + len(page))
      tokens[i, here], targets[i, here], segments[i, here] = page, wanted, number
      at += len(page)
  return sft.Pages(*map(jnp.asarray, (tokens, segments, targets)))


def some_pages(seed=0):
  rng = np.random.default_rng(seed)

  def page(n):
    return rng.integers(1, VOCAB, n), (np.arange(n) > 0) & (rng.random(n) < 0.7)

  return [[page(n) for n in row] for row in LENGTHS]


def counts_of(pages):
  return tuple(
    jnp.asarray(sft.targets_ahead(pages, ahead).sum(), jnp.float32) for ahead in (1, 2)
  )


@functools.partial(jax.jit, static_argnums=3)
def loss_and_gradient(weights, pages, counts, mtp_coef):
  params, router = weights

  def loss(params):
    return sft.loss_fn(NETWORK, params, router, pages, counts=counts, mtp_coef=mtp_coef)

  return jax.value_and_grad(loss, has_aux=True)(params)


def assert_close_trees(a, b, tolerance):
  a, b = (jax.tree_util.tree_leaves_with_path(x) for x in (a, b))
  for (path, x), (_, y) in zip(a, b, strict=True):
    name = jax.tree_util.keystr(path)
    scale = max(np.abs(y).max(), 1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=name)


def test_positions_count_from_zero_in_every_segment():
  segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
  got = sft.positions(jnp.asarray(segments))
  np.testing.assert_array_equal(got[0, :6], [0, 1, 2, 0, 1, 0])
  np.testing.assert_array_equal(got[1], np.arange(8))


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_position_learns_a_target_of_its_own_page_only(ahead):
  pages = pages_of(some_pages())
  pages = pages.replace(
    targets=jnp.ones_like(pages.targets)
  )  # even first ones, padding
  segments = np.asarray(pages.segments)
  got = sft.targets_ahead(pages, ahead)
  assert got.shape == (ROWS, WIDTH - ahead)
  for b in range(ROWS):
    for i in range(WIDTH - ahead):
      same = segments[b, i] == segments[b, i + ahead] != 0
      assert bool(got[b, i]) == bool(same)
  none = sft.targets_ahead(pages.replace(targets=~pages.targets), ahead)
  assert not none.any()


def by_hand(logits, pages, ahead):
  """Mean of -log softmax over the targets, one position at a time."""
  logits = np.asarray(logits, np.float64)
  tokens, segments, targets = map(
    np.asarray, (pages.tokens, pages.segments, pages.targets)
  )
  losses = []
  for b in range(tokens.shape[0]):
    for i in range(tokens.shape[1] - ahead):
      j = i + ahead
      if targets[b, j] and segments[b, i] == segments[b, j]:
        row = logits[b, i]
        losses.append(np.log(np.exp(row).sum()) - row[tokens[b, j]])
  return np.mean(losses)


def test_the_loss_is_the_cross_entropy_of_the_next_token_and_of_the_one_after(
  random_weights,
):
  weights, pages = random_weights(NETWORK), pages_of(some_pages())
  (loss, (metrics, _)), _ = loss_and_gradient(weights, pages, counts_of(pages), 0.3)

  @jax.jit
  def logits(params, router):
    variables = {"params": params, "router": router}
    seq = Sequence(positions=sft.positions(pages.segments), segments=pages.segments)
    out = NETWORK.apply(variables, pages.tokens, seq)
    ahead, _ = NETWORK.apply(variables, out.hidden, pages.tokens, seq, method="mtp")
    return tuple(
      NETWORK.apply(variables, h, method="logits") for h in (out.hidden, ahead)
    )

  main, ahead = logits(*weights)
  one, two = by_hand(main, pages, 1), by_hand(ahead, pages, 2)
  np.testing.assert_allclose(metrics["nll"], one, rtol=1e-5)
  np.testing.assert_allclose(metrics["mtp_nll"], two, rtol=1e-5)
  np.testing.assert_allclose(loss, one + 0.3 * two, rtol=1e-5)


@pytest.mark.parametrize("mtp_coef", [0.0, 0.3])
def test_packed_rows_teach_what_their_pages_teach_one_a_row(mtp_coef, random_weights):
  weights, rows = random_weights(NETWORK), some_pages()
  packed = pages_of(rows)
  apart = pages_of([[page] for row in rows for page in row])
  counts = counts_of(packed)
  assert [int(x) for x in counts] == [int(x) for x in counts_of(apart)]
  got = loss_and_gradient(weights, packed, counts, mtp_coef)
  want = loss_and_gradient(weights, apart, counts, mtp_coef)
  assert_close_trees(got[0][0], want[0][0], 1e-5)
  assert_close_trees(got[0][1][0], want[0][1][0], 1e-5)
  assert_close_trees(got[1], want[1], 1e-5)
  (_, (_, load)), _ = got
  (_, (_, other)), _ = want
  np.testing.assert_array_equal(load["moe_layers"], other["moe_layers"])
  real = int((packed.segments > 0).sum())
  assert load["moe_layers"].sum() == real * NETWORK.config.active_experts


def test_losses_gradients_and_loads_of_parts_add_up_to_those_of_the_batch(
  random_weights,
):
  weights, rows = random_weights(NETWORK), some_pages()
  counts = counts_of(pages_of(rows))
  whole = loss_and_gradient(weights, pages_of(rows), counts, 0.3)
  parts = [
    loss_and_gradient(weights, pages_of(part), counts, 0.3)
    for part in (rows[:1], rows[1:])
  ]
  assert_close_trees(jax.tree.map(jnp.add, *parts), whole, 1e-5)


def test_a_batch_without_targets_gives_zeros_and_no_nan(random_weights):
  pages = pages_of(some_pages())
  pages = pages.replace(targets=jnp.zeros_like(pages.targets))
  (loss, _), grads = loss_and_gradient(
    random_weights(NETWORK), pages, counts_of(pages), 0.3
  )
  assert loss == 0
  for g in jax.tree.leaves(grads):
    np.testing.assert_array_equal(g, np.zeros(g.shape))


ONE_LAYER = policy.Policy(
  config.tiny(VOCAB, **{**SIZES, "layers": 1, "dense_layers": 0})
)


def test_micro_batches_change_no_gradient_no_metric_and_no_load(random_weights):
  """1x8, 2x4, 4x2 and 8x1 rows."""
  params, router = random_weights(ONE_LAYER)
  rows = [[page] for seed in (1, 2) for row in some_pages(seed) for page in row]
  pages = pages_of(rows[:8], height=8)
  counts = counts_of(pages)

  def loss(params, part):
    loss, aux = sft.loss_fn(ONE_LAYER, params, router, part, counts=counts)
    return loss, (*aux, part.tokens)

  @functools.partial(jax.jit, static_argnums=1)
  def summed(params, parts):
    return optimizer.accumulate(loss, params, pages, parts)

  grads, metrics, load, tokens = summed(params, 1)
  np.testing.assert_array_equal(tokens, pages.tokens)
  for parts in (2, 4, 8):
    other_grads, other_metrics, other_load, tokens = summed(params, parts)
    np.testing.assert_array_equal(tokens, pages.tokens)
    assert_close_trees(other_grads, grads, 1e-5)
    assert_close_trees(other_metrics, metrics, 1e-5)
    np.testing.assert_array_equal(other_load["moe_layers"], load["moe_layers"])


def test_a_step_lowers_the_loss_and_moves_biases_by_the_rate(random_weights):
  tx = optimizer.make_optimizer(
    optimizer.OptimizerConfig(learning_rate=3e-3, steps=10, weight_decay=0.1)
  )
  params, router = random_weights(ONE_LAYER)
  state = train_state.restart(params, router, tx, reference=False)
  pages = pages_of(some_pages(), height=8)
  step = jax.jit(
    functools.partial(
      sft.step, policy=ONE_LAYER, optimizer=tx, router_bias_rate=1e-3, micro_batches=2
    )
  )
  losses = []
  for i in range(4):
    assert int(state.step) == i
    before = state.router["moe_layers"]["moe"]["bias"]
    state, metrics = step(state, pages)
    moved = np.abs(state.router["moe_layers"]["moe"]["bias"] - before)
    near = np.isclose(moved, 1e-3, rtol=1e-3) | (moved == 0)
    assert near.all() and moved.any()
    losses.append(float(metrics["nll"]))
    assert metrics["grad_norm"] > 0
  assert losses == sorted(losses, reverse=True)
  # A gradient that is not finite moves neither moments nor biases.
  bad = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
  after, metrics = step(bad, pages)
  assert metrics["skipped"] == 1
  for kept in ("router", "opt_state"):
    pair = jax.tree.leaves(getattr(after, kept)), jax.tree.leaves(getattr(bad, kept))
    assert all(np.array_equal(x, y) for x, y in zip(*pair, strict=True)), kept
