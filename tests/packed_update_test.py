"""Outputs packed into rows: best fit, and the update of one output a row."""

import dataclasses
import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK
from trees import assert_same, host
from whole_groups_test import EXPERTS, QUERIES, SGD, P, T, group_rows, weights

from r1jax import experience, grpo, packing, sharding, train_state
from r1jax.data import packing as on_the_host
from r1jax.errors import UserError
from r1jax.objective import Objective

WIDTH = 17  # of packed rows; the longest output with its prompt has 11 tokens

# -- where outputs stand ---------------------------------------------------------------


@functools.cache
def placed(width):
  return jax.jit(lambda lengths: packing.best_fit(lengths, width))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("longest_first", [True, False])
def test_every_sequence_stands_where_the_hosts_best_fit_puts_it(seed, longest_first):
  """In the same column, of as many rows. (Rows that are equally full are as good.)"""
  rng, width = np.random.default_rng(seed), 40
  lengths = rng.integers(1, rng.integers(2, width + 1), 24, endpoint=True)
  if longest_first:
    lengths = -np.sort(-lengths)
  row, column = map(np.asarray, placed(width)(jnp.asarray(lengths, jnp.int32)))
  rows = on_the_host.best_fit(lengths.tolist(), width)
  want = {}
  for members in rows:
    ends = np.cumsum(lengths[members])
    want |= dict(zip(members, ends - lengths[members], strict=True))
  np.testing.assert_array_equal(column, [want[i] for i in range(24)])
  assert row.max() + 1 == len(rows)
  filled = np.bincount(row, lengths)
  assert filled.max() <= width
  assert sorted(filled) == sorted(lengths[members].sum() for members in rows)


