"""The kernels on a GPU, beside cuDNN and the XLA form, in one process and interleaved.

Attention at head dim 128 (and MLA's) over 16,384 tokens; decoding beside a plain copy
of the cache's size.
"""

from collections.abc import Callable
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from r1jax import ops
from r1jax.errors import UserError

TOKENS = 16_384
BF16 = jnp.bfloat16


def clock(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
  """Median milliseconds of each call, interleaved; None for one that failed. A turn is
  as many calls as take 30 ms, queued: waiting for each would add half a millisecond."""
  times, calls = {name: [] for name in runs}, {}
  for name, run in runs.items():  # compiles, and shows who cannot
    try:
      jax.block_until_ready(run())
      calls[name] = max(1, int(30 / max(_milliseconds(run, 1), 1e-3)))
    except Exception as error:  # a library may refuse a shape in its own way
      print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
      times[name] = None
  for _ in range(repeats):
    for name, count in calls.items():
      times[name].append(_milliseconds(runs[name], count))
  return {name: t and statistics.median(t) for name, t in times.items()}


def _milliseconds(run: Callable, count: int) -> float:
  """Of one of so many queued calls."""
  start = time.perf_counter()
  for _ in range(count):
    result = run()
  jax.block_until_ready(result)
  return 1e3 * (time.perf_counter() - start) / count


def normal(seed: int, *shape: int, dtype: jnp.dtype = BF16) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def attention(t: int, heads: int, d: int, dv: int, kernel: str, repeats: int) -> dict:
  """Causal forward and backward passes of TOKENS tokens.

  Args:
    t: tokens of a row.
    heads, d, dv: of queries, keys and values.
    kernel: the implementation beside "xla" and cuDNN.
    repeats: calls of each.
  """
  b = max(1, TOKENS // t)
  q, k = normal(0, b, t, heads, d), normal(1, b, t, heads, d)
  v, grad = normal(2, b, t, heads, dv), normal(3, b, t, heads, dv)

  def ours(implementation):
    def function(q, k, v):
      return ops.attention(q, k, v, scale=d**-0.5, implementation=implementation)[0]

    return function

  def cudnn(q, k, v):
    how = dict(scale=d**-0.5, is_causal=True, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, **how)

  functions = {kernel: ours(kernel), "cudnn": cudnn}
  if t <= 4096:  # beyond, its scores alone are tens of GB
    functions["xla"] = ours("xla")
  forward = {name: jax.jit(f) for name, f in functions.items()}
  backward = {
    name: jax.jit(lambda q, k, v, g, f=f: jax.vjp(f, q, k, v)[1](g))
    for name, f in functions.items()
  }
  runs = {f"{n}_forward": functools.partial(f, q, k, v) for n, f in forward.items()}
  for name, f in backward.items():
    runs[f"{name}_both"] = functools.partial(f, q, k, v, grad)
  ms = clock(runs, repeats)
  for name in functions:
    both, one = ms.pop(f"{name}_both"), ms[f"{name}_forward"]
    ms[f"{name}_backward"] = both and one and both - one
  pairs = b * heads * t * t
  found = {"kernel": "attention", "shape": f"B {b}, T {t}, heads {heads}, {d}/{dv}"}
  works = {"forward": pairs * (d + dv), "backward": pairs * (3 * d + 2 * dv)}
  for part, work in works.items():
    mine = ms[f"{kernel}_{part}"]
    found |= {
      f"{part}_ms": mine,
      f"{part}_tflops": mine and work / mine / 1e9,
      f"{part}_of_cudnn": ratio(ms.get(f"cudnn_{part}"), mine),
      f"{part}_of_xla": ratio(ms.get(f"xla_{part}"), mine),
    }
  return found


def ratio(theirs: float | None, mine: float | None) -> float | None:
  """Our speed over theirs."""
  return theirs / mine if theirs and mine else None


def decode(
  rows: int, slots: int, heads: int, layout: ops.Layout, kernel: str, repeats: int
) -> dict:
  """One token of every row over caches that are full, beside a copy of that size."""
  q = normal(0, rows, 1, heads, layout.key_width)
  prefix = normal(1, 1, rows, 128, layout.width)
  suffix = normal(2, 1, rows, 1, slots, layout.width)
  starts, stops = jnp.zeros(rows, jnp.int32), jnp.full(rows, 128, jnp.int32)
  lengths, layer = jnp.full((rows, 1), slots, jnp.int32), jnp.int32(0)

  def function(implementation):
    def run(*args):
      how = dict(layout=layout, scale=0.1, implementation=implementation)
      return ops.decode_attention(*args, **how)

    return jax.jit(run)

  args = q, prefix, suffix, layer, starts, stops, lengths
  copy = jax.jit(lambda x: x + 1)
  runs = {name: functools.partial(function(name), *args) for name in (kernel, "xla")}
  ms = clock({**runs, "copy": functools.partial(copy, suffix)}, repeats)
  read = (prefix.size + suffix.size) * 2
  mine, copied = ms[kernel], ms["copy"] and 2 * suffix.size * 2 / ms["copy"]
  return {
    "kernel": "decode",
    "shape": f"B {rows}, S {slots}, heads {heads}, entry {layout.width}",
    "ms": mine,
    "gb_per_s": mine and read / mine / 1e6,
    "of_copy_bandwidth": mine and copied and read / mine / copied,
    "of_xla": ratio(ms["xla"], mine),
  }


def experts(rows: int, d: int, f: int, groups: int, kernel: str, repeats: int) -> dict:
  """The experts' two backward products."""
  x, w, grad = normal(0, rows, d), normal(1, groups, d, f), normal(2, rows, f)
  sizes = jnp.full(groups, rows // groups, jnp.int32)

  def function(implementation):
    def run(x, w, grad):
      def product(x, w):
        return ops.grouped_matmul(x, w, sizes, implementation=implementation)

      return jax.vjp(product, x, w)[1](grad)

    return jax.jit(run)

  runs = {
    name: functools.partial(function(name), x, w, grad) for name in (kernel, "xla")
  }
  ms = clock(runs, repeats)
  mine = ms[kernel]
  return {
    "kernel": "experts",
    "shape": f"M {rows}, {d} x {f}, experts {groups}",
    "ms": mine,
    "tflops": mine and 4 * rows * d * f / mine / 1e9,
    "of_xla": ratio(ms["xla"], mine),
  }


def run(repeats: int = 20) -> list[dict]:
  """All figures of this GPU.

  Raises:
    UserError: JAX sees no GPU.
  """
  if jax.default_backend() != "gpu":
    raise UserError("JAX sees no GPU: the times of a GPU cannot be measured here.")
  how = dict(kernel="triton", repeats=repeats)
  rows = [attention(t, 16, 128, 128, **how) for t in (4096, 8192, 16_384)]
  rows += [attention(t, 16, 192, 128, **how) for t in (4096, 8192)]
  rows.append(decode(64, 8192, 128, ops.Layout.mla(512, 64), **how))
  rows.append(decode(64, 8192, 28, ops.Layout.gqa(4, 128), **how))
  rows.append(experts(32_768, 2048, 1408, 16, **how))
  return rows
