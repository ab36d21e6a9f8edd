"""What `bench rollout` measures, a function a part: (sizes, repeats) -> figures.

Every time is a median of runs that took turns, with compilation and one run before them
left out; `..._runs` holds all of them, in seconds.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from r1jax import grpo, rollout, sharding, train_state
from r1jax.errors import UserError
from r1jax.models import config, policy
from r1jax.models.mla import Sequence
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
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
  # Drafts of a miniature.
  draft_rows: int = 4

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
  mesh = sharding.make_mesh((count, 1, 1), jax.devices()[:count])

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


# -- transformers ----------------------------------------------------------------------


def qwen2(network: policy.Policy, params: dict) -> tuple[dict, dict[str, np.ndarray]]:
  """The policy as transformers' Qwen2: (its config, its weights)."""
  c, params = network.config, jax.device_get(params)
  theirs = dict(
    vocab_size=c.vocab,
    hidden_size=c.width,
    intermediate_size=c.dense_ffn,
    num_hidden_layers=c.layers,
    num_attention_heads=c.heads,
    num_key_value_heads=c.kv_heads,
    head_dim=c.head_dim,
    rms_norm_eps=c.norm_eps,
    rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=PAD,
  )

  def matrix(w, inputs=1):  # [in..., out...] -> [out, in]
    return np.ascontiguousarray(w.reshape(int(np.prod(w.shape[:inputs])), -1).T)

  weights = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": matrix(params["head"]),
  }
  for i in range(c.layers):
    layer = jax.tree.map(lambda w, i=i: w[i], params["dense_layers"])
    name, attention = f"model.layers.{i}", layer["attention"]
    weights |= {
      f"{name}.input_layernorm.weight": layer["attention_norm"]["scale"],
      f"{name}.post_attention_layernorm.weight": layer["ffn_norm"]["scale"],
      f"{name}.self_attn.o_proj.weight": matrix(attention["w_o"], 2),
    }
    for x in "qkv":
      weights[f"{name}.self_attn.{x}_proj.weight"] = matrix(attention[f"w_{x}"])
      weights[f"{name}.self_attn.{x}_proj.bias"] = attention[f"b_{x}"].reshape(-1)
    for x in ("gate", "up", "down"):
      weights[f"{name}.mlp.{x}_proj.weight"] = matrix(layer["ffn"][x])
  return theirs, weights


@contextlib.contextmanager
def torch_process(
  network: policy.Policy, params: dict, prompts: PromptBatch
) -> Iterator[Callable]:
  """(name of a method of rollout_torch.Model, arguments) -> what it returns there.

  Raises:
    RuntimeError: its logits are not ours, or it ended.
  """
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.benches.rollout_torch"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    # Its threads do not spin while JAX computes.
    env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
  )

  def call(*command):
    try:
      pickle.dump(command, process.stdin)
      process.stdin.flush()
      return pickle.load(process.stdout)
    except (EOFError, BrokenPipeError):
      raise RuntimeError("the process of torch ended; it says why above") from None

  try:
    call(cores(), *qwen2(network, params))
    theirs = call("logits", np.asarray(prompts.tokens))
    gap = np.abs(theirs - logits(network, params, prompts)).max()
    if not gap < 1e-4:
      raise RuntimeError(f"the logits of r1jax and transformers are {gap:.1e} apart")
    yield call
  finally:
    process.kill()
    process.communicate()


def logits(network: policy.Policy, params: dict, prompts: PromptBatch) -> jax.Array:
  """[B, P, V]."""

  def run(params, prompts):
    seq = Sequence.of_mask(prompts.mask)
    out = network.apply({"params": params}, prompts.tokens, seq)
    return network.apply({"params": params}, out.hidden, method="logits")

  return compiled(run, params, prompts)[0](params, prompts)


def transformers(z: Sizes, repeats: int) -> dict:
  """The rollout alone, tokens a second."""
  network = z.dense()
  weights = weights_of(network)
  prompts = problems(z.prompts, z.prompt, z.vocab)
  run = sampler(network, group_size=z.group, max_tokens=z.new)
  with (
    torch_process(network, weights[0], prompts) as theirs,
    a_device_each_core(z.prompts) as put,
  ):
    args = *put(weights), put(prompts, rows=True), put(jax.random.key(0))
    ours, compile_seconds = compiled(run, *args)
    tokens = np.asarray(prompts.tokens)
    runs = dict(
      r1jax=lambda: timed(ours, *args),
      transformers=lambda: theirs("rollout", tokens, z.group, z.new),
    )
    times = interleaved(repeats, runs)
  total = z.prompts * z.group * z.new
  speed = {name: total / statistics.median(t) for name, t in times.items()}
  return {
    "ratio_to_transformers": speed["r1jax"] / speed["transformers"],
    "r1jax_tokens_per_s": speed["r1jax"],
    "transformers_tokens_per_s": speed["transformers"],
    "rollout_compile_seconds": compile_seconds,
    "rollout_runs": times,
  }


