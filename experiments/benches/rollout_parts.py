"""What `bench rollout` measures of r1jax alone, a function a part: (sizes, repeats) ->
figures; and what all its parts share.

Every time is a median of runs that took turns, with compilation and one run before them
left out; `..._runs` holds all of them, in seconds.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from r1jax import rollout, sharding
from r1jax.errors import UserError
from r1jax.models import config, policy
from r1jax.prompts import PromptBatch
from r1jax.sampling import Sampler

PAD = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
  # The dense policy.
  vocab: int = 512
  width: int = 256
  layers: int = 4
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 64
  ffn: int = 704
  # Against transformers.
  prompts: int = 16
  group: int = 16
  prompt: int = 64  # tokens
  new: int = 128  # tokens
  micro_batches: int = 4
  # Refill: lengths of p50 `median` and p99 `cap`.
  queue: int = 64  # prompts
  slots: int = 64
  cache_tokens: int = 8192  # of the queue's outputs; half of what all could fill
  median: int = 32
  cap: int = 256
  # The shared prefix.
  prefix: int = 512  # tokens
  prefix_prompts: int = 4
  # Cost by length, of a policy with fewer layers.
  lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768)
  length_layers: int = 2
  length_rows: int = 8
  length_steps: int = 32
  # Drafts of a miniature, after so many updates of its base.
  draft_pretrain: int = 300
  draft_prompts: int = 4
  draft_group: int = 4

  def dense(self, layers: int = 0) -> policy.Policy:
    layers = layers or self.layers
    sizes = dict(vocab=self.vocab, width=self.width, layers=layers, dense_layers=layers)
    sizes |= dict(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
    sizes |= dict(unroll=layers)
    return policy.Policy(
      config.PolicyConfig(**sizes, attention="gqa", qkv_bias=True, dense_ffn=self.ffn)
    )


def cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


# -- what the parts share --------------------------------------------------------------


def shapes_of(network: policy.Policy) -> tuple[dict, dict]:
  return jax.eval_shape(lambda: nn.unbox(policy.init(network, jax.random.key(0))))


def weights_of(network: policy.Policy) -> tuple[dict, dict]:
  """(params, router), of which nothing is one or zero."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    mean = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(mean + 0.05 * rng.normal(size=x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(network))


def problems(count: int, length: int, vocab: int, first: int = 0) -> PromptBatch:
  """Prompts of random tokens, numbers first .. first + count - 1; each is the same in
  whatever batch it stands."""
  ids = range(first, first + count)
  rows = [np.random.default_rng(i).integers(1, vocab, length) for i in ids]
  return PromptBatch(
    tokens=jnp.asarray(np.stack(rows), jnp.int32),
    mask=jnp.ones((count, length), bool),
    answers=jnp.full((count, 1, 1), -1, jnp.int32),
    ids=jnp.asarray(ids, jnp.int32),
  )


@contextlib.contextmanager
def a_device_each_core(prompts: int) -> Iterator[Callable]:
  """A mesh of one CPU device a core, as far as they divide the prompts: XLA alone keeps
  small products on one core. Yields (array tree, whether its rows are cut) -> there."""
  count = math.gcd(min(cores(), len(jax.devices())), prompts)
  mesh = sharding.make_mesh(jax.devices()[:count], fsdp=count)

  def put(tree, rows=False):
    cut = sharding.batch_sharding(mesh) if rows else sharding.replicated(mesh)
    return jax.device_put(tree, cut)

  with jax.set_mesh(mesh):
    yield put


def compiled(function: Callable, *args: Any, **how: Any) -> tuple[Callable, float]:
  """(the program for such arguments, seconds that its compilation took)."""
  start = time.perf_counter()
  program = jax.jit(function, **how).lower(*args).compile()
  return program, time.perf_counter() - start


def timed(program: Callable, *args: Any) -> float:
  """Seconds until its result is there, and JAX is idle."""
  start = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - start


