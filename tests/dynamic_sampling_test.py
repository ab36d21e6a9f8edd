"""Dynamic sampling: which groups are taken, against Python lists and against sampling
the whole pool at once; that slots left empty have no say; whole steps."""

import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import optax
import pytest
from trees import assert_same, host

from r1jax import dynamic_sampling, grpo, sharding, train_state
from r1jax.dynamic_sampling import Slots, all_of, collect, empty, fill
from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout, repeats
from r1jax.segments import make_segments

POLICY = golden.tiny_policy()
AGGREGATIONS = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]


# -- fill against lists ----------------------------------------------------------------

B, G, T = 4, 3, 5


def fake_wave(rng, share=0.5) -> Slots:
  """B groups of random tokens; about `share` of them have rewards that differ."""
  lengths = rng.integers(1, T + 1, (B, G))
  mask = np.arange(T) < lengths[..., None]
  differ = rng.uniform(size=(B, 1)) < share
  part = np.where(differ, np.arange(G)[None] % 2, rng.integers(0, 2, (B, 1)))
  tokens = np.where(mask, rng.integers(4, golden.VOCAB, mask.shape), golden.PAD)
  noise = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  rollout = Rollout(
    tokens=jnp.asarray(tokens, jnp.int32),
    mask=jnp.asarray(mask),
    logprobs=jnp.asarray(np.where(mask, noise[0], 0)),
    entropy=jnp.asarray(np.where(mask, np.abs(noise[1]), 0)),
    ended=jnp.asarray(rng.uniform(size=(B, G)) < 0.5),
  )
  prompts = golden.prompt_batch(B, seed=int(rng.integers(1000)))
  prompts = prompts.replace(ids=jnp.asarray(rng.integers(0, 1000, B), jnp.int32))
  rewards = Rewards.of(
    accuracy=(1.0, jnp.asarray(part, jnp.float32)),
    format=(0.5, jnp.ones((B, G), jnp.float32)),
  )
  return all_of(prompts, rollout, rewards)


def groups_of(wave: Slots) -> list:
  """The wave's groups one by one."""
  kept = host((wave.prompts, wave.rollout, wave.rewards))
  return [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(B)]


def reward_of(group) -> np.ndarray:
  return group[2].total


