# ruff: noqa: E741
"""The losses and the advantages once more, in NumPy float64 and plain loops.

Written from the formulas alone, for the tests to compare with: it imports nothing of
what it checks. Arrays are [rows M, tokens T]. Of each row only the tokens that count
are ever looked at, so whatever stands outside the mask has no say.

  l  log-probs of the sampled tokens under the policy that is trained
  o, s, f  the same under the old policy, the sampler and the reference
  m  the completion mask      in_loss, in_mean [M]  rows with tokens, rows counted
  A  advantages
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class Choices:
  """What a loss is made of. Zero switches a clamp, cap or floor off."""

  ratio: str = "token"
  log_ratio_clamp: float = 20.0
  clip: str = "ppo"
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  ratio_cap: float = 0.0
  kl: str = "k3"
  kl_coef: float = 0.0
  kl_max: float = 0.0
  aggregation: str = "seq-mean-token-mean"
  sum_norm: float = 1.0
  off_policy: str = "none"
  off_policy_cap: float = 2.0
  off_policy_floor: float = 0.0
  negative_mask: float = 0.0

  def __post_init__(self):
    for name, allowed in ALLOWED.items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)!r} is none of {allowed}")


ALLOWED = {
  "ratio": ["token", "sequence", "sequence-token"],
  "clip": ["ppo", "cispo", "none"],
  "kl": ["k1-in-loss", "k2", "k3", "ratio-k3", "k1-in-reward"],
  "aggregation": ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"],
  "off_policy": [
    *["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]
  ],
}


def _exp(x: float) -> float:
  with np.errstate(over="ignore"):
    return float(np.exp(x))


def _clamp(x: float, bound: float) -> tuple[float, float]:
  """x within [-bound, bound], and the derivative; bound 0 leaves x alone."""
  if bound and abs(x) > bound:
    return float(np.copysign(bound, x)), 0.0
  return float(x), 1.0


def _clip(rho: float, c: Choices) -> float:
  return min(max(rho, 1 - c.clip_low), 1 + c.clip_high)


# One row of the n >= 1 tokens that count; l0 is l where no gradient flows.
def _ratios(l, l0, o, c: Choices) -> tuple[ndarray, ndarray]:
  """rho [n], and [t, k] = d rho_t / d l_k."""
  n = len(l)
  rho, jacobian = np.zeros(n), np.zeros((n, n))
  for t in range(n):
    if c.ratio == "token":
      d, inside = _clamp(l[t] - o[t], c.log_ratio_clamp)
      rho[t] = _exp(d)
      jacobian[t, t] = rho[t] * inside
    elif c.ratio == "sequence":
      d, inside = _clamp(sum(l - o) / n, c.log_ratio_clamp)
      rho[t] = _exp(d)
      jacobian[t, :] = rho[t] * inside / n
    else:
      d, _ = _clamp(sum(l0 - o) / n, c.log_ratio_clamp)
      rho[t] = _exp(d) * _exp(l[t] - l0[t])
      jacobian[t, t] = rho[t]
  return rho, jacobian


def _surrogate(l, rho, rho0, A, c: Choices) -> tuple[float, float, float]:
  """S of one token, to be maximised; dS / d rho; dS / dl with rho held."""
  if c.clip == "none":
    return rho * A, A, 0.0
  if c.clip == "cispo":
    return _clip(rho0, c) * A * l, 0.0, _clip(rho0, c) * A
  u = min(rho, c.ratio_cap) if c.ratio_cap else rho
  plain, clipped = u * A, _clip(rho, c) * A
  S, kept = (plain, u) if plain <= clipped else (clipped, _clip(rho, c))
  if c.dual_clip and A < 0 and c.dual_clip * A > S:
    return c.dual_clip * A, 0.0, 0.0
  return S, (A if kept == rho else 0.0), 0.0


def _kl(l: float, o: float, f: float, c: Choices) -> tuple[float, float]:
  """The KL term of one token, to be minimised, and its derivative by l."""
  D, inside = _clamp(f - l, c.log_ratio_clamp)
  dD = -inside
  if c.kl == "k1-in-loss":
    return -D, -dD
  if c.kl == "k2":
    return D * D / 2, D * dD
  k3, dk3 = _exp(D) - D - 1, (_exp(D) - 1) * dD
  if c.kl_max and k3 > c.kl_max:
    k3, dk3 = c.kl_max, 0.0
  if c.kl == "k3":
    return k3, dk3
  log_rho, inside = _clamp(l - o, c.log_ratio_clamp)
  rho = _exp(log_rho)
  return rho * k3, rho * inside * k3 + rho * dk3


def _weight(t: int, l0, o, s, A, c: Choices) -> float:
  """g w of token t: it multiplies the surrogate, and no gradient flows through it."""
  if c.negative_mask and A[t] < 0 and np.mean(s - l0) > c.negative_mask:
    return 0.0
  if c.off_policy == "none":
    return 1.0
  over, how = c.off_policy.split("-")
  r = _exp(o[t] - s[t] if over == "token" else np.sum(o - s))
  if how == "truncate":
    return min(r, c.off_policy_cap)
  return r if c.off_policy_floor <= r <= c.off_policy_cap else 0.0


def _row(l, l0, o, s, f, A, c: Choices) -> tuple[ndarray, ndarray]:
  """x [n], the loss of each token, and [t, k] = d x_t / d l_k."""
  rho, jacobian = _ratios(l, l0, o, c)
  rho0, _ = _ratios(l0, l0, o, c)
  x = np.zeros(len(l))
  for t in range(len(l)):
    weight = _weight(t, l0, o, s, A, c)
    S, by_rho, by_l = _surrogate(l[t], rho[t], rho0[t], A[t], c)
    x[t] = -weight * S
    jacobian[t, :] *= -weight * by_rho
    jacobian[t, t] -= weight * by_l
    if c.kl != "k1-in-reward" and c.kl_coef:
      kl, slope = _kl(l[t], o[t], f[t], c)
      x[t] += c.kl_coef * kl
      jacobian[t, t] += c.kl_coef * slope
  return x, jacobian


def _effective(m, in_loss) -> ndarray:
  return np.asarray(m, bool) & np.asarray(in_loss, bool)[:, None]


def _rows(mm: ndarray, *arrays):
  """(i, the tokens that count of row i of each array), rows without any left out."""
  for i in range(len(mm)):
    if mm[i].any():
      yield i, [np.asarray(x)[i][mm[i]].astype(np.float64) for x in arrays]


def _share(i: int, mm: ndarray, in_mean, how: str, sum_norm: float) -> float:
  """What each token of row i weighs: the aggregate is sum_i share_i sum_t x_it."""
  rows = max(np.sum(np.asarray(in_mean, bool)), 1)
  if how == "token-mean":
    return 1 / max(mm.sum(), 1)
  if how == "seq-mean-token-mean":
    return 1 / rows / max(mm[i].sum(), 1)
  return 1 / rows / sum_norm


def loss(l, o, s, f, m, in_loss, in_mean, A, **choices) -> float:
  """The loss alone; `stopped` as below."""
  return loss_and_gradient(l, o, s, f, m, in_loss, in_mean, A, **choices)[0]


def loss_and_gradient(
  l, o, s, f, m, in_loss, in_mean, A, *, stopped=None, **choices
) -> tuple[float, ndarray]:
  """The loss and d loss / d l [M, T], derived by hand. Where no gradient flows,
  `stopped` stands in for l."""
  c, mm = Choices(**choices), _effective(m, in_loss)
  total, gradient = 0.0, np.zeros(mm.shape)
  for i, row in _rows(mm, l, l if stopped is None else stopped, o, s, f, A):
    x, jacobian = _row(*row, c)
    share = _share(i, mm, in_mean, c.aggregation, c.sum_norm)
    total += share * x.sum()
    gradient[i, mm[i]] = share * jacobian.sum(axis=0)
  return float(total), gradient


def clip_flags(l, o, m, in_loss, A, **choices) -> dict[str, ndarray]:
  """Which tokens are clipped low, clipped high and capped; bools [M, T]."""
  c, mm = Choices(**choices), _effective(m, in_loss)
  flags = {name: np.zeros(mm.shape, bool) for name in ("low", "high", "cap")}
  ppo, cap = c.clip == "ppo", c.dual_clip or c.ratio_cap
  for i, (l_i, o_i, A_i) in _rows(mm, l, o, A):
    rho, _ = _ratios(l_i, l_i, o_i, c)
    if c.clip != "none":
      flags["low"][i, mm[i]] = (rho < 1 - c.clip_low) & ((A_i < 0) | (not ppo))
      flags["high"][i, mm[i]] = (rho > 1 + c.clip_high) & ((A_i > 0) | (not ppo))
    if ppo and cap:
      flags["cap"][i, mm[i]] = (rho > cap) & (A_i < 0)
  return flags


def _std(x: ndarray, ddof: int) -> float:
  return float(np.sqrt(np.sum((x - np.mean(x)) ** 2) / (x.size - ddof)))


def advantages(kind: str, parts, weights, *, std_ddof: int, std_eps: float) -> ndarray:
  """parts [n, B, G], weights [n] -> [B, G]. A group of equal values is centred on 0."""
  parts, weights = np.asarray(parts, np.float64), np.asarray(weights, np.float64)
  if kind == "gdpo":
    Y = np.zeros(parts.shape[1:])
    for w, part in zip(weights, parts, strict=True):
      Y += w * advantages("grpo", [part], [1.0], std_ddof=std_ddof, std_eps=std_eps)
    if np.ptp(Y) == 0:
      return np.zeros(Y.shape)
    return (Y - np.mean(Y)) / (_std(Y, std_ddof) + std_eps)
  R = sum(w * part for w, part in zip(weights, parts, strict=True))
  A = np.zeros(R.shape)
  for b, group in enumerate(R):
    if np.ptp(group) == 0:
      continue
    A[b] = group - np.mean(group)
    if kind == "grpo":
      A[b] /= _std(group, std_ddof) + std_eps
    elif kind == "rloo":
      for i in range(len(group)):
        A[b, i] = group[i] - np.mean(np.delete(group, i))
    elif kind == "batch_std":
      A[b] /= _std(R, std_ddof) + std_eps
    elif kind != "dr_grpo":
      raise ValueError(kind)
  return A


def overlong(length: float, window: float, buffer: float, penalty: float) -> float:
  """0, then a slope down to -penalty over the last `buffer` tokens of the window."""
  if length <= window - buffer:
    return 0.0
  if length <= window:
    return penalty * ((window - buffer) - length) / buffer
  return -float(penalty)


def token_rewards(score, o, f, mask, *, kl_coef: float) -> ndarray:
  """The score [M] on the last token of each row, less the KL penalty on every one."""
  mask = np.asarray(mask, bool)
  rewards = np.zeros(mask.shape)
  for i, (o_i, f_i) in _rows(mask, o, f):
    row = -kl_coef * (o_i - f_i) if kl_coef else np.zeros(len(o_i))
    row[-1] += score[i]
    rewards[i, mask[i]] = row
  return rewards


def gae(rewards, values, mask, *, gamma: float, lam: float) -> tuple[ndarray, ndarray]:
  """(advantages, returns), zero outside the mask; the value past a row's end is 0."""
  mask = np.asarray(mask, bool)
  A, returns = np.zeros(mask.shape), np.zeros(mask.shape)
  for i, (r, V) in _rows(mask, rewards, values):
    n, later = len(r), [*V[1:], 0.0]
    delta = [r[t] + gamma * later[t] - V[t] for t in range(n)]
    row = [
      sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)
    ]
    A[i, mask[i]], returns[i, mask[i]] = row, row + V
  return A, returns


def value_loss_and_gradient(
  v, v_old, returns, m, in_loss, in_mean, *, value_clip, aggregation, sum_norm
) -> tuple[float, ndarray]:
  """Half the squared error, the worse of plain and clipped, and its gradient by v."""
  mm = _effective(m, in_loss)
  total, gradient = 0.0, np.zeros(mm.shape)
  for i, (v_i, old_i, return_i) in _rows(mm, v, v_old, returns):
    share, slopes = _share(i, mm, in_mean, aggregation, sum_norm), []
    for V, old, ret in zip(v_i, old_i, return_i, strict=True):
      step, inside = _clamp(V - old, value_clip)
      error, slope = V - ret, 1.0
      if value_clip and (old + step - ret) ** 2 > error**2:
        error, slope = old + step - ret, inside
      total += share * error**2 / 2
      slopes.append(share * error * slope)
    gradient[i, mm[i]] = slopes
  return float(total), gradient
