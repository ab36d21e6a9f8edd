"""Attention of rows cut over devices is that of whole rows, with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from r1jax import ops, sharding
from r1jax.models import ring_attention

B, T, HEADS, KV, DIM, VALUES = 2, 16, 4, 2, 8, 6
# Pages that end in the middle of a device's part, one over all devices, padding.
SEGMENTS = np.array(
  [
    [1] * 3 + [2] * 9 + [3] * 2 + [0] * 2,
    [0] * 5 + [1] * 11,
  ]
)


def arrays():
  rng = np.random.default_rng(0)
  shapes = (
    (B, T, HEADS, DIM),
    (B, T, KV, DIM),
    (B, T, KV, VALUES),
    (B, T, HEADS, VALUES),
  )
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def graded(attend, way):
  def loss(q, k, v):
    out = attend(q, k, v)
    return (out * way).sum(), out

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.fixture(scope="module")
def whole():
  *args, way = arrays()
  segments = jnp.asarray(SEGMENTS)

  def attend(q, k, v):
    return ops.attention(q, k, v, segments, segments, scale=0.3)[0]

  return graded(attend, way)(*args)


@pytest.mark.parametrize(
  ("sizes", "implementation"),
  [
    (dict(context=4), "xla"),
    (dict(context=2, tensor=2), "xla"),
    (dict(fsdp=2, context=4), "xla"),
    (dict(context=2, tensor=2), "mosaic"),
  ],
  ids=str,
)
def test_a_ring_is_attention_of_whole_rows(whole, sizes, implementation):
  *args, way = arrays()
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]

  def attend(q, k, v):
    return ring_attention.attention(
      q, k, v, jnp.asarray(SEGMENTS), scale=0.3, implementation=implementation
    )

  with jax.set_mesh(sharding.make_mesh(devices, **sizes)):
    program = graded(attend, way).lower(*args).compile(QUICK)
    (_, out), grads = program(*args)
  (_, want), want_grads = whole
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
  for got, true in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(got, true, rtol=1e-3, atol=1e-4)


def test_forwards_no_device_has_a_whole_row():
  *args, way = arrays()

  def attend(q, k, v):
    return ring_attention.attention(
      q, k, v, jnp.asarray(SEGMENTS), scale=0.3, implementation="xla"
    )

  with jax.set_mesh(sharding.make_mesh(jax.devices()[:4], context=4)):
    cut = jax.sharding.PartitionSpec(None, "context")
    args = [jax.device_put(x, cut) for x in args]
    text = graded(attend, way).lower(*args).compile(QUICK).as_text()
  assert "collective-permute" in text
  assert "all-gather" not in text
