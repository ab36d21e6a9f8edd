"""The sampler against teacher forcing, against softmax, and cut into pieces."""

import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import experience, prompts, rollout, sampling
from r1jax.models import config, moe, policy
from r1jax.models.sequence import Sequence

VOCAB, PAD, STOPS = 16, 0, (3, 5, 9)
WINDOW, GROUP, LENGTH = 5, 2, 10
ROWS = [[7, 2], [1, 8, 4, 6], [11, 12, 13, 14, 15]]

NETWORK = policy.Policy(
  config.tiny(
    VOCAB,
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
    expert_groups=2,
    active_groups=1,
    route_scale=2.5,
    rope_theta=20.0,
  )
)


def batch_of(rows, window=WINDOW):
  tokens, mask = prompts.pad_left(rows, window, PAD)
  b = len(rows)
  return prompts.PromptBatch(
    tokens=jnp.asarray(tokens),
    mask=jnp.asarray(mask),
    answers=jnp.full((b, 1, 1), -1, jnp.int32),
    ids=jnp.arange(b),
  )


def sample(
  weights, batch, key, temperature=1.0, *, group=GROUP, length=LENGTH, stops=STOPS
):
  return _sample(weights, batch, key, temperature, group, length, stops)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _sample(weights, batch, key, temperature, group, length, stops):
  return rollout.sample(
    NETWORK,
    *weights,
    batch,
    key,
    group_size=group,
    max_tokens=length,
    temperature=temperature,
    stop_ids=stops,
    pad_id=PAD,
  )


def settings(stops=STOPS, **more):
  how = dict(group_size=GROUP, max_tokens=LENGTH, pad_id=PAD) | more
  return sampling.Sampler(stop_ids=stops, **how)


@jax.jit
def start(weights, batch, key):
  return rollout.start(NETWORK, *weights, batch, key, settings())


@functools.partial(jax.jit, static_argnames="stops")
def advance(weights, carry, limit, *, stops=STOPS):
  return rollout.advance(NETWORK, *weights, carry, limit, settings(stops))


@jax.jit
def teacher_forced(weights, batch, drawn, temperature):
  rows = experience.rows_of(batch, drawn)
  logprobs, _ = experience.completion_logprobs(NETWORK, *weights, rows, temperature)
  return logprobs.reshape(drawn.tokens.shape)


