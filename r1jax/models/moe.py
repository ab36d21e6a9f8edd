"""DeepSeekMoE with aux-loss-free balancing (DeepSeek-V3 report, Eq. 12-16).

The router bias lives in the collection `router`, outside the parameters: it chooses
experts, never weighs them, gets no gradient, and `balance` moves it after each update.
"""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from r1jax.models import dispatch
from r1jax.models.config import PolicyConfig
from r1jax.models.layers import SwiGLU, weight
from r1jax.models.sequence import Sequence


@struct.dataclass
class Routing:
  """What an MoE layer did with its tokens (a scanned stack has a leading axis N)."""

  load: jax.Array  # E float32, counted tokens that each expert served
  balance: jax.Array  # seq.outputs float32, the sequence-wise balance loss of each
  # B T A int32, the router's present choice, in order of rank; not what was replayed
  experts: jax.Array
  dropped: jax.Array  # [] float32, the share of (token, expert) pairs without service


def choose_experts(
  scores: jax.Array, bias: jax.Array, config: PolicyConfig
) -> tuple[jax.Array, jax.Array]:
  """Group-limited top-k on scores + bias; gate values from the scores alone.

  Args:
    scores: [..., E] float32 affinities s.
    bias: [E] float32 selection bias b.
    config: scoring, groups, active groups and experts, renormalisation, scale.

  Returns:
    (experts [..., A] int32, gates [..., A] float32): the A experts with the highest
    s + b within the groups whose two best s + b sum highest (V2's softmax: whose best
    is highest), and g = s / sum(s) * scale.
  """
  c = config
  choice = jax.lax.stop_gradient(scores) + bias.reshape(*[1] * (scores.ndim - 1), -1)
  if c.expert_groups > 1:
    grouped = choice.reshape(*choice.shape[:-1], c.expert_groups, -1)
    best = min(1 if c.scoring == "softmax" else 2, grouped.shape[-1])
    best, _ = jax.lax.top_k(grouped, best)
    _, kept = jax.lax.top_k(best.sum(-1), c.active_groups)
    keep = jax.nn.one_hot(kept, c.expert_groups, dtype=jnp.bool_).any(axis=-2)
    # As DeepSeek's own code. Older transformers fill dropped groups with 0, which a
    # kept expert with s + b < 0 loses to.
    choice = jnp.where(keep[..., None], grouped, -jnp.inf).reshape(choice.shape)
  _, experts = jax.lax.top_k(choice, c.active_experts)
  return experts, gate_values(scores, experts, c)


def gate_values(
  scores: jax.Array, experts: jax.Array, config: PolicyConfig
) -> jax.Array:
  """g = s / sum(s) * scale over the chosen experts [..., A], with the gradient of s."""
  gates = jnp.take_along_axis(scores, experts, axis=-1)
  if config.renormalise:
    gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
  return gates * config.route_scale


def sequence_balance(
  scores: jax.Array, counted: jax.Array, config: PolicyConfig
) -> jax.Array:
  """The sequence-wise balance loss, without its alpha (DeepSeek-V3 report, Eq. 17-20).

    sum_i f_i P_i,   f_i = E / (A T) #{t : i among the A highest s_t},
    P_i = 1/T sum_t s_it / sum_j s_jt

  1 when every expert serves as many tokens. f is taken on s, without bias and groups.

  Args:
    scores: [B, T, E] float32.
    counted: [B, T] bool, the row's real tokens.

  Returns:
    [B] float32, 0 for a row without tokens.
  """
  c, keep = config, counted[:, :, None]
  tokens = jnp.maximum(counted.sum(axis=1), 1)[:, None].astype(jnp.float32)
  _, best = jax.lax.top_k(jax.lax.stop_gradient(scores), c.active_experts)
  chosen = jax.nn.one_hot(best, c.experts, dtype=jnp.float32).sum(axis=2)  # B T E
  frequency = (chosen * keep).sum(axis=1) * (c.experts / c.active_experts) / tokens
  share = scores / scores.sum(axis=-1, keepdims=True)
  probability = (share * keep).sum(axis=1) / tokens
  return (frequency * probability).sum(axis=-1)


