"""Drafts by the MTP module leave the policy's distribution as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK
from rollout_test import NETWORK, PAD, ROWS, VOCAB, batch_of

from r1jax import experience, rollout, speculative
from r1jax.errors import UserError
from r1jax.models import config, policy
from r1jax.models.sequence import Sequence
from r1jax.sampling import Sampler

DRAFTING = policy.Policy(dataclasses.replace(NETWORK.config, mtp_depth=1))
DENSE = policy.Policy(  # grouped queries below, an MTP module of experts on top
  config.tiny_dense(
    VOCAB,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    dense_ffn=24,
    expert_ffn=12,
    experts=4,
    active_experts=2,
    mtp_depth=1,
  )
)
BOTH = pytest.mark.parametrize(
  "network", [DRAFTING, pytest.param(DENSE, marks=pytest.mark.slow)], ids=["mla", "gqa"]
)


@functools.lru_cache
def program(network, batch, settings):
  def draw(weights, prompts, key):
    return rollout.sample(network, *weights, prompts, key, **dict(settings))

  return jax.jit(draw, compiler_options=QUICK)


def sample(network, weights, batch, seed=0, **settings):
  how = dict(group_size=4, max_tokens=24, pad_id=PAD, stop_ids=(3,)) | settings
  run = program(network, len(batch.ids), tuple(sorted(how.items())))
  return jax.device_get(run(weights, batch, jax.random.key(seed)))


@BOTH
def test_the_likeliest_tokens_are_the_same_with_and_without_drafts(
  network, random_weights
):
  weights, batch = random_weights(network), batch_of([*ROWS, [5]])
  plain = sample(network, weights, batch, temperature=0.0, stop_ids=(3, 5))
  drafted = sample(
    network, weights, batch, temperature=0.0, stop_ids=(3, 5), speculative="on"
  )
  np.testing.assert_array_equal(drafted.tokens, plain.tokens)
  np.testing.assert_array_equal(drafted.mask, plain.mask)
  np.testing.assert_array_equal(drafted.ended, plain.ended)
  if network is DRAFTING:
    np.testing.assert_array_equal(
      drafted.experts * drafted.mask[:, :, None, :, None],
      plain.experts * plain.mask[:, :, None, :, None],
    )


@BOTH
def test_tokens_follow_the_policys_distribution_exactly(network, random_weights):
  """Every token given the one before it, from both kinds of step: chi-square against
  probabilities of the full forward pass."""
  weights, n, prompt = random_weights(network), 12_000, ROWS[2]
  said = sample(
    network,
    weights,
    batch_of([prompt]),
    group_size=n,
    max_tokens=3,
    stop_ids=(),
    speculative="on",
  )
  accepted = said.accepted.sum() / said.drafted.sum()
  assert 0.05 < accepted < 0.95, "both kinds of step must be seen"
  tokens = said.tokens[0]
  rows = [[*prompt, a, b] for a in range(VOCAB) for b in range(VOCAB)]
  p = np.exp(log_softmax(forward(network, weights, jnp.asarray(rows, jnp.int32))))
  first = p[0, len(prompt) - 1]
  second = p[::VOCAB, len(prompt)]
  third = p[:, len(prompt) + 1].reshape(VOCAB, VOCAB, VOCAB)
  pairs = first[:, None] * second
  whole = pairs[:, :, None] * third
  for expected, kept in (
    (pairs, tokens[:, :2]),
    (whole.sum(axis=0), tokens[:, 1:]),
  ):
    counts = np.zeros(expected.shape)
    np.add.at(counts, tuple(kept.T), 1)
    expected = n * expected
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    cells = common.sum()
    assert cells > 30
    assert abs(chi_square - cells) < 5 * np.sqrt(2 * cells)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  high = logits.max(-1, keepdims=True)
  return logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def forward(network, weights, tokens):
  seq = Sequence.of_mask(jnp.ones_like(tokens, bool))
  variables = dict(zip(("params", "router"), weights, strict=True))
  hidden = network.apply(variables, tokens, seq).hidden
  return network.apply(variables, hidden, method="logits")


@BOTH
def test_log_probabilities_are_the_policys(network, random_weights):
  weights, batch, temperature = random_weights(network), batch_of(ROWS), 0.7
  said = sample(network, weights, batch, temperature=temperature, speculative="on")
  rows = experience.rows_of(batch, jax.tree.map(jnp.asarray, said))
  want, out = jax.jit(
    lambda rows: experience.completion_logprobs(network, *weights, rows, temperature)
  )(rows)
  mask = said.mask.reshape(want.shape)
  assert mask.sum() > 60 and said.accepted.sum() > 0
  got = said.logprobs.reshape(want.shape)
  np.testing.assert_allclose(got[mask], np.asarray(want)[mask], rtol=0, atol=2e-5)
  if said.experts is not None:
    real = np.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
    chosen = np.asarray(out.experts).transpose(1, 2, 0, 3)[real]
    kept = np.asarray(rows.experts).transpose(0, 2, 1, 3)[real]
    np.testing.assert_array_equal(kept, chosen)


def test_drafts_of_a_truncated_sampler_stay_in_its_support(random_weights):
  weights, batch = random_weights(DRAFTING), batch_of(ROWS)
  said = sample(DRAFTING, weights, batch, top_k=3, speculative="on")
  keep = np.unpackbits(said.support, axis=-1).astype(bool)
  inside = np.take_along_axis(keep, said.tokens[..., None], axis=-1)[..., 0]
  assert inside[said.mask].all() and said.accepted.sum() > 0
  assert (keep.sum(-1)[said.mask] == 3).all()


def test_an_output_does_not_depend_on_its_slot(random_weights):
  weights, batch = random_weights(DRAFTING), batch_of([*ROWS, [5]])
  everyone = sample(DRAFTING, weights, batch, speculative="on", max_tokens=40)
  few = sample(DRAFTING, weights, batch, speculative="on", max_tokens=40, slots=3)
  np.testing.assert_array_equal(few.tokens, everyone.tokens)
  np.testing.assert_array_equal(few.accepted, everyone.accepted)
  tight = sample(
    DRAFTING, weights, batch, speculative="on", max_tokens=40, slots=8, cache_tokens=273
  )
  shorter = tight.mask
  np.testing.assert_array_equal(tight.tokens[shorter], everyone.tokens[shorter])
  assert tight.starved.any() and not tight.starved.all()


def test_steps_are_saved_by_what_is_accepted(random_weights):
  """A step writes one token and, where the draft stays, another."""
  weights, batch = random_weights(DRAFTING), batch_of([ROWS[0]])
  said = sample(DRAFTING, weights, batch, speculative="on", group_size=1)
  assert said.steps[0] == said.lengths[0, 0] - said.accepted[0, 0]
  assert said.figures()["draft_acceptance"] == said.accepted.sum() / said.drafted.sum()


def test_a_stop_in_a_draft_ends_the_output_there(random_weights):
  weights, batch = random_weights(DRAFTING), batch_of(ROWS)
  said = sample(DRAFTING, weights, batch, seed=4, stop_ids=(3, 5, 9), speculative="on")
  for tokens, n, ended in zip(
    said.tokens.reshape(-1, 24), said.lengths.ravel(), said.ended.ravel(), strict=True
  ):
    stops = np.flatnonzero(np.isin(tokens[:n], (3, 5, 9)))
    assert ended == (len(stops) > 0) and (not ended or stops[0] == n - 1)
    assert (tokens[n:] == PAD).all()


def test_without_an_mtp_module_drafts_are_refused_and_auto_makes_none(monkeypatch):
  monkeypatch.setattr(speculative, "AUTO_ROWS", {"cpu": 4})
  s = Sampler(group_size=1, max_tokens=4, pad_id=0, speculative="on")
  with pytest.raises(UserError, match=r"MTP module.*mtp_depth=1"):
    speculative.wanted(s, NETWORK, 1)
  auto = dataclasses.replace(s, speculative="auto")
  assert not speculative.wanted(auto, NETWORK, 1)
  assert speculative.wanted(auto, DRAFTING, 4)
  assert not speculative.wanted(auto, DRAFTING, 5)
  with pytest.raises(
    UserError, match=r"speculative=True must be 'off', 'on' or 'auto'"
  ):
    dataclasses.replace(s, speculative=True)
