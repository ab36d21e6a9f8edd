"""Distillation: divergences by hand, means over targets, and students that learn."""

import functools

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_same, host

from r1jax import distillation, sft, train_state
from r1jax.distillation import DIVERGENCES, DistillConfig, OnPolicyConfig
from r1jax.errors import UserError
from r1jax.experience import shuffled
from r1jax.grpo import SHUFFLE, key_of
from r1jax.models.sequence import Sequence
from r1jax.optimizer import OptimizerConfig, make_optimizer

VOCAB, HEIGHT, WIDTH = golden.VOCAB, 8, 11
STUDENT = golden.tiny_policy(width=16)
TEACHER = golden.tiny_policy(width=24, dense_layers=1, dense_ffn=32)  # without experts
OPTIMIZER = make_optimizer(  # its eps is far above rounding
  OptimizerConfig(learning_rate=3e-2, steps=100, eps=1e-3)
)
LENGTHS = [[5, 4], [7, 3], [6], [2, 3, 4]]  # of pages, row by row; the rest is padding

# -- the configuration -----------------------------------------------------------------


@pytest.mark.parametrize(
  "key, value",
  [
    ("divergence", "kl"),
    ("beta", 0.0),
    ("beta", 1.0),
    ("teacher_temperature", 0.0),
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("micro_batches", 0),
    ("router_bias_rate", -1.0),
  ],
)
@pytest.mark.parametrize("config", [DistillConfig, OnPolicyConfig])
def test_config_refuses_what_cannot_work_and_names_it(config, key, value):
  with pytest.raises(UserError, match=f"{key}.*{value}"):
    config(**{key: value})


@pytest.mark.parametrize(
  "key, value",
  [
    ("group_size", 0),
    ("minibatches", 0),
    ("max_tokens", 0),
    ("temperature", 0.0),
    ("alpha", 0.5),
  ],
)
def test_on_policy_config_refuses_what_cannot_work_and_names_it(key, value):
  with pytest.raises(UserError, match=f"{key}.*{value}"):
    OnPolicyConfig(**{key: value})


def test_traces_are_learnt_by_forward_and_own_samples_by_reverse_kl():
  assert DistillConfig().divergence == "forward_kl"
  assert OnPolicyConfig().divergence == "reverse_kl"


# -- divergences -----------------------------------------------------------------------


def some_logits(seed):
  return 2 * np.random.default_rng(seed).normal(size=(4, 3, VOCAB))


