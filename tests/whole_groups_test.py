"""Minibatches of whole groups, each prompt computed once: the numbers of plain rows."""

import dataclasses
import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import optax
import pytest
from quick import QUICK
from trees import assert_same, host

from r1jax import experience, grpo, sharding, train_state
from r1jax.models import config as sizes
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence
from r1jax.objective import Objective

B, G, P, T = 4, 3, 5, 6
EXPERTS = golden.tiny_policy(mtp_depth=1)
QUERIES = Policy(
  sizes.PolicyConfig(
    **dict(vocab=golden.VOCAB, width=32, layers=2, dense_layers=2, heads=4),
    **dict(kv_heads=2, head_dim=8, attention="gqa", qkv_bias=True, dense_ffn=16),
  )
)
SGD = optax.sgd(1.0)  # the parameters move by the gradient itself


def group_rows(policy, seed=0):
  """Groups with short and full prompts; full and one-token outputs, one empty."""
  rng = np.random.default_rng(seed)
  prompt_mask = np.arange(P)[None] >= np.array([0, 2, 4, 1])[:, None]
  lengths = np.array([6, 1, 3, 2, 6, 4, 1, 5, 6, 0, 2, 4])
  mask = np.arange(T)[None] < lengths[:, None]
  m = B * G
  near = np.where(mask, -2.7 + 0.3 * rng.normal(size=mask.shape), 0.0)
  c = policy.config
  experts = None
  if c.moe_layers:
    shape = (m, c.moe_layers, P + T, c.active_experts)
    experts = rng.permuted(
      np.broadcast_to(np.arange(c.experts), (*shape[:3], c.experts)), axis=3
    )[..., : c.active_experts]
    experts[:, :, :P] = experts[::G, :, :P].repeat(G, axis=0)  # of one prompt
    experts = jnp.asarray(experts, jnp.uint8)
  return experience.Rows(
    prompts=jnp.asarray(rng.integers(3, golden.VOCAB, (B, P)).repeat(G, 0), jnp.int32),
    prompt_mask=jnp.asarray(prompt_mask.repeat(G, axis=0)),
    completions=jnp.asarray(rng.integers(3, golden.VOCAB, (m, T)), jnp.int32),
    completion_mask=jnp.asarray(mask),
    in_loss=jnp.asarray(np.arange(m) != 4),
    in_mean=jnp.ones(m, bool),
    sampler_logprobs=jnp.asarray(near, jnp.float32),
    old_logprobs=jnp.asarray(near, jnp.float32),
    reference_logprobs=jnp.asarray(near[::-1], jnp.float32),
    advantages=jnp.asarray(rng.normal(size=(m, T)), jnp.float32),
    place=jnp.arange(m, dtype=jnp.int32),
    experts=experts,
  )


def step_config(**changes):
  return grpo.GRPOConfig(
    **{
      **dict(group_size=G, minibatches=1, max_tokens=T, reference_refresh=0),
      **dict(router_bias_rate=0.25, balance_coef=0.1, mtp_coef=0.0, temperature=0.7),
      **dict(objective=Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04)),
      **changes,
    }
  )


def weights(policy):
  """None of which is zero: biases and norms count."""
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype),
    golden.weights(policy),
  )


def updated(policy, put=lambda tree, rows=False: tree, **changes):
  state = train_state.restart(*weights(policy), SGD, reference=False)
  update = functools.partial(
    grpo.update, policy=policy, optimizer=SGD, config=step_config(**changes)
  )
  args = put(state), put(group_rows(policy), True)
  program = jax.jit(update).lower(*args).compile(QUICK)
  state, metrics, per_token = program(*args)
  return host((state.params, state.router, metrics, per_token))


CASES = {
  "gqa": (QUERIES, {}),
  "mla-experts": (EXPERTS, {}),
  "replay": (EXPERTS, dict(routing_replay=True)),
  "mtp": (EXPERTS, dict(mtp_coef=0.3)),
}


@functools.cache
def by_rows(case):
  policy, changes = CASES[case]
  return updated(policy, **changes)


@pytest.mark.parametrize(
  ("case", "micro_batches"),
  [
    *(("gqa", 1), ("mla-experts", 2), ("replay", 4)),
    pytest.param("mtp", 1, marks=pytest.mark.slow),
  ],
)
def test_an_update_is_that_of_plain_rows(case, micro_batches):
  """Gradient, router biases, metrics, and every token's figures in the rows' order."""
  policy, changes = CASES[case]
  got = updated(policy, whole_groups=True, micro_batches=micro_batches, **changes)
  assert_same(got, by_rows(case), rtol=2e-4, atol=2e-5)


def test_an_update_on_a_mesh_is_that_of_one_device():
  mesh = mesh_of((2, 1, 1), jax.devices()[:2])

  def put(tree, rows=False):
    cut = sharding.batch_sharding(mesh) if rows else sharding.replicated(mesh)
    return jax.device_put(tree, cut)

  with jax.set_mesh(mesh):
    got = updated(EXPERTS, put, whole_groups=True, micro_batches=2)
  assert_same(got, by_rows("mla-experts"), rtol=2e-4, atol=2e-5)


