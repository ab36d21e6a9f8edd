"""The policy: embedding, scanned pre-norm blocks, head, and the optional MTP module.

One forward definition serves trainer and sampler: `__call__` runs whole sequences and
returns the cache entries of every layer, `decode` runs one token a row on such a cache.
"""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from r1jax import sharding, vocabulary
from r1jax.models.config import PolicyConfig
from r1jax.models.gqa import GQA
from r1jax.models.layers import RMSNorm, SwiGLU, weight
from r1jax.models.mla import MLA, DecodeStep, Sequence
from r1jax.models.moe import MoE


@struct.dataclass
class Forward:
  hidden: jax.Array  # B T D, after the final norm
  trunk: jax.Array  # B T D, before it (the MTP module's input)
  cache: jax.Array  # N B T L, of the entries' layout config.cache
  load: dict  # {stack of MoE layers: [layers, E] float32}
  balance: jax.Array  # B float32, the sequence-wise balance loss, summed over layers
  experts: jax.Array | None  # N B T A int32, the router's choice in the N MoE layers


class Block(nn.Module):
  """x += attention(norm x); x += FFN(norm x), for a sequence or for one new token."""

  config: PolicyConfig
  moe: bool

  @nn.compact
  def __call__(self, carry, prefix, layer, replay, at):
    """Args:
      carry: (x, suffix): suffix [N, B, G, S, L] is None for a whole sequence.
      prefix: all layers' prompt caches [N, B, P, L], None for a whole sequence.
      layer: [] int32, the layer's number.
      replay: this layer's experts to use [B, T, A], None for the router's choice.
      at: a Sequence or a DecodeStep.

    Returns:
      ((x, suffix), (cache entries or None, moe.Routing or None)).
    """
    c = self.config
    x, suffix = carry
    attention = (MLA if c.attention == "mla" else GQA)(c, name="attention")
    h = RMSNorm(c.norm_eps, name="attention_norm")(x)
    with jax.named_scope(c.attention):
      if isinstance(at, Sequence):
        h, entries = attention(h, at)
      else:
        h, suffix = attention.decode(h, at, prefix, suffix, layer)
        entries = None
    x = sharding.shard_batch(x + h)
    h = RMSNorm(c.norm_eps, name="ffn_norm")(x)
    routing = None
    with jax.named_scope("ffn"):
      if self.moe:
        counted = at.segments > 0 if isinstance(at, Sequence) else None
        h, routing = MoE(c, name="moe")(h, counted, replay)
      else:
        h = SwiGLU(c, c.dense_ffn, name="ffn")(h)
    return (sharding.shard_batch(x + h), suffix), (entries, routing)


def _stack(config: PolicyConfig, moe: bool, length: int) -> nn.Module:
  block = nn.remat(Block, prevent_cse=False) if config.remat else Block
  return nn.scan(
    block,
    variable_axes={"params": 0, "router": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, 0, 0, nn.broadcast),
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )(config, moe)


