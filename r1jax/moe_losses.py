"""What a V3-type policy adds to an RL update: the balance of its experts, its MTP head,
and how far its routing has moved from the sampler's."""

from typing import Any

import jax
import jax.numpy as jnp

from r1jax.experience import Rows, sampled_experts, sequences
from r1jax.models import moe
from r1jax.models.policy import Forward, Policy
from r1jax.packing import Part


def auxiliary_losses(
  policy: Policy,
  params: Any,
  router: Any,
  rows: Rows,
  out: Forward,
  *,
  batch: Rows,
  balance_coef: float,
  mtp_coef: float,
  part: Part | None = None,
) -> tuple[jax.Array, dict, dict]:
  """Losses beside the policy's, of a part of a minibatch.

    balance_coef * mean over outputs of sum over layers of sum_i f_i P_i
    mtp_coef * mean over tokens of -log P_mtp(token)

  Args:
    policy, params, router: the network.
    rows: the part.
    out: its forward pass.
    batch: the whole minibatch, for the divisors.
    balance_coef: alpha of DeepSeek-V3's sequence-wise balance loss (report, Eq. 17).
    mtp_coef: lambda of the MTP loss; see `mtp_nll`.
    part: of packed rows, which have no balance loss.

  Returns:
    (loss, metrics, load by stack): loss and metrics are shares of the minibatch's.
  """
  loss, metrics, load = jnp.zeros(()), {}, out.load
  if out.experts is not None:
    metrics["tokens_dropped_max"] = out.dropped
  if out.experts is not None and part is None:
    outputs = jnp.maximum(batch.completion_mask.any(axis=1).sum(), 1)
    metrics["balance_loss"] = out.balance.sum() / outputs
    loss = loss + balance_coef * metrics["balance_loss"]
  if rows.experts is not None:
    _, seq = sequences(rows, part=part)
    moved = moe.changed(out.experts, sampled_experts(rows, seq, part))
    total = batch.prompt_mask.sum() + batch.completion_mask.sum()
    moved &= seq.segments > 0
    metrics["experts_changed"] = moved.sum() / jnp.maximum(total, 1)
  if mtp_coef:
    nll, mtp_load = mtp_nll(policy, params, router, rows, out, part)
    metrics["mtp_nll"] = nll / jnp.maximum(batch.mask.sum(), 1)
    loss = loss + mtp_coef * metrics["mtp_nll"]
    load = {**load, **mtp_load}
  return loss, jax.lax.stop_gradient(metrics), load


def mtp_nll(
  policy: Policy,
  params: Any,
  router: Any,
  rows: Rows,
  out: Forward,
  part: Part | None = None,
) -> tuple[jax.Array, dict]:
  """The MTP module's summed -log P(token) over the completions' tokens, and its load.

  Only the module's own weights get a gradient: layers, embedding and head belong to the
  policy gradient. So the module follows the policy as its draft head and does not pull
  the policy towards its own samples.
  """
  tokens, seq = sequences(rows, part=part)
  own = {
    name: x if name.startswith("mtp") else jax.lax.stop_gradient(x)
    for name, x in params.items()
  }
  variables = {"params": own, "router": router}
  hidden = jax.lax.stop_gradient(out.hidden)
  hidden, load = policy.apply(variables, hidden, tokens, seq, method="mtp")
  # Position i predicts token i + 2 of its own segment.
  logprobs, _ = policy.apply(
    variables, hidden[:, :-2], tokens[:, 2:], method="token_statistics"
  )
  targets = jnp.concatenate([jnp.zeros_like(rows.prompt_mask), rows.mask], axis=1)
  if part is not None:
    targets = part.lay(targets, rows.first)
  segments = seq.segments
  seen = (segments[:, :-2] > 0) & (segments[:, :-2] == segments[:, 2:])
  seen &= targets[:, 2:]
  return -jnp.where(seen, logprobs, 0.0).sum(), load
