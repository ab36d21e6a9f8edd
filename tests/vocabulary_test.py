"""Log-probabilities and entropies in chunks: against NumPy, and what never exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import support as supports
from r1jax import vocabulary
from r1jax.models import config
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence

B, T, D, V = 2, 7, 5, 21


def drawn(dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  head = jnp.asarray(rng.normal(size=(D, V)), dtype)
  return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def oracle(hidden, head, tokens, keep, temperature):
  """One token after the other, float64."""
  logprobs, entropies = np.zeros((B, T)), np.zeros((B, T))
  for b in range(B):
    for t in range(T):
      logits = np.asarray(hidden, np.float64)[b, t] @ np.asarray(head, np.float64)
      p = np.exp(logits / temperature) * keep[b, t]
      p /= p.sum()
      logprobs[b, t] = np.log(p[tokens[b, t]])
      entropies[b, t] = -sum(x * np.log(x) for x in p if x > 0)
  return logprobs, entropies


def supports_of(tokens, seed=1):
  """Random ones that hold the tokens: (bool, bits)."""
  keep = np.random.default_rng(seed).random((B, T, V)) < 0.4
  np.put_along_axis(keep, np.asarray(tokens)[..., None], True, axis=2)
  return keep, supports.pack(jnp.asarray(keep))


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_are_those_of_the_formula(chunk, truncated, temperature):
  hidden, head, tokens = drawn()
  keep, bits = supports_of(tokens)
  got = vocabulary.token_statistics(
    hidden,
    head,
    tokens,
    bits if truncated else None,
    temperature=temperature,
    chunk=chunk,
  )
  keep = keep if truncated else np.ones_like(keep)
  want = oracle(hidden, head, tokens, keep, temperature)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradients_are_the_differences_of_the_oracle(chunk, truncated):
  hidden, head, tokens = drawn()
  keep, bits = supports_of(tokens)
  bits, keep = (bits, keep) if truncated else (None, np.ones_like(keep))
  rng = np.random.default_rng(2)
  weights = rng.normal(size=(2, B, T))

  def loss(hidden, head):
    found = vocabulary.token_statistics(
      hidden, head, tokens, bits, temperature=0.7, chunk=chunk
    )
    return sum(jnp.sum(jnp.asarray(w) * x) for w, x in zip(weights, found, strict=True))

  grads = jax.grad(loss, argnums=(0, 1))(hidden, head)
  arrays = [np.asarray(x, np.float64) for x in (hidden, head)]

  def exact():
    found = oracle(*arrays, tokens, keep, 0.7)
    return sum((w * x).sum() for w, x in zip(weights, found, strict=True))

  for x, grad in zip(arrays, grads, strict=True):
    for _ in range(8):
      at = tuple(rng.integers(0, n) for n in x.shape)
      before, step = x[at], 1e-5
      x[at] = before + step
      up = exact()
      x[at] = before - step
      slope = (up - exact()) / (2 * step)
      x[at] = before
      assert grad[at] == pytest.approx(slope, abs=2e-5)


def test_in_bfloat16_chunks_equal_the_whole():
  hidden, head, tokens = drawn(jnp.bfloat16)

  def loss(hidden, head, chunk):
    a, b = vocabulary.token_statistics(hidden, head, tokens, chunk=chunk)
    return (a * jnp.arange(T)[None]).sum() + b.sum()

  whole = jax.grad(loss, argnums=(0, 1))(hidden, head, T)
  parts = jax.grad(loss, argnums=(0, 1))(hidden, head, 2)
  for a, b in zip(whole, parts, strict=True):
    assert b.dtype == jnp.bfloat16
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * np.abs(a).max())


def test_all_logits_never_exist_at_full_size():
  """8,192 tokens and DeepSeek-V3's vocabulary: neither pass has [B, T, V]."""
  tokens, vocab, width = 8192, 129_280, 256

  def loss(hidden, head, targets):
    a, b = vocabulary.token_statistics(hidden, head, targets)
    return a.sum() + b.sum()

  specs = [
    jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((width, vocab), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, tokens), jnp.int32),
  ]
  compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*specs).compile()
  text = compiled.as_text()
  assert f"{vocab}]" in text, "the head's gradient is there"
  assert f"{tokens},{vocab}" not in text
  assert f"{vocab},{tokens}" not in text
  held = compiled.memory_analysis().temp_size_in_bytes
  assert held < tokens * vocab * 4 / 2, "less than half of the logits"


def test_a_device_holds_so_many_logits(monkeypatch):
  monkeypatch.setattr(vocabulary, "ELEMENTS", 60)
  assert vocabulary.positions_at_a_time(2, 7, 10) == 3  # three of 20 fit; 3 + 3 + 1
  assert vocabulary.positions_at_a_time(2, 8, 10) == 3
  assert vocabulary.positions_at_a_time(2, 4, 10) == 2  # equal ones, not 3 + 1
  assert vocabulary.positions_at_a_time(100, 4, 10) == 1
  assert vocabulary.positions_at_a_time(1, 4, 10) == 4


def test_a_policy_in_chunks_has_the_same_gradients(random_weights, monkeypatch):
  policy = Policy(config.tiny(40, layers=1, dense_layers=1))
  params, router = random_weights(policy)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)), jnp.int32)

  def loss(params):
    variables = {"params": params, "router": router}
    out = policy.apply(variables, tokens, Sequence.of_mask(tokens >= 0))
    found, _ = policy.apply(
      variables, out.hidden[:, :-1], tokens[:, 1:], method="token_statistics"
    )
    return found.mean()

  want = jax.jit(jax.grad(loss))(params)
  monkeypatch.setattr(vocabulary, "ELEMENTS", 2 * 3 * 40)
  assert "custom_vjp" in str(jax.make_jaxpr(lambda x: loss(x))(params))
  got = jax.jit(jax.grad(lambda x: loss(x)))(params)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_any_function_of_positions_goes_over_chunks():
  hidden, head, tokens = drawn()

  def function(arrays):
    hidden, tokens = arrays
    return {"x": jnp.tanh(hidden @ head).sum(axis=-1) * tokens, "t": tokens}

  def loss(hidden, chunk):
    found = vocabulary.over_chunks(function, (hidden, tokens), chunk)
    return (found["x"] ** 2).sum(), found

  want = jax.value_and_grad(loss, has_aux=True)(hidden, T)
  for chunk in (1, 3, 4):
    got = jax.value_and_grad(loss, has_aux=True)(hidden, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), want, got)
