"""Tokens reach their experts and come back: by sorting, by an exchange over a mesh, in
one round of buffers or several, with and without drops."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from r1jax import sharding
from r1jax.models import config, dispatch

B, T, D, E, A, F = 8, 4, 8, 8, 2, 6
SIZES = config.tiny(32, moe="ragged", experts=E, active_experts=A)


def inputs(skew=0.0, seed=0):
  """Tokens, experts (all different; `skew` of the tokens take the first two), gates,
  matrices."""
  rng = np.random.default_rng(seed)
  experts = np.array([rng.permutation(E)[:A] for _ in range(B * T)])
  experts[: round(skew * B * T)] = [0, 1]
  w = [rng.normal(size=s) / 3 for s in ((E, D, F), (E, D, F), (E, F, D))]
  return jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32),
    (
      rng.normal(size=(B, T, D)),
      rng.uniform(0.1, 1.0, (B, T, A)),
      tuple(w),
    ),
  ), jnp.asarray(experts.reshape(B, T, A), jnp.int32)


def by_hand(x, gates, weights, experts):
  """A loop over tokens and their experts, in float64."""
  x, gates, experts = (np.asarray(v, np.float64) for v in (x, gates, experts))
  w_gate, w_up, w_down = (np.asarray(w, np.float64) for w in weights)
  out = np.zeros_like(x)
  for b, t, a in np.ndindex(*experts.shape):
    e, h = int(experts[b, t, a]), x[b, t]
    g = h @ w_gate[e]
    out[b, t] += gates[b, t, a] * ((g / (1 + np.exp(-g)) * (h @ w_up[e])) @ w_down[e])
  return out


def run(arrays, experts, sizes, **changes):
  """(output, gradients by x, gates and weights, dropped)."""
  c = dataclasses.replace(SIZES, **changes)
  way = np.random.default_rng(5).normal(size=arrays[0].shape).astype(np.float32)

  def loss(arrays):
    x, gates, weights = arrays
    out, dropped = dispatch.routed(x, experts, gates, weights, c)
    return (out * way).sum(), (out, dropped)

  function = jax.value_and_grad(loss, has_aux=True)
  if sizes is None:
    (_, (out, dropped)), grads = jax.jit(function)(arrays)
  else:
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(jax.devices()[:count], **sizes)
    with jax.set_mesh(mesh):
      program = jax.jit(function).lower(arrays).compile(QUICK)
      (_, (out, dropped)), grads = program(arrays)
  return jax.tree.map(np.asarray, (out, grads, dropped))


@functools.cache
def alone(skew):
  arrays, experts = inputs(skew)
  return run(arrays, experts, None)


def test_on_one_device_it_is_a_loop_over_tokens_and_experts():
  arrays, experts = inputs()
  out, _, dropped = alone(0.0)
  np.testing.assert_allclose(out, by_hand(*arrays, experts), rtol=1e-4, atol=1e-5)
  assert dropped == 0


def test_its_gradient_is_that_of_a_plain_formula():
  arrays, experts = inputs()
  way = np.random.default_rng(5).normal(size=(B, T, D))

  def loss(arrays):
    x, gates, (w_gate, w_up, w_down) = arrays
    g = jnp.einsum("btd,btadf->btaf", x, w_gate[experts])
    u = jnp.einsum("btd,btadf->btaf", x, w_up[experts])
    out = jnp.einsum("btaf,btafd->btad", jax.nn.silu(g) * u, w_down[experts])
    return ((out * gates[..., None]).sum(axis=2) * way).sum()

  want = jax.jit(jax.grad(loss))(arrays)
  for a, b in zip(jax.tree.leaves(alone(0.0)[1]), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


MESHES = [
  dict(expert=4),
  dict(fsdp=2, expert=2, tensor=2),
  dict(expert=2, context=2, data=2),
  dict(fsdp=2, tensor=2),
]


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_an_exchange_gives_the_same_output_and_gradient(sizes, skew):
  """Also where all tokens want the same experts, so that it takes several rounds."""
  arrays, experts = inputs(skew)
  out, grads, dropped = run(arrays, experts, sizes, expert_capacity=0.5)
  want_out, want_grads, _ = alone(skew)
  np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  assert dropped == 0


def test_one_token_a_row_is_served_by_parts_of_experts():
  """As when decoding: tokens do not divide over `tensor`, so the FFNs do, and nobody
  gathers a matrix."""
  arrays, experts = inputs()
  arrays = arrays[0][:, :1], arrays[1][:, :1], arrays[2]
  experts = experts[:, :1]
  sizes = dict(expert=2, tensor=2)
  out, grads, _ = run(arrays, experts, sizes)
  np.testing.assert_allclose(out, by_hand(*arrays, experts), rtol=1e-4, atol=1e-5)
  want = run(arrays, experts, None)[1]
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  mesh = sharding.make_mesh(jax.devices()[:4], **sizes)
  with jax.set_mesh(mesh):
    x, gates, weights = arrays
    made = jax.make_jaxpr(lambda *a: dispatch.routed(*a, SIZES))
    jaxpr = str(made(x, experts, gates, weights))
  assert "all_gather" in jaxpr  # along fsdp, of one device
  assert not re.search(r"all_gather\[[^\]]*tensor", jaxpr)


def test_dropping_serves_what_fits_and_says_how_much_did_not():
  arrays, experts = inputs(1.0)  # every pair goes to the first part of four
  out, grads, dropped = run(
    arrays, experts, dict(expert=4), expert_capacity=1.0, drop_tokens=True
  )
  # A device has 2 x 4 tokens, 16 pairs; a buffer has room for 16 / 4 -> 8 of them.
  assert dropped == pytest.approx(0.5)
  want = alone(1.0)[0]
  flat, full = out.reshape(4, 8, D), want.reshape(4, 8, D)
  # The pairs of expert 0 come first in a buffer, and are the 8.
  first = inputs(1.0)[0]
  gates = np.asarray(first[1]).copy()
  gates[..., 1] = 0.0
  of_first = by_hand(first[0], gates, first[2], experts).reshape(4, 8, D)
  np.testing.assert_allclose(flat, of_first, rtol=1e-4, atol=1e-5)
  assert np.abs(flat - full).max() > 1e-2
  assert not np.asarray(grads[2][0])[1].any(), "expert 1 learns nothing"


@pytest.mark.parametrize("sizes", [None, dict(expert=4)], ids=str)
def test_padding_goes_nowhere_and_takes_no_room(sizes):
  """Nine of ten tokens are padding that all want the first experts: the real ones are
  served as alone, nothing of them is dropped."""
  (x, gates, weights), experts = inputs()
  far = 10 * T
  pads = ((0, 0), (far - T, 0), (0, 0))
  x, gates, experts = (jnp.pad(v, pads) for v in (x, gates, experts))
  real = jnp.broadcast_to(jnp.arange(far)[None] >= far - T, (B, far))
  c = dataclasses.replace(SIZES, expert_capacity=1.0, drop_tokens=True)
  function = jax.jit(lambda *args: dispatch.routed(*args, c, real))
  if sizes is None:
    out, dropped = function(x, experts, gates, weights)
  else:
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:4], **sizes)):
      out, dropped = function(x, experts, gates, weights)
  assert dropped == 0
  assert not np.asarray(out[:, : far - T]).any()
  np.testing.assert_allclose(out[:, far - T :], alone(0.0)[0], rtol=1e-4, atol=1e-5)


def test_a_counting_sort_is_a_stable_sort():
  rng = np.random.default_rng(1)
  keys = rng.integers(0, 5, 40)
  places, sizes = jax.jit(dispatch._counting_sort, static_argnums=1)(keys, 7)
  order = np.argsort(keys, kind="stable")
  want = np.empty(40, int)
  want[order] = np.arange(40)
  np.testing.assert_array_equal(places, want)
  np.testing.assert_array_equal(sizes, np.bincount(keys, minlength=7))


@pytest.mark.parametrize("sizes", [None, dict(expert=2)])
def test_there_is_neither_a_sort_nor_a_scatter_of_rows(sizes):
  arrays, experts = inputs()

  def loss(arrays):
    x, gates, weights = arrays
    return dispatch.routed(x, experts, gates, weights, SIZES)[0].sum()

  function = jax.jit(jax.grad(loss))
  if sizes is None:
    text = function.lower(arrays).as_text()
  else:
    with jax.set_mesh(sharding.make_mesh(jax.devices()[:2], **sizes)):
      text = function.lower(arrays).as_text()
  assert "stablehlo.sort" not in text
  scatters = [line for line in text.splitlines() if '"stablehlo.scatter"' in line]
  assert all("xf32>" not in line for line in scatters)
