# ruff: noqa: E741
"""The oracle against finite differences and against numbers worked out on paper."""

from math import log

import numpy as np
import oracle
import pytest

MASK = np.arange(6) < np.array([[4], [6], [1], [5], [2], [3], [2]])
IN_LOSS = np.array([1, 1, 1, 0, 1, 1, 0], bool)
IN_MEAN = np.array([1, 1, 1, 1, 1, 0, 0], bool)
REAL = MASK & IN_LOSS[:, None]

PLAIN = {"kl_coef": 0.3}
TIGHT = {
  **{"log_ratio_clamp": 0.5, "kl_max": 0.1, "dual_clip": 1.4, "sum_norm": 7.0},
  **{"kl_coef": 0.3, "clip_low": 0.1, "off_policy": "token-mask"},
  **{"off_policy_cap": 1.3, "off_policy_floor": 0.6, "negative_mask": 0.1},
}
CAPPED = {
  **{"ratio_cap": 1.3, "kl_coef": 0.1, "clip_high": 0.15, "kl_max": 0.2},
  **{"off_policy": "sequence-truncate", "off_policy_cap": 1.1},
}


def batch(garbage=1e30, seed=847):
  """(l, o, s, f, m, in_loss, in_mean, A), with garbage where nothing counts.
  With this seed no ratio, clamped value or k3 is within 2e-3 of a kink."""
  rng = np.random.default_rng(seed)
  l = rng.uniform(-2.0, -0.5, MASK.shape)
  o, s, f = (l - rng.normal(0.0, scale, l.shape) for scale in (0.4, 0.3, 0.5))
  o -= rng.normal(0.0, 0.2, (len(l), 1))  # so that the ratio of a whole row clips too
  A = rng.normal(0.0, 1.0, l.shape)
  l, o, s, f, A = (
    np.where(REAL, x, sign * garbage)
    for x, sign in zip((l, o, s, f, A), (1, -1, -1, 1, -1), strict=True)
  )
  return l, o, s, f, MASK, IN_LOSS, IN_MEAN, A


def numeric_gradient(function, x, where, h=1e-5):
  gradient = np.zeros(x.shape)
  for index in np.argwhere(where):
    up, down = x.copy(), x.copy()
    up[*index] += h
    down[*index] -= h
    gradient[*index] = (function(up) - function(down)) / (2 * h)
  return gradient


@pytest.mark.parametrize("more", [PLAIN, TIGHT, CAPPED], ids=["plain", "tight", "cap"])
@pytest.mark.parametrize("aggregation", oracle.ALLOWED["aggregation"])
@pytest.mark.parametrize("kl", oracle.ALLOWED["kl"])
@pytest.mark.parametrize("clip", oracle.ALLOWED["clip"])
@pytest.mark.parametrize("ratio", oracle.ALLOWED["ratio"])
def test_gradient(ratio, clip, kl, aggregation, more):
  names = {"ratio": ratio, "clip": clip, "kl": kl, "aggregation": aggregation}
  choices, args = {**names, **more}, batch()
  value, gradient = oracle.loss_and_gradient(*args, **choices)
  assert value == oracle.loss(*args, **choices)
  numeric = numeric_gradient(
    lambda l: oracle.loss(l, *args[1:], stopped=args[0], **choices), args[0], REAL
  )
  np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)
  assert np.all(gradient[~REAL] == 0) and np.any(gradient)


@pytest.mark.parametrize("choices", [PLAIN, TIGHT, CAPPED])
@pytest.mark.parametrize("ratio", oracle.ALLOWED["ratio"])
def test_what_is_masked_has_no_say(choices, ratio):
  choices, (expected, slopes) = {**choices, "ratio": ratio}, (0.0, None)
  for garbage in (0.0, 1e30, -1e30, np.nan, np.inf):
    l, o, *_, A = args = batch(garbage)
    value, gradient = oracle.loss_and_gradient(*args, **choices)
    if garbage == 0:
      expected, slopes = value, gradient
    assert value == expected
    np.testing.assert_array_equal(gradient, slopes)
    flags = oracle.clip_flags(l, o, MASK, IN_LOSS, A, **choices)
    assert not any(np.any(flag[~REAL]) for flag in flags.values())