def assert_equal_trees(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_full_forward_pass(temperature, key, random_weights):
  weights = random_weights(NETWORK)
  batch = batch_of(ROWS)
  drawn = sample(weights, batch, key, temperature)
  want = np.asarray(teacher_forced(weights, batch, drawn, temperature))
  mask = np.asarray(drawn.mask)
  assert mask.sum() > 20
  np.testing.assert_allclose(
    np.asarray(drawn.logprobs)[mask], want[mask], rtol=0, atol=1e-5
  )


def test_rows_run_through_their_first_stop_token_and_hold_nothing_after_it(
  key, random_weights
):
  drawn = sample(random_weights(NETWORK), batch_of(ROWS), key)
  ended = []
  for b in range(len(ROWS)):
    for g in range(GROUP):
      tokens = [int(x) for x in drawn.tokens[b, g]]
      stops = [t for t, token in enumerate(tokens) if token in STOPS]
      n = stops[0] + 1 if stops else LENGTH
      ended.append(bool(stops))
      assert drawn.mask[b, g].tolist() == [True] * n + [False] * (LENGTH - n)
      assert tokens[n:] == [PAD] * (LENGTH - n)
      assert bool(drawn.ended[b, g]) == bool(stops)
      assert int(drawn.lengths[b, g]) == n
      assert (np.asarray(drawn.logprobs[b, g, :n]) < 0).all()
      assert (np.asarray(drawn.logprobs[b, g, n:]) == 0).all()
      assert (np.asarray(drawn.entropy[b, g, n:]) == 0).all()
  assert any(ended) and not all(ended), "choose a key that gives both kinds of row"


def test_entropy_lies_between_zero_and_log_vocab(key, random_weights):
  drawn = sample(random_weights(NETWORK), batch_of(ROWS), key)
  entropy = np.asarray(drawn.entropy)[np.asarray(drawn.mask)]
  assert (entropy > 0).all() and (entropy <= np.log(VOCAB) + 1e-6).all()


def test_a_row_does_not_depend_on_the_width_of_the_prompt_window(key, random_weights):
  weights = random_weights(NETWORK)
  narrow = sample(weights, batch_of(ROWS), key)
  wide = sample(weights, batch_of(ROWS, WINDOW + 3), key)
  np.testing.assert_array_equal(narrow.tokens, wide.tokens)
  np.testing.assert_array_equal(narrow.mask, wide.mask)
  np.testing.assert_allclose(narrow.logprobs, wide.logprobs, atol=1e-5)
  np.testing.assert_allclose(narrow.entropy, wide.entropy, atol=1e-5)


def test_a_row_does_not_depend_on_the_other_prompts(key, random_weights):
  weights = random_weights(NETWORK)
  before = sample(weights, batch_of(ROWS), key)
  after = sample(weights, batch_of([ROWS[0], [10], ROWS[2]]), key)
  for b in (0, 2):
    assert_equal_trees(*(jax.tree.map(lambda x, b=b: x[b], r) for r in (before, after)))
  assert (before.tokens[1] != after.tokens[1]).any()


def test_rows_of_a_group_and_keys_draw_differently(key, random_weights):
  weights = random_weights(NETWORK)
  one = sample(weights, batch_of(ROWS), key)
  two = sample(weights, batch_of(ROWS), jax.random.key(1))
  assert (one.tokens != two.tokens).any()
  assert (one.tokens[:, 0] != one.tokens[:, 1]).any()
  assert_equal_trees(one, sample(weights, batch_of(ROWS), key))


def test_segments_of_a_rollout_equal_the_whole_bit_for_bit(key, random_weights):
  weights, batch = random_weights(NETWORK), batch_of(ROWS)
  carry = start(weights, batch, key)
  for limit in (1, 4, 4, 9, LENGTH + 7):
    carry = advance(weights, carry, limit)
    assert int(carry.step) <= min(limit, LENGTH)
  assert_equal_trees(rollout.finish(carry), sample(weights, batch, key))


def test_a_rollout_cut_short_holds_the_beginning_of_the_whole(key, random_weights):
  weights, batch = random_weights(NETWORK), batch_of(ROWS)
  part = rollout.finish(advance(weights, start(weights, batch, key), 2))
  whole = sample(weights, batch, key)
  np.testing.assert_array_equal(part.mask[..., :2], whole.mask[..., :2])
  np.testing.assert_array_equal(part.tokens[..., :2], whole.tokens[..., :2])
  np.testing.assert_array_equal(part.logprobs[..., :2], whole.logprobs[..., :2])
  assert not part.mask[..., 2:].any()


def test_the_loop_ends_with_the_last_row(key, random_weights):
  weights, batch = random_weights(NETWORK), batch_of(ROWS)
  every = tuple(range(VOCAB))
  carry = start(weights, batch, key)
  assert int(carry.step) == 0 and carry.running
  carry = advance(weights, carry, LENGTH, stops=every)
  assert int(carry.step) == 1 and not carry.running
  again = advance(weights, carry, 2 * LENGTH, stops=every)
  assert_equal_trees(again, carry)
  drawn = rollout.finish(carry)
  np.testing.assert_array_equal(drawn.lengths, np.ones((len(ROWS), GROUP)))
  assert drawn.ended.all()


def test_the_loop_runs_as_long_as_its_longest_row(key, random_weights):
  weights, batch = random_weights(NETWORK), batch_of(ROWS)
  carry = advance(weights, start(weights, batch, key), 3 * LENGTH)
  assert int(carry.step) == int(rollout.finish(carry).lengths.max())


def test_a_group_shares_the_prefill_of_its_prompt(key, random_weights):
  carry = jax.eval_shape(start, random_weights(NETWORK), batch_of(ROWS), key)
  c, outputs = NETWORK.config, len(ROWS) * GROUP
  assert len(carry.cache.prompts) == len(carry.cache.own) == c.layers
  for keys, values in carry.cache.prompts:
    assert keys.shape == (len(ROWS), 1, c.kv_latent + c.rope_dim, WINDOW)
    assert values.shape == (len(ROWS), 1, WINDOW, c.kv_latent)
  for levels in carry.cache.own:
    assert [k.shape[3] for k, _ in levels] == [LENGTH]
    assert all(len(k) == len(v) == outputs for k, v in levels)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_of_pairs_of_tokens_are_their_probabilities(
  temperature, key, random_weights
):
  """The first token by softmax(logits / temperature), the second by its own, given the
  first: within five standard deviations in every one of V x V cells."""
  weights, n = random_weights(NETWORK), 8192
  prompt = ROWS[2]
  drawn = sample(
    weights, batch_of([prompt]), key, temperature, group=n, length=2, stops=(99,)
  )
  pairs = np.asarray(drawn.tokens[0])
  counts = np.zeros((VOCAB, VOCAB))
  np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)

  logits = logits_after_every_token(weights, prompt).astype(np.float64) / temperature
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  first, second = p[0, -2], p[:, -1]
  expected = n * first[:, None] * second
  spread = 5 * np.sqrt(expected * (1 - expected / n)) + 2
  assert (np.abs(counts - expected) <= spread).all()
  common = expected >= 5
  chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
  cells = common.sum()
  assert cells > 50
  assert abs(chi_square - cells) < 5 * np.sqrt(2 * cells)

  # The same numbers by hand: log-probabilities and entropies.
  np.testing.assert_allclose(
    drawn.logprobs[0, :, 0], np.log(first)[pairs[:, 0]], atol=1e-5
  )
  np.testing.assert_allclose(
    drawn.logprobs[0, :, 1], np.log(second)[pairs[:, 0], pairs[:, 1]], atol=1e-5
  )
  entropies = -(second * np.log(second)).sum(-1)
  np.testing.assert_allclose(
    drawn.entropy[0, :, 0], np.full(n, -(first * np.log(first)).sum()), atol=1e-5
  )
  np.testing.assert_allclose(drawn.entropy[0, :, 1], entropies[pairs[:, 0]], atol=1e-5)


