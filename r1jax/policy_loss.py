"""The policy's loss: from log-probabilities to one number, in five named choices.

  ratio        of the new to the old policy, a token or an output       RATIOS
  surrogate    what of ratio times advantage is kept                    SURROGATES
  weights      how much a token counts when sampler and trainer differ  OFF_POLICY
  KL           estimator of the distance to the reference               KLS
  aggregation  tokens -> one number                                     AGGREGATIONS

  loss = aggregate( -weight * surrogate + kl_coef * KL )

Each choice is a function of arrays [M, T] and a row of its table. `new`, `old` and
`reference` are log-probabilities of the sampled tokens by the policy that is trained,
the one that sampled, and the frozen one; `a` is the advantage, `o` the Objective.
Arrays keep their dtype where it is wider than float32.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from r1jax.experience import Rows
from r1jax.objective import Objective, pick

stop = jax.lax.stop_gradient


@struct.dataclass
class Totals:
  """Divisors of the whole minibatch, so that losses of its parts add up."""

  rows: jax.Array  # [] outputs that count in means over outputs
  tokens: jax.Array  # [] tokens with a loss

  @classmethod
  def of(cls, rows: Rows) -> "Totals":
    return cls(
      rows=jnp.maximum(rows.in_mean.sum(), 1), tokens=jnp.maximum(rows.mask.sum(), 1)
    )


def _clamp(x: jax.Array, limit: float) -> jax.Array:
  """x within +-limit, with no gradient beyond; 0 means no limit."""
  return jnp.clip(x, -limit, limit) if limit else x


def _row_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """[M, T] -> [M, 1], over the tokens of each row."""
  total = jnp.where(mask, x, 0.0).sum(axis=1, keepdims=True)
  return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


# -- ratio -----------------------------------------------------------------------------


def token_ratio(
  new: jax.Array, old: jax.Array, mask: jax.Array, clamp: float
) -> jax.Array:
  """rho_t = exp(new_t - old_t) (arXiv 2402.03300, Eq. 3)."""
  return jnp.exp(_clamp(jnp.where(mask, new - old, 0.0), clamp))


def sequence_ratio(
  new: jax.Array,
  old: jax.Array,
  mask: jax.Array,
  clamp: float,
) -> jax.Array:
  """s = exp(mean_t (new_t - old_t)), one an output (GSPO, arXiv 2507.18071)."""
  s = jnp.exp(_clamp(_row_mean(jnp.where(mask, new - old, 0.0), mask), clamp))
  return jnp.broadcast_to(s, new.shape)


def sequence_token_ratio(
  new: jax.Array,
  old: jax.Array,
  mask: jax.Array,
  clamp: float,
) -> jax.Array:
  """stop(s) pi_t / stop(pi_t): GSPO's value with a gradient a token (GSPO-token)."""
  new = jnp.where(mask, new, 0.0)
  return stop(sequence_ratio(new, old, mask, clamp)) * jnp.exp(new - stop(new))


RATIOS: dict[str, Callable] = {
  "token": token_ratio,
  "sequence": sequence_ratio,
  "sequence-token": sequence_token_ratio,
}

# -- surrogate -------------------------------------------------------------------------


