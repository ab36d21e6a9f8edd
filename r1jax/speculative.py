"""Speculative decoding with the MTP module: two tokens a step where a draft is right.

The policy draws a token; the MTP module drafts the one after it; one pass of the policy
over both says whether the draft may stand. With p the policy's distribution and q the
draft's, a draft d stays with probability min(1, p(d) / q(d)), and where it goes the
next token is drawn from max(p - q, 0), normalised: outputs are distributed as p says,
whatever q is (Leviathan, Kalman and Matias, arXiv 2211.17192, appendix A.1). MTP for
drafts: DeepSeek-V3 report, section 5.4.3.
"""

import jax
import jax.numpy as jnp

from r1jax import implementation as impl
from r1jax import sampling, slots
from r1jax.errors import UserError
from r1jax.models.policy import Policy
from r1jax.sampling import Sampler
from r1jax.slots import Decoding

# What a row's random numbers are for, beside the token itself.
DRAFT, ACCEPT = 1, 2
NEVER = -1e30

# Rows of a data shard up to which "auto" drafts, by platform, as measured: beyond,
# arithmetic binds a step and two tokens a row cost twice as much. On a CPU drafting
# lost at every number of rows; on a GPU and a TPU it has not been measured.
AUTO_ROWS = {"cpu": 0}


def wanted(s: Sampler, policy: Policy, rows: int) -> bool:
  """Whether to draft. Args: rows: that decode at once on a data shard.

  Raises:
    UserError: drafts without an MTP module.
  """
  if s.speculative == "on" and not policy.config.mtp_depth:
    raise UserError(
      "speculative='on' drafts by the MTP module and this policy has none: set"
      " config.model.mtp_depth=1 (and train it: config.pretrain.mtp_coef=0.3), or"
      " speculative='off'."
    )
  auto = policy.config.mtp_depth and rows <= AUTO_ROWS.get(impl.platform(), 0)
  return s.speculative == "on" or (s.speculative == "auto" and bool(auto))


def step(
  policy: Policy, variables: dict, layers: list | None, c: Decoding, s: Sampler
) -> Decoding:
  """One turn of the loop: every slot writes one token or two.

  Args:
    policy, variables, layers: as in `rollout.advance`.
    c: the carry.
    s: the settings.
  """
  draft, length = c.slots.draft, c.slots.length

  # The token that follows, from p, or from what a rejected draft left of it.
  p, packed = _distribution(policy, variables, c.slots.hidden, s)
  left = jnp.maximum(jax.nn.softmax(p) - draft.probabilities, 0.0)
  some = draft.rejected & (left.sum(axis=-1) > 0)
  remains = jnp.where(left > 0, jnp.log(jnp.maximum(left, 1e-37)), NEVER)
  drawn = sampling.pick(
    jnp.where(some[:, None], remains, p), sampling.uniforms(c.slots.keys, length)
  )
  drawn = drawn, *sampling.statistics(p, drawn), packed
  c, token, writes, over = slots.write(c, drawn, s)

  # A draft of the one after it, by the last two tokens and what stood before each.
  at = slots.place(c, writes)
  back = at.replace(
    positions=at.positions + jnp.arange(-2, 0)[None],
    lengths=length - 1,
    prompt_starts=jnp.minimum(at.prompt_starts + 1, c.draft_cache.window),
  )
  hidden, draft_cache = policy.apply(
    variables,
    jnp.stack([draft.before, c.slots.hidden], axis=1),
    jnp.stack([draft.token, token], axis=1),
    back,
    c.draft_cache,
    method="draft",
  )
  q, _ = _distribution(policy, variables, hidden[:, 1], s)
  guess = sampling.pick(q, sampling.uniforms(c.slots.keys, length + 1, DRAFT))

  # The policy over both.
  both = at.replace(positions=at.positions + jnp.arange(2)[None])
  tokens = jnp.stack([token, guess], axis=1)
  out = policy.apply(variables, tokens, both, c.cache, layers, method="decode")
  after, packed = _distribution(policy, variables, out.hidden[:, 0], s)

  def chance(x):
    return jnp.take_along_axis(jax.nn.softmax(x), guess[:, None], axis=1)[:, 0]

  may = writes & ~over
  luck = sampling.uniforms(c.slots.keys, length + 1, ACCEPT)[:, 0]
  accepted = may & (luck * chance(q) < chance(after))
  drawn = guess, *sampling.statistics(after, guess), packed
  c, _, accepted, ended = slots.write(c, drawn, s, ahead=1, allowed=accepted)
  c = slots.record(c, both, out.experts, jnp.stack([writes, accepted], axis=1))
  c = _counted(c, may, accepted)

  def last(x):  # [S, 2, ...]: of the last token that was written
    return jnp.where(accepted.reshape(-1, *[1] * (x.ndim - 2)), x[:, 1], x[:, 0])

  draft = draft.replace(
    token=last(tokens),
    before=jnp.where(accepted[:, None], out.hidden[:, 0], c.slots.hidden),
    rejected=may & ~accepted,
    probabilities=jax.nn.softmax(q),
  )
  state = c.slots.replace(
    hidden=last(out.hidden), norms=out.norms.swapaxes(0, 1), draft=draft
  )
  c = c.replace(slots=state, cache=out.cache, draft_cache=draft_cache)
  return slots.turn(c, over | ended, writes + accepted.astype(jnp.int32))


def _distribution(policy, variables, hidden, s):
  return sampling.tempered(policy.apply(variables, hidden, method="logits"), s)


def _counted(c: Decoding, drafted: jax.Array, accepted: jax.Array) -> Decoding:
  def local(outputs, output, drafted, accepted):
    def more(counts, which):
      total = counts.size
      where = jnp.where(which, output, total)
      flat = counts.reshape(-1).at[where].add(1, mode="drop")
      return flat.reshape(counts.shape)

    return outputs.replace(
      drafted=more(outputs.drafted, drafted), accepted=more(outputs.accepted, accepted)
    )

  args = c.outputs, c.slots.output, drafted, accepted
  return c.replace(outputs=slots.each(c, local, *args))