class Policy(nn.Module):
  config: PolicyConfig

  def setup(self):
    c = self.config
    # A small head starts the policy near uniform, be it the embedding or its own.
    std = 0.02 if c.init_std is None else c.init_std
    self.embedding = weight(
      self,
      "embedding",
      (c.vocab, c.width),
      ("vocab", "embed"),
      fan_in=4,
      std=std if c.tied_embeddings else c.init_std,
    )
    if c.dense_layers:
      self.dense_layers = _stack(c, False, c.dense_layers)
    if c.moe_layers:
      self.moe_layers = _stack(c, True, c.moe_layers)
    self.final_norm = RMSNorm(c.norm_eps)
    if not c.tied_embeddings:
      self.head = weight(
        self, "head", (c.width, c.vocab), ("embed", "vocab"), fan_in=c.width, std=std
      )
    if c.mtp_depth:
      self.mtp_embedding_norm = RMSNorm(c.norm_eps)
      self.mtp_hidden_norm = RMSNorm(c.norm_eps)
      self.mtp_projection = weight(
        self,
        "mtp_projection",
        (2 * c.width, c.width),
        ("embed", None),
        fan_in=2 * c.width,
        std=c.init_std,
      )
      self.mtp_layer = Block(c, moe=True)
      self.mtp_norm = RMSNorm(c.norm_eps)

  def _embed(self, tokens: jax.Array) -> jax.Array:
    return sharding.shard_batch(
      self.embedding.astype(self.config.compute_dtype)[tokens]
    )

  def _layers(self, carry, prefix, replay, at):
    """Runs both stacks; returns (carry, cache entries, {MoE stack: moe.Routing})."""
    start, caches, routing = 0, [], {}
    for name in ("dense_layers", "moe_layers"):
      n = getattr(self.config, name)
      if not n:
        continue
      layer = jnp.arange(start, start + n)
      chosen = replay if name == "moe_layers" else None
      carry, (entries, routed) = getattr(self, name)(carry, prefix, layer, chosen, at)
      caches.append(entries)
      if routed is not None:
        routing[name] = routed
      start += n
    return carry, caches, routing

  def __call__(
    self, tokens: jax.Array, seq: Sequence, replay: jax.Array | None = None
  ) -> Forward:
    """Whole sequences.

    Args:
      tokens: [B, T] int32.
      seq: where they stand.
      replay: [N, B, T, A] experts for the N MoE layers instead of the router's choice.
    """
    carry = self._embed(tokens), None
    (trunk, _), caches, routing = self._layers(carry, None, replay, seq)
    if self.is_initializing() and self.config.mtp_depth:
      self.mtp(trunk, tokens, seq)
    moe = routing.get("moe_layers")
    return Forward(
      hidden=self.final_norm(trunk),
      trunk=trunk,
      cache=jnp.concatenate(caches, axis=0),
      load={name: r.load for name, r in routing.items()},
      balance=jnp.zeros(tokens.shape[0]) if moe is None else moe.balance.sum(axis=0),
      experts=None if moe is None else moe.experts,
    )

  def decode(
    self, tokens: jax.Array, at: DecodeStep, prefix: jax.Array, suffix: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One token a row.

    Args:
      tokens: [B, G] int32.
      at: where they stand.
      prefix: [N, B, P, L], the prompts' cache, shared by the G rows of a group.
      suffix: [N, B, G, S, L], the rows' own cache.

    Returns:
      (hidden [B, G, D], suffix with the tokens' entries written at `at.slot`, experts
      of the MoE layers [N, B, G, A] or None).
    """
    (x, suffix), _, routing = self._layers(
      (self._embed(tokens), suffix), prefix, None, at
    )
    moe = routing.get("moe_layers")
    return self.final_norm(x), suffix, None if moe is None else moe.experts

  def _head(self, dtype: jnp.dtype) -> jax.Array:
    """[D, V]."""
    head = self.embedding.T if self.config.tied_embeddings else self.head
    return head.astype(dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32."""
    head = self._head(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)

  def token_statistics(
    self,
    hidden: jax.Array,
    tokens: jax.Array,
    support: jax.Array | None = None,
    *,
    temperature: float = 1.0,
  ) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities of the tokens, entropies): vocabulary.token_statistics."""
    head = self._head(hidden.dtype)
    return vocabulary.token_statistics(
      hidden, head, tokens, support, temperature=temperature
    )

  def mtp(
    self, trunk: jax.Array, tokens: jax.Array, seq: Sequence
  ) -> tuple[jax.Array, dict]:
    """Multi-token prediction (report, Eq. 21-23): at i, the hidden for token i + 2.

    h'_i = M [norm(Emb(t_i+1)) ; norm(h_i)], one more block, a norm, the shared head.
    Differs: the report prints [hidden ; embedding]; the released weights expect the
    embedding first, and so do we.

    Args:
      trunk: [B, T, D] from `__call__`.
      tokens: [B, T].
      seq: as in `__call__`.

    Returns:
      (hidden [B, T, D] for `logits`, {"mtp_layer": load [E]}).
    """
    following = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    # A page's last position has no next token; nothing attends to it or counts it.
    more = jnp.pad(seq.segments[:, 1:] == seq.segments[:, :-1], ((0, 0), (0, 1)))
    seq = seq.replace(segments=jnp.where(more, seq.segments, 0))
    both = [
      self.mtp_embedding_norm(self._embed(following)),
      self.mtp_hidden_norm(trunk),
    ]
    x = jnp.concatenate(both, axis=-1) @ self.mtp_projection.astype(trunk.dtype)
    layer = jnp.zeros((), jnp.int32)
    (x, _), (_, routing) = self.mtp_layer((x, None), None, layer, None, seq)
    return self.mtp_norm(x), {"mtp_layer": routing.load}


def init(policy: Policy, key: jax.Array) -> tuple[dict, dict]:
  """(params, router) in `nn.Partitioned` boxes that carry the logical axes."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  seq = Sequence(positions=tokens, segments=jnp.ones_like(tokens))
  variables = policy.init(key, tokens, seq)
  return variables["params"], variables.get("router", {})
