"""How a token is drawn, and the settings of a rollout."""

import dataclasses

import jax
import jax.numpy as jnp

from r1jax import support as supports
from r1jax import vocabulary
from r1jax.errors import UserError
from r1jax.stopping import StopStrings


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The settings of a rollout."""

  group_size: int  # G, outputs a prompt
  max_tokens: int  # T, of an output; one that fills it is truncated
  pad_id: int  # fills rows after their end
  stop_ids: tuple[int, ...] = ()  # tokens that end an output: EOS, say
  stop: StopStrings | None = None  # strings that end an output
  temperature: float = 1.0  # divides the logits; 0 takes the most likely token
  top_k: int = 0  # support.py; 0: all
  top_p: float = 1.0  # 1: all
  min_p: float = 0.0  # 0: all
  slots: int = 0  # rows that decode at once; 0: all outputs
  cache_tokens: int = 0  # that the cache may hold of outputs (levels.py); 0: no bound
  prefill_parts: int = 1  # that the prompts are read in, one after another
  # Weights that a mesh cuts along fsdp and expert are gathered once for the loop that
  # decodes, those of routed experts excepted; False: by each layer at every token,
  # which holds less.
  gather_weights: bool = True
  # Keep the experts that the router chose for every token: routing_replay needs them,
  # and the metric experts_changed. A byte for each of a token's experts in each layer.
  record_experts: bool = True
  # Draft by the MTP module (speculative.py): "off", "on", or "auto": where the policy
  # has one and so few rows decode that a second token each is nearly free.
  speculative: str = "off"

  def __post_init__(self):
    """Raises UserError: what came, the rule and the remedy."""
    if min(self.group_size, self.max_tokens) < 1:
      raise UserError(
        f"group_size={self.group_size} and max_tokens={self.max_tokens} must be at"
        " least 1: there is nothing to sample otherwise."
      )
    if not self.temperature >= 0:
      raise UserError(
        f"temperature={self.temperature} must be above 0, or 0 for the most likely"
        " token."
      )
    if self.prefill_parts < 1:
      raise UserError(
        f"prefill_parts={self.prefill_parts} must be 1 (all prompts at once) or more."
      )
    if min(self.slots, self.cache_tokens) < 0:
      raise UserError(
        f"slots={self.slots} and cache_tokens={self.cache_tokens} must be positive, or"
        " 0: a slot for every output, no bound on the cache."
      )
    if self.speculative not in ("off", "on", "auto"):
      raise UserError(
        f"speculative={self.speculative!r} must be 'off', 'on' or 'auto'."
      )
    supports.check(self.top_k, self.top_p, self.min_p)

  @property
  def truncates(self) -> bool:
    return supports.truncates(self.top_k, self.top_p, self.min_p)


def tempered(logits: jax.Array, s: Sampler) -> tuple[jax.Array, jax.Array | None]:
  """The distribution that is sampled from, as logits.

  Args:
    logits: [..., V] float32.
    s: temperature and truncation.

  Returns:
    (logits, divided by the temperature and masked outside the support; the support's
    bits [..., V / 8] uint8, or None if it is whole).
  """
  finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
  if s.temperature == 0.0:  # all of the probability on the first of the most likely
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    one = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) == best
    logits, keep = jnp.where(one, 0.0, supports.MASKED), one
  else:
    logits = logits / s.temperature
    keep = None
    if s.truncates:
      keep = supports.support(logits, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
  packed = None
  if s.truncates:
    packed = supports.pack(keep)
    logits = supports.restrict(logits, packed)
  # What is not finite must be noticed, whatever a bound has made of it.
  return jnp.where(finite, logits, jnp.nan), packed


def pick(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
  """A token from softmax(logits), by inversion of its cumulative sum: first a block of
  about sqrt(V) tokens, then a token of it, by a number each. A token of no probability
  is never drawn.

  Args:
    logits: [..., V] float32.
    uniforms: [..., 2] float32, in [0, 1).

  Returns:
    [...] int32.
  """
  vocab = logits.shape[-1]
  width = 1 << max(0, (vocab - 1).bit_length() // 2)
  p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -vocab % width)])
  p = p.reshape(*p.shape[:-1], -1, width)
  block = _invert(p.sum(axis=-1), uniforms[..., 0])
  inside = jnp.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :]
  return block * width + _invert(inside, uniforms[..., 1])


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
  """The place [...] int32 in [..., K] masses where the cumulative sum passes the share
  `uniform` [...] of the total."""
  sums = jnp.cumsum(mass, axis=-1)
  # A sum may round below the one before it, and the last below the share of itself: so
  # the first mass that passes is asked for, of those above 0, or else the last of them.
  some, count = mass > 0, mass.shape[-1]
  passes = some & (sums > uniform[..., None] * sums[..., -1:])
  places = jnp.arange(count).reshape((1,) * (mass.ndim - 1) + (-1,))
  first = jnp.where(passes, places, count).min(axis=-1)
  last = jnp.where(some, places, 0).max(axis=-1)
  return jnp.minimum(first, last).astype(jnp.int32)


def uniforms(keys: jax.Array, t: jax.Array, purpose: int = 0) -> jax.Array:
  """Two numbers in [0, 1) a row, [S, 2] float32, by the row's key, the token's number t
  [S] and what they are for alone. Args: keys [S, 2] uint32."""

  def one(key, t):
    key = jax.random.fold_in(jax.random.wrap_key_data(key), t)
    if purpose:
      key = jax.random.fold_in(key, purpose)
    return jax.random.uniform(key, (2,))

  return jax.vmap(one)(keys, t)


def row_keys(key: jax.Array, ids: jax.Array, samples: jax.Array) -> jax.Array:
  """[B, G, 2] uint32: fold_in(fold_in(key, id), sample). Args: ids [B], samples [B,
  G]."""

  def one(problem, sample):
    both = jax.random.fold_in(jax.random.fold_in(key, problem), sample)
    return jax.random.key_data(both)

  return jax.vmap(jax.vmap(one, (None, 0)))(ids, samples)


def statistics(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(log-probabilities of the tokens, entropies), [...] float32 each."""
  return vocabulary.token_logprobs(logits, tokens), vocabulary.entropy(logits)
