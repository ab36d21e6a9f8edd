"""Prompts that are read in parts: the same as all at once, with less held."""

import functools

import grpo_golden as golden
import jax
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK

from r1jax import prefill, rollout, sharding
from r1jax.errors import UserError

POLICY = golden.tiny_policy(moe="ragged", mtp_depth=1)
PARAMS, ROUTER = golden.weights(POLICY)
BATCH = golden.prompt_batch(8, length=6)


@functools.cache
def read(parts, shape, drafts=True):
  """(Read, bytes of the program's temporaries)."""
  mesh = mesh_of(shape, jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    batch = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    shards = shape[0] * shape[1]
    how = dict(drafts=drafts, record_experts=drafts, parts=parts, shards=shards)
    program = jax.jit(lambda b: prefill.read(POLICY, PARAMS, ROUTER, b, **how))
    compiled = program.lower(batch).compile(QUICK)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return jax.device_get(compiled(batch)), temporaries


ONE, FOUR = (1, 1, 1), (2, 2, 1)


@pytest.mark.parametrize("parts, shape", [(2, ONE), (8, ONE), (2, FOUR)])
def test_parts_read_what_the_whole_reads(parts, shape):
  whole, got = read(1, ONE)[0], read(parts, shape)[0]
  assert got.experts.dtype == whole.experts.dtype == np.uint8
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(got), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_that_nobody_needs():
  found = read(2, ONE, drafts=False)[0]  # nor records
  assert found.draft_cache is None and found.experts is None


def test_a_part_holds_less():
  batch = golden.prompt_batch(64, length=6)

  def held(parts):
    how = dict(drafts=False, record_experts=True, parts=parts, shards=1)
    program = jax.jit(lambda b: prefill.read(POLICY, PARAMS, ROUTER, b, **how))
    compiled = program.lower(batch).compile(QUICK)
    return compiled.memory_analysis().temp_size_in_bytes

  assert held(16) < 0.5 * held(1)


def test_a_rollout_draws_the_same_tokens():
  def sample(parts, **more):
    how = dict(group_size=2, max_tokens=6, pad_id=0, stop_ids=(1,), prefill_parts=parts)
    how |= more
    key = jax.random.key(3)
    drawn = functools.partial(rollout.sample, POLICY, PARAMS, ROUTER, BATCH, key, **how)
    return jax.jit(drawn).lower().compile(QUICK)()

  one, four, bare = sample(1), sample(4), sample(1, record_experts=False)
  assert bare.experts is None and bare.prompt_experts is None
  np.testing.assert_array_equal(one.tokens, bare.tokens)
  np.testing.assert_array_equal(one.tokens, four.tokens)
  np.testing.assert_array_equal(one.prompt_experts, four.prompt_experts)
  np.testing.assert_allclose(one.logprobs, four.logprobs, atol=1e-5)


@pytest.mark.parametrize("parts, words", [(3, "divide the 8 prompts"), (0, "or more")])
def test_parts_that_do_not_divide_are_refused(parts, words):
  how = dict(group_size=2, max_tokens=6, pad_id=0, prefill_parts=parts)
  with pytest.raises(UserError, match=f"prefill_parts={parts} must .*{words}"):
    jax.eval_shape(
      lambda: rollout.sample(POLICY, PARAMS, ROUTER, BATCH, jax.random.key(0), **how)
    )
