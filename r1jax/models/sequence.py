"""Where the tokens of a full forward pass stand, and which of them see each other.

A row is one sequence, several packed pages, or a group: a prompt that stands there once
and G outputs after it, each of which sees the prompt and itself.
"""

from flax import struct
import jax
import jax.numpy as jnp

from r1jax import implementation as impl
from r1jax import ops
from r1jax.models import ring_attention


@struct.dataclass
class Sequence:
  positions: jax.Array  # B T int32, for RoPE
  # B T int32; 0 is padding; a token sees its own segment only, whose number must not
  # return later in the row.
  segments: jax.Array
  turns: jax.Array | None = None  # 2 B T R/2, layers.rope_turns; the policy fills it in
  # Of a row that holds a group: T = prompt + group * (an output's tokens).
  prompt: int = struct.field(pytree_node=False, default=0)
  group: int = struct.field(pytree_node=False, default=1)

  @classmethod
  def of_mask(cls, mask: jax.Array) -> "Sequence":
    """One page a row: positions count the real tokens. Args: mask [B, T] bool."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return cls(positions=positions, segments=mask.astype(jnp.int32))

  @classmethod
  def of_groups(cls, prompts: jax.Array, outputs: jax.Array) -> "Sequence":
    """A group a row. Args: masks [B, P] and [B, G, T] bool."""
    b, group, _ = outputs.shape
    before = jnp.cumsum(prompts, axis=1)
    after = before[:, -1:, None] + jnp.cumsum(outputs, axis=2)
    positions = jnp.concatenate([before, after.reshape(b, -1)], axis=1) - 1
    mask = jnp.concatenate([prompts, outputs.reshape(b, -1)], axis=1)
    return cls(
      positions=jnp.maximum(positions, 0),
      segments=mask.astype(jnp.int32),
      prompt=prompts.shape[1],
      group=group,
    )

  @property
  def outputs(self) -> int:
    """Sequences that the rows hold, a group's G and otherwise one a row."""
    return self.positions.shape[0] * self.group

  @property
  def uses(self) -> jax.Array:
    """[B, T] float32, the sequences that each token is part of; 0 for padding."""
    place = jnp.arange(self.segments.shape[1])[None]
    return (self.segments > 0) * jnp.where(place < self.prompt, self.group, 1.0)

  def by_output(self, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B G, P + (T - P) / G, ...]: a row for each output, with its
    prompt before it. As it is where no row holds a group."""
    if not self.prompt:
      return x
    rest = x.shape[2:]
    prompts = jnp.repeat(x[:, : self.prompt], self.group, axis=0)
    outputs = x[:, self.prompt :].reshape(self.outputs, -1, *rest)
    return jnp.concatenate([prompts, outputs], axis=1)

  def by_group(self, x: jax.Array) -> jax.Array:
    """[B G, P + (T - P) / G, ...] -> [B, T, ...]: `by_output` undone; a prompt is taken
    from its first output."""
    if not self.prompt:
      return x
    apart = x.reshape(-1, self.group, *x.shape[1:])
    prompts, outputs = apart[:, 0, : self.prompt], apart[:, :, self.prompt :]
    outputs = outputs.reshape(-1, outputs.shape[1] * outputs.shape[2], *x.shape[2:])
    return jnp.concatenate([prompts, outputs], axis=1)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seq: Sequence,
  *,
  scale: float,
  implementation: str,
) -> jax.Array:
  """Causal attention within the rows of a sequence: ops.attention, for groups
  ops.group_attention, for rows that are cut over devices ring_attention.

  Args:
    q: [B, T, H, d].
    k: [B, T, Hk, d].
    v: [B, T, Hk, dv].
    seq: where the tokens stand.
    scale, implementation: as in ops.attention.

  Returns:
    [B, T, H, dv].
  """
  how = dict(scale=scale, implementation=implementation)
  context = impl.parts("context")
  if not seq.prompt and context > 1 and q.shape[1] % context == 0:
    return ring_attention.attention(q, k, v, seq.segments, **how)
  if not seq.prompt:
    out, _ = ops.attention(q, k, v, seq.segments, seq.segments, **how)
    return out
  b, p = q.shape[0], seq.prompt
  parts = q, k, v, seq.segments
  prompts = [x[:, :p] for x in parts]
  outputs = [x[:, p:].reshape(b, seq.group, -1, *x.shape[2:]) for x in parts]
  before, _ = ops.attention(*prompts, prompts[-1], **how)
  after = ops.group_attention(*outputs, *prompts[1:], **how)
  after = after.reshape(b, -1, *after.shape[3:])
  return jnp.concatenate([before, after], axis=1)