def probabilities(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl_by_hand(p, q):
  return (p * np.log(p / q)).sum(-1, keepdims=True)


def by_hand(student, teacher, c):
  """(divergence [...], its gradient by the student's logits [..., V])."""
  s, t = probabilities(student), probabilities(teacher / c.teacher_temperature)
  if c.divergence == "forward_kl":
    return kl_by_hand(t, s)[..., 0], s - t
  if c.divergence == "reverse_kl":
    kl = kl_by_hand(s, t)
    return kl[..., 0], s * (np.log(s / t) - kl)
  m = c.beta * t + (1 - c.beta) * s
  value = c.beta * kl_by_hand(t, m) + (1 - c.beta) * kl_by_hand(s, m)
  return value[..., 0], (1 - c.beta) * s * (np.log(s / m) - kl_by_hand(s, m))


def value_and_gradients(student, teacher, config):
  """(divergence [...], gradients of its sum by student and by teacher)."""

  def total(student, teacher):
    value = distillation.divergence(student, teacher, config)
    return value.sum(), value

  both = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
  (_, value), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*both)
  return value, *gradients


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
  "choice",
  [
    dict(divergence="forward_kl"),
    dict(divergence="reverse_kl"),
    dict(divergence="jsd", beta=0.5),
    dict(divergence="jsd", beta=0.1),
  ],
)
def test_a_divergence_and_its_gradient_are_those_by_hand(choice, temperature):
  config = DistillConfig(**choice, teacher_temperature=temperature)
  student, teacher = some_logits(0), some_logits(1)
  value, gradient, to_teacher = value_and_gradients(student, teacher, config)
  want, slope = by_hand(student, teacher, config)
  assert value.shape == (4, 3) and (want > 0.1).all()
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
  assert not to_teacher.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(divergence):
  logits = some_logits(0)
  config = DistillConfig(divergence=divergence)
  value, gradient, _ = value_and_gradients(logits, logits + 3.0, config)
  np.testing.assert_allclose(value, 0.0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_one_of_them_rules_out_give_no_nan(divergence):
  student, teacher = some_logits(0), some_logits(1)
  student[..., 0], teacher[..., 1] = -1e4, -1e4
  config = DistillConfig(divergence=divergence)
  value, gradient, _ = value_and_gradients(student, teacher, config)
  assert np.isfinite(value).all() and np.isfinite(gradient).all()


def test_the_even_jsd_is_symmetric_and_the_others_are_not():
  def both_ways(**choice):
    config, a, b = DistillConfig(**choice), some_logits(0), some_logits(1)
    return [value_and_gradients(*pair, config)[0] for pair in ((a, b), (b, a))]

  np.testing.assert_allclose(*both_ways(divergence="jsd", beta=0.5), rtol=1e-5)
  for choice in (dict(divergence="jsd", beta=0.2), dict(divergence="forward_kl")):
    one, other = both_ways(**choice)
    assert (np.abs(one - other) > 1e-3).any()


@pytest.mark.parametrize("kl, beta", [("forward_kl", 1e-3), ("reverse_kl", 1 - 1e-3)])
def test_the_jsd_tends_to_the_kls(kl, beta):
  logits = some_logits(0), some_logits(0) + 0.3 * some_logits(1)
  jsd, *_ = value_and_gradients(*logits, DistillConfig(divergence="jsd", beta=beta))
  want, *_ = value_and_gradients(*logits, DistillConfig(divergence=kl))
  np.testing.assert_allclose(jsd / min(beta, 1 - beta), want, rtol=0.02)


# -- pages -----------------------------------------------------------------------------


def some_pages(seed=0):
  """Rows of (tokens, targets): a prompt without targets, then a completion."""
  rng = np.random.default_rng(seed)

  def page(n):
    return rng.integers(1, VOCAB, n), np.arange(n) >= rng.integers(1, n)

  return [[page(n) for n in row] for row in LENGTHS]


def packed(rows, fill=0):
  """[HEIGHT, WIDTH] Pages, the last rows empty; `fill` stands in the padding."""
  shape = HEIGHT, WIDTH
  tokens, segments = np.full(shape, fill, np.int32), np.zeros(shape, np.int32)
  targets = np.zeros(shape, bool)
  for i, row in enumerate(rows):
    at = 0
    for number, (page, wanted) in enumerate(row, start=1):
      here = slice(at, at + len(page))
      tokens[i, here], targets[i, here], segments[i, here] = page, wanted, number
      at += len(page)
  return sft.Pages(*map(jnp.asarray, (tokens, segments, targets)))


MIXED = DistillConfig(alpha=0.7, teacher_temperature=0.8)


@pytest.fixture(scope="module")
def weights():
  """((params, router) of the student, of the teacher)."""
  return golden.weights(STUDENT, seed=0), golden.weights(TEACHER, seed=1)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradients(weights, pages, count, config=MIXED):
  """(loss, (metrics, load)), and gradients by the params of student and teacher."""
  (params, router), (wanted, biases) = weights

  def loss(params, wanted):
    return distillation.loss_fn(
      STUDENT,
      params,
      router,
      pages,
      teacher=(wanted, biases),
      teacher_policy=TEACHER,
      count=count,
      config=config,
    )

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, wanted)


def count_of(pages):
  return sft.targets_ahead(pages, 1).sum()


@functools.partial(jax.jit, static_argnums=0)
def logits_of(policy, weights, tokens):
  """[n, V] of one page alone."""
  params, router = weights
  variables = {"params": params, "router": router}
  seq = Sequence.of_mask(jnp.ones((1, len(tokens)), bool))
  out = policy.apply(variables, tokens[None], seq)
  return policy.apply(variables, out.hidden, method="logits")[0]


def test_the_loss_is_the_mean_over_all_targets_and_no_other_token(weights):
  rows = some_pages()
  pages = packed(rows)
  (loss, (metrics, _)), _ = loss_and_gradients(weights, pages, count_of(pages))
  found = {"divergence": [], "nll": [], "teacher_nll": []}
  for tokens, targets in (page for row in rows for page in row):
    tokens = np.pad(tokens, (0, 7 - len(tokens)))  # one shape; causal
    student, teacher = (
      np.asarray(logits_of(policy, w, tokens), np.float64)
      for policy, w in zip((STUDENT, TEACHER), weights, strict=True)
    )
    value, _ = by_hand(student, teacher, MIXED)
    for i in np.flatnonzero(targets):
      found["divergence"].append(value[i - 1])
      for name, logits in (("nll", student), ("teacher_nll", teacher)):
        found[name].append(-np.log(probabilities(logits[i - 1])[tokens[i]]))
  assert len(found["nll"]) == int(count_of(pages)) == int(pages.targets.sum())
  for name, values in found.items():
    np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-4, err_msg=name)
  want = 0.7 * np.mean(found["divergence"]) + 0.3 * np.mean(found["nll"])
  np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_the_student_has_a_gradient_and_the_teacher_none(weights):
  pages = packed(some_pages())
  _, (student, teacher) = loss_and_gradients(weights, pages, count_of(pages))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(student))
  assert optax.tree.norm(student) > 0.01
  assert not any(g.any() for g in jax.tree.leaves(teacher))


