"""The policy's loss and gradient against tests/oracle.py, for every choice and preset.

The oracle is NumPy, written from the formulas alone. Everything runs in float64, and
what stands outside the masks is garbage.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from r1jax import advantages, experience, policy_loss, presets
from r1jax.dynamic_sampling import all_of
from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards
from r1jax.rollout import Rollout

T = 6
WINDOW = 6
NAMES = ("ratio", "log_ratio_clamp", "clip", "clip_low", "clip_high", "dual_clip")
NAMES += ("ratio_cap", "kl", "kl_coef", "kl_max", "aggregation", "off_policy")
NAMES += ("off_policy_cap", "off_policy_floor", "negative_mask")


@pytest.fixture(autouse=True)
def wide():
  with jax.enable_x64(True):
    yield


def for_oracle(o: Objective) -> dict:
  """The oracle's keywords for an Objective."""
  return {n: getattr(o, n) for n in NAMES} | {"sum_norm": o.sum_norm or WINDOW}


# -- cases -----------------------------------------------------------------------------


def case(seed=0, lengths=(6, 1, 3, 5, 2, 4), spread=0.4, garbage=1e30):
  """A ragged minibatch: l, o, s, f, m, in_loss, in_mean, A."""
  rng = np.random.default_rng(seed)
  shape = (len(lengths), T)
  m = np.arange(T)[None] < np.asarray(lengths)[:, None]
  l = -rng.gamma(2.0, 1.0, shape)  # noqa: E741
  near = [l + spread * rng.normal(size=shape) for _ in range(3)]
  o, s, f = (np.where(m, x, garbage) for x in near)
  in_loss = np.ones(len(lengths), bool)
  a = np.repeat(rng.normal(size=(len(lengths), 1)), T, axis=1)
  return dict(l=l, o=o, s=s, f=f, m=m, in_loss=in_loss, in_mean=in_loss.copy(), A=a)


def some_rows_out(c):
  """One output that was truncated and counts, one slot that is empty."""
  in_loss, in_mean = c["in_loss"].copy(), c["in_mean"].copy()
  in_loss[[1, 3]] = False
  in_mean[3] = False
  return {**c, "in_loss": in_loss, "in_mean": in_mean}


def all_rows_out(c):
  return {**c, "in_loss": np.zeros_like(c["in_loss"])}


def gaps(*values):
  """Log-ratios of exactly these sizes, both to the old policy and the reference."""
  c = case(seed=5, lengths=(1,) * len(values) + (2,) * len(values))
  d = np.array([*values, *values])[:, None]
  far = {"o": c["l"] - d, "s": c["l"] - d / 2, "f": c["l"] + d}
  return {**c, **{k: np.where(c["m"], x, 1e30) for k, x in far.items()}}


CASES = {
  "ragged": case(),
  "far": case(seed=1, spread=2.5),
  "one-token": case(seed=2, lengths=(1, 1, 1, 1)),
  "two": case(seed=3, lengths=(6, 2)),
  "rows-out": some_rows_out(case(seed=4)),
  "all-out": all_rows_out(case(seed=4)),
  "19-and-21": gaps(19.0, -19.0, 21.0, -21.0),
  "per-token": {**case(seed=6), "A": np.random.default_rng(6).normal(size=(6, T))},
}


def rows_of(c) -> experience.Rows:
  count = len(c["in_loss"])
  return experience.Rows(
    prompts=jnp.zeros((count, 1), jnp.int32),
    prompt_mask=jnp.ones((count, 1), bool),
    completions=jnp.zeros((count, T), jnp.int32),
    completion_mask=jnp.asarray(c["m"]),
    in_loss=jnp.asarray(c["in_loss"]),
    in_mean=jnp.asarray(c["in_mean"]),
    sampler_logprobs=jnp.asarray(c["s"]),
    old_logprobs=jnp.asarray(c["o"]),
    reference_logprobs=jnp.asarray(c["f"]),
    advantages=jnp.asarray(c["A"]),
    place=jnp.arange(count),
  )


def ours(c, o: Objective, totals=None):
  """(loss, gradient, metrics, per_token) of r1jax."""
  rows = rows_of(c)
  totals = policy_loss.Totals.of(rows) if totals is None else totals

  def loss_fn(x):
    return policy_loss.policy_loss(x, rows, o, totals, window=WINDOW)

  (loss, (metrics, per_token)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    jnp.asarray(c["l"])
  )
  assert loss.dtype == gradient.dtype == jnp.float64
  return float(loss), np.asarray(gradient), metrics, per_token