@pytest.mark.parametrize("choices", [TIGHT, CAPPED])
def test_the_batch_reaches_every_branch(choices):
  l, o, *_, A = args = batch()
  for name, flag in oracle.clip_flags(l, o, MASK, IN_LOSS, A, **choices).items():
    assert np.any(flag), name
  for name in set(choices) - {"sum_norm"}:
    without = {key: value for key, value in choices.items() if key != name}
    assert oracle.loss(*args, **choices) != oracle.loss(*args, **without), name


def test_unknown_choices():
  with pytest.raises(TypeError):
    oracle.loss(*batch(), temperature=1.0)
  with pytest.raises(ValueError, match="clip="):
    oracle.loss(*batch(), clip="PPO")


def one_row(l, A, o=(0.0, 0.0), s=None, f=(0.0, 0.0), **choices):
  """One row of two tokens; the sampler is the old policy unless said otherwise."""
  l, A, o, s, f = (np.array([x], float) for x in (l, A, o, o if s is None else s, f))
  yes, mask = np.array([True]), np.ones((1, 2), bool)
  value, gradient = oracle.loss_and_gradient(l, o, s, f, mask, yes, yes, A, **choices)
  flags = oracle.clip_flags(l, o, mask, yes, A, **choices)
  raised = [name for name in flags for flag in flags[name][0] if flag]
  return value, list(gradient[0]), raised


RATIOS = (log(1.5), log(0.5))  # of the two tokens
CLAMP = {"log_ratio_clamp": log(1.1)}
PAPER = [
  # l, A, choices, loss, gradient, flags
  (RATIOS, (1, 1), {}, -(1.2 + 0.5) / 2, (0, -0.25), ["high"]),
  (RATIOS, (1, 1), {"dual_clip": 1.4}, -(1.2 + 0.5) / 2, (0, -0.25), ["high"]),
  (RATIOS, (-1, -1), {}, (1.5 + 0.8) / 2, (0.75, 0), ["low"]),
  (RATIOS, (-1, -1), {"dual_clip": 1.4}, (1.4 + 0.8) / 2, (0, 0), ["low", "cap"]),
  (RATIOS, (-1, 1), {"ratio_cap": 1.4}, (1.4 - 0.5) / 2, (0, -0.25), ["cap"]),
  # With both, the flag goes by dual_clip.
  (RATIOS, (-1, 0), {"ratio_cap": 1.4, "dual_clip": 1.7}, 0.7, (0, 0), []),
  (RATIOS, (-1, 1), {"clip": "none"}, (1.5 - 0.5) / 2, (0.75, -0.25), []),
  (RATIOS, (-1, 0), {"clip": "cispo"}, 0.6 * log(1.5), (0.6, 0), ["low", "high"]),
  # The ratio of the row is sqrt(4 * 1) = 2: each token moves both terms, or its own.
  ((log(4), 0), (1, -3), {"ratio": "sequence", "clip": "none"}, 2, (1, 1), []),
  ((log(4), 0), (1, -3), {"ratio": "sequence-token", "clip": "none"}, 2, (-1, 3), []),
  # Clamped, they are 2 or 1.1, and only sequence-token keeps its slope.
  ((log(4), 0), (-1, 1), {"log_ratio_clamp": log(2)}, 0.5, (0, -0.5), []),
  ((log(4), 0), (-1, 0), {"ratio": "sequence", **CLAMP}, 0.55, (0, 0), []),
  ((log(4), 0), (-1, 0), {"ratio": "sequence-token", **CLAMP}, 0.55, (0.55, 0), []),
]


@pytest.mark.parametrize("l, A, choices, loss, gradient, raised", PAPER)
def test_surrogate_on_paper(l, A, choices, loss, gradient, raised):
  actual = one_row(l, A, **choices)
  np.testing.assert_allclose(actual[0], loss, rtol=1e-14)
  np.testing.assert_allclose(actual[1], gradient, rtol=1e-14, atol=1e-15)
  assert actual[2] == raised


