"""One test a defect that was seen in another framework, named after what goes wrong.

Some have a closer test elsewhere; here they stand together, so that none is lost.
"""

import ast
import itertools
import pathlib
import threading

import grpo_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import dynamic_sampling, experience, grpo, policy_loss, ppo, presets
from r1jax.data import problems
from r1jax.data.problem import Problem
from r1jax.evals import pass_at_k
from r1jax.objective import Objective
from r1jax.prompts import PromptBatch
from r1jax.rewards import accuracy
from r1jax.rewards.in_graph import Rewards
from r1jax.rewards.scorer import Scorer, ScorerConfig
from r1jax.rollout import Rollout

ROOT = pathlib.Path(__file__).parents[1]


def rows(new, old, advantage, count=1):
  """Outputs of one token each."""
  ones = jnp.ones((count, 1), jnp.float32)
  return experience.Rows(
    prompts=jnp.zeros((count, 1), jnp.int32),
    prompt_mask=jnp.ones((count, 1), bool),
    completions=jnp.zeros((count, 1), jnp.int32),
    completion_mask=jnp.ones((count, 1), bool),
    in_loss=jnp.ones(count, bool),
    in_mean=jnp.ones(count, bool),
    sampler_logprobs=old * ones,
    old_logprobs=old * ones,
    reference_logprobs=new * ones,
    advantages=advantage * ones,
    place=jnp.arange(count),
  )


def slope(new, old, advantage, **choices):
  """d loss / d log pi of one token."""
  batch = rows(new, old, advantage)

  def loss(x):
    o = Objective(kl_coef=0.0, **choices)
    totals = policy_loss.Totals.of(batch)
    return policy_loss.policy_loss(x, batch, o, totals, window=1)[0]

  return float(jax.grad(loss)(jnp.full((1, 1), new))[0, 0])


# 1. PPO's reward tensor made of token ids: scores of 0.9 and -0.5 became 0.


def test_a_float_reward_is_not_written_into_an_array_of_token_ids():
  batch = rows(-1.0, -1.0, 0.0, count=2)
  got = ppo.token_rewards(jnp.asarray([0.9, -0.5]), batch, kl_coef=0.0)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got[:, 0], np.float32([0.9, -0.5]))


# 2. A dynamic-sampling switch that nothing reads; overlong counted in characters.


def fake_rollout(lengths, rewards):
  lengths = np.asarray(lengths)
  b, g = lengths.shape
  mask = np.arange(8)[None, None] < lengths[..., None]
  zeros = jnp.zeros((b, g, 8), jnp.float32)
  rollout = Rollout(
    tokens=jnp.zeros((b, g, 8), jnp.int32),
    mask=jnp.asarray(mask),
    logprobs=zeros,
    entropy=zeros,
    ended=jnp.ones((b, g), bool),
  )
  prompts = PromptBatch(
    tokens=jnp.zeros((b, 1), jnp.int32),
    mask=jnp.ones((b, 1), bool),
    answers=jnp.zeros((b, 1, 1), jnp.int32),
    ids=jnp.arange(b, dtype=jnp.int32),
  )
  scored = Rewards.of(accuracy=(1.0, jnp.asarray(rewards, jnp.float32)))
  return dynamic_sampling.all_of(prompts, rollout, scored)


def test_dynamic_sampling_is_not_a_switch_that_nothing_reads():
  wave = fake_rollout([[3, 3], [3, 3]], [[1, 1], [0, 1]])
  slots = dynamic_sampling.fill(dynamic_sampling.empty(wave), wave, "reward")
  assert slots.filled.tolist() == [True, False]
  assert slots.prompts.ids[0] == 1 and int(slots.dropped) == 1


def test_the_overlong_penalty_does_not_count_characters():
  """It sees lengths in tokens and no text at all."""
  slots = fake_rollout([[4, 6, 7, 8]], [[0, 0, 0, 0]])
  o = Objective(overlong_buffer=4.0, kl_coef=0.0)
  batch = experience.counted(slots, o)
  penalty = experience.shaped(slots, batch, o, window=8).parts["overlong"]
  np.testing.assert_allclose(penalty[0], [0.0, -0.5, -0.75, -1.0])


# 3. k1 in the loss by default: it regularises nothing.


def test_k1_in_the_loss_is_nobodys_default_but_the_peers_own():
  assert Objective().kl == "k3"
  with_k1 = [n for n in presets.PRESETS if presets.objective(n).kl == "k1-in-loss"]
  assert with_k1 == ["tunix"]


# 4. The pessimistic bound inverted for A < 0; old log-probabilities never supplied;
#    CISPO's weight with a gradient.


def test_the_clip_is_not_on_the_wrong_side_for_negative_advantages():
  how = dict(clip_low=0.2, clip_high=0.2)
  assert slope(np.log(0.5), 0.0, -1.0, **how) == 0.0
  assert slope(np.log(1.5), 0.0, -1.0, **how) == pytest.approx(1.5)
  assert slope(np.log(1.5), 0.0, 1.0, **how) == 0.0
  assert slope(np.log(0.5), 0.0, 1.0, **how) == pytest.approx(-0.5)