def compare(c, o: Objective):
  """Loss and gradient to 1e-6 relative; 0 wherever a token has no loss."""
  loss, gradient, metrics, per_token = ours(c, o)
  want_loss, want = oracle.loss_and_gradient(**c, **for_oracle(o))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6, atol=1e-12)
  np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-12)
  mask = c["m"] & c["in_loss"][:, None]
  assert (gradient[~mask] == 0).all()
  flags = oracle.clip_flags(
    c["l"], c["o"], c["m"], c["in_loss"], c["A"], **for_oracle(o)
  )
  codes = np.zeros(mask.shape, int)
  for code, side in enumerate(("low", "high", "cap"), start=1):
    codes = np.where(flags[side], code, codes)
    share = flags[side].sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    share = share.sum() / max(c["in_mean"].sum(), 1)
    got = float(metrics.get(f"clip_fraction_{side}", 0.0))
    np.testing.assert_allclose(got, share, rtol=1e-6, atol=1e-12, err_msg=side)
  assert np.array_equal(per_token["clipped"], codes)


# -- every choice against the oracle ---------------------------------------------------

PRODUCT = list(
  itertools.product(
    policy_loss.RATIOS,
    policy_loss.SURROGATES,
    policy_loss.KLS,
    policy_loss.AGGREGATIONS,
  )
)


def test_the_oracle_knows_every_row_of_every_table():
  tables = dict(
    ratio=policy_loss.RATIOS,
    clip=policy_loss.SURROGATES,
    kl=policy_loss.KLS,
    aggregation=policy_loss.AGGREGATIONS,
    off_policy=policy_loss.OFF_POLICY,
  )
  for name, table in tables.items():
    assert set(oracle.ALLOWED[name]) == set(table), name


@pytest.mark.parametrize(
  "ratio, clip, kl, aggregation", PRODUCT, ids=map("/".join, PRODUCT)
)
def test_every_combination_equals_the_oracle(ratio, clip, kl, aggregation):
  o = Objective(
    ratio=ratio,
    clip=clip,
    kl=kl,
    aggregation=aggregation,
    clip_low=0.2,
    clip_high=0.3,
    kl_coef=0.04,
    force_k1_in_loss=True,
  )
  for name in ("ragged", "rows-out", "19-and-21"):
    compare(CASES[name], o)


