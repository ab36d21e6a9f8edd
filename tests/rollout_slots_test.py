"""Slots, refill and budgets: against teacher forcing, a queue simulated in Python, and
the same rollout with a slot for every output."""

import dataclasses
import functools

from flax import linen as nn
import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK

from r1jax import experience, levels, prompts, rollout, sampling, sharding
from r1jax.errors import UserError
from r1jax.models import config, policy
from r1jax.models.sequence import Sequence
from r1jax.stopping import StopStrings

VOCAB, PAD, STOPS = 16, 0, (3, 5)
ROWS = [[7, 2], [1, 8, 4, 6], [11, 12, 13, 14, 15], [9]]
WINDOW, GROUP, LENGTH = 5, 5, 24
OUTPUTS = len(ROWS) * GROUP

# MLA, a dense layer and one of experts; grouped queries, dense.
MOE = golden.tiny_policy(layers=2, dense_layers=1, experts=6, active_experts=2)
DENSE = policy.Policy(
  config.tiny_dense(
    VOCAB, width=32, layers=2, heads=4, kv_heads=2, head_dim=6, dense_ffn=24
  )
)
NETWORKS = {"MoE": MOE, "dense": DENSE}
both = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True, scope="module")
def short_levels():
  """Levels of 4, 4, 8 and 8 tokens, so that rows of 24 cross three borders."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(levels, "plan", functools.partial(levels.plan, first=4))
    yield


def test_levels_are_short_here():
  assert [(lv.start, lv.size) for lv in levels.plan(6, LENGTH)] == [
    *((0, 4), (4, 4), (8, 8), (16, 8))
  ]


def batch_of(rows=ROWS, window=WINDOW):
  tokens, mask = prompts.pad_left(rows, window, PAD)
  return prompts.PromptBatch(
    tokens=jnp.asarray(tokens),
    mask=jnp.asarray(mask),
    answers=jnp.full((len(rows), 1, 1), -1, jnp.int32),
    ids=jnp.arange(len(rows)),
  )


def heavy_tailed(seed=0, shape=(4, GROUP)):
  """[B, G] limits: most are short, some reach the end."""
  rng = np.random.default_rng(seed)
  return np.minimum(1 + rng.pareto(0.7, shape) * 3, LENGTH).astype(np.int32)


@functools.cache
def program(name, **settings):
  """A whole rollout of (weights, batch, key, limits)."""

  def run(weights, batch, key, limits):
    how = dict(group_size=GROUP, max_tokens=LENGTH, pad_id=PAD, stop_ids=STOPS)
    how |= settings
    return rollout.sample(NETWORKS[name], *weights, batch, key, limits=limits, **how)

  return jax.jit(run, compiler_options=QUICK)


@functools.cache
def teacher(name, temperature=1.0):
  def run(weights, batch, drawn):
    rows = experience.rows_of(batch, drawn)
    logprobs, _ = experience.completion_logprobs(
      NETWORKS[name], *weights, rows, temperature
    )
    return logprobs.reshape(drawn.tokens.shape)

  return jax.jit(run, compiler_options=QUICK)


def weights_of(name):
  return golden.weights(NETWORKS[name], seed=1)


@functools.cache
def drawn_by(name, key=0, long=False, **settings):
  """A rollout in NumPy; long: without stop tokens, so that limits are lengths."""
  if long:
    settings["stop_ids"] = ()
  run = program(name, **settings)
  limits = jnp.asarray(heavy_tailed())
  drawn = run(weights_of(name), batch_of(), jax.random.key(key), limits)
  return jax.tree.map(np.asarray, drawn)


def simulated(wanted, slots, plan=()):
  """(steps, lengths, starved) of a queue in order over S slots, a token a step,
  refilled at once; a row needs a seat in each level before it writes there, and leaves
  where there is none.

  Args:
    wanted: tokens that each output would write.
    slots: S.
    plan: levels; none: no row wants a seat.
  """
  wanted, queue = np.ravel(wanted), list(range(np.size(wanted)))
  lengths, starved = np.zeros(len(wanted), int), np.zeros(len(wanted), bool)
  busy = [queue.pop(0) if queue else None for _ in range(slots)]
  seated = [set() for _ in plan]
  steps = 0
  while any(x is not None for x in busy):
    steps += 1
    for x in busy:
      if x is not None:
        lengths[x] += 1
    leaving = {x for x in busy if x is not None and lengths[x] == wanted[x]}
    for seats in seated:
      seats -= leaving
    hungry = set()
    for level, seats in zip(plan, seated, strict=True):
      if level.seats >= slots:
        continue
      for x in busy:
        here = x is not None and x not in leaving and lengths[x] >= level.start
        if here and x not in seats:
          if len(seats) < level.seats:
            seats.add(x)
          else:
            hungry.add(x)
    starved[list(hungry)] = True
    for seats in seated:
      seats -= hungry
    for i, x in enumerate(busy):
      if x is None or x in leaving | hungry:
        busy[i] = queue.pop(0) if queue else None
  return steps, lengths.reshape(np.shape(wanted)), starved


def assert_same_tokens(got, want, which=...):
  """Of the outputs `which` [B, G]."""
  for field in ("tokens", "mask", "ended", "nonfinite", "lengths"):
    np.testing.assert_array_equal(
      getattr(got, field)[which], getattr(want, field)[which], err_msg=field
    )
  for field in ("logprobs", "entropy"):
    np.testing.assert_allclose(
      getattr(got, field)[which], getattr(want, field)[which], atol=1e-5, err_msg=field
    )
  if want.experts is not None:
    n = want.experts.shape[2]
    written = np.repeat(want.mask[:, :, None], n, axis=2)
    for x in (got, want):
      assert not x.experts[~written].any()
    np.testing.assert_array_equal(got.experts[which], want.experts[which])
    np.testing.assert_array_equal(got.prompt_experts, want.prompt_experts)


def assert_teacher_forced(name, drawn, temperature=1.0):
  again = np.asarray(teacher(name, temperature)(weights_of(name), batch_of(), drawn))
  assert drawn.mask.sum() > 40
  np.testing.assert_allclose(
    drawn.logprobs[drawn.mask], again[drawn.mask], rtol=0, atol=1e-5
  )
  assert not drawn.logprobs[~drawn.mask].any()
  assert not drawn.entropy[~drawn.mask].any()
  assert (drawn.tokens[~drawn.mask] == PAD).all()


# -- slots -----------------------------------------------------------------------------


@both
def test_a_slot_for_every_output_writes_what_teacher_forcing_sees(name):
  drawn = drawn_by(name)
  assert_teacher_forced(name, drawn)
  assert drawn.ended.any() and not drawn.ended.all()
  lengths = np.sort(drawn.lengths.ravel())
  assert lengths[0] == 1 and lengths[-1] > 3 * np.median(lengths), "a heavy tail"
  assert (drawn.steps == lengths[-1]).all() and drawn.steps.shape == (len(ROWS),)
  assert not drawn.starved.any() and not drawn.nonfinite.any()
  assert not drawn.norms.any()


@both
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_fewer_slots_write_the_same_in_the_steps_of_the_queue(name, slots):
  got, want = drawn_by(name, slots=slots), drawn_by(name)
  assert_same_tokens(got, want)
  assert not got.starved.any()
  steps, lengths, _ = simulated(want.lengths, slots)
  np.testing.assert_array_equal(lengths.ravel(), want.lengths.ravel())
  assert (got.steps == steps).all()
  occupancy = got.lengths.sum() / (got.steps[0] * slots)
  assert occupancy == want.lengths.sum() / (steps * slots)
  assert occupancy == 1 if slots == 1 else occupancy < 1


def test_outputs_stop_at_their_own_limit():
  limits = heavy_tailed()
  drawn = drawn_by("dense", long=True)
  np.testing.assert_array_equal(drawn.lengths, limits)
  assert not drawn.ended.any() and limits.max() == LENGTH and limits.min() == 1
  # With stop tokens: at whichever comes first.
  stopped = drawn_by("dense")
  for got, whole, mask in zip(
    stopped.lengths.ravel(),
    drawn.tokens.reshape(-1, LENGTH),
    limits.ravel(),
    strict=True,
  ):
    at = [n + 1 for n, token in enumerate(whole[:mask]) if token in STOPS]
    assert got == min([*at, mask])
  # What lies outside 1 .. T is brought there.
  run = program("dense", stop_ids=())
  odd = jnp.asarray(np.where(limits > 4, 1000, -limits))
  lengths = run(weights_of("dense"), batch_of(), jax.random.key(0), odd).lengths
  np.testing.assert_array_equal(lengths, np.where(limits > 4, LENGTH, 1))


@both
def test_an_output_does_not_depend_on_the_batch(name):
  """Other prompts beside it, in another order, through other slots."""
  whole = drawn_by(name)
  order = np.array([2, 0, 3, 1])
  batch = jax.tree.map(lambda x: x[order], batch_of())
  limits = jnp.asarray(heavy_tailed()[order])
  run = program(name, slots=4)
  moved = run(weights_of(name), batch, jax.random.key(0), limits)
  moved = jax.tree.map(np.asarray, moved)
  np.testing.assert_array_equal(moved.tokens, whole.tokens[order])
  np.testing.assert_allclose(moved.logprobs, whole.logprobs[order], atol=1e-5)


def test_samples_prompts_and_keys_draw_differently():
  one, two = drawn_by("dense", long=True), drawn_by("dense", key=1, long=True)
  assert (one.tokens != two.tokens).any(axis=-1).mean() > 0.8
  rows = [tuple(r) for r in one.tokens[one.lengths >= 4][:, :4].tolist()]
  assert len(rows) > 5 and len(set(rows)) == len(rows)


def test_more_slots_than_outputs_are_refused():
  with pytest.raises(
    UserError, match=r"slots=21 for 4 prompts x group_size=5 = 20.* 1 w"
  ):
    jax.eval_shape(
      program("dense", slots=21),
      *(
        weights_of("dense"),
        batch_of(),
        jax.random.key(0),
        jnp.asarray(heavy_tailed()),
      ),
    )


# -- budgets ---------------------------------------------------------------------------

BUDGETS = [("dense", *x) for x in [(6, 44), (6, 60), (6, 90), (20, 110), (20, 200)]]
BUDGETS += [("MoE", 6, 60), ("MoE", 20, 110)]


@pytest.mark.parametrize("name, slots, budget", BUDGETS)
def test_a_small_budget_truncates_the_rows_that_the_seats_rule_names(
  name, slots, budget
):
  """And leaves every other output and every token that was written as it was."""
  want = drawn_by(name, long=True)
  got = drawn_by(name, long=True, slots=slots, cache_tokens=budget)
  plan = levels.plan(slots, LENGTH, budget=budget)
  assert any(lv.seats < slots for lv in plan)
  steps, lengths, starved = simulated(want.lengths, slots, plan)
  starved = starved.reshape(want.lengths.shape)
  np.testing.assert_array_equal(got.starved, starved)
  np.testing.assert_array_equal(got.lengths.ravel(), lengths.ravel())
  assert (got.steps == steps).all()
  assert starved.any() and not starved.all()
  assert_same_tokens(got, want, ~starved)
  np.testing.assert_array_equal(
    got.tokens[starved], np.where(got.mask, want.tokens, PAD)[starved]
  )
  assert (got.lengths < want.lengths)[starved].all() and not got.ended[starved].any()
  assert_teacher_forced(name, got)


def test_a_small_budget_with_stop_tokens_truncates_by_the_rule_too():
  want = drawn_by("MoE")
  got = drawn_by("MoE", slots=6, cache_tokens=44)
  _, lengths, starved = simulated(want.lengths, 6, levels.plan(6, LENGTH, budget=44))
  np.testing.assert_array_equal(got.starved.ravel(), starved)
  np.testing.assert_array_equal(got.lengths.ravel(), lengths.ravel())
  assert_same_tokens(got, want, ~got.starved)
  assert_teacher_forced("MoE", got)


@pytest.mark.parametrize("slots", [6, 20])
def test_with_an_ample_budget_nothing_changes(slots):
  got = drawn_by("dense", long=True, slots=slots, cache_tokens=slots * LENGTH)
  assert not got.starved.any()
  assert_same_tokens(got, drawn_by("dense", long=True))
  assert (got.steps == simulated(got.lengths, slots)[0]).all()


def test_a_budget_that_is_too_small_is_refused_and_the_least_one_works():
  args = weights_of("dense"), batch_of(), jax.random.key(0), jnp.asarray(heavy_tailed())
  with pytest.raises(
    UserError, match=r"cache_tokens=43 .*6 slots .*max_tokens=24.* 44 "
  ):
    jax.eval_shape(program("dense", slots=6, cache_tokens=43), *args)
  jax.eval_shape(program("dense", slots=6, cache_tokens=44), *args)


# -- segments --------------------------------------------------------------------------


class Letters:
  """A tokenizer of which token n is the n-th letter; 0 to 2 add nothing."""

  vocab = VOCAB

  def bytes_of(self, token):
    return b"" if token < 3 else bytes([ord("a") + token])


SEGMENTED = [
  dict(slots=4),
  dict(slots=6, cache_tokens=50, stop=StopStrings.of(["d", "hf", "kkp"], Letters())),
  dict(slots=6, cache_tokens=60, top_k=6, min_p=0.01, temperature=0.8),
]


@pytest.mark.parametrize(
  "name, more",
  [("MoE", m) for m in SEGMENTED] + [("dense", SEGMENTED[1])],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_segments_equal_one_run_bit_for_bit(name, more):
  """With refill, budgets, stop strings, supports and experts."""
  network, weights, key = NETWORKS[name], weights_of(name), jax.random.key(0)
  how = dict(group_size=GROUP, max_tokens=LENGTH, pad_id=PAD, stop_ids=STOPS[:1])
  s, limits = sampling.Sampler(**how | more), jnp.asarray(heavy_tailed())

  @functools.partial(jax.jit, compiler_options=QUICK)
  def start(weights, batch, key, limits):
    return rollout.start(network, *weights, batch, key, s, limits=limits)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def advance(weights, carry, limit):
    return rollout.advance(network, *weights, carry, limit, s)

  begun = start(weights, batch_of(), key, limits)
  at_once = advance(weights, begun, rollout.FOREVER)
  whole = rollout.finish(at_once)
  steps = int(at_once.step)
  assert steps > 10 and int(whole.lengths.sum()) > 40
  assert whole.starved.any() == ("cache_tokens" in more)
  assert whole.ended.any() and not whole.ended.all()
  for gap in (1, 3, 7, 50):
    carry, limit = begun, 0
    while bool(carry.running):
      limit += gap
      carry = advance(weights, carry, limit)
      assert int(carry.step) == min(limit, steps)
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(at_once), strict=True):
      np.testing.assert_array_equal(x, y)
  drawn = program(name, **how | more)(weights, batch_of(), key, limits)
  for x, y in zip(jax.tree.leaves(drawn), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(x, y)


# -- a mesh ----------------------------------------------------------------------------

EIGHT = [[1 + (3 * b + n) % 15 for n in range(1 + b % 5)] for b in range(8)]
ON_MESH = dict(group_size=2, slots=0)


@functools.cache
def on_mesh(shape, name="MoE", **settings):
  mesh = mesh_of(shape, jax.devices()[: int(np.prod(shape))])
  limits = heavy_tailed(3, (8, 2))
  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    batch, limits = jax.device_put((batch_of(EIGHT), jnp.asarray(limits)), rows)
    how = dict(group_size=2) | settings
    drawn = program(name, **how)(weights_of(name), batch, jax.random.key(0), limits)
    return jax.tree.map(np.asarray, drawn)


SHARDS = 4


@pytest.mark.parametrize(
  "shape, name, slots",
  [
    ((2, 2, 2), "MoE", 0),
    ((2, 2, 2), "dense", 8),
    pytest.param((4, 1, 2), "MoE", 8, marks=pytest.mark.slow),
    pytest.param((4, 1, 2), "MoE", 4, marks=pytest.mark.slow),
  ],
)
def test_a_mesh_writes_the_tokens_of_one_device_with_a_queue_a_shard(
  shape, name, slots
):
  want, got = on_mesh((1, 1, 1), name), on_mesh(shape, name, slots=slots)
  assert want.ended.any() and want.lengths.max() > 10
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.mask, want.mask)
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)
  if name == "MoE":
    np.testing.assert_array_equal(got.experts, want.experts)
  # Two prompts a shard, each shard with its own slots and its own queue.
  of_shard = want.lengths.reshape(SHARDS, -1)
  count = (slots or 16) // SHARDS
  assert (got.steps == max(simulated(x, count)[0] for x in of_shard)).all()


def test_a_budget_is_of_all_shards_of_a_mesh_together():
  """Each has its part of the seats."""
  budget = SHARDS * (2 * 4 + 20)
  want = on_mesh((1, 1, 1), stop_ids=())
  got = on_mesh((4, 1, 2), slots=8, cache_tokens=budget, stop_ids=())
  plan = levels.plan(2, LENGTH, budget=budget // SHARDS)
  each = [simulated(x, 2, plan) for x in want.lengths.reshape(SHARDS, -1)]
  starved = np.concatenate([x[2] for x in each])
  assert starved.any() and not starved.all()
  np.testing.assert_array_equal(got.starved.ravel(), starved)
  lengths = np.concatenate([x[1].ravel() for x in each])
  np.testing.assert_array_equal(got.lengths.ravel(), lengths)
  np.testing.assert_array_equal(got.tokens, np.where(got.mask, want.tokens, PAD))
  assert (got.steps == max(x[0] for x in each)).all()


def test_slots_that_do_not_divide_over_the_shards_are_refused():
  with pytest.raises(UserError, match=r"slots=6 must divide over the 4 data shards"):
    on_mesh((2, 2, 2), slots=6)
  with pytest.raises(UserError, match=r"slots=17 for 8 prompts x group_size=2 = 16"):
    on_mesh((2, 2, 2), slots=17)


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_a_budget_that_is_too_small_on_a_mesh_is_refused_with_the_least_one(budget):
  """The one that is set, of all shards: 4 x (2 x 4 + 20)."""
  with pytest.raises(UserError, match=rf"cache_tokens={budget} .* 112 at least"):
    on_mesh((4, 1, 2), slots=8, cache_tokens=budget, stop_ids=())


# -- numbers that are not finite -------------------------------------------------------


start = jax.jit(rollout.start, static_argnums=(0, 5), compiler_options=QUICK)
advance = jax.jit(rollout.advance, static_argnums=(0, 5), compiler_options=QUICK)


def spoiled(weights, token):
  """With NaN in one token's embedding."""
  params, router = weights
  embedding = params["embedding"].at[token, 3].set(jnp.nan)
  return {**params, "embedding": embedding}, router


