"""Host rewards in the step: every row once, in its place, and lost ones masked."""

import collections
import threading

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from trees import assert_same

from r1jax import segments, sharding
from r1jax.advantages import ADVANTAGES, group_relative
from r1jax.data.problem import Problem
from r1jax.errors import UserError
from r1jax.host_reward import HostReward
from r1jax.objective import Objective
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rewards.scorer import Scorer, ScorerConfig
from r1jax.rewards.total import Breakdown
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout

LOST = OUTCOMES.index("infrastructure")
B, G, T = 8, 4, 6


class Letters:
  """A tokenizer of one letter a token."""

  def decode(self, ids):
    return "".join(chr(97 + int(i)) for i in ids)


class Counting:
  """Stands in for a scorer: scores by a function, and keeps what it was asked."""

  def __init__(self, score, weights=None):
    self.weights = weights or {"count": 1.0}
    self.asked, self._score, self._lock = collections.Counter(), score, threading.Lock()

  def score(self, samples):
    with self._lock:
      self.asked.update((text, p.problem) for text, p in samples)
    return [self._score(text, p) for text, p in samples]


def by_text(text, problem):
  """A reward that depends on the text and on the problem."""
  value = float(len(text)) + 0.01 * int(problem.problem) + 0.1 * text.count("c")
  parts = {"count": value, "half": value / 2}
  outcome = "correct" if len(text) % 2 else "wrong"
  return Breakdown(value, parts, outcome)


def a_rollout(seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, T + 1, (B, G))
  mask = np.arange(T) < lengths[..., None]
  tokens = rng.integers(0, 26, (B, G, T)).astype(np.int32)
  zeros = jnp.zeros((B, G, T), jnp.float32)
  return Rollout(
    jnp.asarray(tokens), jnp.asarray(mask), zeros, zeros, jnp.ones((B, G), bool)
  )


def prompts(order):
  empty = jnp.zeros((B, 1), jnp.int32)
  return PromptBatch(empty, empty.astype(bool), empty[..., None], jnp.asarray(order))


PROBLEMS = [Problem(str(i), ("1",)) for i in range(50)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_every_row_is_scored_once_and_stands_in_its_place(shape):
  """Also where devices along the tensor axis hold the same rows."""
  scorer = Counting(by_text, {"count": 1.0, "half": 0.5})
  reward = HostReward(scorer, PROBLEMS, Letters())
  rollout = a_rollout()
  order = np.random.default_rng(1).permutation(50)[:B].astype(np.int32)
  mesh = mesh_of(shape, jax.devices()[: int(np.prod(shape))])
  with jax.set_mesh(mesh):
    given = jax.device_put((prompts(order), rollout), sharding.batch_sharding(mesh))
    got = jax.jit(reward)(*given)
  texts = [
    [Letters().decode(t[m]) for t, m in zip(ts, ms, strict=True)]
    for ts, ms in zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
  ]
  want = [
    [by_text(t, PROBLEMS[i]) for t in row] for i, row in zip(order, texts, strict=True)
  ]
  for name in ("count", "half"):
    expected = [[s.parts[name] for s in row] for row in want]
    np.testing.assert_allclose(got.parts[name], expected, rtol=1e-6)
  total = [[s.parts["count"] + 0.5 * s.parts["half"] for s in row] for row in want]
  np.testing.assert_allclose(got.total, total, rtol=1e-6)
  assert [[OUTCOMES[i] for i in row] for row in np.asarray(got.outcome)] == [
    [s.outcome for s in row] for row in want
  ]
  pairs = [(t, str(i)) for i, row in zip(order, texts, strict=True) for t in row]
  assert scorer.asked == collections.Counter(pairs)


def test_without_a_mesh_one_callback_scores_all():
  scorer = Counting(by_text)
  got = jax.jit(HostReward(scorer, PROBLEMS, Letters()))(
    prompts(np.arange(B)), a_rollout()
  )
  assert got.total.shape == (B, G) and scorer.asked.total() == B * G


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_large_batch_does_not_hang(devices):
  """On CPU, callbacks on all devices at once that wait for arrays of megabytes. With
  operands of more than 100 KB this never ends."""
  shape = (8, 16, 4096)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 26, shape), jnp.int32)
  mask = tokens < 20
  zeros = jnp.zeros(shape, jnp.float32)
  rollout = Rollout(tokens, mask, zeros, zeros, mask[..., 0])
  texts = []

  def score(text, problem):
    texts.append(text)
    return Breakdown(1.0, {"count": 1.0}, "correct")

  mesh = mesh_of((devices, 1, 1), jax.devices()[:devices])
  reward = jax.jit(HostReward(Counting(score), PROBLEMS, Letters()))
  with jax.set_mesh(mesh):
    given = jax.device_put(
      (prompts(np.arange(B)), rollout), sharding.batch_sharding(mesh)
    )
    for _ in range(3):
      assert float(reward(*given).total.sum()) == 8 * 16
  want = [
    Letters().decode(t[m])
    for t, m in zip(
      np.asarray(tokens).reshape(-1, 4096),
      np.asarray(mask).reshape(-1, 4096),
      strict=True,
    )
  ]
  assert collections.Counter(texts) == collections.Counter(3 * want)