def assert_close(got, want):
  assert_same(host(got), host(want), rtol=1e-4, atol=1e-6)


def test_packed_rows_teach_what_their_pages_teach_one_a_row(weights):
  rows = some_pages()
  apart = packed([[page] for row in rows for page in row])
  pages = packed(rows)
  count = count_of(pages)
  assert count == count_of(apart)
  assert_close(
    loss_and_gradients(weights, pages, count), loss_and_gradients(weights, apart, count)
  )


def test_what_stands_in_padding_has_no_influence(weights):
  rows = some_pages()
  count = count_of(packed(rows))
  got = loss_and_gradients(weights, packed(rows, fill=9), count)
  assert_same(host(got), host(loss_and_gradients(weights, packed(rows), count)))


def test_losses_gradients_and_loads_of_parts_add_up_to_those_of_the_batch(weights):
  rows = some_pages()
  count = count_of(packed(rows))
  whole, *parts = (
    loss_and_gradients(weights, packed(part), count)
    for part in (rows, rows[:1], rows[1:])
  )
  assert_close(jax.tree.map(jnp.add, *parts), whole)


def test_without_the_divergence_the_loss_is_that_of_sft(weights):
  pages, (params, router) = packed(some_pages()), weights[0]

  @jax.jit
  def both(teacher):
    count, config = count_of(pages), DistillConfig(alpha=0.0)
    ours = distillation.loss_fn(
      STUDENT,
      params,
      router,
      pages,
      teacher=teacher,
      teacher_policy=TEACHER,
      count=count,
      config=config,
    )
    return ours, sft.loss_fn(STUDENT, params, router, pages, counts=(count, count))

  (loss, (_, load)), (want, (_, served)) = both(weights[1])
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert_same(host(load), host(served))


# -- steps on traces -------------------------------------------------------------------


def first_state(weights):
  return train_state.restart(*weights[0], OPTIMIZER, reference=False)


def logit_step(config, **changes):
  fixed = dict(student=STUDENT, teacher_policy=TEACHER, optimizer=OPTIMIZER)
  return functools.partial(
    distillation.logit_step, config=config, **{**fixed, **changes}
  )


@pytest.fixture(scope="module")
def learn():
  """The jitted step on [HEIGHT, WIDTH] pages."""
  return jax.jit(
    logit_step(DistillConfig(divergence="reverse_kl", router_bias_rate=0.01))
  )


def test_a_student_moves_towards_its_teacher_on_traces(learn, weights):
  state, pages, history = first_state(weights), packed(some_pages()), []
  other = packed(some_pages(seed=1))

  def unseen(state):
    student = state.params, state.router
    (_, (metrics, _)), _ = loss_and_gradients(
      (student, weights[1]), other, count_of(other)
    )
    return metrics["divergence"]

  before = unseen(state)
  for i in range(10):
    assert int(state.step) == i
    state, metrics = learn(state, pages, weights[1])
    history.append(float(metrics["divergence"]))
  assert history[-1] < 0.5 * history[0]
  assert unseen(state) < before


def test_a_batch_without_targets_changes_nothing(learn, weights):
  """Not even by AdamW's momentum, and no router bias."""
  pages = packed(some_pages())
  state, _ = learn(first_state(weights), pages, weights[1])
  nothing = pages.replace(targets=jnp.zeros_like(pages.targets))
  after, metrics = learn(state, nothing, weights[1])
  assert_same(host(after), host(state.replace(step=state.step + 1)))
  assert all(float(x) == 0 for x in metrics.values())


def test_the_teacher_is_no_constant_of_the_program(weights):
  args = first_state(weights), packed(some_pages()), weights[1]
  program = jax.make_jaxpr(logit_step(DistillConfig()))(*args)
  assert sum(np.size(x) for x in program.consts) < VOCAB


# -- on policy -------------------------------------------------------------------------

KEY, K = jax.random.key(7), 2
SAMPLED = OnPolicyConfig(
  group_size=4, max_tokens=6, minibatches=K, micro_batches=4, router_bias_rate=0.01
)