@jax.jit
def forward(weights, tokens):
  params, router = weights
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  seq = Sequence(positions=at, segments=jnp.ones_like(tokens))
  variables = {"params": params, "router": router}
  hidden = NETWORK.apply(variables, tokens, seq).hidden
  return NETWORK.apply(variables, hidden, method="logits")


def logits_after_every_token(weights, prompt):
  """[V, len(prompt) + 1, V]: row v is the prompt and then token v."""
  rows = [[*prompt, v] for v in range(VOCAB)]
  return np.asarray(forward(weights, jnp.asarray(rows, jnp.int32)))


# -- what is recorded for the update ---------------------------------------------------

# Two layers, both of experts.
FRESH = np.zeros(len(ROWS), np.int32)  # no problem stood there before
TWO = golden.tiny_policy(layers=2, experts=6, active_experts=2)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def recorded(weights, batch, temperature, top_k=0, top_p=1.0, earlier=FRESH):
  return rollout.sample(
    TWO,
    *weights,
    batch,
    jax.random.key(3),
    group_size=4,
    max_tokens=LENGTH,
    temperature=temperature,
    stop_ids=STOPS,
    pad_id=PAD,
    top_k=top_k,
    top_p=top_p,
    earlier=earlier,
  )


@functools.partial(jax.jit, static_argnames="replay")
def seen_again(weights, rows, temperature, *, replay=False):
  """(log-probabilities, forward pass, logits of the completions), teacher-forced."""
  logprobs, out = experience.completion_logprobs(
    TWO, *weights, rows, temperature, replay=replay
  )
  variables = dict(zip(("params", "router"), weights, strict=True))
  hidden = out.hidden[:, rows.prompts.shape[1] - 1 : -1]
  return logprobs, out, TWO.apply(variables, hidden, method="logits")


