"""The kernels at the sizes of DeepSeek-V3 and Qwen2.5, their work counted by hand.

Causal FLOPs are halved: of T^2 pairs of tokens T^2 / 2 are seen.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from r1jax import ops, vocabulary
from r1jax.kernels import decode_attention_mosaic

BF16 = jnp.bfloat16
GUESS = "how often a loop runs is guessed"


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  shape: str
  function: Callable
  specs: tuple
  flops: float
  bytes: float  # read and written once: the least that memory must move
  no_cycles: str = ""  # why the compiler's static cycles mean nothing; "" if they do
  kernel: str = ""  # the one whose cycles are meant, if not the whole program's


def spec(*shape: int, dtype: jnp.dtype = BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
  return spec(*shape, dtype=jnp.int32)


def size(specs: tuple) -> int:
  return sum(x.size * x.dtype.itemsize for x in specs)


def attention(
  name: str,
  t: int,
  heads: int,
  kv_heads: int,
  d: int,
  dv: int,
  *,
  backward: bool = False,
  implementation: str = "auto",
) -> Case:
  """Causal, one row, without segments."""
  specs = spec(1, t, heads, d), spec(1, t, kv_heads, d), spec(1, t, kv_heads, dv)

  def forward(q, k, v):
    how = dict(scale=d**-0.5, implementation=implementation)
    return ops.attention(q, k, v, **how)[0]

  def gradients(q, k, v, out):
    return jax.vjp(forward, q, k, v)[1](out)

  forward_flops = heads * t * t * (d + dv)
  out = spec(1, t, heads, dv)
  shape = f"T {t}, heads {heads}/{kv_heads}, {d}/{dv}"
  if not backward:
    moved = size((*specs, out))
    return Case(
      name, shape, forward, specs, forward_flops, moved, "", "mla_attention_forward"
    )
  # The forward pass, the scores again, dP, dV, dS^T q and dS k.
  flops = forward_flops + heads * t * t * (3 * d + 2 * dv)
  return Case(
    name,
    shape,
    gradients,
    (*specs, out),
    flops,
    2 * size((*specs, out)),
    "the estimate does not follow the order of blocks of dK and dV",
  )


def decode(name: str, rows: int, slots: int, heads: int, layout: ops.Layout) -> Case:
  """One cache that is full, by the kernel without branches: the cycles of the one in
  use, which skips blocks, are a guess."""
  specs = (
    spec(rows, heads, layout.key_width),
    spec(1, rows, slots, layout.width),
    ints(1),
    ints(rows),
    ints(rows),
    ints(rows),
  )

  def function(q, cache, layer, *scalars):
    how = dict(layout=layout, scale=0.1, interpret=False, full=True)
    return decode_attention_mosaic.decode(q, cache, layer, *scalars, **how)

  width = layout.key_width + layout.value_width
  return Case(
    name,
    f"B {rows}, S {slots}, heads {heads}, entry {layout.width}",
    function,
    specs,
    2 * rows * heads * slots * width,
    size(specs[1:2]),
    kernel="decode_attention",
  )


def experts(
  name: str, rows: int, d: int, f: int, groups: int, implementation: str = "auto"
) -> Case:
  """The product and both backward products."""

  def function(x, w, sizes, grad):
    def product(x, w):
      return ops.grouped_matmul(x, w, sizes, implementation=implementation)

    out, vjp = jax.vjp(product, x, w)
    return out, vjp(grad)

  specs = spec(rows, d), spec(groups, d, f), ints(groups), spec(rows, f)
  return Case(
    name,
    f"M {rows}, {d} x {f}, experts {groups}, {implementation}",
    function,
    specs,
    6 * rows * d * f,
    3 * size((specs[0], specs[1], specs[3])),
    "the visits of tiles are data; " + GUESS,
  )


def token_statistics(
  name: str, tokens: int, width: int, vocab: int, chunk: int | None = None
) -> Case:
  """Log-probabilities and entropies with their gradients."""

  def function(hidden, head, targets):
    def loss(hidden, head):
      found = vocabulary.token_statistics(hidden, head, targets, chunk=chunk)
      return sum(x.sum() for x in found)

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

  specs = spec(1, tokens, width), spec(width, vocab), ints(1, tokens)
  again = 8 if chunk is None else 6
  return Case(
    name,
    f"T {tokens}, {width} x {vocab}" + ("" if chunk is None else ", all at once"),
    function,
    specs,
    again * tokens * width * vocab,
    3 * size(specs),
    "XLA's own program, no kernel; " + GUESS,
  )


MLA, GQA = ops.Layout.mla(512, 64), ops.Layout.gqa(4, 128)
# Heads are independent programs of equal length: two stand for 128, one a core.
CASES = [
  attention("mla_forward", 8192, 2, 2, 192, 128),
  attention("mla_both_passes", 8192, 2, 2, 192, 128, backward=True),
  attention("gqa_forward", 8192, 4, 2, 128, 128),
  attention("gqa64_forward", 8192, 4, 2, 64, 64),
  decode("mla_decode", 8, 8192, 128, MLA),
  decode("gqa_decode", 8, 8192, 16 * 28, GQA),
  experts("experts", 32_768, 7168, 2048, 8),
  experts("experts_ragged_dot", 32_768, 7168, 2048, 8, "xla"),
  token_statistics("token_statistics", 8192, 7168, 129_280),
  token_statistics("token_statistics_plain", 8192, 7168, 129_280, 8192),
]
