"""Next-token cross-entropy: pre-training of the miniature's base, and SFT.

A batch holds packed rows; `targets` names the tokens that are learned (all of a page in
pre-training, the completion alone in SFT).
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import lora
from r1jax.models import moe
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence
from r1jax.optimizer import OptimizerConfig, accumulate, descend
from r1jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How rows are learned."""

  optimizer: OptimizerConfig  # its steps are the updates
  rows: int  # packed rows an update
  micro_batches: int = 1
  router_bias_rate: float = 0.0
  mtp_coef: float = 0.0


@struct.dataclass
class Pages:
  tokens: jax.Array  # B W int32
  segments: jax.Array  # B W int32, 0 padding; a page sees itself alone
  targets: jax.Array  # B W bool, tokens to be learned; a page's first never is


def positions(segments: jax.Array) -> jax.Array:
  """[B, W] int32 places within each segment, counted from 0."""
  at = jnp.arange(segments.shape[1])[None]
  new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return at - jax.lax.cummax(jnp.where(new, at, 0), axis=1)


def targets_ahead(pages: Pages, ahead: int) -> jax.Array:
  """[B, W - ahead] bool: the token `ahead` later is a target of the same page."""
  same = pages.segments[:, ahead:] == pages.segments[:, :-ahead]
  return pages.targets[:, ahead:] & same & (pages.segments[:, ahead:] > 0)


def loss_fn(
  policy: Policy,
  params: dict,
  router: dict,
  pages: Pages,
  *,
  counts: tuple[jax.Array, jax.Array],
  mtp_coef: float = 0.0,
) -> tuple[jax.Array, tuple[dict, dict]]:
  """Mean negative log-likelihood over the targets, plus mtp_coef times the MTP loss
  (DeepSeek-V3 report, Eq. 24-25: -mean log P(t_i+2), same page only).

  Args:
    policy, params, router: the network and its variables.
    pages: a batch or a part of it.
    counts: the whole batch's targets one and two tokens ahead, the two means' divisors.
    mtp_coef: lambda; 0 leaves the MTP module out.

  Returns:
    (loss, (metrics, load by stack)).
  """
  variables = {"params": params, "router": router}
  seq = Sequence(positions=positions(pages.segments), segments=pages.segments)
  out = policy.apply(variables, pages.tokens, seq)
  load = out.load

  def nll(hidden, ahead):
    logprobs, _ = policy.apply(
      variables, hidden[:, :-ahead], pages.tokens[:, ahead:], method="token_statistics"
    )
    total = jnp.where(targets_ahead(pages, ahead), logprobs, 0.0).sum()
    return -total / jnp.maximum(counts[ahead - 1], 1)

  loss = nll(out.hidden, 1)
  metrics = {"nll": loss}
  if mtp_coef:
    hidden, mtp_load = policy.apply(
      variables, out.hidden, pages.tokens, seq, method="mtp"
    )
    metrics["mtp_nll"] = nll(hidden, 2)
    loss = loss + mtp_coef * metrics["mtp_nll"]
    load = {**load, **mtp_load}
  return loss, (metrics, load)


def step(
  state: TrainState,
  pages: Pages,
  *,
  policy: Policy,
  optimizer: optax.GradientTransformation,
  router_bias_rate: float,
  mtp_coef: float = 0.0,
  micro_batches: int = 1,
) -> tuple[TrainState, dict]:
  """One update of parameters, or of their adapters, and router biases."""

  counts = targets_ahead(pages, 1).sum(), targets_ahead(pages, 2).sum()
  weights, whole = lora.split(policy, state.params)

  def loss(weights, part):
    params = whole(weights)
    loss, aux = loss_fn(
      policy, params, state.router, part, counts=counts, mtp_coef=mtp_coef
    )
    return loss, (*aux, ())

  grads, metrics, load, _ = accumulate(loss, weights, pages, micro_batches)
  params, opt_state, finite = descend(
    optimizer, grads, lora.trained(state.params), state.opt_state
  )
  state = state.replace(
    step=state.step + 1,
    params=lora.put(state.params, params),
    router=moe.balance(state.router, load, jnp.where(finite, router_bias_rate, 0.0)),
    opt_state=opt_state,
  )
  norm = optax.tree.norm(grads)
  return state, {**metrics, "grad_norm": norm, "skipped": 1.0 - finite}