@pytest.fixture(scope="module")
def one_step():
  """(state before, what the whole step returned) of two updates."""
  before = golden.new_state(golden.tiny_policy())
  step = jax.jit(golden.make_step(golden.tiny_policy()))
  return before, step(before, golden.prompt_batch(), jax.random.key(7))


def test_the_ratio_is_not_1_for_ever(one_step):
  """In the second update of a rollout the policy has left the one that sampled."""
  _, (_, _, metrics, trace) = one_step
  assert float(metrics["ratio_max"]) > 1.01
  moved = np.asarray(trace.logprobs - trace.old_logprobs)[np.asarray(trace.mask)]
  assert np.abs(moved).max() > 0.01


def test_cispos_weight_has_no_gradient():
  how = dict(clip="cispo", clip_low=10.0, clip_high=4.0)
  assert slope(np.log(2.0), 0.0, 1.0, **how) == pytest.approx(-2.0)
  assert slope(np.log(9.0), 0.0, 1.0, **how) == pytest.approx(-5.0)


# 5. The router bias moved in pre-training only.


def test_router_biases_are_not_forgotten_in_rl(one_step):
  before, (after, *_) = one_step
  for old, new in zip(
    jax.tree.leaves(before.router), jax.tree.leaves(after.router), strict=True
  ):
    assert not np.array_equal(old, new)


# 6. A resumed run that shuffles anew or skips problems.


def test_a_resumed_stream_neither_shuffles_anew_nor_skips():
  whole = problems.stream(20, 4, seed=3)
  want = [np.asarray(next(whole)) for _ in range(9)]
  first = problems.stream(20, 4, seed=3)
  for _ in range(4):
    next(first)
  resumed = problems.stream(20, 4, seed=3)
  resumed.set_state(first.get_state())
  for batch in want[4:]:
    np.testing.assert_array_equal(next(resumed), batch)


# 7. A reference that is the initial checkpoint for ever.


def test_the_reference_is_not_the_first_checkpoint_for_ever():
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    micro_batches=2,
    max_tokens=6,
    reference_refresh=2,
  )
  policy = golden.tiny_policy()
  step = jax.jit(golden.make_step(policy, config))
  after, *_ = step(golden.new_state(policy), golden.prompt_batch(), jax.random.key(7))
  for ours, reference in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(after.reference.params), strict=True
  ):
    np.testing.assert_array_equal(ours, reference)


# 8. Timeouts by signals in the trainer's process, which cannot kill native code and
#    work on the main thread alone.


def test_a_reward_is_right_and_in_time_in_any_thread():
  """In verl and TRL the alarm raised ValueError off the main thread, and all maths
  rewards were 0."""
  config = ScorerConfig(maths_seconds=2.0, workers=1)
  problem, said = Problem("p", (r"\frac{\sqrt{2}}{2}",)), []

  def score():
    hang, right = (rf"\boxed{{{x}}}" for x in ("9^{9^{9^{9}}}", r"1/\sqrt{2}"))
    with Scorer(config, [problem]) as scorer:
      said.extend(scorer.score([(text, problem) for text in (hang, right)]))

  thread = threading.Thread(target=score)
  thread.start()
  thread.join(60)
  assert [s.outcome for s in said] == ["timeout", "correct"]


def test_no_reward_waits_for_a_signal_in_this_process():
  for path in sorted((ROOT / "r1jax" / "rewards").glob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      name = getattr(node, "attr", "")
      assert name not in ("alarm", "setitimer", "sigtimedwait"), path
      called = isinstance(node, ast.Call) and ast.unparse(node.func) == "signal.signal"
      assert not called, path


# 9. pass@1 from the last sample's verdict, and a right answer without form as wrong.


def test_the_last_sample_does_not_decide_pass_at_1():
  verdicts = np.array([[True, False, False, False]])
  for order in itertools.permutations(range(4)):
    assert pass_at_k.pass_at_1(verdicts[:, order]) == 0.25
  said = "no think block, and <answer>0.5</answer>"
  assert accuracy.accuracy(said, ["1/2"]) == 1.0


# 10. "No answer found" as a candidate of the majority; strings that vote apart; a tie
#     that goes to the first.


def test_no_answer_is_not_the_majoritys_answer():

  def cons(answers, right):
    said = [None if a is None else pass_at_k.meaning(a) for a in answers]
    votes = np.array([pass_at_k.classes(said)])
    return pass_at_k.cons_at_n(votes, np.array([[a in right for a in answers]]))

  assert cons([None] * 6 + ["7"] * 5 + ["9"] * 5, ["7"]) == 0.5  # a tie is shared
  assert cons([None] * 6 + ["1/2", "0.5", "3"], ["1/2", "0.5"]) == 1.0


# And from what users report: the temperature left out of the trainer's side.


def test_the_trainers_side_has_the_samplers_temperature():
  """And its truncated support: otherwise the ratio is wrong before the first update."""
  config = grpo.GRPOConfig(
    group_size=4,
    minibatches=2,
    micro_batches=2,
    max_tokens=6,
    temperature=0.7,
    top_k=5,
    reference_refresh=4,
  )
  policy = golden.tiny_policy()
  step = jax.jit(golden.make_step(policy, config))
  _, _, metrics, _ = step(
    golden.new_state(policy), golden.prompt_batch(), jax.random.key(7)
  )
  assert float(metrics["sampler_gap_max"]) < 1e-4
