"""The tiny preset's whole step, and V3's rollouts, compile for TPUs on a machine that
has none.

Needs the libtpu wheel (pip install -e ".[tpu]"):  python -m pytest -m tpu
"""

import os
import re

from flax import linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
import numpy as np
import pytest

from experiments.configs.r1_zero import get_config
from r1jax import ahead_of_time, grpo, rollout, settings, sharding, train_state
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.config import v3_671b
from r1jax.models.policy import Policy, init
from r1jax.optimizer import make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards import in_graph
from r1jax.sampling import Sampler


@pytest.mark.tpu
@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_whole_step_of_the_tiny_preset_compiles_for_a_tpu(shape):
  pytest.importorskip("libtpu")
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = mesh_of(shape, topology.devices)
  config = get_config("tiny")
  texts = ["<think>4 + 3 = 7, wait 4 + 3 = 7</think><answer>7</answer>"] * 20
  tokenizer = Tokenizer.train(texts, vocab=400)
  policy = Policy(settings.policy_config(config, tokenizer.vocab))
  optimizer = make_optimizer(settings.optimizer_config(config))

  def step(state, prompts, key):
    return grpo.whole_step(
      state,
      prompts,
      jax.random.wrap_key_data(key),
      policy=policy,
      optimizer=optimizer,
      reward_fn=in_graph.rule_reward(
        in_graph.TagTable.of(tokenizer), prefill_think=False, **config.reward
      ),
      config=settings.step_config(config, max_tokens=48),
      stop_ids=(tokenizer.eos_id,),
      pad_id=tokenizer.pad_id,
    )

  def spec(x, layout):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

  shapes = jax.eval_shape(
    lambda key: train_state.create(policy, optimizer, key, reference=True),
    jax.random.key(0),
  )
  layouts = train_state.shardings(policy, optimizer, mesh, reference=True)
  rows = sharding.batch_sharding(mesh)
  prompts = PromptBatch(
    tokens=np.zeros((16, 12), np.int32),
    mask=np.zeros((16, 12), bool),
    answers=np.zeros((16, 1, 2), np.int32),
    ids=np.zeros(16, np.int32),
  )
  key = spec(np.zeros(2, np.uint32), sharding.replicated(mesh))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = (
      jax.jit(step, donate_argnums=0)
      .trace(
        jax.tree.map(spec, shapes, layouts),
        jax.tree.map(lambda x: spec(x, rows), prompts),
        key,
      )
      .lower(lowering_platforms=("tpu",))
      .compile()
    )
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes > 0
  assert memory.alias_size_in_bytes > 0, "the state's buffers are reused"


@pytest.mark.tpu
def test_rollouts_of_the_whole_of_v3_fit_256_chips():
  """DeepSeek-V3 in bfloat16 on a slice of a v5p pod, as in the paper's rollouts: 512
  prompts x 16 outputs over 4,096 slots of a 32k window that refill in the loop.
  Arguments and temporaries stay under 80 GiB a chip, no cache is copied, nothing goes
  to the host."""
  pytest.importorskip("libtpu")
  mesh = mesh_of((4, 64, 1), ahead_of_time.devices("v5p:8x8x4"))
  network = Policy(v3_671b(remat="all", mtp_depth=0))
  boxed = jax.eval_shape(lambda: init(network, jax.random.key(0)))
  rows = sharding.batch_sharding(mesh)
  s = Sampler(group_size=16, max_tokens=31_744, pad_id=0, stop_ids=(1,), slots=4096)

  def weights(tree, dtype=None):
    layout = sharding.tree_shardings(tree, mesh)
    return jax.tree.map(
      lambda x, cut: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=cut),
      nn.unbox(tree),
      layout,
    )

  def of_rows(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  def placed(path, x):
    name = jax.tree_util.keystr(path)
    spec = P(sharding.BATCH)
    if "cache" in name or "prompt_experts" in name:
      spec = P(None, sharding.BATCH)
    spec = P() if name == ".step" else spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  params, router = weights(boxed[0], jnp.bfloat16), weights(boxed[1])
  prompts = PromptBatch(
    tokens=of_rows(512, 1024),
    mask=of_rows(512, 1024, dtype=bool),
    answers=of_rows(512, 1, 2),
    ids=of_rows(512),
  )

  def start(params, router, prompts):
    return rollout.start(network, params, router, prompts, jax.random.key(0), s)

  def advance(params, router, carry):
    return rollout.advance(network, params, router, carry, rollout.FOREVER, s)

  with jax.set_mesh(mesh):
    carry = jax.eval_shape(start, params, router, prompts)
    carry = jax.tree_util.tree_map_with_path(placed, carry)
    program = jax.jit(advance, donate_argnums=2).lower(params, router, carry)
    compiled = program.compile()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  cache = carry.cache.own[0]
  assert cache.shape == (61, 4096, 31_744, 640)
  assert used < 80 * 2**30
  assert memory.temp_size_in_bytes < cache.size * 2 / 256 / 2, "a copy of the cache"
  held = r"bf16\[61,16,31744,640\]\S* "
  assert re.search(held + r"scatter\(", text)
  assert not re.search(held + r"(copy|transpose|pad|convert)\(", text)
  assert not re.search(r"(infeed|outfeed|send|recv|MoveToHost)\(", text)
