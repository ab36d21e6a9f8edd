"""Weights for decoding: gathered once for the loop, the same values and the same
tokens."""

import dataclasses
import functools
import re

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK

from r1jax import rollout, sharding
from r1jax.models import policy as policy_lib
from r1jax.models.policy import Policy

POLICY = golden.tiny_policy(moe="ragged")
HOW = dict(group_size=2, max_tokens=6, pad_id=0, stop_ids=(1,))


@functools.cache
def drawn(gather):
  """(rollout, the compiled program's text) on fsdp 2 x expert 2 x tensor 2."""
  mesh = mesh_of((2, 2, 2))
  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: policy_lib.init(POLICY, jax.random.key(0)))
    layouts = sharding.tree_shardings(boxed, mesh)
    params, router = jax.device_put(golden.weights(POLICY), layouts)
    rows = sharding.batch_sharding(mesh)
    batch = jax.device_put(golden.prompt_batch(8, length=6), rows)

    def sample(params, router, batch):
      how = HOW | dict(gather_weights=gather)
      return rollout.sample(POLICY, params, router, batch, jax.random.key(3), **how)

    compiled = jax.jit(sample).lower(params, router, batch).compile(QUICK)
    return jax.device_get(compiled(params, router, batch)), compiled.as_text()


def gathers_a_token(text):
  """All-gathers in the loop that decodes."""
  of_loop = re.compile(r' all-gather(-start)?\(.*op_name="[^"]*decode/while/body')
  return sum(of_loop.search(line) is not None for line in text.splitlines())


def test_the_same_tokens_are_drawn():
  (once, _), (each, _) = drawn(True), drawn(False)
  assert once.lengths.max() > 1
  np.testing.assert_array_equal(once.tokens, each.tokens)
  np.testing.assert_allclose(once.logprobs, each.logprobs, atol=1e-5)


def test_a_token_gathers_no_weights():
  once, each = (gathers_a_token(drawn(gather)[1]) for gather in (True, False))
  assert once < each - 8  # those of the layer's attention and of the head


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_layers_compute_with_is_cast_and_the_rest_is_kept(name):
  policy = Policy(dataclasses.replace(POLICY.config, dtype=name))
  params = golden.weights(POLICY)[0]
  got = policy_lib.gathered(policy, params)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(got), strict=True
  ):
    where = jax.tree_util.keystr(path)
    wide = "router" in where or "norm" in where
    assert b.dtype == (jnp.float32 if wide else jnp.dtype(name)), where
    np.testing.assert_array_equal(a.astype(b.dtype), b)