def interleaved(repeats: int, runs: dict[str, Callable[[], Any]]) -> dict[str, list]:
  """What the runs return, which take turns; the first turn does not count."""
  found = {name: [] for name in runs}
  for turn in range(repeats + 1):
    for name, run in runs.items():
      result = run()
      if turn:
        found[name].append(result)
  return found


def sampler(network: policy.Policy, **settings: Any) -> Callable[..., rollout.Rollout]:
  """(params, router, prompts, key, limits) -> rollout; nothing stops but a limit."""

  def run(params, router, prompts, key, limits=None):
    how = dict(limits=limits, pad_id=PAD, stop_ids=()) | settings
    return rollout.sample(network, params, router, prompts, key, **how)

  return run


# -- refill ----------------------------------------------------------------------------


def heavy_tail(count: int, median: int, cap: int) -> np.ndarray:
  """[count] int32, the quantiles of a log-normal distribution with its p99 at `cap`, in
  a random order; what would be longer is cut there."""
  normal = statistics.NormalDist()
  sigma = np.log(cap / median) / normal.inv_cdf(0.99)
  quantiles = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
  lengths = np.clip(np.rint(median * np.exp(sigma * np.array(quantiles))), 1, cap)
  return np.random.default_rng(0).permutation(lengths).astype(np.int32)


def refill(z: Sizes, repeats: int) -> dict:
  """A queue of outputs over its slots, against static batches of as many slots, each of
  which runs to its longest. Raises UserError where they do not divide."""
  few, over = divmod(z.slots, z.group)  # prompts of a static batch
  if over or z.queue % few:
    raise UserError(f"{z.slots} slots do not divide {z.queue} x {z.group} outputs.")
  network = z.dense()
  lengths = heavy_tail(z.queue * z.group, z.median, z.cap).reshape(z.queue, z.group)
  how = dict(group_size=z.group, max_tokens=z.cap)
  drawn = {}
  with a_device_each_core(few) as put:
    weights, key = put(weights_of(network)), put(jax.random.key(1))

    def part(start, count):
      asked = problems(count, z.prompt, z.vocab, start)
      limits = jnp.asarray(lengths[start : start + count])
      return put(asked, rows=True), key, put(limits, rows=True)

    whole = part(0, z.queue)
    parts = [part(start, few) for start in range(0, z.queue, few)]
    few_seats = dict(slots=z.slots, cache_tokens=z.cache_tokens)
    refilled, _ = compiled(sampler(network, **how, **few_seats), *weights, *whole)
    static, _ = compiled(sampler(network, **how), *weights, *parts[0])

    def in_turn(*all_parts):
      return [jax.block_until_ready(static(*weights, *p)) for p in all_parts]

    def keep(name, program, *args):
      drawn[name] = program(*args)
      return drawn[name]

    runs = dict(
      refill=lambda: timed(keep, "refill", refilled, *weights, *whole),
      static=lambda: timed(keep, "static", in_turn, *parts),
    )
    times = interleaved(repeats, runs)
  one, many = drawn["refill"], drawn["static"]
  if not (np.asarray(one.lengths) == lengths).all():
    raise RuntimeError("an output has not the length that it was given")
  tokens = np.concatenate([np.asarray(batch.tokens) for batch in many])
  total, steps = int(lengths.sum()), int(one.steps[0])
  static_steps = sum(int(batch.steps[0]) for batch in many)
  speed = {name: total / statistics.median(t) for name, t in times.items()}
  return {
    "refill_ratio_to_static": speed["refill"] / speed["static"],
    "refill_tokens_per_s": speed["refill"],
    "static_tokens_per_s": speed["static"],
    "slot_occupancy": total / (steps * z.slots),
    "static_occupancy": total / (static_steps * z.slots),
    "ideal_ratio": static_steps / (total / z.slots),
    "refill_steps": steps,
    "static_steps": static_steps,
    "refill_tokens": total,
    "refill_equal_outputs": float((np.asarray(one.tokens) == tokens).all(-1).mean()),
    "refill_runs": times,
  }


