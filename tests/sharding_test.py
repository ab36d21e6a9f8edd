"""A step gives the same numbers on one device and cut over eight; a mesh that does not
fit is refused."""

import grpo_golden as golden
import jax
import numpy as np
import pytest

from r1jax import experience, grpo, rollout, sharding, train_state
from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.sampling import Sampler

POLICIES = {moe: golden.tiny_policy(moe=moe) for moe in ("dense", "ragged")}
# A large eps: AdamW's first step is lr * sign(g) otherwise, which turns the rounding of
# a gradient near 0 into a whole step.
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, steps=100, eps=1e-2))
CONFIG = grpo.GRPOConfig(
  group_size=4,
  minibatches=2,
  micro_batches=2,
  max_tokens=6,
  reference_refresh=2,
  objective=Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04),
)


def run(shape, devices, policy):
  """(state, rollout, metrics) of one whole step on a mesh."""
  mesh = sharding.make_mesh(shape, devices)
  with jax.set_mesh(mesh):
    shardings = train_state.shardings(policy, OPTIMIZER, mesh, reference=True)
    params, router = golden.weights(policy)
    state = train_state.restart(params, router, OPTIMIZER, reference=True)
    moved = jax.tree.map(
      lambda a, b: a + 0.1 * b, params, golden.weights(policy, seed=1)[0]
    )
    state = state.replace(reference=state.reference.replace(params=moved))
    state = jax.device_put(state, shardings)
    batch = jax.device_put(golden.prompt_batch(8), sharding.batch_sharding(mesh))
    key = jax.device_put(jax.random.key(7), sharding.replicated(mesh))
    step = jax.jit(
      golden.make_step(policy, CONFIG, optimizer=OPTIMIZER),
      donate_argnums=0,
      out_shardings=(shardings, None, None, None),
    )
    return step(state, batch, key)[:3]


@pytest.fixture(scope="module")
def one():
  return run((1, 1, 1), jax.devices()[:1], POLICIES["dense"])


CUTS = [((2, 2, 2), "dense"), ((8, 1, 1), "dense"), ((2, 2, 2), "ragged")]


@pytest.fixture(scope="module", params=CUTS, ids=str)
def cut(request):
  shape, moe = request.param
  return shape, run(shape, jax.devices(), POLICIES[moe])


def test_a_step_is_invariant_to_the_mesh(one, cut):
  state, rollout, metrics = cut[1]
  want_state, want_rollout, want_metrics = one
  assert np.array_equal(rollout.tokens, want_rollout.tokens)
  assert np.array_equal(rollout.mask, want_rollout.mask)
  np.testing.assert_allclose(rollout.logprobs, want_rollout.logprobs, atol=2e-5)
  for name in sorted(n for n in want_metrics if not n.startswith("sampler_")):
    np.testing.assert_allclose(
      metrics[name], want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )
  assert float(metrics["sampler_gap_max"]) < 1e-4
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    want = want_state
    for part in path:  # the same leaf of the other state
      name = getattr(part, "name", None)
      want = (
        getattr(want, name) if name else want[getattr(part, "key", None) or part.idx]
      )
    np.testing.assert_allclose(
      x, want, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path)
    )


def test_weights_and_moments_are_really_cut(cut):
  (fsdp, expert, tensor), (state, _, _) = cut
  c = POLICIES["dense"].config
  moments = state.opt_state[1][0].mu
  for params in (state.params, state.reference.params, moments):
    moe = params["moe_layers"]["moe"]
    attention = params["moe_layers"]["attention"]
    for weight, want in [
      (params["embedding"], (c.vocab // tensor, c.width // fsdp)),
      (params["head"], (c.width // fsdp, c.vocab // tensor)),
      (attention["w_o"], (1, c.heads // tensor, c.v_dim, c.width // fsdp)),
      (
        moe["w_gate"],
        (1, c.experts // expert, c.width // fsdp, c.expert_ffn // tensor),
      ),
      (
        moe["w_down"],
        (1, c.experts // expert, c.expert_ffn // tensor, c.width // fsdp),
      ),
    ]:
      assert weight.addressable_shards[0].data.shape == want
      assert len(weight.addressable_shards) == fsdp * expert * tensor


def test_a_batch_is_cut_over_the_data_axes_alone():
  mesh = sharding.make_mesh((2, 2, 2))
  x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
  assert x.addressable_shards[0].data.shape == (2, 3)
  y = jax.device_put(np.zeros((8, 3)), sharding.replicated(mesh))
  assert y.addressable_shards[0].data.shape == (8, 3)


def test_without_a_mesh_shard_batch_is_the_identity():
  x = jax.numpy.ones((3, 2))  # 3 rows: no mesh could cut them
  assert sharding.shard_batch(x) is x


@pytest.mark.parametrize(
  "shape, devices, full",
  [
    ((2, 2, 2), 8, (2, 2, 2)),
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((1, 8, -1), 8, (1, 8, 1)),
    ([1, 1, 1], 1, (1, 1, 1)),
  ],
)
def test_one_size_may_be_left_open(shape, devices, full):
  assert sharding.check_mesh(shape, devices) == full


@pytest.mark.parametrize(
  "shape, devices",
  [
    ((2, 2, 1), 8),
    ((4, 4, 1), 8),
    ((-1, -1, 1), 8),
    ((-1, 3, 1), 8),
    ((0, 1, 1), 8),
    ((-1, 0, 1), 8),
    ((-2, 2, -2), 8),
    ((8, 1), 8),
    ((8, 1, 1, 1), 8),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_a_remedy(shape, devices):
  with pytest.raises(UserError, match=r"config\.mesh=.*8 devices.*\(-1, 1, 1\)"):
    sharding.check_mesh(shape, devices)


def test_rows_of_a_rollout_and_of_minibatches_are_cut_from_the_start():
  """Also where the pieces are programs of their own: neither the empty cache nor the
  shuffled rows stand whole on every device."""
  policy = POLICIES["dense"]
  mesh = sharding.make_mesh((8, 1, 1))
  params, router = golden.weights(policy)
  with jax.set_mesh(mesh):
    batch = jax.device_put(golden.prompt_batch(8), sharding.batch_sharding(mesh))

    settings = Sampler(group_size=4, max_tokens=6, pad_id=0, slots=16, top_k=3)

    def start(params, router, batch):
      key = jax.random.key(0)
      return rollout.start(policy, params, router, batch, key, settings)

    carry = jax.jit(start)(params, router, batch)
    rows = {"x": jax.device_put(np.zeros((64, 3)), sharding.batch_sharding(mesh))}
    parts = jax.jit(experience.shuffled, static_argnums=2)(rows, jax.random.key(0), 2)
  assert carry.slots.output.shape == (16,) and carry.outputs.support is not None
  whole = carry.outputs, carry.prompts, carry.slots, carry.cache, carry.begun
  for path, x in jax.tree_util.tree_leaves_with_path(whole):
    shard, where = x.addressable_shards[0].data.shape, jax.tree_util.keystr(path)
    assert shard == (x.shape[0] // 8, *x.shape[1:]), where
  x = carry.prompt_experts
  assert x.addressable_shards[0].data.shape == (x.shape[0], 1, *x.shape[2:])
  assert parts["x"].shape == (2, 32, 3)
  assert parts["x"].addressable_shards[0].data.shape == (2, 4, 3)