OPTIONS = {
  "symmetric": dict(clip_low=0.2, clip_high=0.2),
  "clip-higher": dict(clip_low=0.2, clip_high=0.28),
  "one-sided": dict(clip_low=10.0, clip_high=10.0),
  "dual": dict(clip_low=0.2, clip_high=0.2, dual_clip=3.0),
  "two-sided": dict(clip_low=0.2, clip_high=0.2, ratio_cap=4.0),
  "gspo": dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
  "cispo": dict(clip="cispo", clip_low=10.0, clip_high=4.0),
  "no-kl": dict(kl_coef=0.0),
  "kl-max": dict(kl_coef=0.1, kl_max=0.05),
  "ratio-k3-max": dict(kl="ratio-k3", kl_coef=0.1, kl_max=0.05),
  "no-clamp": dict(log_ratio_clamp=0.0, clip_low=0.2, clip_high=0.2),
  "tight-clamp": dict(log_ratio_clamp=0.3, kl="k2", kl_coef=0.1),
  "sum-norm": dict(aggregation="seq-mean-token-sum-norm", sum_norm=17.0),
  "sum-norm-window": dict(aggregation="seq-mean-token-sum-norm"),
  **{
    how: dict(off_policy=how, old_logprobs="trainer", off_policy_cap=1.1)
    for how in policy_loss.OFF_POLICY
  },
  "icepop": dict(
    off_policy="token-mask",
    old_logprobs="trainer",
    off_policy_cap=1.3,
    off_policy_floor=0.8,
  ),
  "negative-mask": dict(negative_mask=0.1),
  "negative-mask-and-weights": dict(
    negative_mask=0.1, off_policy="sequence-truncate", old_logprobs="trainer"
  ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_the_oracle(option, name):
  compare(CASES[name], Objective(**OPTIONS[option]))


@pytest.mark.parametrize("option", ["dual", "two-sided", "negative-mask", "kl-max"])
def test_an_option_that_is_on_changes_the_loss(option):
  """So that the comparisons above compare something."""
  plain = dict(OPTIONS[option])
  for switch in ("dual_clip", "ratio_cap", "negative_mask", "kl_max"):
    plain.pop(switch, None)
  on, off = (ours(CASES["far"], Objective(**how)) for how in (OPTIONS[option], plain))
  assert not np.allclose(on[1], off[1])


# -- presets, from rewards to the gradient ---------------------------------------------


def sampled(seed, batch, group, *, equal=False, all_truncated=False, spread=0.5):
  """Slots and log-probabilities of a rollout with rewards of two parts."""
  rng = np.random.default_rng(seed)
  shape = (batch, group, T)
  lengths = rng.integers(1, T + 1, (batch, group))
  lengths[0, 0], lengths[-1, -1] = 1, T
  ended = lengths < T
  if all_truncated:
    lengths[0], ended[0] = T, False
  mask = np.arange(T)[None, None] < lengths[..., None]
  parts = [rng.integers(0, 2, shape[:2]) * 1.0, rng.normal(size=shape[:2])]
  if equal:
    parts = [np.full(shape[:2], 0.1), np.full(shape[:2], 0.1)]
  l = -rng.gamma(2.0, 1.0, shape)  # noqa: E741
  o, s, f = (np.where(mask, l + spread * rng.normal(size=shape), 1e30) for _ in "osf")
  rollout = Rollout(
    tokens=jnp.zeros(shape, jnp.int32),
    mask=jnp.asarray(mask),
    logprobs=jnp.asarray(s),
    entropy=jnp.zeros(shape),
    ended=jnp.asarray(ended),
  )
  prompts = PromptBatch(
    tokens=jnp.zeros((batch, 1), jnp.int32),
    mask=jnp.ones((batch, 1), bool),
    answers=jnp.zeros((batch, 1, 1), jnp.int32),
    ids=jnp.arange(batch),
  )
  weights = (1.0, 0.5)
  both = {
    name: (w, jnp.asarray(x))
    for name, w, x in zip(("accuracy", "format"), weights, parts, strict=True)
  }
  flat = dict(l=l, o=o, s=s, f=f, m=mask)
  flat = {k: x.reshape(-1, T) for k, x in flat.items()}
  return all_of(prompts, rollout, Rewards.of(**both)), flat, parts, weights, lengths


def by_the_oracle(o: Objective, flat, parts, weights, lengths, ended):
  """(loss, gradient) from rewards on."""
  old = flat["o"] if o.old_logprobs == "trainer" else flat["s"]
  parts, weights = list(parts), list(weights)
  if o.overlong_buffer:
    buffer = round(o.overlong_buffer * WINDOW)
    values = [oracle.overlong(n, WINDOW, buffer, 1.0) for n in lengths.ravel()]
    parts.append(np.reshape(values, lengths.shape))
    weights.append(o.overlong_penalty)
  if o.truncated == "penalise":
    parts.append(np.where(ended, 0.0, -1.0))
    weights.append(o.truncation_penalty)
  in_mean = np.ones(lengths.size, bool)
  in_loss = ended.ravel() if o.truncated == "mask" else in_mean
  if o.kl == "k1-in-reward" and o.kl_coef:
    kl = [
      float((a - b)[k].sum()) for a, b, k in zip(old, flat["f"], flat["m"], strict=True)
    ]
    parts.append(-np.reshape(kl, lengths.shape))
    weights.append(o.kl_coef)
  a = oracle.advantages(
    o.advantage, np.stack(parts), weights, std_ddof=o.std_ddof, std_eps=o.std_eps
  )
  return oracle.loss_and_gradient(
    **{**flat, "o": old},
    in_loss=in_loss,
    in_mean=in_loss if o.masked_rows == "drop" else in_mean,
    A=np.repeat(a.reshape(-1, 1), T, axis=1),
    **for_oracle(o),
  )


SITUATIONS = {
  "ragged": dict(batch=3, group=4),
  "two-a-group": dict(batch=4, group=2),
  "all-equal": dict(batch=2, group=4, equal=True),
  "all-truncated": dict(batch=3, group=4, all_truncated=True),
  "far": dict(batch=2, group=4, spread=8.0),
}
GRPO_PRESETS = [p for p in presets.PRESETS if p != "ppo"]
CHANGES = [
  dict(),
  dict(truncated="mask"),
  dict(truncated="mask", masked_rows="drop"),
  dict(truncated="penalise", truncation_penalty=0.3),
  dict(overlong_buffer=0.5),
  dict(std_ddof=0),
  *(dict(advantage=name) for name in advantages.ADVANTAGES),
]


def preset_case(preset, situation, changes):
  """One jit-free pass from rewards to (loss, gradient), and the oracle's."""
  how = SITUATIONS[situation]
  slots, flat, parts, weights, lengths = sampled(7, **how)
  o = presets.objective(preset, **changes)
  rows = experience.counted(slots, o).replace(reference_logprobs=jnp.asarray(flat["f"]))
  if o.old_logprobs == "trainer":
    rows = rows.replace(old_logprobs=jnp.asarray(flat["o"]))
  rewards = experience.shaped(slots, rows, o, WINDOW)
  a = advantages.group_relative(rewards, slots.filled, o).reshape(-1, 1)
  rows = rows.replace(advantages=jnp.broadcast_to(a, rows.completions.shape))
  totals = policy_loss.Totals.of(rows)
  loss, gradient = jax.value_and_grad(
    lambda x: policy_loss.policy_loss(x, rows, o, totals, window=WINDOW)[0]
  )(jnp.asarray(flat["l"]))
  ended = np.asarray(slots.rollout.ended)
  return (loss, gradient), by_the_oracle(o, flat, parts, weights, lengths, ended), o


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("preset", GRPO_PRESETS)
def test_every_preset_equals_the_oracle_from_rewards_on(preset, changes):
  for situation in SITUATIONS:
    (loss, gradient), (want_loss, want), _ = preset_case(preset, situation, changes)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("preset", GRPO_PRESETS)
def test_equal_rewards_of_a_tenth_give_no_policy_gradient(preset):
  o = presets.objective(preset, kl_coef=0.0, overlong_buffer=0.0)
  how = dict(kl_coef=0.0, overlong_buffer=0.0)
  (loss, gradient), _, _ = preset_case(preset, "all-equal", how)
  assert o.advantage in advantages.ADVANTAGES
  assert loss == 0 and not np.any(gradient)


# -- invariance ------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", policy_loss.AGGREGATIONS)
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_losses_gradients_and_metrics_of_parts_add_up(aggregation, parts):
  """The divisors are the minibatch's, so any cut gives the same sum."""
  c = some_rows_out(case(seed=8))
  o = Objective(aggregation=aggregation, clip_low=0.2, clip_high=0.2, kl_coef=0.04)
  totals = policy_loss.Totals.of(rows_of(c))
  loss, gradient, metrics, _ = ours(c, o)
  cut = [ours({k: x[i::parts] for k, x in c.items()}, o, totals) for i in range(parts)]
  np.testing.assert_allclose(sum(p[0] for p in cut), loss)
  for i, p in enumerate(cut):
    np.testing.assert_allclose(p[1], gradient[i::parts])
  for name, value in metrics.items():
    how = max if name.endswith("_max") else sum
    np.testing.assert_allclose(float(how(p[2][name] for p in cut)), float(value))


@pytest.mark.parametrize("aggregation", policy_loss.AGGREGATIONS)
def test_padding_and_what_stands_in_it_have_no_say(aggregation):
  o = Objective(aggregation=aggregation, clip_low=0.2, clip_high=0.2, kl_coef=0.04)
  c = some_rows_out(case(seed=9))
  loss, gradient, _, _ = ours(c, o)
  for garbage in (0.0, -1e30, 1e4):
    other = {k: np.where(c["m"], c[k], garbage) for k in ("l", "o", "s", "f")}
    again = ours({**c, **other}, o)
    assert again[0] == loss
    assert np.array_equal(again[1], gradient)


def test_losses_in_float32_stay_finite_at_the_clamp():
  c = CASES["19-and-21"]
  for kl in ("k2", "k3", "ratio-k3"):
    o = Objective(kl=kl, kl_coef=0.04, clip_low=0.2, clip_high=0.2)
    rows = jax.tree.map(
      lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, rows_of(c)
    )
    totals = policy_loss.Totals.of(rows)
    loss, gradient = jax.value_and_grad(
      lambda x, rows=rows, o=o, totals=totals: policy_loss.policy_loss(
        x, rows, o, totals, window=WINDOW
      )[0]
    )(jnp.asarray(c["l"], jnp.float32))
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert np.isfinite(gradient).all()


# -- defects of others that must not be ours -------------------------------------------


def test_the_pessimistic_bound_is_not_inverted_for_negative_advantages():
  """A < 0 takes the smaller of the two terms too: no gradient below 1 - eps, and the
  full one above 1 + eps."""
  o = Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.0)
  for ratio, binds in [(0.5, True), (0.9, False), (1.1, False), (1.5, False)]:
    c = {**case(lengths=(1,)), "A": np.full((1, T), -1.0)}
    c["o"] = c["l"] - np.log(ratio)
    gradient = ours(c, o)[1]
    assert (gradient[0, 0] == 0) == binds
    if not binds:
      np.testing.assert_allclose(gradient[0, 0], ratio)


def test_the_ratio_moves_once_the_policy_has_moved():
  """Old log-probabilities are the rollout's, not the present ones."""
  o = Objective(kl_coef=0.0)
  _, _, metrics, _ = ours(CASES["ragged"], o)
  assert float(metrics["ratio_max"]) > 1.05 and float(metrics["kl_old"]) > 0.01


def test_cispo_stops_the_gradient_of_its_weight():
  """d loss / d l is minus weight times A, as if the weight were a constant."""
  o = Objective(clip="cispo", clip_low=10.0, clip_high=0.2, kl_coef=0.0)
  c = case(lengths=(1,))
  c["o"] = c["l"] - np.log(1.1)
  np.testing.assert_allclose(ours(c, o)[1][0, 0], -1.1 * c["A"][0, 0])
  c["o"] = c["l"] - np.log(7.0)  # clipped to 1.2, and still a gradient
  np.testing.assert_allclose(ours(c, o)[1][0, 0], -1.2 * c["A"][0, 0])


def test_k1_in_the_loss_has_no_expected_gradient_and_k2_k3_have_that_of_a_kl():
  """Exact expectations over four tokens on-policy, by enumeration."""
  logits = np.array([0.3, -1.0, 0.8, 0.1])
  reference = np.log(np.array([0.4, 0.3, 0.2, 0.1]))

  def expected(name):
    def loss(x):
      logp = jax.nn.log_softmax(x)
      p = jax.lax.stop_gradient(jnp.exp(logp))
      ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))
      each = policy_loss.KLS[name](logp, jnp.asarray(reference), ratio, Objective())
      return jnp.sum(p * each)

    return np.asarray(jax.grad(loss)(jnp.asarray(logits)))

  def kl_gradient(forward):
    def kl(x):
      logp = jax.nn.log_softmax(x)
      if forward:
        return jnp.sum(jnp.exp(reference) * (reference - logp))
      return jnp.sum(jnp.exp(logp) * (logp - reference))

    return np.asarray(jax.grad(kl)(jnp.asarray(logits)))

  np.testing.assert_allclose(expected("k1-in-loss"), 0.0, atol=1e-12)
  np.testing.assert_allclose(expected("k2"), kl_gradient(forward=False), atol=1e-12)
  np.testing.assert_allclose(expected("k3"), kl_gradient(forward=True), atol=1e-12)
  np.testing.assert_allclose(
    expected("ratio-k3"), kl_gradient(forward=False), atol=1e-12
  )


def test_the_token_mean_is_over_the_whole_batch_not_a_mean_of_parts():
  """Two micro-batches of 1 and 11 tokens: every token has the weight 1/12."""
  c = {**case(lengths=(1, 6, 5)), "A": np.ones((3, T))}
  c["o"] = c["l"]
  o = Objective(aggregation="token-mean", kl_coef=0.0)
  totals = policy_loss.Totals.of(rows_of(c))
  for part in (slice(0, 1), slice(1, 3)):
    cut = {k: x[part] for k, x in c.items()}
    gradient = ours(cut, o, totals)[1]
    np.testing.assert_allclose(gradient[cut["m"]], -1 / 12)


@pytest.mark.parametrize(
  "key, value",
  [
    ("ratio", "word"),
    ("clip", "soft"),
    ("kl", "k4"),
    ("aggregation", "mean"),
    ("off_policy", "half"),
  ],
)
def test_an_unknown_choice_is_refused_with_what_there_is(key, value):
  how = dict(old_logprobs="trainer") if key == "off_policy" else {}
  with pytest.raises(UserError, match=rf"objective\.{key}='{value}' is not one of"):
    ours(CASES["two"], Objective(**{key: value}, **how))
