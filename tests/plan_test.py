"""The plan's figures against a program that runs, against counts by hand, and what it
refuses."""

import functools
import json
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.r1_zero import get_config
from r1jax import ahead_of_time, config_checks, plan, program_cost, sharding
from r1jax.errors import UserError
from r1jax.models import policy as policy_lib

SMALL = dict(
  model=dict(layers=2, moe="ragged", expert_capacity=1.0),
  grpo=dict(group_size=4, micro_batches=1, minibatches=1),
  data=dict(prompt_length=16),
)


def small(**mesh):
  config = get_config()
  with config.unlocked():
    config.mesh.update({"fsdp": 1, **mesh})
    for section, values in SMALL.items():
      config[section].update(values)
    config.windows = ((0, 32),)
    config.prompts, config.grpo.reference_refresh = 8, 40
  return config


def test_a_plan_says_what_a_run_would_have():
  """One plan for all its figures: its programs take a minute to compile."""
  config = small(expert=2, tensor=2)
  found = plan.plan(config, "cpu:4")
  bytes_are_those_of_a_state_that_exists(config, found)
  flops_are_those_of_a_hand_count(config, found)
  turns_and_cache_are_those_of_the_sizes(config, found)
  json.dumps(found)


def bytes_are_those_of_a_state_that_exists(config, found):
  """Parameters, moments and reference on one device, made and counted."""
  mesh = sharding.make_mesh(jax.devices()[:4], **config.mesh)
  sizes = plan.sizes_of(config)
  with jax.set_mesh(mesh):
    _, layouts, optimizer = plan._state(config, sizes.policy, mesh)
    make = functools.partial(
      plan.train_state.create, sizes.policy, optimizer, reference=True
    )
    state = jax.jit(make, out_shardings=layouts)(jax.random.key(0))

  def held(tree):
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == first)

  of = found["bytes"]
  assert of["parameters"] == held((state.params, state.router))
  assert of["optimizer"] == held(state.opt_state)
  assert of["reference"] == held(state.reference)
  arguments = found["programs"]["update"]["arguments"]
  rows = 32 // 2  # of 8 x 4 outputs, cut in two
  tokens = 4 * 3 * 32 + 4 * 32 + 4 * 32 + 32 + 4 * 16 + 16 + 4 * 1 + 2 + 48 * 2
  assert arguments == pytest.approx(held(state) + rows * tokens, rel=0.05)


def flops_are_those_of_a_hand_count(config, found):
  """Products of a forward pass, twice as many backwards; attention over whole rows."""
  c = plan.sizes_of(config).policy.config
  row = 16 + 32
  d, h, q, kv, r = c.width, c.heads, c.q_latent, c.kv_latent, c.rope_dim
  qk = c.nope_dim + r
  projections = d * q + q * h * qk + d * (kv + r)
  projections += kv * h * (c.nope_dim + c.v_dim) + h * c.v_dim * d
  attention = h * row * (qk + c.v_dim)
  dense = 3 * d * c.dense_ffn
  routed = 3 * d * c.expert_ffn * c.active_experts
  experts = d * c.experts + 3 * d * c.expert_ffn + routed
  token = 2 * projections + 2 * attention + dense + experts
  count = 32  # outputs
  forward = 2 * (count * row * token + count * 32 * d * c.vocab)
  again = 2 * count * row * routed  # the backward pass computes a round again
  got = found["programs"]["update"]["flops"] * found["chips"]
  assert got == pytest.approx(3 * forward + again, rel=0.05)


def turns_and_cache_are_those_of_the_sizes(config, found):
  assert found["decode_turns"] == 32  # all outputs at once, the whole window
  of = found["bytes"]
  c = plan.sizes_of(config).policy.config
  entry = c.cache.width + c.kv_latent  # keys and values by themselves, on a CPU
  entries = (8 * 16 + 32 * 32) * c.layers * entry * 4
  assert of["cache"] == pytest.approx(entries / 2, rel=0.05)  # rows are cut in two
  assert found["fits"] and found["free_hbm_fraction"] > 0.9
  assert set(found["programs"]) == {"prefill", "decode", "update"}
  update = found["programs"]["update"]
  assert update["collectives"]["all-to-all"][1] > 0