@pytest.mark.parametrize(
  "kl, kl_max, value, slope",
  [
    ("k1-in-loss", 0, -log(2), 1),
    ("k2", 0, log(2) ** 2 / 2, -log(2)),
    ("k3", 0, 1 - log(2), -1),
    ("k3", 0.1, 0.1, 0),
    ("ratio-k3", 0, 3 * (1 - log(2)), 3 * (1 - log(2)) - 3),
    ("ratio-k3", 0.1, 0.3, 0.3),
    ("k1-in-reward", 0, 0, 0),
  ],
)
def test_kl_on_paper(kl, kl_max, value, slope):
  """f - l = log 2 and l - o = log 3 on both tokens, no advantage."""
  l, f, o = [-2.0] * 2, [log(2) - 2] * 2, [-2 - log(3)] * 2
  choices = {"kl": kl, "kl_max": kl_max, "kl_coef": 10.0}
  actual = one_row(l, (0, 0), o, f=f, **choices)
  np.testing.assert_allclose(actual[0], 10 * value, rtol=1e-13)
  np.testing.assert_allclose(actual[1], [5 * slope] * 2, rtol=1e-13)


@pytest.mark.parametrize(
  "choices, weights",
  [
    ({"off_policy": "token-truncate"}, (2, 0.5)),  # the ratios are 4 and 0.5
    ({"off_policy": "token-mask"}, (0, 0.5)),
    ({"off_policy": "token-mask", "off_policy_floor": 0.6}, (0, 0)),
    ({"off_policy": "sequence-truncate", "off_policy_cap": 1.5}, (1.5, 1.5)),
    ({"off_policy": "sequence-mask", "off_policy_cap": 2.5}, (2, 2)),
    ({"off_policy": "sequence-mask", "off_policy_cap": 1.5}, (0, 0)),
    ({"negative_mask": 0.5}, (1, 1)),  # mean of s - l is -log(2) / 2
  ],
)
def test_weights_on_paper(choices, weights):
  actual = one_row((0, 0), (1, -3), s=(-log(4), log(2)), clip="none", **choices)
  np.testing.assert_allclose(actual[1], [-weights[0] / 2, weights[1] * 3 / 2])


def test_negative_mask_drops_only_negative_advantages():
  """The sampler was surer by 1 on average: past 0.9, and not past 1.1."""
  s = (2.0, 0.0)
  assert one_row((0, 0), (1, -3), s=s, negative_mask=0.9)[:2] == (-0.5, [-0.5, 0])
  assert one_row((0, 0), (1, -3), s=s, negative_mask=1.1)[:2] == (1.0, [-0.5, 1.5])


@pytest.mark.parametrize(
  "aggregation, loss",
  [  # rows of 2, 1 and no tokens, of -1 each on the first and -5 on the second
    ("seq-mean-token-mean", (-1 - 5) / 2),
    ("token-mean", (-2 - 5) / 3),
    ("seq-mean-token-sum-norm", (-2 - 5) / 10 / 2),
  ],
)
def test_aggregation_on_paper(aggregation, loss):
  zero, mask = np.zeros((3, 2)), np.array([[1, 1], [1, 0], [1, 1]], bool)
  A = np.array([[1, 1], [5, 5], [9, 9]])
  in_loss, in_mean = np.array([1, 1, 0], bool), np.array([1, 0, 1], bool)
  rows = (zero, zero, zero, zero, mask, in_loss, in_mean, A)
  actual = oracle.loss(*rows, aggregation=aggregation, sum_norm=10.0)
  assert actual == pytest.approx(loss, rel=1e-14)
  nothing = (zero, zero, zero, zero, mask, in_loss & False, in_mean & False, A)
  assert oracle.loss(*nothing, aggregation=aggregation) == 0.0


def test_advantages_on_paper():
  def of(kind, *parts, weights=None, ddof=1, eps=0.0):
    weights = [1.0] * len(parts) if weights is None else weights
    return oracle.advantages(kind, parts, weights, std_ddof=ddof, std_eps=eps).tolist()

  root = 2**0.5
  two = [[0.0, 2.0], [1.0, 1.0]]  # the second group is all equal
  assert of("dr_grpo", two) == [[-1, 1], [0, 0]]
  assert of("dr_grpo", two, weights=[3.0]) == [[-3, 3], [0, 0]]
  assert of("rloo", two) == [[-2, 2], [0, 0]]
  assert of("grpo", two, ddof=0) == [[-1, 1], [0, 0]]
  assert of("grpo", two, ddof=0, eps=1.0) == [[-0.5, 0.5], [0, 0]]
  np.testing.assert_allclose(of("grpo", two), [[-1 / root, 1 / root], [0, 0]])
  # 0, 2, 1, 1: squares 1 + 1 over 4, or over 3
  np.testing.assert_allclose(of("batch_std", two, ddof=0), [[-root, root], [0, 0]])
  np.testing.assert_allclose(of("batch_std", two)[0][1], 1.5**0.5)
  # Parts (0, 9) and (3, 1): +-1 each, Y = (-1, 1) + 2 (1, -1) = (1, -1).
  a, b = [[0.0, 9.0]], [[3.0, 1.0]]
  assert of("gdpo", a, b, weights=[1.0, 2.0], ddof=0) == [[1, -1]]
  # With weights 1 and 1 they cancel, and GRPO of the sum (3, 10) does not.
  assert of("gdpo", a, b, ddof=0) == [[0, 0]]
  assert of("grpo", a, b, ddof=0) == [[-1, 1]]
  for kind in ("grpo", "dr_grpo", "rloo", "batch_std", "gdpo"):
    assert of(kind, [[0.1], [0.7]]) == [[0], [0]]  # groups of one
    assert of(kind, [[0.1] * 3] * 2) == [[0] * 3] * 2