def ppo_clip(
  ratio: jax.Array, a: jax.Array, new: jax.Array, o: Objective
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """min(rho A, clip(rho, 1 - low, 1 + high) A), and its two mends for A < 0.

  low = high: PPO's clip. high > low: clip-higher (DAPO). `dual_clip` c: at least c A
  where A < 0 (arXiv 1912.09729). `ratio_cap` delta: rho is cut at delta in the first
  term (two-sided clipping, arXiv 2505.07291).
  """
  low, high = 1 - o.clip_low, 1 + o.clip_high
  first = jnp.minimum(ratio, o.ratio_cap) if o.ratio_cap else ratio
  kept = jnp.minimum(first * a, jnp.clip(ratio, low, high) * a)
  if o.dual_clip:
    kept = jnp.where(a < 0, jnp.maximum(kept, o.dual_clip * a), kept)
  bounds = {"low": (a < 0) & (ratio < low), "high": (a > 0) & (ratio > high)}
  if cap := o.dual_clip or o.ratio_cap:
    bounds["cap"] = (a < 0) & (ratio > cap)
  return kept, bounds


def cispo(
  ratio: jax.Array, a: jax.Array, new: jax.Array, o: Objective
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """stop(clip(rho, 1 - low, 1 + high)) A log pi: the weight is clipped, no token loses
  its gradient (MiniMax-M1, arXiv 2506.13585)."""
  low, high = 1 - o.clip_low, 1 + o.clip_high
  kept = stop(jnp.clip(ratio, low, high)) * a * new
  return kept, {"low": ratio < low, "high": ratio > high}


def unclipped(
  ratio: jax.Array, a: jax.Array, new: jax.Array, o: Objective
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """rho A: the importance-weighted policy gradient."""
  return ratio * a, {}


SURROGATES: dict[str, Callable] = {"ppo": ppo_clip, "cispo": cispo, "none": unclipped}

# -- weights where sampler and trainer differ ------------------------------------------


def _truncate(r: jax.Array, o: Objective) -> jax.Array:
  """min(r, C): truncated importance sampling."""
  return jnp.minimum(r, o.off_policy_cap)


def _mask(r: jax.Array, o: Objective) -> jax.Array:
  """r within [floor, C], else 0: masked importance sampling (IcePop)."""
  return jnp.where((r >= o.off_policy_floor) & (r <= o.off_policy_cap), r, 0.0)


def _whole(gap: jax.Array) -> jax.Array:
  """Of the whole output: unbiased, and of more variance than token by token."""
  return jnp.broadcast_to(gap.sum(axis=1, keepdims=True), gap.shape)


OFF_POLICY: dict[str, Callable] = {
  "none": lambda gap, o: jnp.ones_like(gap),
  "token-truncate": lambda gap, o: _truncate(jnp.exp(gap), o),
  "token-mask": lambda gap, o: _mask(jnp.exp(gap), o),
  "sequence-truncate": lambda gap, o: _truncate(jnp.exp(_whole(gap)), o),
  "sequence-mask": lambda gap, o: _mask(jnp.exp(_whole(gap)), o),
}


def weights(new: jax.Array, rows: Rows, o: Objective) -> jax.Array:
  """What multiplies the surrogate, without a gradient: importance weights pi_old (by
  the trainer) / pi_sampler, and DeepSeek-V3.2's mask, which drops outputs with A < 0
  whose mean log(pi_sampler / pi) exceeds `negative_mask` (arXiv 2512.02556)."""
  gap = jnp.where(rows.mask, rows.old_logprobs - rows.sampler_logprobs, 0.0)
  w = pick(OFF_POLICY, o.off_policy, "off_policy")(gap, o)
  if o.negative_mask:
    far = _row_mean(rows.sampler_logprobs - new, rows.mask) > o.negative_mask
    w = jnp.where((rows.advantages < 0) & far, 0.0, w)
  return stop(w)


# -- KL to the reference ---------------------------------------------------------------


def k1(
  new: jax.Array, reference: jax.Array, ratio: jax.Array, o: Objective
) -> jax.Array:
  """new - reference: right in a reward; as a loss its gradient on-policy averages 0."""
  return -_clamp(reference - new, o.log_ratio_clamp)


def k2(
  new: jax.Array, reference: jax.Array, ratio: jax.Array, o: Objective
) -> jax.Array:
  """(new - reference)^2 / 2: as a loss, on-policy, the gradient of
  KL(policy || reference)."""
  return 0.5 * jnp.square(_clamp(reference - new, o.log_ratio_clamp))


def k3(
  new: jax.Array, reference: jax.Array, ratio: jax.Array, o: Objective
) -> jax.Array:
  """exp(d) - d - 1 with d = reference - new (R1, Eq. 2): unbiased, never negative; as a
  loss, on-policy, the gradient of KL(reference || policy)."""
  d = _clamp(reference - new, o.log_ratio_clamp)
  value = jnp.expm1(d) - d
  return jnp.minimum(value, o.kl_max) if o.kl_max else value


def ratio_k3(
  new: jax.Array, reference: jax.Array, ratio: jax.Array, o: Objective
) -> jax.Array:
  """rho k3, the gradient through both: unbiased for KL(policy || reference) off-policy
  too, in value and gradient (DeepSeek-V3.2, arXiv 2512.02556)."""
  return ratio * k3(new, reference, ratio, o)


KLS: dict[str, Callable] = {
  "k1-in-loss": k1,
  "k2": k2,
  "k3": k3,
  "ratio-k3": ratio_k3,
  "k1-in-reward": lambda new, *_: jnp.zeros_like(new),  # experience.py pays it
}

# -- tokens -> one number --------------------------------------------------------------


def seq_mean_token_mean(
  x: jax.Array, mask: jax.Array, totals: Totals, norm: float
) -> jax.Array:
  """1/rows sum_i 1/|o_i| sum_t x (arXiv 2402.03300, Eq. 3)."""
  lengths = jnp.maximum(mask.sum(axis=1), 1)
  return jnp.sum(jnp.where(mask, x, 0.0).sum(axis=1) / lengths) / totals.rows


def token_mean(x: jax.Array, mask: jax.Array, totals: Totals, norm: float) -> jax.Array:
  """1/tokens sum_i sum_t x, over the whole minibatch: all its micro-batches and devices
  (DAPO, arXiv 2503.14476, Eq. 8)."""
  return jnp.where(mask, x, 0.0).sum() / totals.tokens


def seq_mean_token_sum_norm(
  x: jax.Array, mask: jax.Array, totals: Totals, norm: float
) -> jax.Array:
  """1/rows sum_i 1/L sum_t x with one L for all outputs (arXiv 2503.20783)."""
  return jnp.where(mask, x, 0.0).sum() / norm / totals.rows


AGGREGATIONS: dict[str, Callable] = {
  "seq-mean-token-mean": seq_mean_token_mean,
  "token-mean": token_mean,
  "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
}

# -- the loss --------------------------------------------------------------------------


@jax.named_scope("loss")
def policy_loss(
  logprobs: jax.Array, rows: Rows, o: Objective, totals: Totals, *, window: int
) -> tuple[jax.Array, tuple[dict, dict]]:
  """The loss of some rows of a minibatch.

  Differs from R1's Eq. 1, which prints the ratio of whole outputs: its origin and every
  implementation take it token by token, and so do the defaults.

  Args:
    logprobs: [m, T] of the policy that is trained.
    rows: m rows.
    o: the choices.
    totals: of the whole minibatch.
    window: output tokens, the default L of seq-mean-token-sum-norm.

  Returns:
    (scalar, (metrics, per_token)). Metrics are shares of the minibatch's, to be summed
    (names ending in `_max`: to be maximised) over micro-batches; they are means over
    the tokens of an output, then over outputs, whatever the aggregation. per_token
    holds `logprobs` and `ratio` [m, T], and `clipped` [m, T] int8: 0 not, 1 low,
    2 high, 3 cap.

  Raises:
    UserError: a choice that is in no table.
  """
  mask, a = rows.mask, rows.advantages.astype(logprobs.dtype)
  new = jnp.where(mask, logprobs, 0.0)
  old = jnp.where(mask, rows.old_logprobs, 0.0)
  reference = jnp.where(mask, rows.reference_logprobs, 0.0)
  ratio = pick(RATIOS, o.ratio, "ratio")(new, old, mask, o.log_ratio_clamp)
  surrogate, bounds = pick(SURROGATES, o.clip, "clip")(ratio, a, new, o)
  aggregate = pick(AGGREGATIONS, o.aggregation, "aggregation")
  norm = o.sum_norm or window
  x = -weights(new, rows, o) * surrogate
  kl = k3(new, reference, ratio, Objective(log_ratio_clamp=o.log_ratio_clamp))
  if o.kl_coef:
    by_token = token_ratio(new, old, mask, o.log_ratio_clamp)
    x = x + o.kl_coef * pick(KLS, o.kl, "kl")(new, reference, by_token, o)
  loss = aggregate(x, mask, totals, norm)

  def mean(x):
    return seq_mean_token_mean(x.astype(new.dtype), mask, totals, norm)

  bounds = {side: bound & mask for side, bound in bounds.items()}
  log_ratio, gap = new - old, jnp.where(mask, logprobs - rows.sampler_logprobs, 0.0)
  moved = _clamp(log_ratio, 20.0)
  metrics = {
    "loss": loss,
    "clip_fraction": sum((mean(x) for x in bounds.values()), jnp.zeros((), new.dtype)),
    **{f"clip_fraction_{side}": mean(bound) for side, bound in bounds.items()},
    "kl_old": mean(jnp.expm1(moved) - moved),
    "ratio_max": jnp.max(jnp.where(mask, ratio, 1.0)),
    "sampler_gap_max": jnp.max(jnp.abs(gap)),
    "sampler_gap_mean": mean(jnp.abs(gap)),
    "sampler_kl": mean(jnp.expm1(_clamp(gap, 20.0)) - _clamp(gap, 20.0)),
  }
  if o.needs_reference:
    metrics["kl"] = mean(kl)
  clipped = jnp.zeros(mask.shape, jnp.int8)
  for code, side in enumerate(("low", "high", "cap"), start=1):
    if side in bounds:
      clipped = jnp.where(bounds[side], jnp.int8(code), clipped)
  return loss, stop((metrics, {"logprobs": new, "ratio": ratio, "clipped": clipped}))
