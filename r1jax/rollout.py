"""G samples a prompt, in the graph.

A prompt is prefilled once and its cache is shared by its group. Then one
`lax.while_loop` writes a token a row: the rows' latent cache rides in the carry, every
token's log-probability is kept, and the loop ends when all rows have.

`start`, `advance` and `finish` are the pieces: `sample` joins them inside one program;
long rollouts call `advance` again and again with a rising limit, with the same result.
"""

from flax import struct
import jax
import jax.numpy as jnp

from r1jax import ops, sharding, vocabulary
from r1jax import support as supports
from r1jax.models.mla import DecodeStep, Sequence
from r1jax.models.policy import Policy
from r1jax.prompts import PromptBatch


@struct.dataclass
class Rollout:
  tokens: jax.Array  # B G T int32, the completions, padded on the right
  mask: jax.Array  # B G T bool, the sampled tokens, the stop token included
  logprobs: jax.Array  # B G T float32, of the distribution sampled from; 0 in padding
  entropy: jax.Array  # B G T float32, nats, of that distribution; 0 in padding
  ended: jax.Array  # B G bool, a stop token was drawn; False means truncated
  # What an update needs to see the tokens as the sampler did; None where there is none.
  prompt_experts: jax.Array | None = None  # B N P A uint8 or int32, of the N MoE layers
  experts: jax.Array | None = None  # B G N T A, likewise
  support: jax.Array | None = None  # B G T V/8 uint8, the truncated support's bits

  @property
  def lengths(self) -> jax.Array:  # B G int32
    return self.mask.sum(axis=-1)

  def spoken(self) -> "Rollout":
    """What was said, without the records for the update."""
    return self.replace(prompt_experts=None, experts=None, support=None)


@struct.dataclass
class Decoding:
  """The carry of the loop."""

  t: jax.Array  # [] int32, tokens written so far
  tokens: jax.Array  # B G T
  logprobs: jax.Array  # B G T
  entropy: jax.Array  # B G T
  lengths: jax.Array  # B G int32
  done: jax.Array  # B G bool
  hidden: jax.Array  # B G D, of the last token
  prefix: jax.Array  # N B P L, the prompts on the right
  suffix: jax.Array  # N B G S L, S slots for T tokens
  prompt_experts: jax.Array | None  # N B P A
  experts: jax.Array | None  # N B G T A
  support: jax.Array | None  # B G T V/8


def repeats(ids: jax.Array) -> jax.Array:
  """How often each problem stood in the batch before. Args: ids [B]. Returns: [B]."""
  return jnp.tril(ids[:, None] == ids[None, :], k=-1).sum(axis=1)


