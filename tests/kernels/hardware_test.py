"""What plain interpreting hides: memory that nobody wrote, reads outside of an array,
and races of programs that run side by side. python -m pytest -m slow tests/kernels"""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import ops
from r1jax.kernels import decode_attention, mla_attention

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(capsys):
  """Two cores that share a device, memory full of NaN; the detector prints races."""
  yield pltpu.InterpretParams(
    uninitialized_memory="nan", detect_races=True, num_cores_or_threads=2
  )
  assert "RACE DETECTED" not in capsys.readouterr().out


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def near(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    largest = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients(machine, causal):
  """Several blocks, padding, one row of several segments, one of padding alone."""
  t, s = 333, 333 if causal else 140
  q, k, v = normal(0, 2, t, 2, 32), normal(1, 2, s, 1, 32), normal(2, 2, s, 1, 32)
  numbers = np.sort(np.random.default_rng(3).integers(0, 4, (2, t)), axis=1)
  numbers[1] = 0
  q_segments = jnp.asarray(numbers, jnp.int32)
  k_segments = q_segments[:, :s]

  def both(attention):
    def loss(q, k, v):
      out, lse = attention(q, k, v)
      seen = jnp.isfinite(lse)
      return (out**2).sum() + jnp.where(seen, jnp.sin(lse), 0.0).sum(), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  def kernel(q, k, v):
    args = q_segments, k_segments, causal, 0.3, "mosaic", machine
    return mla_attention.attention(q, k, v, *args)

  def definition(q, k, v):
    how = dict(scale=0.3, causal=causal, implementation="xla")
    return ops.attention(q, k, v, q_segments, k_segments, **how)

  near(both(kernel), both(definition))


def test_decoding(machine):
  layout = ops.Layout.gqa(2, 64)
  arrays = (
    normal(0, 2, 3, 8, 64),
    normal(1, 3, 2, 384, 256),
    normal(2, 3, 2, 3, 256, 256),
  )
  starts, stops = jnp.asarray([130, 0]), jnp.asarray([300, 0])
  lengths = jnp.asarray([[1, 0, 256], [0, 128, 3]])
  args = *arrays, jnp.asarray(2), starts, stops, lengths
  how = dict(layout=layout, scale=0.1)
  want = ops.decode_attention(*args, **how, implementation="xla")
  got = decode_attention.decode(*args, **how, body="mosaic", interpret=machine)
  near(got, want)
