"""Weights cast before the gradient is taken: half the memory, the same gradient."""

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np

from r1jax import optimizer
from r1jax.models import policy as policy_lib
from r1jax.models.sequence import Sequence

POLICY = golden.tiny_policy(dtype="bfloat16")
PARAMS, ROUTER = golden.weights(POLICY)
TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, golden.VOCAB)


def loss(params, tokens):
  variables = {"params": params, "router": ROUTER}
  seq = Sequence.of_mask(jnp.ones(tokens.shape, bool))
  hidden = POLICY.apply(variables, tokens, seq).hidden
  logits = POLICY.apply(variables, hidden, method="logits")
  return -jax.nn.log_softmax(logits)[:, :-1, 0].mean(), ({}, (), ())


def test_the_sum_over_parts_is_float32_and_that_of_float32_masters():
  summed = jax.jit(lambda p: optimizer.accumulate(loss, p, TOKENS, 2)[0])
  wide, narrow = summed(PARAMS), summed(policy_lib.cast(POLICY, PARAMS))
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3 * float(jnp.abs(a).max()))


def test_the_gradient_of_a_part_is_as_narrow_as_the_weights():
  part = jax.eval_shape(
    jax.grad(loss, has_aux=True), policy_lib.cast(POLICY, PARAMS), TOKENS
  )[0]
  w_o = part["moe_layers"]["attention"]["w_o"]
  assert w_o.dtype == jnp.bfloat16
  assert part["final_norm"]["scale"].dtype == jnp.float32