def start(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  *,
  group_size: int,
  max_tokens: int,
  pad_id: int,
  truncated_support: bool = False,
) -> Decoding:
  """Prefills each prompt once and sets up the loop's carry."""
  batch, cut = prompts.tokens.shape[0], sharding.shard_batch
  seq = Sequence.of_mask(prompts.mask)
  out = policy.apply({"params": params, "router": router}, prompts.tokens, seq)
  rows = (batch, group_size)
  hidden = jnp.broadcast_to(out.hidden[:, -1:], (*rows, out.hidden.shape[-1]))
  layers, _, length, width = out.cache.shape
  kind = policy.config.implementation
  fill = ops.cache_slots(length, kind) - length
  prefix = jnp.pad(out.cache, ((0, 0), (0, 0), (fill, 0), (0, 0)))
  slots = ops.cache_slots(max_tokens, kind)
  experts = prompt_experts = support = None
  if out.experts is not None:
    few = policy.config.experts <= 256
    prompt_experts = out.experts.astype(jnp.uint8 if few else jnp.int32)
    moe_layers, _, _, active = prompt_experts.shape
    shape = (moe_layers, *rows, max_tokens, active)
    experts = cut(jnp.zeros(shape, prompt_experts.dtype), axis=1)
  if truncated_support:
    shape = (*rows, max_tokens, -(-policy.config.vocab // 8))
    support = cut(jnp.zeros(shape, jnp.uint8))
  return Decoding(
    t=jnp.zeros((), jnp.int32),
    tokens=cut(jnp.full((*rows, max_tokens), pad_id, jnp.int32)),
    logprobs=cut(jnp.zeros((*rows, max_tokens), jnp.float32)),
    entropy=cut(jnp.zeros((*rows, max_tokens), jnp.float32)),
    lengths=cut(jnp.zeros(rows, jnp.int32)),
    done=cut(jnp.zeros(rows, bool)),
    hidden=cut(hidden),
    prefix=cut(prefix, axis=1),
    suffix=cut(jnp.zeros((layers, *rows, slots, width), prefix.dtype), axis=1),
    prompt_experts=prompt_experts,
    experts=experts,
    support=support,
  )


def advance(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  carry: Decoding,
  key: jax.Array,
  limit: int | jax.Array,
  *,
  temperature: float,
  stop_ids: tuple[int, ...],
  pad_id: int,
  top_k: int = 0,
  top_p: float = 1.0,
  earlier: jax.Array | None = None,
) -> Decoding:
  """Decodes until `limit` tokens are written or every row has ended.

  Token t of sample g of the problem with id i is drawn with the key
  fold_in(fold_in(fold_in(key, i), g), t) alone: a completion depends neither on where
  the loop was cut nor on which other problems share its batch. (A problem that stands
  in the batch for the n-th time goes on counting: its samples are n * G + g; `earlier`
  [B] says how often it stood before where the batch is a part of a larger one.)
  """
  variables = {"params": params, "router": router}
  _, group, length = carry.tokens.shape
  earlier = repeats(prompts.ids) if earlier is None else earlier
  samples = earlier[:, None] * group + jnp.arange(group)[None]  # B G

  def sample_key(problem, sample):
    return jax.random.fold_in(jax.random.fold_in(key, problem), sample)

  row_keys = jax.vmap(jax.vmap(sample_key, (None, 0)))(prompts.ids, samples)
  prompt_lengths = prompts.mask.sum(axis=1)

  def draw(logits, t):
    def one(k, row):
      noise = jax.random.gumbel(jax.random.fold_in(k, t), row.shape)
      return jnp.argmax(row + noise).astype(jnp.int32)

    return jax.vmap(jax.vmap(one))(row_keys, logits)

  def running(c: Decoding):
    return (c.t < jnp.minimum(limit, length)) & ~jnp.all(c.done)

  def body(c: Decoding) -> Decoding:
    logits = policy.apply(variables, c.hidden, method="logits") / temperature
    packed = None
    if c.support is not None:
      packed = supports.pack(supports.support(logits, top_k=top_k, top_p=top_p))
      logits = supports.restrict(logits, packed)
    drawn = draw(logits, c.t)
    token = jnp.where(c.done, pad_id, drawn)
    logprob = jnp.where(c.done, 0.0, vocabulary.token_logprobs(logits, drawn))
    entropy = jnp.where(c.done, 0.0, vocabulary.entropy(logits))

    def put(buffer, column):
      return jax.lax.dynamic_update_slice(buffer, column[..., None], (0, 0, c.t))

    at = DecodeStep(
      positions=jnp.broadcast_to(prompt_lengths[:, None] + c.t, token.shape),
      prefix_starts=c.prefix.shape[2] - prompt_lengths,
      slot=c.t,
    )
    hidden, suffix, chosen = policy.apply(
      variables, token, at, c.prefix, c.suffix, method="decode"
    )
    experts, support = c.experts, c.support
    if chosen is not None:
      entry = chosen.astype(experts.dtype)[:, :, :, None]
      experts = jax.lax.dynamic_update_slice(experts, entry, (0, 0, 0, c.t, 0))
    if packed is not None:
      support = jax.lax.dynamic_update_slice(
        support, packed[:, :, None], (0, 0, c.t, 0)
      )
    stops = (token[..., None] == jnp.asarray(stop_ids).reshape(1, 1, -1)).any(-1)
    return Decoding(
      t=c.t + 1,
      tokens=put(c.tokens, token),
      logprobs=put(c.logprobs, logprob),
      entropy=put(c.entropy, entropy),
      lengths=c.lengths + ~c.done,
      done=c.done | stops,
      hidden=hidden,
      prefix=c.prefix,
      suffix=suffix,
      prompt_experts=c.prompt_experts,
      experts=experts,
      support=support,
    )

  return jax.lax.while_loop(running, body, carry)


def finish(carry: Decoding) -> Rollout:
  written = jnp.arange(carry.tokens.shape[-1])[None, None]
  return Rollout(
    tokens=carry.tokens,
    mask=written < carry.lengths[..., None],
    logprobs=carry.logprobs,
    entropy=carry.entropy,
    ended=carry.done,
    prompt_experts=_batch_first(carry.prompt_experts, 1),
    experts=_batch_first(carry.experts, 2),
    support=carry.support,
  )


def _batch_first(x: jax.Array | None, rows: int) -> jax.Array | None:
  """Layers N from the front to behind the `rows` axes of rows."""
  return None if x is None else jnp.moveaxis(x, 0, rows)


def sample(
  policy: Policy,
  params: dict,
  router: dict,
  prompts: PromptBatch,
  key: jax.Array,
  *,
  group_size: int,
  max_tokens: int,
  temperature: float,
  stop_ids: tuple[int, ...],
  pad_id: int,
  top_k: int = 0,
  top_p: float = 1.0,
  earlier: jax.Array | None = None,
) -> Rollout:
  """A whole rollout of G completions a prompt.

  Args:
    policy: the network.
    params: its parameters.
    router: its router biases.
    prompts: B left-padded prompts.
    key: of this rollout.
    group_size: G.
    max_tokens: T, the output window; a row that fills it is truncated.
    temperature: divides the logits; the log-probabilities are of the tempered
      distribution. The paper samples at 1.
    stop_ids: tokens that end a row (EOS; `</answer>` with `stop_on_answer`).
    pad_id: fills rows after their end.
    top_k, top_p: truncate the distribution (support.py); 0 and 1 leave it whole. The
      log-probabilities and the entropy are of what is left, renormalised.
    earlier: [B] int32, see `advance`.
  """
  carry = start(
    policy,
    params,
    router,
    prompts,
    group_size=group_size,
    max_tokens=max_tokens,
    pad_id=pad_id,
    truncated_support=supports.truncates(top_k, top_p),
  )
  carry = advance(
    policy,
    params,
    router,
    prompts,
    carry,
    key,
    max_tokens,
    temperature=temperature,
    stop_ids=stop_ids,
    pad_id=pad_id,
    top_k=top_k,
    top_p=top_p,
    earlier=earlier,
  )
  return finish(carry)