@pytest.fixture(scope="module")
def fill_jit():
  return jax.jit(functools.partial(fill, filter_on="reward"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_fill_equals_lists(fill_jit, share, seed):
  rng = np.random.default_rng([seed, int(10 * share)])
  waves = [fake_wave(rng, share) for _ in range(5)]
  slots, taken, dropped, surplus = empty(waves[0]), [], 0, 0
  for n, wave in enumerate(waves, start=1):
    slots = fill_jit(slots, wave)
    for group in groups_of(wave):
      if len(set(reward_of(group).tolist())) == 1:
        dropped += 1
      elif len(taken) < B:
        taken.append(group)
      else:
        surplus += 1
    found = groups_of(slots)
    for got, want in zip(found, taken, strict=False):
      assert_same(got, want)
    for got in found[len(taken) :]:
      assert not any(x.any() for x in jax.tree.leaves(got))
    assert slots.filled.tolist() == [i < len(taken) for i in range(B)]
    assert int(slots.waves) == n
    assert int(slots.dropped) == dropped
    assert int(slots.surplus) == surplus
    for name in waves[0].figures:
      mean = np.mean([float(w.figures[name]) for w in waves[:n]])
      np.testing.assert_allclose(slots.figures[name], mean, rtol=1e-5, err_msg=name)
  assert dropped + surplus + len(taken) == 5 * B


def test_an_empty_batch_has_nothing():
  slots = empty(fake_wave(np.random.default_rng(0)))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(slots))


def test_all_of_fills_every_slot_with_groups_without_variance_too():
  wave = fake_wave(np.random.default_rng(0), share=0.0)
  assert wave.filled.all()
  assert [int(x) for x in (wave.waves, wave.dropped, wave.surplus)] == [1, 0, 0]
  assert wave.figures["equal_groups"] == 1


def test_a_part_can_decide_instead_of_the_reward():
  """Accuracy and format cancel out in the second group and format alone differs in the
  third."""
  accuracy = jnp.float32([[0, 1], [0, 1], [1, 1], [0, 0]])
  form = jnp.float32([[1, 1], [1, 0], [0, 1], [1, 1]])
  rewards = Rewards.of(accuracy=(1.0, accuracy), format=(1.0, form))
  for name, want in [
    ("reward", [True, False, True, False]),
    ("accuracy", [True, True, False, False]),
    ("format", [False, True, True, False]),
  ]:
    assert dynamic_sampling.informative(rewards, name).tolist() == want


def test_the_smallest_difference_is_informative():
  x = jnp.float32([[0.1, 0.1, 0.1], [0.1, 0.1, np.nextafter(np.float32(0.1), 1)]])
  rewards = Rewards.of(x=(1.0, x))
  assert dynamic_sampling.informative(rewards, "reward").tolist() == [False, True]


def test_an_unknown_part_is_refused_and_the_parts_are_listed():
  wave = fake_wave(np.random.default_rng(0))
  with pytest.raises(UserError, match=r"filter_on='speed'.*accuracy, format"):
    fill(empty(wave), wave, "speed")
  with pytest.raises(UserError, match="filter_on='speed'"):
    fake_collect(np.ones((2, 8)), np.ones((2, 8)), objective=dict(filter_on="speed"))


# -- collect with a sampler that is a table --------------------------------------------


def fake_pool(ids) -> PromptBatch:
  return golden.prompt_batch(len(ids)).replace(ids=jnp.asarray(ids, jnp.int32))


def fake_collect(lengths, informative, *, ids=None, batch=4, objective=None) -> Slots:
  """`collect` where the n-th time problem i is answered in outputs of lengths[n, i]
  tokens, all of them i + 1, and its rewards differ if informative[n, i]."""
  lengths, informative = (jnp.asarray(x, jnp.int32) for x in (lengths, informative))
  ids = np.arange(lengths.shape[1]) if ids is None else np.asarray(ids)

  def draw(prompts, earlier):
    rows = lengths[earlier, prompts.ids]
    mask = jnp.arange(T)[None, None] < jnp.broadcast_to(
      rows[:, None, None], (*rows.shape, 2, 1)
    )
    tokens = jnp.where(mask, prompts.ids[:, None, None] + 1, 0)
    zeros = jnp.zeros(mask.shape)
    wins = informative[earlier, prompts.ids][:, None] * jnp.arange(2)[None]
    # The reward rides in the log-probabilities, the count in the entropy.
    return Rollout(
      tokens=tokens,
      mask=mask,
      logprobs=zeros + wins[..., None],
      entropy=zeros + earlier[:, None, None],
      ended=jnp.ones(mask.shape[:2], bool),
    )

  def reward_fn(prompts, rollout):
    return Rewards.of(win=(1.0, rollout.logprobs[..., 0]))

  o = Objective(pool=len(ids) // batch, **(objective or {}))
  return jax.jit(lambda pool: collect(pool, draw, reward_fn, o))(fake_pool(ids))


def order_of(pool: int, batch: int) -> list[int]:
  """Rows in the order of sampling: a wave takes every pool-th row."""
  return [b * pool + w for w in range(pool) for b in range(batch)]


def test_the_choice_is_the_pools_order_however_fast_problems_are_answered():
  """Short outputs would be finished first; if that mattered, easy problems would be
  preferred. Whatever the lengths are, the same groups are taken."""
  rng = np.random.default_rng(0)
  informative = np.array([[1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1]])
  first = [i for i in order_of(3, 4) if informative[0, i]][:4]
  lengths = np.array([[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]])
  chosen_last = np.isin(np.arange(12), first)
  cases = [lengths, lengths[:, ::-1], rng.permutation(lengths[0])[None]]
  cases += [np.where(chosen_last, 5, 1)[None], np.where(chosen_last, 1, 5)[None]]
  cases.append(np.full((1, 12), 3))
  for case in cases:
    slots = fake_collect(case, informative)
    assert slots.prompts.ids.tolist() == first
    assert slots.rollout.lengths.tolist() == [[case[0, i]] * 2 for i in first]
    assert (int(slots.waves), int(slots.dropped), int(slots.surplus)) == (2, 3, 1)
    sampled = [i for i in order_of(3, 4)][:8]
    np.testing.assert_allclose(slots.figures["length"], case[0, sampled].mean())


def test_sampling_stops_as_soon_as_the_slots_are_full():
  ones = np.ones((1, 12))
  slots = fake_collect(ones, ones)
  assert int(slots.waves) == 1 and slots.filled.all()
  assert slots.prompts.ids.tolist() == [0, 3, 6, 9]  # every third row of the pool
  late = np.zeros((1, 12))
  late[0, [1, 4, 7, 10]] = 1  # all of the second wave
  slots = fake_collect(ones, late)
  assert int(slots.waves) == 2 and slots.filled.all()
  assert int(slots.dropped) == 4 and int(slots.surplus) == 0


def test_a_spent_pool_leaves_slots_empty():
  informative = np.zeros((1, 12))
  informative[0, [11, 3]] = 1
  slots = fake_collect(np.ones((1, 12)), informative)
  assert int(slots.waves) == 3
  assert slots.filled.tolist() == [True, True, False, False]
  assert slots.prompts.ids.tolist()[:2] == [3, 11]  # the first wave's comes first
  assert not slots.prompts.mask[2:].any() and not slots.rollout.mask[2:].any()
  assert int(slots.dropped) == 10
  np.testing.assert_allclose(slots.figures["reward"], 1 / 12)
  np.testing.assert_allclose(slots.figures["equal_groups"], 10 / 12)


def test_nothing_informative_fills_nothing():
  slots = fake_collect(np.ones((1, 8)), np.zeros((1, 8)))
  assert not slots.filled.any()
  assert int(slots.dropped) == 8 and int(slots.waves) == 2


def test_a_problem_that_stands_twice_goes_on_counting_over_the_waves():
  """Its second place is in a later wave and still is its second answer; rows count in
  the pool's order."""
  ids = [0, 1, 2, 0, 4, 5, 6, 2]  # pool 2: waves are [0, 2, 4, 6] and [1, 0, 5, 2]
  informative = np.array([[0, 1, 1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 0]])
  slots = fake_collect(np.ones((2, 8)), informative, ids=ids)
  assert slots.prompts.ids.tolist() == [2, 6, 1, 0]
  assert slots.rollout.entropy[:, 0, 0].tolist() == [0, 0, 0, 1]
  assert int(slots.surplus) == 1  # the second answer to problem 2


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_waves_are_the_pool(pool):
  prompts = golden.prompt_batch(8)
  waves = [dynamic_sampling.wave_of(prompts, w, 8 // pool) for w in range(pool)]
  ids = [x for wave in waves for x in wave.ids.tolist()]
  assert ids == order_of(pool, 8 // pool)
  for wave in waves:
    assert np.array_equal(wave.tokens, prompts.tokens[wave.ids])
    assert np.array_equal(wave.answers, prompts.answers[wave.ids])


# -- collect with the tiny policy ------------------------------------------------------


def rare_reward(prompts, rollout) -> Rewards:
  """1 where the first token is one of the last four: many groups are all 0."""
  won = rollout.tokens[..., 0] >= golden.VOCAB - 4
  return Rewards.of(
    win=(1.0, won.astype(jnp.float32)),
    short=(0.0, (rollout.lengths < 4).astype(jnp.float32)),
  )


POOL, SMALL = 3, 3
COLLECT = grpo.GRPOConfig(
  group_size=2,
  minibatches=1,
  max_tokens=5,
  reference_refresh=0,
  objective=Objective(kl_coef=0.0, pool=POOL),
)


def twice_pool() -> PromptBatch:
  """Nine problems of which the fifth, in the second wave, is the first once more."""
  pool = golden.prompt_batch(POOL * SMALL)
  order = np.array([0, 1, 2, 3, 0, 5, 6, 7, 8])
  return jax.tree.map(lambda x: x[order], pool)


@pytest.fixture(scope="module")
def collected():
  """Programs (state, pool, key) -> slots, and -> (rollout, rewards) of all at once."""
  draw = functools.partial(
    grpo.draw,
    policy=POLICY,
    config=COLLECT,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
  )

  def in_waves(state, pool, key):
    return collect(pool, draw(state, key), rare_reward, COLLECT.objective)

  def at_once(state, pool, key):
    rollout = draw(state, key)(pool, repeats(pool.ids))
    return rollout, rare_reward(pool, rollout)

  return jax.jit(in_waves), jax.jit(at_once)


def test_collect_is_the_first_informative_groups_of_the_whole_pool(collected):
  in_waves, at_once = collected
  state, pool = golden.new_state(POLICY, reference=False), twice_pool()
  seen = set()
  for seed in range(12):
    key = jax.random.key(seed)
    slots = in_waves(state, pool, key)
    rollout, rewards = host(at_once(state, pool, key))
    differ = (rewards.total != rewards.total[:, :1]).any(axis=1)
    order = order_of(POOL, SMALL)
    chosen = [i for i in order if differ[i]][:SMALL]
    for j, i in enumerate(chosen):
      assert np.array_equal(slots.prompts.tokens[j], pool.tokens[i])
      assert np.array_equal(slots.rollout.tokens[j], rollout.tokens[i])
      assert np.array_equal(slots.rollout.mask[j], rollout.mask[i])
      assert np.array_equal(slots.rollout.ended[j], rollout.ended[i])
      assert np.array_equal(slots.rewards.total[j], rewards.total[i])
      np.testing.assert_allclose(
        slots.rollout.logprobs[j], rollout.logprobs[i], rtol=1e-4, atol=1e-5
      )
    assert slots.filled.tolist() == [j < len(chosen) for j in range(SMALL)]
    counts = np.cumsum([differ[order[w * SMALL :][:SMALL]].sum() for w in range(POOL)])
    waves = int(np.argmax(counts >= SMALL)) + 1 if counts[-1] >= SMALL else POOL
    sampled = order[: waves * SMALL]
    assert int(slots.waves) == waves
    assert int(slots.dropped) == (~differ[sampled]).sum()
    assert int(slots.surplus) == differ[sampled].sum() - len(chosen)
    for name, x in (("win", rewards.parts["win"]), ("length", rollout.mask.sum(-1))):
      np.testing.assert_allclose(slots.figures[name], x[sampled].mean(), rtol=1e-5)
    seen |= {("waves", waves), ("full", len(chosen) == SMALL)}
    seen |= {("twice", i) for i in chosen if i in (0, 4)}
    if {0, 4} <= set(sampled):  # a problem's two places are answered differently
      assert not np.array_equal(rollout.tokens[0], rollout.tokens[4])
  # What the keys showed: every kind of end, and both places of the doubled problem.
  assert {("waves", 2), ("waves", 3), ("full", True), ("full", False)} <= seen
  assert {("twice", 0), ("twice", 4)} <= seen


# -- slots left empty ------------------------------------------------------------------


def half_filled() -> tuple[Slots, Slots]:
  """(4 slots of which 2 are filled, those 2 groups alone)."""
  wave = fake_wave(np.random.default_rng(3))
  part = jnp.float32([[0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 2, 1]])
  wave = all_of(wave.prompts, wave.rollout, Rewards.of(accuracy=(1.0, part)))
  good = np.array([0, 3])
  rollout = wave.rollout.replace(  # near what the policy says
    logprobs=jnp.where(wave.rollout.mask, -2.7 + 0.2 * wave.rollout.logprobs, 0.0)
  )
  wave = all_of(wave.prompts, rollout, wave.rewards)
  kept = jax.tree.map(lambda x: x[good], (wave.prompts, rollout, wave.rewards))
  alone = all_of(*kept).replace(figures=wave.figures, dropped=jnp.asarray(2, jnp.int32))
  half = fill(empty(wave), wave, "reward")
  assert half.filled.tolist() == [True, True, False, False]
  return half, alone


@pytest.fixture(
  scope="module",
  params=[
    AGGREGATIONS[0],
    *(pytest.param(x, marks=pytest.mark.slow) for x in AGGREGATIONS[1:]),
  ],
)
def updates(request):
  """Plain gradient descent on the half-filled slots and on the filled alone."""
  full = request.param == "seq-mean-token-mean"  # the others leave out what takes long
  policy = POLICY if full else golden.tiny_policy(dense_layers=1, dense_ffn=16)
  config = grpo.GRPOConfig(
    group_size=G,
    minibatches=1,
    micro_batches=2,
    max_tokens=T,
    reference_refresh=0,
    router_bias_rate=0.5,
    objective=Objective(
      clip_low=0.2,
      clip_high=0.2,
      kl_coef=0.04 if full else 0.0,
      aggregation=request.param,
    ),
  )
  optimizer = optax.sgd(0.5)
  state = train_state.restart(*golden.weights(policy), optimizer, reference=full)

  @jax.jit
  def learn(state, slots):
    rows, metrics = grpo.experience(
      state, slots, jax.random.key(7), policy=policy, config=config
    )
    state, more, _ = grpo.update(
      state,
      jax.tree.map(lambda x: x[0], rows),
      policy=policy,
      optimizer=optimizer,
      config=config,
    )
    return state, {**metrics, **more}

  half, alone = (learn(state, slots) for slots in half_filled())
  return half, alone, state


def test_a_half_filled_batch_gives_the_update_of_its_filled_rows(updates):
  (half, _), (alone, _), before = updates
  assert_same(half.params, alone.params, rtol=1e-5, atol=2e-6)
  assert_same(half.router, alone.router)
  moved = jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), before, alone))
  assert max(float(x) for x in moved) > 1e-2


def test_an_empty_slot_has_no_share_in_any_mean(updates):
  (_, half), (_, alone), _ = updates
  assert half.keys() == alone.keys()
  for name in half.keys() - {"groups_empty", "balance_loss"}:
    np.testing.assert_allclose(
      half[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name
    )
  assert (half["groups_empty"], alone["groups_empty"]) == (2, 0)


@pytest.mark.parametrize("updates", AGGREGATIONS[:1], indirect=True)
def test_an_empty_slot_has_no_share_in_the_balance_loss(updates):
  (_, half), (_, alone), _ = updates
  np.testing.assert_allclose(half["balance_loss"], alone["balance_loss"], rtol=1e-5)


# -- whole steps -----------------------------------------------------------------------

K = 2
KEY = 21  # of three steps with slots left empty, groups left over, and one wave
STEP = grpo.GRPOConfig(
  group_size=4,
  minibatches=K,
  micro_batches=2,
  max_tokens=6,
  reference_refresh=0,
  objective=Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.0, pool=2),
)
# As in tests/sharding_test.py: a large eps, so that rounding of a gradient near 0 is
# not turned into a whole step.
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, steps=100, eps=1e-2))


