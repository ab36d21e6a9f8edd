"""RoPE, YaRN, RMSNorm and SwiGLU against NumPy and the sizes of DeepSeek-V3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models import config, layers


def turned(x, positions, config):
  return layers.apply_rope(jnp.asarray(x), layers.rope_turns(positions, config))


def rotary(yarn=None, rope_dim=16):
  return config.tiny(8, width=32, rope_dim=rope_dim, yarn=yarn)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turned_by_complex_numbers(x, positions, frequencies):
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  pairs = pairs * np.exp(1j * positions[..., None] * frequencies)
  out = np.empty(x.shape)
  out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
  return out


def test_rope_multiplies_neighbouring_channels_as_complex_numbers():
  c = rotary()
  x = normal(0, 2, 5, c.rope_dim)
  positions = np.array([[0, 1, 2, 3, 4], [7, 0, 30, 2, 63]], np.int32)
  f = c.rope_theta ** (-2.0 * np.arange(c.rope_dim // 2) / c.rope_dim)
  got = turned(x, jnp.asarray(positions), c)
  want = turned_by_complex_numbers(x.astype(np.float64), positions, f)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_rope_turns_every_head_by_the_position_of_its_token():
  c = rotary()
  x = normal(1, 2, 5, 3, c.rope_dim)
  positions = jnp.array([[0, 1, 2, 3, 4], [7, 0, 30, 2, 63]])
  together = turned(x, positions, c)
  for h in range(x.shape[2]):
    alone = turned(x[:, :, h], positions, c)
    np.testing.assert_array_equal(together[:, :, h], alone)


def test_rope_at_position_zero_is_the_identity():
  c = rotary()
  x = normal(2, 1, 4, c.rope_dim)
  got = turned(x, jnp.zeros((1, 4), jnp.int32), c)
  np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("yarn", [None, config.Yarn(factor=8.0, original_length=32)])
def test_rotated_dot_products_depend_on_the_distance_alone(yarn):
  c = rotary(yarn)
  t = 12
  q = jnp.broadcast_to(normal(3, 1, 1, c.rope_dim), (1, t, c.rope_dim))
  k = jnp.broadcast_to(normal(4, 1, 1, c.rope_dim), (1, t, c.rope_dim))
  positions = jnp.arange(t)[None]
  q, k = turned(q, positions, c), turned(k, positions, c)
  scores = np.asarray(jnp.einsum("btr,bsr->bts", q, k)[0])
  for distance in range(-t + 1, t):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=3e-5)
  assert np.ptp(scores[:, 0]) > 0.1  # and on the distance they do depend


def test_rope_keeps_lengths_and_the_dtype():
  c = rotary(config.Yarn(factor=8.0, original_length=32))
  x = normal(5, 1, 6, c.rope_dim)
  got = turned(x, jnp.arange(6)[None] * 9, c)
  np.testing.assert_allclose(
    np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
  )
  half = turned(jnp.asarray(x, jnp.bfloat16), jnp.arange(6)[None], c)
  assert half.dtype == jnp.bfloat16


def test_yarn_scales_rotations_by_the_ratio_of_the_two_mscales():
  c = rotary(
    config.Yarn(factor=8.0, original_length=32, mscale=1.0, mscale_all_dim=0.5)
  )
  x = normal(6, 1, 6, c.rope_dim)
  got = turned(x, jnp.arange(6)[None] * 9, c)
  m = (0.1 * np.log(8.0) + 1) / (0.05 * np.log(8.0) + 1)
  np.testing.assert_allclose(
    np.linalg.norm(got, axis=-1), m * np.linalg.norm(x, axis=-1), rtol=1e-5
  )


def test_yarn_of_the_671b_policy_ramps_between_pairs_10_and_23():
  c = config.v3_671b()
  got = np.asarray(layers.rope_frequencies(c.rope_dim, c.rope_theta, c.yarn))
  j = np.arange(32)
  plain = 10_000.0 ** (-2.0 * j / 64)
  ramp = np.clip((j - 10) / 13, 0.0, 1.0)
  np.testing.assert_allclose(got, plain / 40 * ramp + plain * (1 - ramp), rtol=2e-5)
  shrunk = plain / got
  np.testing.assert_allclose(shrunk[:11], 1.0, rtol=1e-5)
  np.testing.assert_allclose(shrunk[23:], 40.0, rtol=1e-5)
  assert (np.diff(shrunk[10:24]) > 0).all()


def test_attention_scale_of_the_671b_policy_is_that_of_the_released_code():
  c = config.v3_671b()
  assert layers.attention_scale(c) == pytest.approx(0.135234, abs=5e-7)
  short = config.v3_671b(yarn=None)
  assert layers.attention_scale(short) == pytest.approx(192**-0.5, rel=1e-12)


def test_without_yarn_frequencies_are_powers_of_theta():
  got = layers.rope_frequencies(8, 100.0, None)
  want = [100.0**0, 100.0**-0.25, 100.0**-0.5, 100.0**-0.75]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_rms_norm_divides_by_the_root_mean_square(shape):
  x, scale = normal(7, *shape) * 3, normal(8, 6)
  norm = layers.RMSNorm(eps=1e-2)
  got = norm.apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
  wide = x.astype(np.float64)
  want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * scale
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


def test_rms_norm_of_bfloat16_is_rounded_once_at_the_end():
  x, scale = jnp.asarray(normal(9, 4, 64), jnp.bfloat16), normal(10, 64)
  got = layers.RMSNorm(eps=1e-6).apply({"params": {"scale": jnp.asarray(scale)}}, x)
  assert got.dtype == jnp.bfloat16
  wide = np.asarray(x, np.float64)
  want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.0**-8)


def test_swiglu_gates_with_silu():
  c = config.tiny(8, width=6)
  rng = np.random.default_rng(11)
  gate, up, down = (rng.normal(size=s) for s in [(6, 10), (6, 10), (10, 6)])
  x = rng.normal(size=(2, 3, 6))
  params = {"gate": gate, "up": up, "down": down}
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
  got = layers.SwiGLU(c, 10).apply({"params": params}, jnp.asarray(x, jnp.float32))
  g = x @ gate
  want = (g / (1 + np.exp(-g)) * (x @ up)) @ down
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
