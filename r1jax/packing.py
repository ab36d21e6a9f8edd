"""Best-fit packing of an update's outputs, inside the compiled step.

Rows of one width hold outputs of many lengths side by side, each with its prompt before
it, so that hardly any padding is computed (R1, supplement B.1): the outputs are sorted
by length, dealt out to the ranks that cut rows, packed by best fit inside each rank,
and every rank has as many rows. `data/packing.py` is the host's, for fixed examples.

How many rows there are is known on the device alone. So they are computed some at a
time, a `Part`, in a loop over the parts that are in use.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from r1jax import implementation as impl
from r1jax import sharding
from r1jax.models.sequence import Sequence


def best_fit(lengths: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
  """Where sequences stand: each goes, in the order given, into the fullest row that
  still holds it, or opens a new one. Longest first fills rows best.

  Args:
    lengths: [m] int32, from 1 to width.
    width: tokens a row.

  Returns:
    (row, column of the first token), both [m] int32.
  """

  def place(room, length):
    row = jnp.argmin(jnp.where(room >= length, room, width + 1))
    return room.at[row].add(-length), (row, width - room[row])

  free = jnp.full(lengths.shape, width, jnp.int32)  # at worst a row each
  return jax.lax.scan(place, free, lengths)[1]


@struct.dataclass
class Part:
  """Some rows of each of D ranks, the same number everywhere; L tokens a rank."""

  output: jax.Array  # D L int32, which of the rank's m outputs a token is of
  token: jax.Array  # D L int32, which of that output's
  real: jax.Array  # D L bool, there is such a token
  starts: jax.Array  # D m int32, place of each output's first token, if it is here
  here: jax.Array  # M bool, outputs that stand in these rows, M = D m
  width: int = struct.field(pytree_node=False)

  def rows(self, x: jax.Array) -> jax.Array:
    """[D, L, ...] -> [R, width, ...], of all ranks."""
    return sharding.shard_batch(x.reshape(-1, self.width, *x.shape[2:]))

  def sequence(self) -> Sequence:
    """Where the tokens of the R rows stand; each output is a segment."""
    segments = jnp.where(self.real, self.output + 1, 0)
    return Sequence(positions=self.rows(self.token), segments=self.rows(segments))

  def lay(self, x: jax.Array, first: jax.Array) -> jax.Array:
    """What the outputs have of each token, in the rows: [M, S, ...] -> [R, width, ...].

    Args:
      x: of S tokens.
      first: [M] int32, which of the S an output's first token has. Places beyond the S,
        and those without a token, get something of another.
    """
    ranks, m = self.starts.shape

    def of_rank(x, first, output, token):
      return x[output, jnp.clip(first[output] + token, 0, x.shape[1] - 1)]

    x, first = x.reshape(ranks, m, *x.shape[1:]), first.reshape(ranks, m)
    return self.rows(jax.vmap(of_rank)(x, first, self.output, self.token))

  def take(self, x: jax.Array, skip: jax.Array, count: int) -> jax.Array:
    """The way back: [R, width] -> [M, count], `count` places of each output after its
    first `skip` [M]. Something of another where the output is not here, or is over."""
    ranks = len(self.starts)
    x = x.reshape(ranks, -1)
    starts = jnp.clip(self.starts + skip.reshape(ranks, -1), 0, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, count)))

    def of_output(x, start):
      return jax.lax.dynamic_slice(x, (start,), (count,))

    of_rank = jax.vmap(of_output, (None, 0))
    return sharding.shard_batch(jax.vmap(of_rank)(x, starts).reshape(-1, count))


@struct.dataclass
class Packing:
  """M outputs in rows, on D ranks; m = M / D on each."""

  order: jax.Array  # M int32, which outputs these are: by rank, row and column
  starts: jax.Array  # D m int32, row * width + column of the first token; rising
  lengths: jax.Array  # D m int32
  width: int = struct.field(pytree_node=False)
  rows: int = struct.field(pytree_node=False)  # of a rank in a part

  @property
  def parts(self) -> jax.Array:
    """[] int32, parts that hold anything; the last may have rows that are empty."""
    return self.starts.max() // (self.width * self.rows) + 1

  @property
  def efficiency(self) -> jax.Array:
    """[] float32, tokens over places that are computed."""
    tokens = self.rows * self.width * len(self.starts)  # a part's
    return self.lengths.sum() / (self.parts * tokens).astype(jnp.float32)

  def sort(self, tree: Any) -> Any:
    """Arrays [M, ...] of the outputs, in the order of their places."""
    return jax.tree.map(lambda x: sharding.shard_batch(x[self.order]), tree)

  def unsort(self, tree: Any) -> Any:
    """`sort` undone."""
    return jax.tree.map(lambda x: jnp.zeros_like(x).at[self.order].set(x), tree)

  def part(self, i: jax.Array) -> Part:
    """Rows i * rows .. (i + 1) * rows - 1 of each rank."""
    length = self.width * self.rows
    places = i * length + jnp.arange(length)

    def of_rank(starts, lengths):
      output = jnp.searchsorted(starts, places, side="right") - 1
      token = places - starts[output]
      return output, token, token < lengths[output]

    output, token, real = jax.vmap(of_rank)(self.starts, self.lengths)
    starts = self.starts - i * length
    here = (starts >= 0) & (starts < length)
    return Part(output, token, real, starts, here.reshape(-1), self.width)


def pack(lengths: jax.Array, width: int, tokens: int) -> Packing:
  """Where the outputs stand.

  Args:
    lengths: [M] int32, at most `width`; one without tokens gets a place of padding.
    width: tokens a row.
    tokens: that a part may hold on all ranks together; it has a row of each at least.

  Raises:
    ValueError: the outputs do not divide over the ranks.
  """
  ranks = impl.parts(sharding.BATCH)
  if len(lengths) % ranks:
    raise ValueError(f"{len(lengths)} outputs do not divide over {ranks} data shards.")
  lengths = jnp.maximum(lengths, 1).astype(jnp.int32)
  order = jnp.argsort(-lengths).reshape(-1, ranks).T  # dealt out like cards
  lengths = lengths[order]
  row, column = jax.vmap(lambda x: best_fit(x, width))(lengths)
  starts = row * width + column
  by_start = jnp.argsort(starts, axis=1)
  order, starts, lengths = (
    jnp.take_along_axis(x, by_start, axis=1) for x in (order, starts, lengths)
  )
  rows = max(1, tokens // (ranks * width))
  return Packing(order.reshape(-1), starts, lengths, width, rows)