def packed(lengths, ranks=1, width=40, tokens=160):
  with jax.set_mesh(mesh_of((ranks, 1, 1), jax.devices()[:ranks])):
    return host(
      jax.jit(lambda x: packing.pack(x, width, tokens))(jnp.asarray(lengths, jnp.int32))
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_have_as_many_rows_and_about_as_many_tokens(ranks):
  lengths = np.random.default_rng(ranks).integers(0, 41, 32)
  p = packed(lengths, ranks)
  assert sorted(p.order) == list(range(32))
  np.testing.assert_array_equal(p.lengths.reshape(-1), np.maximum(lengths, 1)[p.order])
  assert np.ptp(p.lengths.sum(axis=1)) < 40  # dealt out: less than the longest
  columns, ends = p.starts % 40, p.starts % 40 + p.lengths
  assert ends.max() <= 40
  assert (p.starts[:, 1:] >= p.starts[:, :-1] + p.lengths[:, :-1]).all(), "they overlap"
  assert (columns[:, 0] == 0).all()
  assert p.rows == 4 // ranks
  last = (p.starts // 40).max() + 1
  assert int(p.parts) == -(-last // p.rows)
  places = int(p.parts) * p.rows * ranks * 40
  np.testing.assert_allclose(p.efficiency, np.maximum(lengths, 1).sum() / places)


def test_outputs_that_do_not_divide_over_the_ranks_are_refused():
  with pytest.raises(ValueError, match="9 outputs do not divide over 2 data shards"):
    packed(np.ones(9), 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_lays_tokens_down_and_takes_them_back(ranks):
  """Over all parts each output is here once, its tokens in their order from position 0,
  and what is laid down is taken back."""
  rng = np.random.default_rng(5)
  lengths, longest = rng.integers(1, 13, 12), 12
  p = packed(lengths, ranks, width=16, tokens=32)
  x = rng.integers(1, 99, (12, 3 + longest))  # tokens from the fourth on
  sorted_x = p.sort(jnp.asarray(x))
  seen, taken = np.zeros(12, int), np.zeros((12, longest - 2), int)
  for i in range(int(p.parts)):
    part = p.part(i)
    rows = np.asarray(part.lay(sorted_x, jnp.full(12, 3)))
    seq = host(part.sequence())
    assert rows.shape == seq.segments.shape == (p.rows * ranks, 16)
    for row, positions, segments in zip(rows, seq.positions, seq.segments, strict=True):
      for segment in set(segments) - {0}:
        at = np.flatnonzero(segments == segment)
        np.testing.assert_array_equal(np.diff(at), 1)
        np.testing.assert_array_equal(positions[at], np.arange(len(at)))
        whole = [y[3:][: len(at)].tolist() == row[at].tolist() for y in x]
        assert any(whole)
    back = part.take(jnp.asarray(rows), jnp.full(12, 2), longest - 2)
    taken += np.where(part.here[:, None], back, 0)
    seen += np.asarray(part.here)
  np.testing.assert_array_equal(seen, 1)
  real = np.arange(longest - 2)[None] < lengths[:, None] - 2
  got = np.asarray(p.unsort(jnp.asarray(taken)))
  np.testing.assert_array_equal(np.where(real, got, 0), np.where(real, x[:, 5:], 0))


# -- the update ------------------------------------------------------------------------


def step_config(**changes):
  return grpo.GRPOConfig(
    **{
      **dict(group_size=3, minibatches=1, max_tokens=T, reference_refresh=0),
      **dict(router_bias_rate=0.25, temperature=0.7, micro_batches=2),
      **dict(objective=objective()),
      **changes,
    }
  )


def objective(**changes):
  return Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04, **changes)


def rows_of(policy):
  """With a support for each token: all but one token of the vocabulary, not its own."""
  rows = group_rows(policy)
  keep = np.ones((*rows.completions.shape, golden.VOCAB), bool)
  np.put_along_axis(
    keep, (np.asarray(rows.completions)[..., None] + 3) % golden.VOCAB, False, axis=2
  )
  return rows.replace(support=jnp.packbits(jnp.asarray(keep), axis=-1))


def updated(policy, put=lambda tree, rows=False: tree, **changes):
  state = train_state.restart(*weights(policy), SGD, reference=False)
  update = functools.partial(
    grpo.update, policy=policy, optimizer=SGD, config=step_config(**changes)
  )
  args = put(state), put(rows_of(policy), True)
  program = jax.jit(update).lower(*args).compile(QUICK)
  state, metrics, per_token = program(*args)
  metrics.pop("balance_loss", None)
  return host((state.params, state.router, metrics, per_token))


CASES = {
  "gqa": (QUERIES, dict(objective=objective(ratio="sequence"))),
  "gqa-tokens": (QUERIES, dict(objective=objective(aggregation="token-mean"))),
  "gqa-norm": (
    QUERIES,
    dict(objective=objective(aggregation="seq-mean-token-sum-norm")),
  ),
  "mla-experts": (EXPERTS, {}),
  "replay-mtp": (EXPERTS, dict(routing_replay=True, mtp_coef=0.3)),
}


@functools.cache
def by_rows(case):
  policy, changes = CASES[case]
  return updated(policy, **changes)


def check(got, want):
  efficiency = got[2].pop("packing_efficiency")
  assert 0.3 < efficiency <= 1
  assert_same(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_an_output_a_row(case):
  """Gradient, router biases, metrics, and every token's figures in the rows' order."""
  policy, changes = CASES[case]
  check(updated(policy, pack=WIDTH, **changes), by_rows(case))


@pytest.mark.parametrize(
  "case", [pytest.param("gqa", marks=pytest.mark.slow), "mla-experts"]
)
def test_an_update_on_a_mesh_is_that_of_one_device(case):
  policy, changes = CASES[case]
  mesh = mesh_of((2, 1, 1), jax.devices()[:2])

  def put(tree, rows=False):
    cut = sharding.batch_sharding(mesh) if rows else sharding.replicated(mesh)
    return jax.device_put(tree, cut)

  with jax.set_mesh(mesh):
    got = updated(policy, put, pack=WIDTH, micro_batches=3, **changes)
  check(got, by_rows(case))


def test_recalled_logprobs_are_those_of_an_output_a_row():
  """The trainer's own of the old policy, and the reference's."""
  policy = EXPERTS
  state = train_state.restart(*weights(policy), SGD, reference=True)
  rows = rows_of(policy)

  def recalled(pack):
    config = step_config(
      pack=pack, objective=objective(old_logprobs="trainer"), routing_replay=True
    )
    program = jax.jit(lambda rows: experience.recall(rows, state, policy, config))
    found = program.lower(rows).compile(QUICK)(rows)
    both = found.old_logprobs, found.reference_logprobs
    return host([jnp.where(rows.completion_mask, x, 0) for x in both])

  got, want = recalled(WIDTH), recalled(0)
  assert_same(got, want, rtol=1e-4, atol=1e-5)
  assert np.abs(got[0] - got[1]).max() > 1e-3, "one replays experts, one does not"


def test_a_whole_step_with_recalled_logprobs_is_on_policy():
  policy = golden.tiny_policy()
  config = dataclasses.replace(
    golden.CONFIG, pack=16, objective=objective(old_logprobs="trainer")
  )
  step = jax.jit(golden.make_step(policy, config))
  args = golden.new_state(policy), golden.prompt_batch(), jax.random.key(1)
  _, _, metrics, _ = step.lower(*args).compile(QUICK)(*args)
  assert metrics["sampler_gap_max"] < 1e-4
  assert metrics["kl"] > 0
  assert 0.3 < metrics["packing_efficiency"] <= 1


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("other", [dict(whole_groups=True), dict(balance_coef=0.1)])
def test_what_needs_an_output_a_row_is_refused(other):
  with pytest.raises(UserError, match=r"grpo\.pack=17 goes with neither"):
    step_config(pack=WIDTH, **other)


def test_rows_that_cannot_hold_the_longest_output_are_refused():
  with pytest.raises(UserError, match=r"grpo\.pack=10 must be 0 .* at least 11"):
    updated(QUERIES, pack=P + T - 1)
