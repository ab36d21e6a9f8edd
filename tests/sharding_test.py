"""A step gives the same numbers on one device and cut over eight; a mesh that does not
fit is refused."""

import functools
import math

import grpo_golden as golden
import jax
import numpy as np
import pytest
from quick import QUICK

from r1jax import experience, grpo, rollout, sharding, train_state
from r1jax.errors import UserError
from r1jax.models.policy import init
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


def run(sizes, policy):
  """(state, rollout, metrics) of one whole step on a mesh."""
  devices = jax.devices()[: math.prod(sizes.values())]
  mesh = sharding.make_mesh(devices, **sizes)
  with jax.set_mesh(mesh):
    shardings = train_state.shardings(policy, OPTIMIZER, mesh, reference=True)
    params, router = golden.weights(policy)
    state = train_state.restart(params, router, OPTIMIZER, reference=True)
    moved = jax.tree.map(
      lambda a, b: a + 0.1 * b, params, golden.weights(policy, seed=1)[0]
    )
    state = state.replace(reference=state.reference.replace(params=moved))
    state = jax.device_put(state, shardings)
    batch = golden.prompt_batch(8, length=6)  # 6 + 6 tokens: two devices' context
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    key = jax.device_put(jax.random.key(7), sharding.replicated(mesh))
    step = jax.jit(
      golden.make_step(policy, CONFIG, optimizer=OPTIMIZER),
      donate_argnums=0,
      out_shardings=(shardings, None, None, None),
    )
    return step.lower(state, batch, key).compile(QUICK)(state, batch, key)[:3]


@pytest.fixture(scope="module")
def one():
  return run({}, POLICIES["dense"])


# Every axis alone, and mixtures; by default each axis once.
CUTS = [
  (dict(context=2), "dense"),
  (dict(fsdp=2, expert=2, tensor=2), "ragged"),
  (dict(data=2, expert=2, context=2), "ragged"),
]
MORE = [
  (dict(data=8), "dense"),
  (dict(fsdp=8), "dense"),
  (dict(expert=4), "ragged"),
  (dict(tensor=2), "ragged"),
  (dict(data=2, fsdp=2, tensor=2), "dense"),
]
CUTS += [pytest.param(*cut, marks=pytest.mark.slow) for cut in MORE]


@pytest.mark.parametrize("sizes, moe", CUTS, ids=str)
def test_a_step_is_invariant_to_the_mesh(one, sizes, moe):
  state, rollout, metrics = run(sizes, POLICIES[moe])
  weights_are_cut(sizes, state)
  want_state, want_rollout, want_metrics = one
  assert np.array_equal(rollout.tokens, want_rollout.tokens)
  assert np.array_equal(rollout.mask, want_rollout.mask)
  np.testing.assert_allclose(rollout.logprobs, want_rollout.logprobs, atol=2e-5)
  for name in sorted(n for n in want_metrics if not n.startswith("sampler_")):
    np.testing.assert_allclose(
      metrics[name], want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
    )
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-6)
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