def test_rows_of_pre_training_are_not_asked():
  """The first of what is refused after the config's checks."""
  with pytest.raises(UserError, match="mean_tokens=-1"):
    plan.plan(get_config(), "cpu:8", mean_tokens=-1)


@pytest.mark.parametrize(
  "preset, chips, parameters",
  [
    ("qwen3_0_6b", 4, 596_049_920),
    ("qwen2_5_1_5b", 8, 1_543_714_304),
    ("moonlight_16b", 64, 15_960_108_544),
  ],
)
def test_presets_of_published_models_are_planned_without_them(
  preset, chips, parameters
):
  config = get_config(preset)
  assert config.model.folder
  planned = plan.of_preset(config)
  config_checks.check(planned, chips)
  sizes = plan.sizes_of(planned)
  assert (sizes.prompt, sizes.window) == (384, config.windows[0][1])
  shapes = nn.unbox(policy_lib.boxes(sizes.policy)[0])
  assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_a_checkpoint_that_is_here_says_its_own_sizes(tmp_path):
  config = get_config("qwen3_0_6b")
  config.model.folder = str(tmp_path)
  assert plan.of_preset(config).model.folder == str(tmp_path)
  config.model.folder, config.model.preset = "nowhere", "tiny"
  assert plan.of_preset(config).model.folder == "nowhere"  # whose absence is an error


def test_a_state_is_laid_out_for_devices_that_are_not_here():
  """Nothing may be computed on them: a key that is made outside of a trace would."""
  pytest.importorskip("libtpu")
  config = small(expert=2, tensor=2)
  mesh = sharding.make_mesh(ahead_of_time.devices("v5p:2x2x1"), **config.mesh)
  sizes = plan.sizes_of(config)
  with jax.set_mesh(mesh):
    state, layouts, _ = plan._state(config, sizes.policy, mesh)
  for spec, layout in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(layouts.params), strict=True
  ):
    assert spec.sharding == layout and layout.mesh == mesh


# -- counting --------------------------------------------------------------------------


def test_a_loops_products_count_as_often_as_it_turns():
  w = jnp.ones((8, 8))

  def f(x):
    x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
    return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ w, x)

  jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)))
  assert program_cost.flops(jaxpr) == (5 + 1) * 2 * 4 * 8 * 8


def test_gradients_of_grouped_products_count_once():
  sizes = jnp.asarray([3, 5], jnp.int32)

  def f(x, w):
    return jax.lax.ragged_dot(x, w, sizes).sum()

  args = jnp.ones((8, 4)), jnp.ones((2, 4, 6))
  jaxpr = jax.make_jaxpr(jax.grad(f, (0, 1)))(*args)
  assert program_cost.flops(jaxpr) == pytest.approx(3 * 2 * 8 * 4 * 6, rel=0.01)


def test_traffic_counts_loops_and_collectives():
  mesh = sharding.make_mesh(jax.devices()[:4], fsdp=4)
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

  def local(x):
    def turn(x, _):
      return jax.lax.psum(x, "fsdp") * 0.5, None

    return jax.lax.scan(turn, x, None, length=7)[0]

  def f(x):
    spec = cut.spec
    return jax.shard_map(
      local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(x)

  x = jax.ShapeDtypeStruct((4 * 1024,), np.float32, sharding=cut)
  traffic = program_cost.traffic(jax.jit(f).lower(x).compile().as_text())
  number, sent = traffic.collectives["all-reduce"]
  assert number == 7
  assert sent == 7 * 2 * 4096 * 3 / 4
  assert traffic.sent == sent
  assert traffic.hbm >= 7 * 2 * 4096


def test_what_a_call_does_beside_its_turns_is_told_apart():
  w = jnp.ones((64, 64))

  def f(x):
    x = x @ w  # once
    return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: jnp.sin(x @ w), x)

  text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
  call, turn, three = (program_cost.traffic(text, turns=n).hbm for n in (0, 1, 3))
  assert 0 < call < turn
  assert three - call == pytest.approx(3 * (turn - call))


