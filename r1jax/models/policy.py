"""The policy: embedding, scanned pre-norm blocks, head, and the optional MTP module.

One forward definition serves trainer and sampler: `__call__` runs whole sequences and
returns the cache entries of every layer, `decode` runs new tokens on such a cache.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from r1jax import sharding, vocabulary
from r1jax.models.cache import Cache, DecodeStep
from r1jax.models.config import PolicyConfig
from r1jax.models.gqa import GQA
from r1jax.models.layers import RMSNorm, SwiGLU, rope_turns, weight
from r1jax.models.mla import MLA
from r1jax.models.moe import MoE
from r1jax.models.sequence import Sequence


@struct.dataclass
class Forward:
  hidden: jax.Array  # B T D, after the final norm
  cache: jax.Array  # N B T L, of the entries' layout config.cache
  load: dict  # {stack of MoE layers: [layers, E] float32}
  # seq.outputs float32, the sequence-wise balance loss, summed over layers
  balance: jax.Array
  experts: jax.Array | None  # N B T A int32, the router's choice in the N MoE layers
  dropped: jax.Array  # [] float32, the mean share of pairs that no expert served
  norms: jax.Array  # N B float32, of each layer's output at the last position


@struct.dataclass
class Decoded:
  """What `Policy.decode` says of Q new tokens of each of S rows."""

  hidden: jax.Array  # S Q D, after the final norm
  cache: Cache  # with the tokens' entries
  experts: jax.Array | None  # N S Q A int32, the router's choice in the N MoE layers
  norms: jax.Array  # N S float32, of each layer's output at the last token


_keep = jax.checkpoint_policies
REMAT_POLICIES = {
  "dots": _keep.dots_with_no_batch_dims_saveable,
  "attention": _keep.save_only_these_names("attention"),
  "nothing": _keep.nothing_saveable,
}


class Block(nn.Module):
  """x += attention(norm x); x += FFN(norm x), for a sequence or for one new token."""

  config: PolicyConfig
  moe: bool

  @nn.compact
  def __call__(self, carry, prompts, layer, replay, at):
    """Args:
      carry: (x, own): own is a Cache's, or None for a whole sequence.
      prompts: a Cache's, or None for a whole sequence.
      layer: [] int32, the layer's number; None: the cache is split, and this layer's.
      replay: this layer's experts to use [B, T, A], None for the router's choice.
      at: a Sequence or a DecodeStep.

    Returns:
      ((x, own), (cache entries or None, moe.Routing or None, norm of the last x [B])).
    """
    c = self.config
    x, own = carry
    attention = (MLA if c.attention == "mla" else GQA)(c, name="attention")
    h = RMSNorm(c.norm_eps, name="attention_norm")(x)
    with jax.named_scope(c.attention):
      if isinstance(at, Sequence):
        h, entries = attention(h, at)
      else:
        h, own = attention.decode(h, at, prompts, own, layer)
        entries = None
    h = checkpoint_name(h, "attention")
    keep = sharding.shard_tokens if isinstance(at, Sequence) else sharding.shard_batch
    x = keep(x + h)
    h = RMSNorm(c.norm_eps, name="ffn_norm")(x)
    routing = None
    with jax.named_scope("ffn"):
      if self.moe:
        seq = at if isinstance(at, Sequence) else None
        h, routing = MoE(c, name="moe")(h, seq, replay)
      else:
        h = SwiGLU(c, c.dense_ffn, name="ffn")(h)
    x = keep(x + h)
    norm = jnp.linalg.norm(x[:, -1].astype(jnp.float32), axis=-1)
    return (x, own), (entries, routing, norm)


def _stack(config: PolicyConfig, moe: bool, length: int) -> nn.Module:
  block = Block
  if config.remat != "all":
    block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[config.remat])
  return nn.scan(
    block,
    variable_axes={"params": 0, "router": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, 0, 0, nn.broadcast),
    length=length,
    unroll=min(config.unroll, length),
    # Else Flax traces a layer once more, and takes a GPU kernel's effect for a fault.
    check_constancy_invariants=False,
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

  def _layers(self, carry, prompts, replay, at):
    """Runs both stacks; returns (carry, cache entries, {MoE stack: moe.Routing}, norms
    [N, B])."""
    start, caches, routing, norms = 0, [], {}, []
    for name in ("dense_layers", "moe_layers"):
      n = getattr(self.config, name)
      if not n:
        continue
      layer = jnp.arange(start, start + n)
      chosen = replay if name == "moe_layers" else None
      stack = getattr(self, name)
      carry, (entries, routed, norm) = stack(carry, prompts, layer, chosen, at)
      caches.append(entries)
      norms.append(norm)
      if routed is not None:
        routing[name] = routed
      start += n
    return carry, caches, routing, jnp.concatenate(norms, axis=0)

  def __call__(
    self, tokens: jax.Array, seq: Sequence, replay: jax.Array | None = None
  ) -> Forward:
    """Whole sequences.

    Args:
      tokens: [B, T] int32.
      seq: where they stand.
      replay: [N, B, T, A] experts for the N MoE layers instead of the router's choice.
    """
    seq = seq.replace(turns=rope_turns(seq.positions, self.config))
    carry = sharding.shard_tokens(self._embed(tokens)), None
    (x, _), caches, routing, norms = self._layers(carry, None, replay, seq)
    hidden = self.final_norm(x)
    if self.is_initializing() and self.config.mtp_depth:
      self.mtp(hidden, tokens, seq)
    moe = routing.get("moe_layers")
    return Forward(
      hidden=hidden,
      cache=jnp.concatenate(caches, axis=0),
      load={name: r.load for name, r in routing.items()},
      balance=jnp.zeros(seq.outputs) if moe is None else moe.balance.sum(axis=0),
      experts=None if moe is None else moe.experts,
      dropped=jnp.zeros(()) if moe is None else moe.dropped.mean(),
      norms=norms,
    )

  def decode(
    self,
    tokens: jax.Array,
    at: DecodeStep,
    cache: Cache,
    layers: list | None = None,
  ) -> "Decoded":
    """Q new tokens of each of S rows.

    Args:
      tokens: [S, Q] int32.
      at: where they stand.
      cache: the prompts' entries and the rows' own.
      layers: `layers_of` the variables, for a split cache.
    """
    # Computed here and not again wherever a layer uses them.
    turns = jax.lax.optimization_barrier(rope_turns(at.positions, self.config))
    at, x = at.replace(turns=turns), self._embed(tokens)
    if cache.split:
      x, own, experts, norms = self._unrolled(x, at, cache, layers)
    else:
      carry = x, cache.own
      (x, own), _, routing, norms = self._layers(carry, cache.prompts, None, at)
      moe = routing.get("moe_layers")
      experts = None if moe is None else moe.experts
    return Decoded(
      hidden=self.final_norm(x),
      cache=cache.replace(own=own),
      experts=experts,
      norms=norms,
    )

  def _unrolled(self, x, at, cache, layers):
    """Layer by layer: each has its own arrays of a split cache."""
    own, experts, norms = [], [], []
    for i, variables in enumerate(layers):
      block = Block(self.config, i >= self.config.dense_layers, parent=None)
      (x, mine), (_, routed, norm) = block.apply(
        variables, (x, cache.own[i]), cache.prompts[i], None, None, at
      )
      own.append(mine)
      norms.append(norm)
      if routed is not None:
        experts.append(routed.experts)
    return x, tuple(own), jnp.stack(experts) if experts else None, jnp.stack(norms)

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
    self, hidden: jax.Array, tokens: jax.Array, seq: Sequence
  ) -> tuple[jax.Array, dict]:
    """Multi-token prediction (report, Eq. 21-23): at i, the hidden for token i + 2.

    h'_i = M [norm(Emb(t_i+1)) ; norm(h_i)], one more block, a norm, the shared head.
    Differs: the report prints [hidden ; embedding]; the released weights expect the
    embedding first, and so do we. It leaves open whether h_i comes before or after the
    final norm; their own code and transformers hand over what comes after it.

    Args:
      hidden: [B, T, D] from `__call__`.
      tokens: [B, T].
      seq: as in `__call__`.

    Returns:
      (hidden [B, T, D] for `logits`, {"mtp_layer": load [E]}).
    """
    x, _, routing = self._mtp(hidden, tokens, seq)
    return self.mtp_norm(x), {"mtp_layer": routing.load}

  def mtp_entries(self, hidden: jax.Array, tokens: jax.Array, seq: Sequence):
    """The module's cache entries [1, B, T, L]. Args: as `mtp`."""
    return self._mtp(hidden, tokens, seq)[1][None]

  def _mtp(self, hidden, tokens, seq):
    if seq.prompt:
      raise ValueError("the MTP module takes a row for each output: Sequence.by_output")
    following = jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)
    # A page's last position has no next token; nothing attends to it or counts it.
    more = jnp.pad(seq.segments[:, 1:] == seq.segments[:, :-1], ((0, 0), (0, 1)))
    seq = seq.replace(
      segments=jnp.where(more, seq.segments, 0),
      turns=rope_turns(seq.positions, self.config),
    )
    x, layer = self._mtp_input(hidden, following), jnp.zeros((), jnp.int32)
    (x, _), (entries, routing, _) = self.mtp_layer((x, None), None, layer, None, seq)
    return x, entries, routing

  def _mtp_input(self, hidden: jax.Array, following: jax.Array) -> jax.Array:
    both = [
      self.mtp_embedding_norm(self._embed(following)),
      self.mtp_hidden_norm(hidden),
    ]
    return jnp.concatenate(both, axis=-1) @ self.mtp_projection.astype(hidden.dtype)

  def draft(
    self, hidden: jax.Array, tokens: jax.Array, at: DecodeStep, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """`mtp` of Q tokens of each of S rows.

    Args:
      hidden: [S, Q, D], of the token before each.
      tokens: [S, Q] int32.
      at: where the module's input stands: a place before the tokens'.
      cache: the module's own, of one layer.

    Returns:
      (hidden [S, Q, D] for `logits` of the tokens after, cache with the entries).
    """
    turns = jax.lax.optimization_barrier(rope_turns(at.positions, self.config))
    at, x = at.replace(turns=turns), self._mtp_input(hidden, tokens)
    if cache.split:
      layer, prompts, own = None, cache.prompts[0], cache.own[0]
    else:
      layer, prompts, own = jnp.zeros((), jnp.int32), cache.prompts, cache.own
    (x, own), _ = self.mtp_layer((x, own), prompts, layer, None, at)
    own = (own,) if cache.split else own
    return self.mtp_norm(x), cache.replace(own=own)


def layers_of(variables: dict) -> list:
  """The variables of each layer by itself, taken out of the stacks. Outside of a loop:
  inside, every turn would copy them."""
  found = []
  for name in ("dense_layers", "moe_layers"):
    stack = {kind: tree[name] for kind, tree in variables.items() if name in tree}
    count = len(jax.tree.leaves(stack)[0]) if stack else 0
    found += [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(count)]
  return found


def cast(policy: Policy, params: dict) -> dict:
  """The weights in the dtype that a layer would cast them to. The gradient by them is
  of that dtype, half as large as by float32 masters, and loses nothing more."""

  def one(box, w):
    # The router and norms compute in float32.
    wide = {"router", "norm"} & set(box.names)
    return w if wide else w.astype(policy.config.compute_dtype)

  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  return jax.tree.map(one, boxes(policy)[0], params, is_leaf=is_box)


def gathered(policy: Policy, params: dict) -> dict:
  """The weights as a loop that decodes reads them at every token: `cast`, and whole
  along `fsdp` and `expert` (the rules "replicated"). Inside of jit; values stay.

  Args:
    policy: the network.
    params: its parameters.
  """
  params = cast(policy, params)
  if jax.sharding.get_abstract_mesh().empty:
    return params
  specs = sharding.tree_specs(boxes(policy)[0], "replicated")
  return jax.lax.with_sharding_constraint(params, specs)


@functools.cache
def boxes(policy: Policy) -> tuple[dict, dict]:
  """The shapes of `init`, with the logical axes."""
  return jax.eval_shape(lambda: init(policy, jax.random.key(0)))


def init(policy: Policy, key: jax.Array) -> tuple[dict, dict]:
  """(params, router) in `nn.Partitioned` boxes that carry the logical axes."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  seq = Sequence(positions=tokens, segments=jnp.ones_like(tokens))
  variables = policy.init(key, tokens, seq)
  return variables["params"], variables.get("router", {})