BOUNDS = pytest.mark.parametrize("top_k, top_p", [(3, 1.0), (0, 0.7)])


@BOUNDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_truncated_sampler_draws_from_the_support_that_it_records(
  top_k, top_p, temperature, random_weights
):
  weights, batch = random_weights(TWO), batch_of(ROWS)
  drawn = recorded(weights, batch, temperature, top_k, top_p)
  rows = experience.rows_of(batch, drawn)
  logprobs, _, logits = seen_again(weights, rows, temperature)
  mask = np.asarray(rows.completion_mask)
  assert mask.sum() > 40 and rows.support.shape == (*mask.shape, VOCAB // 8)
  # All by hand from the whole policy's logits, in float64: the support, the
  # log-probabilities and the entropy.
  whole = np.asarray(logits, np.float64)[mask] / temperature
  keep = np.unpackbits(np.asarray(rows.support), axis=-1)[mask].astype(bool)
  for row, kept in zip(whole, keep, strict=True):
    order = np.argsort(-row)[: top_k or VOCAB]
    p = np.exp(row[order]) / np.exp(row[order]).sum()
    inside = order[np.cumsum(p) - p < top_p]
    assert sorted(inside) == np.flatnonzero(kept).tolist()
  token = np.asarray(rows.completions)[mask]
  at = np.arange(len(token))
  assert keep[at, token].all(), "a token outside its support was drawn"
  p = np.exp(whole) * keep
  p /= p.sum(1, keepdims=True)
  entropy = -np.where(keep, p * np.log(np.where(keep, p, 1)), 0).sum(1)
  drawn_logprobs = np.asarray(rows.sampler_logprobs)[mask]
  drawn_entropy = np.asarray(drawn.entropy).reshape(mask.shape)[mask]
  np.testing.assert_allclose(drawn_logprobs, np.log(p[at, token]), atol=1e-4)
  np.testing.assert_allclose(drawn_entropy, entropy, atol=1e-4)
  # And so the update sees them.
  np.testing.assert_allclose(
    np.asarray(logprobs)[mask], drawn_logprobs, rtol=0, atol=1e-4
  )
  if top_k:
    assert (drawn_entropy <= np.log(top_k) + 1e-6).all()
    assert (keep.sum(1) <= top_k).all()
    assert top_p < 1 or (keep.sum(1) == top_k).all()
  assert len({tuple(k) for k in keep}) > 5, "supports follow their token"


def test_a_whole_sampler_records_no_support(random_weights):
  weights, batch = random_weights(TWO), batch_of(ROWS)
  drawn = recorded(weights, batch, 1.0)
  assert drawn.support is None and experience.rows_of(batch, drawn).support is None
  spoken = drawn.spoken()
  assert spoken.experts is None and spoken.prompt_experts is None
  np.testing.assert_array_equal(spoken.tokens, drawn.tokens)


def test_truncated_segments_equal_the_whole_bit_for_bit(random_weights):
  """Support and experts included."""
  weights, batch = random_weights(TWO), batch_of(ROWS)

  s = settings(group_size=4, temperature=0.7, top_k=3)

  @jax.jit
  def begin(weights, batch):
    key = jax.random.key(3)
    return rollout.start(TWO, *weights, batch, key, s, earlier=FRESH)

  @jax.jit
  def go_on(weights, carry, limit):
    return rollout.advance(TWO, *weights, carry, limit, s)

  carry = begin(weights, batch)
  for limit in (1, 4, 9, LENGTH):
    carry = go_on(weights, carry, limit)
  whole = recorded(weights, batch, 0.7, 3, 1.0)
  assert_equal_trees(rollout.finish(carry), whole)


def test_the_recorded_experts_are_those_of_a_full_forward_pass(random_weights):
  weights, batch = random_weights(TWO), batch_of(ROWS)
  drawn = recorded(weights, batch, 1.0)
  b, g, t = drawn.tokens.shape
  assert drawn.prompt_experts.shape == (b, 2, WINDOW, 2)
  assert drawn.experts.shape == (b, g, 2, t, 2)
  assert drawn.experts.dtype == drawn.prompt_experts.dtype == jnp.uint8
  rows = experience.rows_of(batch, drawn)
  assert rows.experts.shape == (b * g, 2, WINDOW + t, 2)
  _, out, _ = seen_again(weights, rows, 1.0)
  real = np.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
  moved = moe.changed(out.experts, rows.experts.swapaxes(0, 1))
  assert not np.asarray(moved)[real].any()
  # In their order of rank, even; and they are not all the same.
  want = np.asarray(out.experts).transpose(1, 2, 0, 3)[real]
  got = np.asarray(rows.experts).transpose(0, 2, 1, 3)[real]
  np.testing.assert_array_equal(got, want)
  assert all(len(np.unique(got[:, n], axis=0)) > 5 for n in range(2))


def test_replay_shows_the_update_what_the_sampler_saw(random_weights):
  """A router bias chooses experts and never weighs them: however far it has moved,
  under replay the log-probabilities are the sampler's."""
  params, router = random_weights(TWO)
  batch = batch_of(ROWS)
  rows = experience.rows_of(batch, recorded((params, router), batch, 1.0))
  turned = jax.tree.map(lambda b: -10 * b, router)
  mask = np.asarray(rows.completion_mask)
  kept, out, _ = seen_again((params, turned), rows, 1.0, replay=True)
  lost, _, _ = seen_again((params, turned), rows, 1.0)
  sampled = np.asarray(rows.sampler_logprobs)[mask]
  np.testing.assert_allclose(np.asarray(kept)[mask], sampled, rtol=0, atol=1e-5)
  assert np.abs(np.asarray(lost)[mask] - sampled).max() > 0.1
  real = np.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
  moved = np.asarray(moe.changed(out.experts, rows.experts.swapaxes(0, 1)))
  assert moved[real].mean() > 0.5
  # The load is of the experts that served.
  served = np.asarray(rows.experts).transpose(1, 0, 2, 3)[:, real]
  load = [np.bincount(x.reshape(-1), minlength=6) for x in served]
  np.testing.assert_array_equal(out.load["moe_layers"], load)


# -- numbering of samples --------------------------------------------------------------

POOL = [7, 4, 7, 4, 4, 7]  # ids: each problem three times


def pool():
  prompt = {7: [7, 2], 4: [1, 8, 4, 6]}
  batch = batch_of([prompt[i] for i in POOL])
  return batch.replace(ids=jnp.asarray(POOL, jnp.int32))


def test_repeats_count_what_stood_before():
  np.testing.assert_array_equal(rollout.repeats(jnp.asarray(POOL)), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 6), slice(1, None, 2)], ids=str)