@pytest.mark.parametrize(
  "name, more",
  [(n, {}) for n in NETWORKS]
  + [("dense", m) for m in (dict(top_k=4), dict(min_p=0.1), dict(temperature=0.0))],
  ids=str,
)
def test_a_prompt_whose_logits_are_not_finite_is_marked_and_ends_the_loop(name, more):
  """A token of the second prompt alone is spoiled. Five slots: its group begins once
  the first prompt's outputs, of one token each, are written."""
  limits = np.full((len(ROWS), GROUP), LENGTH)
  limits[0] = 1
  args = batch_of(), jax.random.key(2), jnp.asarray(limits)
  run, weights = program(name, slots=5, **more), weights_of(name)
  fine = jax.tree.map(np.asarray, run(weights, *args))
  token = next(t for t in ROWS[1] if t not in fine.tokens[0, :, 0])
  drawn = jax.tree.map(np.asarray, run(spoiled(weights, token), *args))
  assert not fine.nonfinite.any()
  second = np.repeat(np.arange(4)[:, None] == 1, GROUP, axis=1)
  np.testing.assert_array_equal(drawn.nonfinite, second)
  np.testing.assert_array_equal(drawn.tokens[0, :, 0], fine.tokens[0, :, 0])
  np.testing.assert_allclose(drawn.logprobs[0], fine.logprobs[0], atol=1e-5)
  assert (drawn.lengths[0] == 1).all() and not drawn.lengths[1:].any()
  assert (drawn.tokens[1:] == PAD).all() and not drawn.logprobs[1:].any()
  assert (drawn.steps == 2).all()
  assert not drawn.ended[1:].any() and not drawn.starved.any()
  assert np.isnan(drawn.norms[1]).all() and not drawn.norms[[0, 2, 3]].any()