def own_reward(prompts, rollout) -> Rewards:
  """1 where the first token is the problem's own or the next: many groups are all 0."""
  ahead = rollout.tokens[..., 0] - prompts.answers[:, :, 0]
  won = (ahead == 0) | (ahead == 1)
  return Rewards.of(win=(1.0, won.astype(jnp.float32)))


@pytest.fixture(scope="module")
def run():
  """(mesh shape, devices) -> (states after each of three steps, rollouts, metrics,
  program)."""

  def steps(shape, devices):
    mesh = mesh_of(shape, devices)
    with jax.set_mesh(mesh):
      layout = train_state.shardings(POLICY, OPTIMIZER, mesh, reference=False)
      state = train_state.restart(*golden.weights(POLICY), OPTIMIZER, reference=False)
      state = jax.device_put(state, layout)
      pool = jax.device_put(golden.prompt_batch(8), sharding.batch_sharding(mesh))
      key = jax.device_put(jax.random.key(KEY), sharding.replicated(mesh))
      step = golden.make_step(POLICY, STEP, optimizer=OPTIMIZER, reward_fn=own_reward)
      program = jax.jit(
        golden.counted(step),
        donate_argnums=0,
        out_shardings=(layout, None, None, None),
      )
      found = []
      for _ in range(3):
        state, rollout, metrics, _ = program(state, pool, key)
        found.append((host(state), host(rollout), golden.figures(metrics)))
    return (*zip(*found, strict=True), program)

  return steps