def on_policy(config, **changes):
  fixed = dict(student=STUDENT, teacher_policy=TEACHER, optimizer=OPTIMIZER)
  fixed |= dict(stop_ids=golden.STOP_IDS, pad_id=golden.PAD)
  return functools.partial(
    distillation.on_policy_step, config=config, **{**fixed, **changes}
  )


@pytest.fixture(scope="module")
def history(weights):
  """(state, rollout, metrics) after each of some steps of one program."""
  program, state, steps = jax.jit(on_policy(SAMPLED)), first_state(weights), []
  for _ in range(6):
    state, rollout, metrics = program(state, golden.prompt_batch(), KEY, weights[1])
    steps.append(host((state, rollout, metrics)))
  return steps


def test_a_student_moves_towards_its_teacher_on_its_own_samples(history):
  divergence = [float(metrics["divergence"]) for _, _, metrics in history]
  assert divergence[-1] < 0.5 * divergence[0]
  assert [int(state.step) for state, *_ in history] == [K * n for n in range(1, 7)]
  tokens = [rollout.tokens for _, rollout, _ in history]
  assert not np.array_equal(tokens[0], tokens[1])


def test_a_step_on_samples_is_logit_steps_on_them_as_traces(history, learn, weights):
  """So sampling adds no gradient, and micro-batches change nothing; and the trainer
  reads the samples as the sampler wrote them."""
  after, rollout, metrics = history[0]
  assert rollout.ended.any() and not rollout.ended.all()
  state, batch = first_state(weights), golden.prompt_batch()
  pages = distillation.pages_of(batch, rollout)
  logprobs = jnp.asarray(rollout.logprobs).reshape(-1, SAMPLED.max_tokens)
  order = key_of(KEY, state.step, SHUFFLE)
  pages, logprobs = shuffled((pages, logprobs), order, K)
  figures, biases = [], [weights[0][1]]
  for i in range(K):
    part = jax.tree.map(lambda x, i=i: x[i], pages)
    state, found = learn(state, part, weights[1])
    figures.append(found)
    biases.append(state.router)
  np.testing.assert_allclose(
    figures[0]["nll"], -logprobs[0].sum() / pages.targets[0].sum(), rtol=1e-4
  )
  assert_same(host(state), after, rtol=1e-3, atol=1e-5)
  for name in figures[0]:
    want = np.mean([x[name] for x in figures])
    np.testing.assert_allclose(metrics[name], want, rtol=1e-4, err_msg=name)
  moved = np.diff([jax.tree.leaves(host(x))[0] for x in biases], axis=0)
  assert (np.isclose(np.abs(moved), 0.01) | (moved == 0)).all() and moved.any()


def test_a_sample_is_a_page_with_its_completion_for_targets(history):
  batch, rollout = golden.prompt_batch(), history[0][1]
  pages = distillation.pages_of(batch, rollout)
  b, g, t = rollout.tokens.shape
  assert pages.tokens.shape == (b * g, batch.tokens.shape[1] + t)
  assert int(count_of(pages)) == rollout.mask.sum() == int(pages.targets.sum())
  want = Sequence.of_mask(pages.segments > 0).positions
  real = np.asarray(pages.segments > 0)
  np.testing.assert_array_equal(sft.positions(pages.segments)[real], want[real])
  row = 2 * g + 1  # sample 1 of problem 2
  prompt, sample = batch.tokens[2][batch.mask[2]], rollout.tokens[2, 1]
  written = np.concatenate([prompt, sample[rollout.mask[2, 1]]])
  np.testing.assert_array_equal(pages.tokens[row][real[row]], written)
  np.testing.assert_array_equal(
    pages.targets[row][real[row]], np.arange(len(written)) >= len(prompt)
  )


def test_samples_that_do_not_divide_are_refused(weights):
  step = on_policy(OnPolicyConfig(group_size=4, max_tokens=6, minibatches=3))
  args = first_state(weights), golden.prompt_batch(), KEY, weights[1]
  with pytest.raises(UserError, match=r"group_size=4 .*minibatches=3"):
    jax.eval_shape(step, *args)


def test_vocabularies_of_different_sizes_are_refused(weights):
  other = golden.Policy(golden.sizes.tiny(VOCAB + 2))
  state, teacher = first_state(weights), weights[1]
  sampling = on_policy(SAMPLED, teacher_policy=other)
  traces = logit_step(DistillConfig(), teacher_policy=other)
  for step, args in (
    (traces, (state, packed(some_pages()), teacher)),
    (sampling, (state, golden.prompt_batch(), KEY, teacher)),
  ):
    with pytest.raises(UserError, match=f"{VOCAB} tokens.*{VOCAB + 2}"):
      jax.eval_shape(step, *args)