@both
def test_norms_are_those_of_each_layers_output_at_the_last_token(name, key):
  """The head spoils all logits after three tokens. A layer's output goes into the final
  norm of a network that ends there."""
  network, (params, router) = NETWORKS[name], weights_of(name)
  how = dict(group_size=GROUP, max_tokens=LENGTH, pad_id=PAD)
  s = sampling.Sampler(**how)
  carry = start(network, params, router, batch_of(), key, s)
  carry = advance(network, params, router, carry, 3, s)
  broken = {**params, "head": params["head"].at[0, 5].set(jnp.nan)}
  drawn = rollout.finish(advance(network, broken, router, carry, 99, s))
  assert drawn.nonfinite.all() and (drawn.lengths == 3).all()
  assert (drawn.steps == 4).all() and drawn.norms.shape == (4, GROUP, 2)
  rows = experience.rows_of(batch_of(), drawn)
  tokens = jnp.concatenate([rows.prompts, rows.completions[:, :3]], axis=1)
  mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask[:, :3]], axis=1)
  seq = Sequence.of_mask(mask)
  for n in (1, 2):
    few = {"layers": n, "dense_layers": min(n, network.config.dense_layers)}
    part = policy.Policy(dataclasses.replace(network.config, **few))
    left = dict(params)
    if n == 1 and name == "MoE":
      left.pop("moe_layers")
    elif n == 1:
      left["dense_layers"] = jax.tree.map(lambda w: w[:1], params["dense_layers"])
    variables = {"params": left, "router": router if n == 2 else {}}
    seen = []

    def watch(call, args, kwargs, context, seen=seen):
      if context.module.name == "final_norm":
        seen.append(args[0][:, -1])
      return call(*args, **kwargs)

    with nn.intercept_methods(watch):
      part.apply(variables, tokens, seq)
    want = np.linalg.norm(np.asarray(seen[0], np.float64), axis=-1)
    np.testing.assert_allclose(drawn.norms[..., n - 1].ravel(), want, rtol=1e-4)