def test_a_part_of_a_batch_goes_on_counting_samples(part, random_weights):
  weights, batch = random_weights(TWO), pool()
  whole = recorded(weights, batch, 1.0, earlier=None)
  earlier = rollout.repeats(batch.ids)
  few = jax.tree.map(lambda x: x[part], batch)
  got = recorded(weights, few, 1.0, earlier=earlier[part])
  np.testing.assert_array_equal(got.tokens, whole.tokens[part])
  np.testing.assert_array_equal(got.mask, whole.mask[part])
  np.testing.assert_allclose(got.logprobs, whole.logprobs[part], atol=1e-5)
  if part.start:  # counted within the part alone, it would draw what was drawn before
    again = recorded(weights, few, 1.0, earlier=rollout.repeats(few.ids))
    assert (again.tokens != got.tokens).any()


def test_no_two_samples_of_a_problem_share_their_draws(random_weights):
  weights, batch = random_weights(TWO), pool()
  drawn = recorded(weights, batch, 1.0, earlier=None)
  for i in set(POOL):
    rows = np.asarray(drawn.tokens)[np.asarray(POOL) == i].reshape(-1, LENGTH)
    again = {tuple(row) for row in rows}
    # Rows of one or two tokens may agree by chance; groups that share keys all do.
    assert len(again) > 8