class MoE(nn.Module):
  """Shared experts on every token plus the chosen routed ones."""

  config: PolicyConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, seq: Sequence | None, replay: jax.Array | None = None
  ) -> tuple[jax.Array, Routing]:
    """Args:
      x: [B, T, D].
      seq: where the tokens stand; padding does not enter load and balance, and a prompt
        that stands there once for its group enters once for each output. None: new
        tokens, which all count.
      replay: [B, T, A] integer experts to use instead of the router's choice; their
        gate values still come from the present scores, so the router gets a gradient
        (Keep Routing, arXiv 2512.02556; R3, arXiv 2510.11370). None: the router's own.

    Returns:
      ([B, T, D] output, Routing).
    """
    c, (d, f, e) = (
      self.config,
      (self.config.width, self.config.expert_ffn, self.config.experts),
    )
    w_router = weight(
      self, "w_router", (d, e), ("embed", "router"), fan_in=d, std=c.init_std
    )
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
    bias = self.variable("router", "bias", lambda: zeros(None, (e,), jnp.float32)).value
    axes_in = "experts", "expert_embed", "expert_ffn"
    axes_out = "experts", "expert_ffn", "expert_embed"
    w_gate = weight(self, "w_gate", (e, d, f), axes_in, fan_in=d, std=c.init_std)
    w_up = weight(self, "w_up", (e, d, f), axes_in, fan_in=d, std=c.init_std)
    w_down = weight(
      self, "w_down", (e, f, d), axes_out, fan_in=2 * c.layers * f, std=c.init_std
    )

    score = jax.nn.softmax if c.scoring == "softmax" else jax.nn.sigmoid
    scores = score(x.astype(jnp.float32) @ w_router)
    own, gates = choose_experts(scores, bias, c)
    experts = own
    if replay is not None:
      experts = replay.astype(own.dtype)
      gates = gate_values(scores, experts, c)
    real = None if seq is None else seq.segments > 0
    if real is not None:  # padding is no expert's
      gates = jnp.where(real[..., None], gates, 0.0)
    chosen = jax.nn.one_hot(experts, e, dtype=jnp.float32)  # B T A E
    kept = chosen if seq is None else chosen * seq.uses[..., None, None]
    load = jax.lax.stop_gradient(kept.sum(axis=(0, 1, 2)))

    weights = (w_gate, w_up, w_down)
    weights = tuple(w.astype(x.dtype) for w in weights)
    if c.moe == "dense":
      of_experts = jnp.einsum("bta,btae->bte", gates, chosen).reshape(-1, e)
      routed = _every_expert(x.reshape(-1, d), of_experts, *weights).reshape(x.shape)
      dropped = jnp.zeros(())
    else:
      routed, dropped = dispatch.routed(x, experts, gates, weights, c, real)
    shared = (
      SwiGLU(c, c.shared_experts * f, name="shared")(x) if c.shared_experts else 0.0
    )
    by_row, counted = scores, jnp.ones(x.shape[:2], bool)
    if seq is not None:
      by_row, counted = seq.by_output(by_row), seq.by_output(real)
    routing = Routing(
      load=load,
      balance=sequence_balance(by_row, counted, c),
      experts=own,
      dropped=dropped,
    )
    return routed + shared, routing


def _every_expert(x, gates, w_gate, w_up, w_down):
  """Every expert on every token, weighted by gates [M, E] (0 where not chosen): exact
  and fast when E is small."""
  e, d, f = w_gate.shape

  def beside(w):  # E D F -> D E*F: one wide product instead of E narrow ones
    return w.swapaxes(0, 1).reshape(d, e * f)

  hidden = jax.nn.silu(x @ beside(w_gate)) * (x @ beside(w_up))
  hidden = hidden.reshape(-1, e, f) * gates.astype(x.dtype)[:, :, None]
  return hidden.reshape(-1, e * f) @ w_down.reshape(e * f, d)


def changed(experts: jax.Array, recorded: jax.Array) -> jax.Array:
  """Whether any layer of a token chose another set of experts.

  Args:
    experts: [N, M, S, A] integers.
    recorded: the same shape.

  Returns:
    [M, S] bool; the order of the A experts does not matter.
  """
  same = jnp.sort(experts, axis=-1) == jnp.sort(recorded, axis=-1).astype(experts.dtype)
  return ~same.all(axis=(0, 3))


def load_imbalance(load: dict) -> jax.Array:
  """Busiest expert's load over the mean, averaged over layers; 1 is perfect balance."""
  if not load:
    return jnp.ones(())
  layers = jnp.concatenate(
    [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(load)], axis=0
  )
  return jnp.mean(layers.max(axis=-1) / jnp.maximum(layers.mean(axis=-1), 1e-6))


@jax.named_scope("router_bias")
def balance(router: Any, load: Any, rate: float) -> Any:
  """Aux-loss-free balancing: b <- b + rate * sign(mean load - load) (report, 2.1.2).

  Args:
    router: the `router` collection, {stack: {..., "bias": [..., E]}}.
    load: {stack: [..., E]} tokens served; stacks without an entry stay as they are.
    rate: the bias update speed, 0.001 in V3's pre-training.
  """

  def moved(biases, served):
    toward = jnp.sign(served.mean(axis=-1, keepdims=True) - served)
    return jax.tree.map(lambda bias: bias + rate * toward, biases)

  return {
    stack: moved(biases, load[stack]) if stack in load else biases
    for stack, biases in router.items()
  }
