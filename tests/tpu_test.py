"""The tiny preset's whole step compiles for a TPU, on a machine that has none.

Needs the libtpu wheel (pip install -e ".[tpu]"):  python -m pytest -m tpu
"""

import os

import jax
from jax.experimental import topologies
import numpy as np
import pytest

from experiments.configs.r1_zero import get_config
from r1jax import grpo, settings, sharding, train_state
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.policy import Policy
from r1jax.optimizer import make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards import in_graph


@pytest.mark.tpu
@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_whole_step_of_the_tiny_preset_compiles_for_a_tpu(shape):
  pytest.importorskip("libtpu")
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  mesh = sharding.make_mesh(shape, topology.devices)
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