# -- the whole iteration ---------------------------------------------------------------


def even(_: PromptBatch, drawn: rollout.Rollout) -> Rewards:
  """The share of even tokens."""
  share = ((drawn.tokens % 2 == 0) & drawn.mask).sum(axis=-1) / drawn.lengths
  return Rewards.of(even=(1.0, share))


def iteration(z: Sizes, repeats: int) -> dict:
  """Rollout, reward, advantages and one AdamW update, in seconds. Of r1jax's one
  program the update is what it takes beyond the rollout alone."""
  network = z.dense()
  weights = weights_of(network)
  prompts = problems(z.prompts, z.prompt, z.vocab)
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, steps=100))
  step = functools.partial(
    grpo.whole_step,
    policy=network,
    optimizer=optimizer,
    reward_fn=even,
    config=grpo.GRPOConfig(
      group_size=z.group,
      minibatches=1,
      micro_batches=z.micro_batches,
      max_tokens=z.new,
      reference_refresh=0,
      objective=Objective(kl_coef=0.0, clip_low=0.2, clip_high=0.2),
    ),
    stop_ids=(),
    pad_id=PAD,
  )
  run = sampler(network, group_size=z.group, max_tokens=z.new)
  with (
    torch_process(network, weights[0], prompts) as theirs,
    a_device_each_core(z.prompts) as put,
  ):
    asked = put(prompts, rows=True), put(jax.random.key(0))
    weights = put(weights)
    copy = jax.tree.map(jnp.copy, weights)
    state = put(train_state.restart(*copy, optimizer, reference=False))
    out = jax.tree.map(lambda x: x.sharding, state), None, None, None
    whole, compile_seconds = compiled(
      step, state, *asked, donate_argnums=0, out_shardings=out
    )
    alone, _ = compiled(run, *weights, *asked)

    def ours():
      nonlocal state
      start = time.perf_counter()
      state, *_ = jax.block_until_ready(whole(state, *asked))
      return time.perf_counter() - start

    tokens = np.asarray(prompts.tokens)
    runs = dict(
      r1jax=ours,
      r1jax_rollout=lambda: timed(alone, *weights, *asked),
      torch=lambda: theirs("iteration", tokens, z.group, z.new, z.micro_batches),
    )
    times = interleaved(repeats, runs)
  ours, alone = (statistics.median(times[k]) for k in ("r1jax", "r1jax_rollout"))
  both = statistics.median(map(sum, times["torch"]))
  rolled, updated = map(statistics.median, zip(*times["torch"], strict=True))
  return {
    "iteration_ratio_to_torch": both / ours,
    "iteration_seconds": ours,
    "iteration_rollout_seconds": alone,
    "iteration_update_seconds": ours - alone,
    "torch_iteration_seconds": both,
    "torch_rollout_seconds": rolled,
    "torch_update_seconds": updated,
    "iteration_compile_seconds": compile_seconds,
    "iteration_runs": times,
  }


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


# -- speculative decoding --------------------------------------------------------------


def speculative(z: Sizes, repeats: int) -> dict:
  """Drafts by the MTP module of an untrained miniature, against none."""
  network = policy.Policy(config.tiny(z.vocab, mtp_depth=1))
  prompts = problems(1, z.prompt, z.vocab)
  args = *weights_of(network), prompts, jax.random.key(0)
  programs, runs = {}, {}
  for name in ("off", "on"):
    how = dict(group_size=z.draft_rows, max_tokens=z.new, speculative=name)
    programs[name], _ = compiled(sampler(network, **how), *args)
    runs[name] = functools.partial(timed, programs[name], *args)
  times = interleaved(repeats, runs)
  drawn = programs["on"](*args)
  total, drafted = z.draft_rows * z.new, int(drawn.drafted.sum())
  speed = {name: total / statistics.median(t) for name, t in times.items()}
  return {
    "speculative_ratio": speed["on"] / speed["off"],
    "speculative_tokens_per_s": speed["on"],
    "plain_tokens_per_s": speed["off"],
    "speculative_acceptance": int(drawn.accepted.sum()) / max(drafted, 1),
    "speculative_tokens_a_step": total / (int(drawn.steps[0]) * z.draft_rows),
    "speculative_runs": times,
  }


NEEDS_TORCH = {"transformers", "iteration"}
PARTS = {
  "transformers": transformers,
  "iteration": iteration,
  "refill": refill,
  "prefix": prefix,
  "length": length,
  "speculative": speculative,
}