# -- the step --------------------------------------------------------------------------


def count(text):
  """golden.reward_fn on text: tokens above half the vocabulary."""
  return float(sum(ord(c) - 97 >= golden.VOCAB // 2 for c in text))


def score_golden(text, problem, lost=lambda text: False):
  if lost(text):
    return Breakdown(0.0, {"count": 0.0}, "infrastructure", "no worker")
  value = count(text)
  return Breakdown(value, {"count": value}, "correct" if value else "wrong")


@pytest.fixture(scope="module")
def in_graph_step():
  policy = golden.tiny_policy()
  step = jax.jit(golden.make_step(policy))
  return step(golden.new_state(policy), golden.prompt_batch(), jax.random.key(7))


@pytest.fixture(scope="module")
def on_host():
  """One compiled step whose scorer each test chooses: score -> (outputs, reward)."""
  policy, reward = golden.tiny_policy(), HostReward(None, PROBLEMS, Letters())
  reward.scorer = Counting(score_golden)
  step = jax.jit(golden.make_step(policy, reward_fn=reward))

  def run(score):
    fresh = HostReward(None, PROBLEMS, Letters()).__dict__
    reward.__dict__.update({**fresh, "scorer": Counting(score)})
    out = step(golden.new_state(policy), golden.prompt_batch(), jax.random.key(7))
    return jax.block_until_ready(out), reward

  return run


def test_a_step_with_host_rewards_is_that_with_the_same_rewards_in_the_graph(
  on_host, in_graph_step
):
  (state, _, metrics, _), reward = on_host(score_golden)
  assert_same(state.params, in_graph_step[0].params, rtol=1e-5, atol=1e-6)
  for name in ("reward", "loss", "advantage_max", "kl"):
    np.testing.assert_allclose(metrics[name], in_graph_step[2][name], rtol=1e-4)
  shares = [float(metrics[f"outcome_{name}"]) for name in OUTCOMES]
  assert sum(shares) == pytest.approx(1.0)
  reward.check(0.0)


def test_lost_samples_have_no_share_in_a_steps_figures(on_host, in_graph_step):
  def lost(text):
    return text.startswith(tuple("hijklmnop"))

  (state, said, metrics, _), _ = on_host(
    lambda text, problem: score_golden(text, problem, lost)
  )
  rows = zip(
    np.asarray(said.tokens).reshape(-1, 6),
    np.asarray(said.mask).reshape(-1, 6),
    strict=True,
  )
  texts = [Letters().decode(t[m]) for t, m in rows]
  share = float(metrics["outcome_infrastructure"])
  assert 0.1 < share < 0.9 and share == pytest.approx(np.mean([*map(lost, texts)]))
  kept = [count(t) for t in texts if not lost(t)]
  assert float(metrics["reward"]) == pytest.approx(np.mean(kept), rel=1e-5)
  ours, theirs = (
    np.ravel(x["embedding"]) for x in (state.params, in_graph_step[0].params)
  )
  assert not np.allclose(ours, theirs)


def test_a_step_that_lost_every_sample_changes_no_parameter(on_host):
  (state, _, metrics, _), reward = on_host(
    lambda text, problem: score_golden(text, problem, lambda text: True)
  )
  assert_same(state.params, golden.new_state(golden.tiny_policy()).params)
  assert float(metrics["outcome_infrastructure"]) == 1.0
  assert all(np.isfinite(float(x)) for x in metrics.values())
  with pytest.raises(UserError, match="no sample of a step could be scored: no worker"):
    reward.check(1.0)
  reward.check(0.99)  # one device's share alone does not stop the run


def test_an_error_of_a_rule_stops_the_run_and_not_the_process(on_host):
  def fail(text, problem):
    raise UserError("the rule 'short' raised KeyError")

  (state, *_), reward = on_host(fail)
  assert_same(state.params, golden.new_state(golden.tiny_policy()).params)
  with pytest.raises(UserError, match="the rule 'short' raised KeyError"):
    reward.check(1.0)


def test_ctrl_c_in_a_callback_is_kept_for_the_loop(on_host):
  def stop(text, problem):
    raise KeyboardInterrupt

  _, reward = on_host(stop)
  with pytest.raises(KeyboardInterrupt):
    reward.check(1.0)


def test_segments_take_host_rewards_too(in_graph_step):
  policy = golden.tiny_policy()
  pieces = segments.make_segments(
    segment_tokens=4,
    policy=policy,
    optimizer=golden.optimizer(),
    reward_fn=HostReward(Counting(score_golden), PROBLEMS, Letters()),
    config=golden.CONFIG,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
  )
  state, *_ = pieces(golden.new_state(policy), golden.prompt_batch(), jax.random.key(7))
  assert_same(state.params, in_graph_step[0].params, rtol=1e-5, atol=1e-6)


def test_outputs_are_scored_while_others_are_still_written(in_graph_step):
  """With segments the host hears of an output as soon as it is over; the step's own
  call asks for nothing twice, and its numbers are the same."""
  policy = golden.tiny_policy()
  reward = HostReward(Counting(score_golden), PROBLEMS, Letters())
  told = []

  def ahead(ids, outputs):
    pairs = zip(ids, outputs, strict=True)
    told.append([(i, tuple(tokens.tolist())) for i, tokens in pairs])
    reward.ahead(ids, outputs)

  pieces = segments.make_segments(
    segment_tokens=1,
    policy=policy,
    optimizer=golden.optimizer(),
    reward_fn=reward,
    config=golden.CONFIG,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
    ahead=ahead,
  )
  state, said, *_ = pieces(
    golden.new_state(policy), golden.prompt_batch(), jax.random.key(7)
  )
  assert_same(state.params, in_graph_step[0].params, rtol=1e-5, atol=1e-6)
  # A call tells of the outputs that one token more has ended; all but the last ones.
  ends = [{len(tokens) for _, tokens in call} for call in told]
  assert len(ends) > 2 and all(len(end) == 1 for end in ends)
  assert sorted(map(max, ends)) == [max(end) for end in ends]
  lengths = np.asarray(said.lengths)
  assert sum(map(len, told)) == (lengths < lengths.max()).sum()
  # Each output is scored once (two outputs of a problem may be the same text).
  assert set(reward.scorer.asked.values()) <= {1, 2, 3}
  assert sum(reward.scorer.asked.values()) <= lengths.size
  assert not reward._ahead


def test_an_error_of_a_rule_ahead_of_the_step_is_raised_by_the_loop():
  def fail(text, problem):
    raise UserError("the rule 'short' raised KeyError")

  reward = HostReward(Counting(fail), PROBLEMS, Letters())
  reward.ahead([0], [np.array([1, 2])])
  reward._on_host((1, 1, 3), [0], np.array([1, 2, -1]))
  with pytest.raises(UserError, match="the rule 'short' raised KeyError"):
    reward.check(1.0)


# -- statistics ------------------------------------------------------------------------


def masked(values, there):
  return np.ma.masked_array(values, ~there)


def by_hand(name, parts, weights, there, ddof, eps):
  """The estimators on what is there, in NumPy's masked arrays."""
  total = masked(sum(w * p for w, p in zip(weights, parts, strict=True)), there)

  def centred(x):
    return x - x.mean(axis=1, keepdims=True)

  def std(x, axis):
    count = np.maximum(x.count(axis=axis, keepdims=True), ddof + 1)
    squares = ((x - x.mean(axis=axis, keepdims=True)) ** 2).sum(
      axis=axis, keepdims=True
    )
    return np.sqrt(squares / (count - ddof))

  def over(x, s):
    return x / np.where(np.ma.filled(s, 0) == 0, 1.0, s + eps)

  if name == "grpo":
    found = over(centred(total), std(centred(total), 1))
  elif name == "dr_grpo":
    found = centred(total)
  elif name == "rloo":
    g = there.sum(axis=1, keepdims=True)
    found = centred(total) * g / np.maximum(g - 1, 1)
  elif name == "batch_std":
    found = over(centred(total), std(total, None))
  else:
    each = [centred(masked(p, there)) for p in parts]
    joined = sum(w * over(x, std(x, 1)) for w, x in zip(weights, each, strict=True))
    found = over(joined, std(joined, None))
  return np.ma.filled(found, 0.0)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_lost_samples_have_no_share_in_any_statistic(name, ddof):
  rng = np.random.default_rng(ddof)
  parts, weights = [rng.normal(size=(6, 5)) for _ in range(2)], [1.0, 0.5]
  there = rng.random((6, 5)) < 0.7
  there[0], there[1], there[2] = True, False, False
  there[2, 3] = True  # one of a group alone has nothing to be compared with
  outcome = jnp.where(there, 0, LOST)
  o = Objective(advantage=name, std_ddof=ddof, std_eps=1e-6)
  with jax.enable_x64(True):

    def ours(filler):
      named = {
        f"part{i}": (w, jnp.where(there, x, filler))
        for i, (w, x) in enumerate(zip(weights, parts, strict=True))
      }
      return group_relative(Rewards.of(outcome, **named), jnp.ones(6, bool), o)

    got, other = np.asarray(ours(0.0)), np.asarray(ours(1e3))
  np.testing.assert_array_equal(got, other)
  want = by_hand(name, parts, weights, there, ddof, 1e-6)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
  assert not got[~there].any()


def test_a_scorer_serves_several_devices_at_a_time():
  """A real pool, called back from eight devices at once."""
  with Scorer(ScorerConfig(maths="exact", workers=2), PROBLEMS) as scorer:
    reward = HostReward(scorer, PROBLEMS, Letters())
    mesh = mesh_of((8, 1, 1))
    with jax.set_mesh(mesh):
      given = (prompts(np.arange(B)), a_rollout())
      given = jax.device_put(given, sharding.batch_sharding(mesh))
      got = jax.block_until_ready(jax.jit(reward)(*given))
  reward.check(0.0)
  assert (np.asarray(got.outcome) == OUTCOMES.index("unparsable")).all()