FUSED = """
%slice (a: f32[58,8,4], i: s32[]) -> f32[8,4] {
  %a = f32[58,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dims
  ROOT %flat = f32[8,4]{1,0} bitcast(%one)
}

%product (w: f32[58,8,4], n: s32[], x: f32[2,8]) -> f32[2,4] {
  %w = f32[58,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[2,8]{1,0} parameter(2)
  %layer = f32[8,4]{1,0} fusion(%w, %n), kind=kLoop, calls=%slice
  ROOT %y = f32[2,4]{1,0} dot(%x, %layer), lhs_contracting_dims={1}
}

ENTRY %main (w: f32[58,8,4], n: s32[], x: f32[2,8]) -> f32[2,4] {
  %w = f32[58,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[2,8]{1,0} parameter(2)
  ROOT %y = f32[2,4]{1,0} fusion(%w, %n, %x), kind=kOutput, calls=%product
}
"""


def test_a_layer_that_a_fusion_in_a_fusion_slices_counts_by_itself():
  layer, x, y = 8 * 4 * 4, 2 * 8 * 4, 2 * 4 * 4
  assert program_cost.traffic(FUSED).hbm == pytest.approx(layer + x + y, abs=8)


@pytest.mark.parametrize(
  "text, devices",
  [
    ("replica_groups=[4,8]<=[32], dims", 8),
    ("replica_groups={{0,1,2},{3,4,5}}, dims", 3),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}, dims", 4),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'a','b'}, dims", 8),
    ("replica_groups={}, dims", 16),
    ("source_target_pairs={{0,1},{1,0}}", 2),
  ],
)
def test_every_form_of_replica_groups_is_read(text, devices):
  assert program_cost._group(text, 16) == devices


def test_an_unknown_form_is_not_guessed():
  with pytest.raises(ValueError, match="unknown form"):
    program_cost._group("replica_groups=cube(3)", 16)


def test_gathered_weights_are_sent():
  """As XLA itself places them."""
  mesh = sharding.make_mesh(jax.devices()[:4], fsdp=4)
  spec = jax.sharding.PartitionSpec
  w = jax.ShapeDtypeStruct(
    (64, 32), np.float32, sharding=jax.sharding.NamedSharding(mesh, spec("fsdp"))
  )
  whole = jax.sharding.NamedSharding(mesh, spec())
  program = jax.jit(lambda w: w * 2.0, out_shardings=whole).lower(w).compile()
  number, sent = program_cost.traffic(program.as_text()).collectives["all-gather"]
  assert (number, sent) == (1, 64 * 32 * 4 * 3 / 4)


# -- what it refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
  "topology, mesh, words",
  [
    ("v9z:2x2x1", {}, ["v9z", "v5p", "h200"]),
    ("v5p:3x9x1", {}, ["v5p:3x9x1", "cannot be compiled for"]),
    ("cpu:99", {}, ["cpu:99", "JAX_NUM_CPU_DEVICES"]),
    ("cpu:4", dict(fsdp=4, prompts=6), ["prompts=6", "4 data shards"]),
    ("cpu:4", dict(tensor=3), ["tensor=3", "4 devices"]),
    ("cpu:4", dict(context=4, prompt=15), ["context=4", "48"]),
  ],
)
def test_a_mistake_is_said_with_a_remedy(topology, mesh, words):
  if topology.startswith("v5p"):
    pytest.importorskip("libtpu")
  mesh = dict(mesh)
  lengths = {k: mesh.pop(k) for k in ("prompt", "prompts") if k in mesh}
  config = small(**mesh)
  with config.unlocked():
    config.data.prompt_length = lengths.get("prompt", 16)
    config.prompts = lengths.get("prompts", 8)
  with pytest.raises(UserError) as error:
    plan.plan(config, topology)
  for word in words:
    assert word in str(error.value)


def test_the_command_says_so_in_one_line():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.plan", "--topology=moon"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
  assert len(errors) == 1 and "'moon' is no chip" in errors[0]
