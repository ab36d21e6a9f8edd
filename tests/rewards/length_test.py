"""The penalty of long outputs: the host rule, its twin in the graph, and that both
count tokens."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from r1jax.data.tokenizer import Tokenizer
from r1jax.dynamic_sampling import all_of
from r1jax.errors import UserError
from r1jax.experience import counted, shaped
from r1jax.objective import Objective
from r1jax.prompts import PromptBatch
from r1jax.rewards import in_graph, length
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout

WINDOWS = [  # window, buffer, penalty
  (64, 13),
  (20, 4),
  (20, 20),  # the slope starts at the first token
  (7, 1),  # only the last token costs
  (1, 1),
]


@pytest.mark.parametrize("window, buffer", WINDOWS)
def test_the_host_rule_is_the_formula_at_every_length(window, buffer):
  how = dict(window=window, buffer=buffer)
  for n in range(window + 1):
    want = oracle.overlong(n, **how, penalty=1.0)
    np.testing.assert_allclose(length.overlong(n, **how), want, atol=1e-12)


@pytest.mark.parametrize("window, buffer", WINDOWS)
def test_the_twin_in_the_graph_equals_the_host_rule(window, buffer):
  how = dict(window=window, buffer=buffer)
  lengths = jnp.arange(window + 1, dtype=jnp.int32)[None]
  got = in_graph.overlong(lengths, **how)
  assert got.dtype == jnp.float32
  want = [length.overlong(n, **how) for n in range(window + 1)]
  np.testing.assert_allclose(got[0], want, rtol=1e-6, atol=1e-7)


def test_dapos_numbers():
  """20,480 tokens of which the last 4,096 are the buffer (arXiv 2503.14476)."""
  how = dict(window=20_480, buffer=4096)
  got = [length.overlong(n, **how) for n in (0, 16_384, 18_432, 20_480, 30_000)]
  np.testing.assert_allclose(got, [0, 0, -0.5, -1, -1])


def test_a_longer_output_never_pays_less():
  got = [length.overlong(n, window=30, buffer=9) for n in range(31)]
  assert (np.diff(got) <= 0).all()
  assert got[21] == 0 > got[22]


@pytest.mark.parametrize(
  "buffer, window, tokens", [(0.2, 64, 13), (0.2, 20_480, 4096), (5, 64, 5), (1, 1, 1)]
)
def test_a_buffer_below_1_is_a_share_of_the_window(buffer, window, tokens):
  assert Objective(overlong_buffer=buffer).overlong_tokens(window) == tokens


@pytest.mark.parametrize("buffer, window", [(65, 64), (0.01, 20)])
def test_a_buffer_that_does_not_fit_is_refused(buffer, window):
  with pytest.raises(UserError, match=r"overlong_buffer=.*1\.\."):
    Objective(overlong_buffer=buffer).overlong_tokens(window)


def shaped_rewards(tokens, counts, o, *, ended=True) -> Rewards:
  """Of one problem's outputs whose rule reward is 0.25, through `experience.shaped`."""
  tokens, counts = jnp.asarray(tokens, jnp.int32)[None], np.asarray(counts)
  mask = jnp.asarray(np.arange(tokens.shape[-1])[None] < counts[:, None])[None]
  zeros = jnp.zeros(tokens.shape, jnp.float32)
  rollout = Rollout(
    tokens=tokens,
    mask=mask,
    logprobs=zeros,
    entropy=zeros,
    ended=jnp.full(tokens.shape[:2], ended),
  )
  prompts = PromptBatch(
    tokens=jnp.zeros((1, 3), jnp.int32),
    mask=jnp.ones((1, 3), bool),
    answers=jnp.zeros((1, 1, 1), jnp.int32),
    ids=jnp.zeros(1, jnp.int32),
  )
  rewards = Rewards.of(rule=(0.5, jnp.full(tokens.shape[:2], 0.5)))
  slots = all_of(prompts, rollout, rewards)
  return shaped(slots, counted(slots, o), o, tokens.shape[-1])


def test_overlong_counts_tokens_not_characters():
  """A text of long pieces costs what one of single digits costs, token for token."""
  texts = [f"<think>{i} plus 7</think>" for i in range(40)]
  tokenizer = Tokenizer.train(texts, vocab=330)
  long, short = tokenizer.id("</answer>"), tokenizer.encode("7")[0]
  window, counts = 10, [9, 9, 7, 7]
  tokens = np.zeros((4, window), int)
  for row, (token, count) in enumerate(zip([long, short] * 2, counts, strict=True)):
    tokens[row, :count] = token
  characters = [
    len(tokenizer.decode(row[:count]))
    for row, count in zip(tokens, counts, strict=True)
  ]
  assert characters == [81, 9, 63, 7]  # all on other sides of the bound but one
  o = Objective(overlong_buffer=4, overlong_penalty=2.0)
  rewards = shaped_rewards(tokens, counts, o)
  want = np.array([-0.75, -0.75, -0.25, -0.25])
  np.testing.assert_allclose(rewards.parts["overlong"][0], want, rtol=1e-6)
  np.testing.assert_allclose(rewards.total[0], 0.25 + 2 * want, rtol=1e-6)
  assert rewards.weights[-1] == ("overlong", 2.0)


def test_padding_after_the_end_costs_nothing():
  o = Objective(overlong_buffer=4)
  rewards = shaped_rewards(np.full((2, 10), 7), [6, 10], o)
  assert np.array_equal(rewards.parts["overlong"][0], [0.0, -1.0])


def test_without_a_buffer_there_is_no_such_part():
  rewards = shaped_rewards(np.full((2, 10), 7), [6, 10], Objective())
  assert set(rewards.parts) == {"rule"}
  assert np.array_equal(rewards.total, [[0.25, 0.25]])


def test_the_price_of_a_truncated_output_comes_on_top():
  o = Objective(overlong_buffer=4, truncated="penalise", truncation_penalty=0.5)
  rewards = shaped_rewards(np.full((2, 10), 7), [10, 8], o, ended=False)
  np.testing.assert_allclose(rewards.total[0], [0.25 - 1 - 0.5, 0.25 - 0.5 - 0.5])