def test_a_prompt_is_computed_once():
  """FLOPs that XLA counts: (P + G T) / (G P + G T) of those of plain rows."""
  rows = group_rows(QUERIES)
  prompts = jnp.tile(rows.prompts, (1, 40))  # of 200 tokens
  rows = rows.replace(prompts=prompts, prompt_mask=jnp.ones(prompts.shape, bool))

  def flops(**changes):
    update = functools.partial(
      grpo.update, policy=QUERIES, optimizer=SGD, config=step_config(**changes)
    )
    state = train_state.restart(*weights(QUERIES), SGD, reference=False)
    return jax.jit(update).lower(state, rows).compile().cost_analysis()["flops"]

  p = prompts.shape[1]
  share = (p + G * T) / (G * (p + T))
  assert flops(whole_groups=True) < 1.1 * share * flops()


def test_a_step_with_recalled_logprobs_is_on_policy_and_keeps_groups():
  """Old and reference log-probabilities are computed the same way; the whole step runs
  in one program, and each minibatch has whole groups in a random order."""
  policy = golden.tiny_policy()
  objective = Objective(old_logprobs="trainer", kl_coef=0.04)
  config = dataclasses.replace(
    golden.CONFIG, whole_groups=True, objective=objective, minibatches=1
  )
  state = golden.new_state(policy)
  step = golden.make_step(policy, config)
  _, _, metrics, _ = jax.jit(step)(state, golden.prompt_batch(), jax.random.key(1))
  np.testing.assert_allclose(metrics["ratio_max"], 1.0, rtol=1e-5)
  assert metrics["sampler_gap_max"] < 1e-4
  assert metrics["kl"] > 0


def test_minibatches_have_whole_groups_in_a_random_order():
  rows = {"group": jnp.arange(24) // 4, "place": jnp.arange(24)}
  got = jax.jit(experience.shuffled, static_argnums=(2, 3))(
    rows, jax.random.key(2), 3, 4
  )
  assert got["group"].shape == (3, 8)
  groups = np.asarray(got["place"]).reshape(6, 4)
  np.testing.assert_array_equal(groups, groups[:, :1] + np.arange(4))
  assert sorted(groups[:, 0]) == [0, 4, 8, 12, 16, 20]
  assert list(groups[:, 0]) != sorted(groups[:, 0])


def test_recall_by_parts_of_groups_keeps_the_order_of_rows():
  x = jnp.arange(48).reshape(24, 2)
  seen = []

  def function(part):
    seen.append(part.shape)
    return part[:, 0] * 10

  got = experience.by_parts(function, x, 3, 4)
  np.testing.assert_array_equal(got, x[:, 0] * 10)
  assert seen[0] == (8, 2)


def test_positions_count_each_output_from_its_prompt():
  prompts = jnp.asarray([[0, 1, 1], [1, 1, 1]], bool)
  outputs = jnp.asarray([[[1, 1], [1, 0]], [[0, 0], [1, 1]]], bool)
  seq = Sequence.of_groups(prompts, outputs)
  np.testing.assert_array_equal(
    seq.positions, [[0, 0, 1, 2, 3, 2, 2], [0, 1, 2, 2, 2, 3, 4]]
  )
  np.testing.assert_array_equal(
    seq.segments, [[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1]]
  )
  np.testing.assert_array_equal(
    seq.uses, [[0, 2, 2, 1, 1, 1, 0], [2, 2, 2, 0, 0, 1, 1]]
  )
  assert seq.outputs == 4


def test_by_output_and_by_group_undo_each_other():
  mask = jnp.ones((2, 3), bool), jnp.ones((2, 4, 5), bool)
  seq = Sequence.of_groups(*mask)
  x = jnp.arange(2 * 23 * 2).reshape(2, 23, 2)
  apart = seq.by_output(x)
  assert apart.shape == (8, 8, 2)
  np.testing.assert_array_equal(apart[5, :3], x[1, :3])  # group 1, output 1
  np.testing.assert_array_equal(apart[5, 3:], x[1, 8:13])
  np.testing.assert_array_equal(seq.by_group(apart), x)
  plain = Sequence.of_mask(jnp.ones((2, 3), bool))
  assert plain.by_output(x) is x
  assert plain.by_group(x) is x


def test_the_mtp_module_refuses_a_row_of_a_group():
  seq = Sequence.of_groups(jnp.ones((1, 3), bool), jnp.ones((1, 2, 4), bool))
  tokens = jnp.ones((1, 11), jnp.int32)
  params, router = golden.weights(EXPERTS)
  hidden = jnp.zeros((1, 11, EXPERTS.config.width))
  with pytest.raises(ValueError, match="a row for each output"):
    EXPERTS.apply(
      {"params": params, "router": router}, hidden, tokens, seq, method="mtp"
    )


def test_parts_that_would_break_a_group_are_refused():
  with pytest.raises(ValueError, match="whole groups of 3; use a divisor of 4"):
    updated(QUERIES, whole_groups=True, micro_batches=3)