# -- the shared prefix -----------------------------------------------------------------


def prefix(z: Sizes, repeats: int) -> dict:
  """A prefill of B prompts for G outputs each, against B G prompts for one: FLOPs that
  XLA counts in the compiled program (a loop's body once, in both), and bytes of the
  prompts' cache. Nothing runs."""
  network = z.dense()
  variables = shapes_of(network)
  flops, bytes_ = [], []
  for prompts, group in ((1, z.group), (z.group, 1)):
    settings = Sampler(group_size=group, max_tokens=z.new, pad_id=PAD)

    def start(params, router, prompts, key, settings=settings):
      return rollout.start(network, params, router, prompts, key, settings)

    batch = problems(prompts * z.prefix_prompts, z.prefix, z.vocab)
    args = *variables, batch, jax.random.key(0)
    program, _ = compiled(start, *args)
    flops.append(program.cost_analysis()["flops"])
    entries = jax.tree.leaves(jax.eval_shape(start, *args).cache.prompts)
    bytes_.append(sum(x.size * x.dtype.itemsize for x in entries))
  return {
    "prefix_flops_ratio": flops[0] / flops[1],
    "prefix_bytes_ratio": bytes_[0] / bytes_[1],
    "prefix_flops": flops,
    "prefix_bytes": bytes_,
  }


# -- cost by length --------------------------------------------------------------------


def length(z: Sizes, repeats: int) -> dict:
  """Milliseconds a step at so many live tokens a row: rows are put at that length with
  an empty cache (a step takes as long whatever is in it)."""
  network = z.dense(z.length_layers)
  weights = weights_of(network)
  settings = Sampler(
    group_size=z.length_rows, max_tokens=max(z.lengths) + z.length_steps, pad_id=PAD
  )
  batch, key = problems(1, z.prompt, z.vocab), jax.random.key(0)

  def begin(params, router, batch, key):
    return rollout.start(network, params, router, batch, key, settings)

  def decode(carry, params, router, limit):
    return rollout.advance(network, params, router, carry, limit, settings)

  carry = compiled(begin, *weights, batch, key)[0](*weights, batch, key)
  limit = jnp.int32(0)
  program, _ = compiled(decode, carry, *weights, limit, donate_argnums=0)

  def run(live):
    nonlocal carry
    rows = np.full(z.length_rows, live - z.length_steps, np.int32)
    slots = carry.slots.replace(length=jnp.array(rows))
    outputs = carry.outputs.replace(lengths=jnp.array(rows[None]))
    carry, limit = (
      carry.replace(slots=slots, outputs=outputs),
      carry.step + z.length_steps,
    )
    start = time.perf_counter()
    carry = jax.block_until_ready(program(carry, *weights, limit))
    return time.perf_counter() - start

  runs = {live: functools.partial(run, live) for live in z.lengths}
  times = interleaved(repeats, runs)
  entry = network.config.cache.width * network.config.compute_dtype.itemsize
  prompts = jax.tree.leaves(carry.cache.prompts)
  rows = []
  for live in z.lengths:
    in_use = sum(lv.seats * lv.size for lv in carry.levels if lv.start < live)
    moved = sum(x.nbytes for x in prompts) + in_use * entry * z.length_layers
    ms = 1e3 * statistics.median(times[live]) / z.length_steps
    rows.append(
      {"length": live, "ms": ms, "bytes": moved, "gb_per_s": moved / ms / 1e6}
    )
  return {
    "cost_by_length": rows,
    "length_fit": fit(rows),
    "length_rows": z.length_rows,
    "length_runs": times,
  }


def fit(rows: list[dict]) -> dict:
  """The least-squares line ms = a + b * bytes."""
  x, y = (np.array([row[k] for row in rows], float) for k in ("bytes", "ms"))
  b, a = np.polyfit(x, y, 1)
  left = np.square(y - (a + b * x)).sum() / np.square(y - y.mean()).sum()
  return {"a_ms": float(a), "b_ms_per_byte": float(b), "r2": float(1 - left)}