def test_overlong_on_paper():
  lengths = (0, 80, 90, 100, 101)
  actual = [oracle.overlong(length, 100, 20, 0.5) for length in lengths]
  assert actual == [0, 0, -0.25, -0.5, -0.5]


def test_gae():
  rng = np.random.default_rng(0)
  r, V = (np.where(MASK, rng.normal(size=MASK.shape), 1e30) for _ in range(2))
  A, returns = oracle.gae(r, V, MASK, gamma=1.0, lam=1.0)
  later = np.cumsum(np.where(MASK, r, 0)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(A, np.where(MASK, later - V, 0), atol=1e-14)
  np.testing.assert_allclose(returns, np.where(MASK, later, 0), atol=1e-14)
  # delta = (1 + 0.5 * 4 - 2, 3 - 4) = (1, -1); A = (1 + 0.5 * 0.5 * -1, -1)
  r, V, mask = np.array([[1.0, 3.0, 9.0]]), np.array([[2.0, 4.0, 9.0]]), [[1, 1, 0]]
  A, returns = oracle.gae(r, V, mask, gamma=0.5, lam=0.5)
  assert (A.tolist(), returns.tolist()) == ([[0.75, -1, 0]], [[2.75, 3, 0]])


def test_token_rewards():
  o, f = np.array([[1.0, 2.0, 1e30]] * 2), np.array([[0.5, 3.0, -1e30]] * 2)
  mask = [[1, 1, 0], [1, 0, 0]]
  actual = oracle.token_rewards([5.0, 7.0], o, f, mask, kl_coef=2.0)
  assert actual.tolist() == [[-1, 7, 0], [6, 0, 0]]


@pytest.mark.parametrize("value_clip", [0.0, 0.3])
@pytest.mark.parametrize("aggregation", oracle.ALLOWED["aggregation"])
def test_value_loss_gradient(value_clip, aggregation):
  v, v_old, returns, *_ = batch()
  rows = (v_old, returns, MASK, IN_LOSS, IN_MEAN)
  more = {"value_clip": value_clip, "aggregation": aggregation, "sum_norm": 7.0}
  _, gradient = oracle.value_loss_and_gradient(v, *rows, **more)
  numeric = numeric_gradient(
    lambda x: oracle.value_loss_and_gradient(x, *rows, **more)[0], v, REAL
  )
  np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)
  assert np.any(gradient[REAL] == 0) == bool(value_clip)


def test_value_loss_on_paper():
  """Errors 3 (clipped 1.5 is smaller) and 1 (clipped 2.5 is larger, and still)."""
  yes, mask = np.array([True]), np.ones((1, 2), bool)
  more = {"aggregation": "token-mean", "sum_norm": 1.0}
  v, old, returns = [[3.0, 2.0]], [[1.0, 0.0]], [[0.0, 3.0]]
  arrays = (v, old, returns, mask, yes, yes)
  clipped = oracle.value_loss_and_gradient(*arrays, value_clip=0.5, **more)
  assert (clipped[0], clipped[1].tolist()) == ((9 + 2.5**2) / 4, [[1.5, 0]])
  plain = oracle.value_loss_and_gradient(*arrays, value_clip=0.0, **more)
  assert (plain[0], plain[1].tolist()) == ((9 + 1) / 4, [[1.5, -0.5]])