@both
@pytest.mark.parametrize("budget", [0, 70])
def test_a_token_that_spoils_its_row_spoils_no_other(name, budget, key):
  """Rows that draw it are broken off with it, whatever seats they sit in, also where it
  is their last. The others' numbers are those of sound weights."""
  network, weights = NETWORKS[name], weights_of(name)
  how = dict(group_size=GROUP, max_tokens=LENGTH, pad_id=PAD)
  s = sampling.Sampler(slots=6, cache_tokens=budget, **how)
  # Rows at all lengths, so that some have no seat where others have one.
  limits = jnp.asarray(heavy_tailed(1))
  carry = start(network, *weights, batch_of(), key, s, limits=limits)
  carry = advance(network, *weights, carry, 9, s)
  sound = rollout.finish(advance(network, *weights, carry, 99, s))
  spoilt = sound_beside = 0
  for token in range(1, VOCAB, 2):
    drawn = rollout.finish(advance(network, *spoiled(weights, token), carry, 99, s))
    if not np.asarray(drawn.nonfinite).any():  # it was not drawn again
      assert_same_tokens(*(jax.tree.map(np.asarray, x) for x in (drawn, sound)))
      continue
    steps = int(drawn.steps[0])
    before, after = (
      rollout.finish(advance(network, *weights, carry, n, s))
      for n in (steps - 1, steps)
    )
    at = np.maximum(np.asarray(after.lengths) - 1, 0)[..., None]
    last = np.take_along_axis(np.asarray(after.tokens), at, axis=2)[..., 0]
    alive = np.asarray(after.lengths > before.lengths)
    want = alive & (last == token)
    np.testing.assert_array_equal(drawn.nonfinite, want)
    spoilt, sound_beside = spoilt + want.sum(), sound_beside + (alive & ~want).sum()
    np.testing.assert_array_equal(drawn.tokens, np.where(drawn.mask, sound.tokens, PAD))
    np.testing.assert_allclose(
      drawn.logprobs, np.where(drawn.mask, sound.logprobs, 0), atol=1e-5
    )
  assert spoilt >= 2 and sound_beside >= 6, "choose another key"
