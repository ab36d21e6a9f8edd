"""The kernels compile for TPUs, and for a GPU, on a machine that has neither.

A TPU's compiler comes with the test extra on Linux x86-64. A GPU's:
pip install -e ".[cuda,test]" && python -m pytest -m gpu
"""

import importlib.util
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from r1jax import ahead_of_time, ops, rollout
from r1jax.errors import UserError
from r1jax.kernels import mla_attention_mosaic
from r1jax.models import policy
from r1jax.models.config import PolicyConfig
from r1jax.prompts import PromptBatch

# One chip for every day; `-m tpu` takes the others too.
TPUS = ["v5p:2x2x1"]
TPUS += [pytest.param(name, marks=pytest.mark.tpu) for name in ("v5e:2x2", "v6e:2x2")]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
needs_cuda = pytest.mark.skipif(
  not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
  reason="JAX's CUDA plugin is not installed",
)


def spec(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
  return spec(*shape, dtype=jnp.int32)


def attention(b, t, heads, kv_heads, d, dv, body, dtype=jnp.bfloat16):
  """Packed rows, forward and backward, through output and log-sum-exp."""

  def function(q, k, v, segments):
    def loss(q, k, v):
      how = dict(scale=d**-0.5, implementation=body)
      out, lse = ops.attention(q, k, v, segments, segments, **how)
      return out.astype(jnp.float32).sum() + lse.sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

  q, k, v = (spec(b, t, n, w) for n, w in ((heads, d), (kv_heads, d), (kv_heads, dv)))
  return function, (q, k, v, ints(b, t)), 3


def decode(b, g, heads, layout, slots, body, layers=4):
  def function(*args):
    return ops.decode_attention(*args, layout=layout, scale=0.1, implementation=body)

  prefix = spec(layers, b, 1024, layout.width)
  suffix = spec(layers, b, g, slots, layout.width)
  q = spec(b, g, heads, layout.key_width)
  return function, (q, prefix, suffix, ints(), ints(b), ints(b), ints(b, g)), 2


def experts(rows, d, f, groups, body, dtype=jnp.bfloat16):
  """The product and both backward products."""

  def function(x, w, sizes, grad):
    def product(x, w):
      return ops.grouped_matmul(x, w, sizes, implementation=body)

    out, vjp = jax.vjp(product, x, w)
    return out, vjp(grad)

  shapes = (rows, d), (groups, d, f), (rows, f)
  x, w, grad = (spec(*shape, dtype=dtype) for shape in shapes)
  return function, (x, w, ints(groups), grad), 3


CASES = {
  "mla": lambda body: attention(1, 8192, 128, 128, 192, 128, body),
  "qwen 7b": lambda body: attention(1, 4096, 28, 4, 128, 128, body),
  "qwen 0.5b": lambda body: attention(1, 4096, 14, 2, 64, 64, body),
  "odd length, float32, 1,024 rows": lambda body: attention(
    1024, 333, 4, 4, 192, 128, body, jnp.float32
  ),
  "mla decode": lambda body: decode(2, 4, 128, ops.Layout.mla(512, 64), 8192, body),
  "qwen 7b decode": lambda body: decode(2, 8, 28, ops.Layout.gqa(4, 128), 8192, body),
  "qwen 0.5b decode": lambda body: decode(2, 8, 14, ops.Layout.gqa(2, 64), 4096, body),
  "experts": lambda body: experts(32_768, 7168, 2048, 8, body),
  "experts down, float32": lambda body: experts(
    32_768, 2048, 7168, 8, body, jnp.float32
  ),
}


@needs_libtpu
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize(
  "case",
  [pytest.param(c, marks=[pytest.mark.tpu] * c.startswith("qwen")) for c in CASES],
)
def test_kernels_compile_for_tpus(case, topology):
  function, specs, kernels = CASES[case]("mosaic")
  compiled = ahead_of_time.compile_for(topology, function, *specs)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
  if "decode" in case:  # the caches are read where they lie
    cache = specs[2].size * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 10


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_a_gpu(case):
  function, specs, kernels = CASES[case]("triton")
  compiled = ahead_of_time.compile_for("h100", function, *specs)
  assert (
    compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == kernels
  )


# Sizes of which the kernels serve all; the widths beside are small.
SIZES = {
  "mla": dict(heads=16, q_latent=128, kv_latent=512, nope_dim=128, rope_dim=64)
  | dict(v_dim=128),
  "gqa": dict(attention="gqa", heads=14, kv_heads=2, head_dim=64),
}


@needs_libtpu
@pytest.mark.parametrize("attention", SIZES)
def test_no_cache_is_copied_while_a_rollout_decodes(attention):
  """Prefill, loop and kernels in one program: memory holds the cache once."""
  config = PolicyConfig(
    vocab=256,
    width=256,
    layers=2,
    dense_layers=2,
    dense_ffn=256,
    dtype="bfloat16",
    **SIZES[attention],
  )
  network, b, g, length, tokens = policy.Policy(config), 2, 4, 100, 8000
  boxed = jax.eval_shape(lambda: policy.init(network, jax.random.key(0)))
  prompts = PromptBatch(
    tokens=ints(b, length),
    mask=spec(b, length, dtype=bool),
    answers=ints(b, 1, 2),
    ids=ints(b),
  )

  def sample(params, router, prompts, key):
    key = jax.random.wrap_key_data(key)
    how = dict(group_size=g, max_tokens=tokens, temperature=1.0)
    how |= dict(stop_ids=(1,), pad_id=0)
    return rollout.sample(network, params, router, prompts, key, **how)

  compiled = ahead_of_time.compile_for(
    "v5e:2x2", sample, *nn.unbox(boxed), prompts, spec(2, dtype=jnp.uint32)
  )
  text, width = compiled.as_text(), config.cache.width
  assert text.count("decode_attention") >= 2
  slots = 8064  # whole blocks of 128
  held = rf"bf16\[2,{b * g},{slots},{width}\]\S* "
  writes = re.findall(held + r"fusion\(.*calls=%([\w.]+)", text)
  assert writes, "the cache is there"
  for (
    name
  ) in writes:  # in place: a fusion whose root is the scatter, of a step's tokens
    body = re.search(rf"^%{re.escape(name)} .*?^}}", text, re.M | re.S).group()
    assert re.search(r"ROOT \S+ = " + held + r"scatter\(", body), body
  assert not re.search(held + r"(copy|copy-start|transpose|pad)\(", text)
  cache = 2 * b * g * slots * width * 2
  assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * cache


def blocks_of(blocks, t, s):
  """The forward kernel with blocks that nobody fitted."""

  def function(q, k, v):
    return mla_attention_mosaic.forward(
      q,
      k,
      v,
      None,
      None,
      causal=False,
      scale=0.1,
      blocks=blocks,
      interpret=False,
    )

  return function, (spec(1, t, 2, 192), spec(1, s, 2, 192), spec(1, s, 2, 128))


@needs_libtpu
@pytest.mark.parametrize(
  ("blocks", "t", "s", "reason"),
  [
    ((200, 256, 256), 400, 512, r"divisible by 8 and 128"),
    ((16_384, 128, 128), 32_768, 256, r"(?i)vmem"),
  ],
)
def test_the_compiler_refuses_what_cannot_run(blocks, t, s, reason):
  """So that compiling means something: misaligned blocks, and more than VMEM holds."""
  function, specs = blocks_of(mla_attention_mosaic.Blocks(*blocks), t, s)
  with pytest.raises(Exception, match=reason):
    ahead_of_time.compile_for("v5e:2x2", function, *specs)


def test_an_unknown_topology_is_named():
  with pytest.raises(UserError, match=r"topology='v9z:2x2'.*v5p:2x2x1"):
    ahead_of_time.compile_for("v9z:2x2", lambda x: x, ints(2))
