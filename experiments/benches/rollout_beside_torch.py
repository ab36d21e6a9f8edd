"""The rollout and the whole iteration of `bench rollout` beside transformers and torch,
which compute in a process of their own (rollout_torch.py).
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
import pickle
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches import rollout_parts as parts
from experiments.benches.rollout_parts import PAD, Sizes
from r1jax import grpo, rollout, train_state
from r1jax.models import policy
from r1jax.models.sequence import Sequence
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards


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
  """`process` with a policy's weights.

  Raises:
    RuntimeError: its logits are not ours, or it ended.
  """
  with process(*qwen2(network, params)) as call:
    theirs = call("logits", np.asarray(prompts.tokens))
    gap = np.abs(theirs - logits(network, params, prompts)).max()
    if not gap < 1e-4:
      raise RuntimeError(f"the logits of r1jax and transformers are {gap:.1e} apart")
    yield call


@contextlib.contextmanager
def process(*model: Any) -> Iterator[Callable]:
  """(name of a method, arguments) -> what it returns in rollout_torch.

  Args:
    model: the arguments of its model, after the threads.

  Raises:
    RuntimeError: it ended.
  """
  child = subprocess.Popen(
    [sys.executable, "-m", "experiments.benches.rollout_torch"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    # Its threads do not spin while JAX computes.
    env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
  )

  def call(*command):
    try:
      pickle.dump(command, child.stdin)
      child.stdin.flush()
      return pickle.load(child.stdout)
    except (EOFError, BrokenPipeError):
      raise RuntimeError("the process of torch ended; it says why above") from None

  try:
    call(parts.cores(), *model)
    yield call
  finally:
    child.kill()
    child.communicate()


def logits(network: policy.Policy, params: dict, prompts: PromptBatch) -> jax.Array:
  """[B, P, V]."""

  def run(params, prompts):
    seq = Sequence.of_mask(prompts.mask)
    out = network.apply({"params": params}, prompts.tokens, seq)
    return network.apply({"params": params}, out.hidden, method="logits")

  return parts.compiled(run, params, prompts)[0](params, prompts)


def transformers(z: Sizes, repeats: int) -> dict:
  """The rollout alone, tokens a second."""
  network = z.dense()
  weights = parts.weights_of(network)
  prompts = parts.problems(z.prompts, z.prompt, z.vocab)
  run = parts.sampler(network, group_size=z.group, max_tokens=z.new)
  with (
    torch_process(network, weights[0], prompts) as theirs,
    parts.a_device_each_core(z.prompts) as put,
  ):
    args = *put(weights), put(prompts, rows=True), put(jax.random.key(0))
    ours, compile_seconds = parts.compiled(run, *args)
    tokens = np.asarray(prompts.tokens)
    runs = dict(
      r1jax=lambda: parts.timed(ours, *args),
      transformers=lambda: theirs("rollout", tokens, z.group, z.new),
    )
    times = parts.interleaved(repeats, runs)
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
  """Rollout, reward, advantages and one AdamW update, in seconds, with each prompt
  computed once for its group in the update too; and with a row for each output, as
  torch has it. Of r1jax's one program the update is what it takes beyond the rollout
  alone."""
  network = z.dense()
  weights = parts.weights_of(network)
  prompts = parts.problems(z.prompts, z.prompt, z.vocab)
  run = parts.sampler(network, group_size=z.group, max_tokens=z.new)
  with (
    torch_process(network, weights[0], prompts) as theirs,
    parts.a_device_each_core(z.prompts) as put,
  ):
    asked = put(prompts, rows=True), put(jax.random.key(0))
    weights = put(weights)
    alone, _ = parts.compiled(run, *weights, *asked)
    whole, compile_seconds = whole_step(z, network, weights, asked, put, groups=True)
    by_rows, _ = whole_step(z, network, weights, asked, put, groups=False)
    tokens = np.asarray(prompts.tokens)
    runs = dict(
      r1jax=whole,
      r1jax_by_rows=by_rows,
      r1jax_rollout=lambda: parts.timed(alone, *weights, *asked),
      torch=lambda: theirs("iteration", tokens, z.group, z.new, z.micro_batches),
    )
    times = parts.interleaved(repeats, runs)
  names = ("r1jax", "r1jax_by_rows", "r1jax_rollout")
  ours, rows, alone = (statistics.median(times[k]) for k in names)
  both = statistics.median(map(sum, times["torch"]))
  rolled, updated = map(statistics.median, zip(*times["torch"], strict=True))
  return {
    "iteration_ratio_to_torch": both / ours,
    "iteration_by_rows_ratio_to_torch": both / rows,
    "iteration_seconds": ours,
    "iteration_rollout_seconds": alone,
    "iteration_update_seconds": ours - alone,
    "iteration_by_rows_update_seconds": rows - alone,
    "torch_iteration_seconds": both,
    "torch_rollout_seconds": rolled,
    "torch_update_seconds": updated,
    "iteration_compile_seconds": compile_seconds,
    "iteration_runs": times,
  }


def whole_step(
  z: Sizes,
  network: policy.Policy,
  weights: tuple,
  asked: tuple,
  put: Callable,
  *,
  groups: bool,
) -> tuple[Callable, float]:
  """(seconds of a step in one program, that of its compilation); the state goes on from
  call to call."""
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
      whole_groups=groups,
      max_tokens=z.new,
      reference_refresh=0,
      objective=Objective(kl_coef=0.0, clip_low=0.2, clip_high=0.2),
    ),
    stop_ids=(),
    pad_id=PAD,
  )
  copy = jax.tree.map(jnp.copy, weights)
  state = put(train_state.restart(*copy, optimizer, reference=False))
  out = jax.tree.map(lambda x: x.sharding, state), None, None, None
  program, compile_seconds = parts.compiled(
    step, state, *asked, donate_argnums=0, out_shardings=out
  )

  def seconds() -> float:
    nonlocal state
    start = time.perf_counter()
    state, *_ = jax.block_until_ready(program(state, *asked))
    return time.perf_counter() - start

  return seconds, compile_seconds