def weights_are_cut(sizes, state):
  """Weights, reference and moments."""
  sizes = dict.fromkeys(sharding.AXES, 1) | sizes
  _, fsdp, expert, tensor, _ = sizes.values()
  devices, wide, c = math.prod(sizes.values()), fsdp * expert, POLICIES["dense"].config
  moments = state.opt_state[1][0].mu
  for params in (state.params, state.reference.params, moments):
    moe = params["moe_layers"]["moe"]
    attention = params["moe_layers"]["attention"]
    for weight, want in [
      (params["embedding"], (c.vocab // tensor, c.width // wide)),
      (params["head"], (c.width // wide, c.vocab // tensor)),
      (attention["w_o"], (1, c.heads // tensor, c.v_dim, c.width // wide)),
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
      assert len(weight.addressable_shards) == devices


def test_a_batch_is_cut_over_the_data_axes_alone():
  mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
  x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
  assert x.addressable_shards[0].data.shape == (2, 3)
  y = jax.device_put(np.zeros((8, 3)), sharding.replicated(mesh))
  assert y.addressable_shards[0].data.shape == (8, 3)


def test_without_a_mesh_shard_batch_is_the_identity():
  x = jax.numpy.ones((3, 2))  # 3 rows: no mesh could cut them
  assert sharding.shard_batch(x) is x


@pytest.mark.parametrize(
  "sizes, devices, full",
  [
    (dict(fsdp=2, expert=2, tensor=2), 8, (1, 2, 2, 2, 1)),
    (dict(fsdp=-1), 8, (1, 8, 1, 1, 1)),
    (dict(data=2, tensor=-1), 8, (2, 1, 1, 4, 1)),
    (dict(expert=8, context=-1), 8, (1, 1, 8, 1, 1)),
    ({}, 1, (1, 1, 1, 1, 1)),
  ],
)
def test_one_size_may_be_left_open(sizes, devices, full):
  assert tuple(sharding.check_mesh(sizes, devices).values()) == full


@pytest.mark.parametrize(
  "sizes, words",
  [
    (dict(fsdp=2, tensor=2), ["fsdp=2, tensor=2", "8 devices", "fsdp=4 tensor=2"]),
    (dict(fsdp=4, expert=4), ["expert=4", "fsdp=2 expert=4"]),
    (dict(fsdp=-1, expert=-1), ["product is 8", "fsdp=8"]),
    (dict(fsdp=-1, tensor=3), ["tensor=3", "fsdp=8"]),
    (dict(fsdp=0), ["fsdp=0"]),
    (dict(fsdp=-1, expert=0), ["expert=0"]),
    (dict(fsdp=-2, data=-4), ["data=-4"]),
    (dict(pipeline=8), ["pipeline", "no axes", "context"]),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(sizes, words):
  with pytest.raises(UserError, match=r"config\.mesh") as error:
    sharding.check_mesh(sizes, 8)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  "sizes, weight", [({"tensor": 8}, "tensor"), ({"expert": 8}, "expert")]
)
def test_heads_and_experts_that_do_not_divide_are_refused(sizes, weight):
  """Two heads, and experts of which eight would be too many parts."""
  policy = golden.tiny_policy(experts=6)
  mesh = sharding.make_mesh(jax.devices()[:8], **sizes)
  with pytest.raises(UserError, match=rf"does not divide over the 8.*{weight}"):
    train_state.shardings(policy, OPTIMIZER, mesh, reference=False)


def test_rows_that_the_context_axis_does_not_divide_are_refused():
  mesh = sharding.make_mesh(jax.devices()[:2], context=2)
  sharding.check_length(mesh, 12, "rows")
  with pytest.raises(UserError, match=r"context=2 does not divide rows of 11 .* 12"):
    sharding.check_length(mesh, 11, "rows")


def test_other_rules_leave_weights_whole():
  boxed = jax.eval_shape(lambda: init(POLICIES["dense"], jax.random.key(0)))[0]
  mesh = sharding.make_mesh(fsdp=8)
  cut, whole = (sharding.tree_shardings(boxed, mesh, r) for r in sharding.RULES)
  w_o = "moe_layers", "attention", "w_o"
  for tree, parts in ((cut, 8), (whole, 1)):
    layout = functools.reduce(lambda t, k: t[k], w_o, tree)
    assert layout.shard_shape((1, 2, 8, 32))[-1] * parts == 32
  with pytest.raises(UserError, match=r"config\.model\.rules='other'.*fsdp"):
    sharding.tree_shardings(boxed, mesh, "other")


def test_rows_of_a_rollout_and_of_minibatches_are_cut_from_the_start():
  """Also where the pieces are programs of their own: neither the empty cache nor the
  shuffled rows stand whole on every device."""
  policy = POLICIES["dense"]
  mesh = sharding.make_mesh(fsdp=8)
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