@pytest.fixture(scope="module")
def one(run):
  return run((1, 1, 1), jax.devices()[:1])


def test_three_steps_compile_once(one):
  assert len(one[3].__wrapped__.traces) == 1


def test_a_step_says_what_it_left_out(one):
  for state, rollout, metrics in zip(*one[:3], strict=True):
    filled = rollout.mask.any(axis=(1, 2))
    assert metrics["groups_empty"] == (~filled).sum()
    groups = metrics["groups_dropped"] + metrics["groups_surplus"] + filled.sum()
    assert groups == 4 * metrics["waves"]
    assert metrics["waves"] in (1, 2)
    equal = metrics["groups_dropped"] / (4 * metrics["waves"])
    np.testing.assert_allclose(metrics["equal_groups"], equal, rtol=1e-6)
    assert metrics["waves"] == 1 or metrics["groups_dropped"] > 0
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  empties, left, waves = (
    [m[name] for m in one[2]] for name in ("groups_empty", "groups_surplus", "waves")
  )
  # What the tests below rest on.
  assert 0 < empties[0] < 4 and left[1] > 0 and waves == [2, 2, 1]


def compare(got, want):
  state, rollout, metrics = got
  want_state, want_rollout, want_metrics = want
  assert np.array_equal(rollout.tokens, want_rollout.tokens)
  assert np.array_equal(rollout.mask, want_rollout.mask)
  assert metrics.keys() == want_metrics.keys()
  for name in metrics.keys() - {"sampler_gap_max", "sampler_gap_mean", "sampler_kl"}:
    np.testing.assert_allclose(
      metrics[name], want_metrics[name], rtol=1e-3, atol=1e-5, err_msg=name
    )
  assert_same(state, want_state, rtol=1e-3, atol=1e-5)


def test_segments_give_the_numbers_of_the_whole_step(one):
  pieces = make_segments(
    policy=POLICY,
    optimizer=OPTIMIZER,
    reward_fn=own_reward,
    config=STEP,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
    segment_tokens=4,  # the last segment is shorter
  )
  state = train_state.restart(*golden.weights(POLICY), OPTIMIZER, reference=False)
  for want in zip(*one[:3], strict=True):
    state, rollout, metrics, _ = pieces(
      state, golden.prompt_batch(8), jax.random.key(KEY)
    )
    compare((host(state), host(rollout), golden.figures(metrics)), want)


@pytest.mark.slow
def test_a_step_on_eight_devices_is_that_on_one(run, one):
  found = run((2, 2, 2), jax.devices())
  for got, want in zip(
    zip(*found[:3], strict=True), zip(*one[:3], strict=True), strict=True
  ):
    compare(got, want)
  assert len(found[3].__wrapped__.traces) == 1
