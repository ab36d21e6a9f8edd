"""How tokens reach their experts and come back.

Each device sorts its tokens by expert: a counting sort, by a running sum over a one-hot
array. Neither a sort nor a scatter of rows is in the program, forwards or backwards:
both are slow to compile and to run on a TPU. Where experts are spread over the mesh
axis `expert`, tokens travel by an all-to-all of buffers of a fixed size. What does not
fit into one round of buffers goes with the next, as many rounds as are needed; with
`drop_tokens` there is one round and the rest is dropped, as in GShard (2006.16668).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from r1jax import implementation as impl
from r1jax import ops, sharding
from r1jax.models.config import PolicyConfig

Weights = tuple[jax.Array, jax.Array, jax.Array]
NOWHERE = 2**30  # an expert that no device has


def routed(
  x: jax.Array,
  experts: jax.Array,
  gates: jax.Array,
  weights: Weights,
  config: PolicyConfig,
  real: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """sum_a gate_a FFN_{expert_a}(x), the routed experts' part of an MoE layer.

  Args:
    x: [B, T, D].
    experts: [B, T, A] int32.
    gates: [B, T, A] float32.
    weights: gate and up [E, D, F], down [E, F, D], in x's dtype.
    config: expert_capacity, drop_tokens, implementation.
    real: [B, T] bool; padding goes to no expert and gets 0. None: all tokens are real.

  Returns:
    ([B, T, D], [] float32: the share of the (token, expert) pairs that were dropped).
  """
  if real is not None:
    experts = jnp.where(real[..., None], experts, NOWHERE)
  if not impl.mesh_axes():
    return _on_one(x, experts, gates, weights, config), jnp.zeros(())
  mesh = jax.sharding.get_abstract_mesh()
  cut = _token_spec(mesh, *x.shape[:2])
  table = sharding.RULES["fsdp"]
  names = (("experts", "expert_embed", "expert_ffn"),) * 2
  names += (("experts", "expert_ffn", "expert_embed"),)
  specs = tuple(P(*(table[name] for name in axes)) for axes in names)
  specs = tuple(
    P(*(_if_divides(mesh, w.shape[i], axes) for i, axes in enumerate(spec)))
    for w, spec in zip(weights, specs, strict=True)
  )

  count = weights[0].shape[0]
  # Where tokens are not cut along `tensor`, as when decoding, the experts' FFNs are.
  narrow = "tensor" not in jax.tree.leaves(tuple(cut)) and specs[0][2] == "tensor"
  axes = ("fsdp",) if narrow else ("fsdp", "tensor")

  def local(x, experts, gates, *weights):
    weights = [_gathered(*pair, axes) for pair in zip(weights, specs, strict=True)]
    out, dropped = _exchanged(x, experts, gates, weights, config, mesh.shape["expert"])
    if narrow:
      out = jax.lax.psum(out, "tensor")
    pairs = (experts < count).sum()
    dropped, pairs = jax.lax.psum((dropped, pairs), tuple(mesh.axis_names))
    return out, dropped / jnp.maximum(pairs, 1)

  return jax.shard_map(
    local, in_specs=(cut, cut, cut, *specs), out_specs=(cut, P()), check_vma=False
  )(x, experts, gates, *weights)


def _token_spec(mesh, rows: int, length: int) -> P:
  """Every device has tokens of its own where they divide; else all have all."""
  if rows % sharding.parts_of(mesh, sharding.BATCH):
    return P()
  return sharding.token_spec(rows, length)


def _if_divides(mesh, size, axes):
  return axes if size % sharding.parts_of(mesh, axes) == 0 else None


def _gathered(w, spec, axes):
  """The matrices of this device's experts, whole along these axes of the mesh."""
  for axis in (1, 2):
    if spec[axis] in axes:
      w = jax.lax.all_gather(w, spec[axis], axis=axis, tiled=True)
  return w


# -- without an exchange ---------------------------------------------------------------


def _on_one(x, experts, gates, weights, config):
  """Every expert is here."""
  flat, count = x.reshape(-1, x.shape[-1]), weights[0].shape[0]
  slots, sizes = _counting_sort(experts.reshape(-1), count)
  owners = _inverse(slots, slots.size)
  slots = slots.reshape(len(flat), -1)
  y = _ffn(_to_slots(flat, slots, owners), sizes, weights, config.implementation)
  return _combine(_from_slots(y, slots, owners), gates).reshape(x.shape)


def _ffn(rows, sizes, weights, implementation):
  """SwiGLU of rows that are sorted by expert."""

  def product(rows, w):
    return ops.grouped_matmul(rows, w, sizes, implementation=implementation)

  w_gate, w_up, w_down = weights
  return product(jax.nn.silu(product(rows, w_gate)) * product(rows, w_up), w_down)


def _combine(y, gates):
  """[T, A, D] -> [T, D]."""
  gates = gates.reshape(*y.shape[:2], 1).astype(y.dtype)
  return (y * gates).sum(axis=1)


# -- with an exchange ------------------------------------------------------------------


def _exchanged(x, experts, gates, weights, config, parts):
  """This device's tokens, by way of the devices along `expert`."""
  if parts == 1:
    return _on_one(x, experts, gates, weights, config), jnp.zeros(())
  flat, held = x.reshape(-1, x.shape[-1]), weights[0].shape[0]
  pairs = experts.size
  room = _room(pairs, parts, config.expert_capacity)
  home = experts.reshape(-1) // held  # the part that an expert lies on
  # Where each pair stands among those of its part, in the order of their experts;
  # padding's is a part that does not exist.
  places, sizes = _counting_sort(experts.reshape(-1), parts * held)
  by_part = sizes.reshape(parts, held).sum(axis=1)
  first = jnp.append(jnp.cumsum(by_part) - by_part, 0)
  place = places - first[home]
  most = jax.lax.pmax(by_part.max(), tuple(jax.sharding.get_abstract_mesh().axis_names))

  def turn(i):
    now = place - i * room
    fits = (now >= 0) & (now < room) & (home < parts)
    slots = jnp.where(fits, home * room + now, parts * room)
    return _combine(_round(flat, slots, sizes, i, room, weights, config, parts), gates)

  if config.drop_tokens or room == pairs:  # all there can be fits into a round
    dropped = jnp.maximum(by_part - room, 0).sum()
    return turn(0).reshape(x.shape), dropped.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one(i):
    return jax.lax.cond(i * room < most, turn, lambda i: jnp.zeros_like(flat), i)

  def add(total, i):
    return total + one(i), None

  # program_cost.py counts it once.
  out, _ = jax.lax.scan(add, jnp.zeros_like(flat), jnp.arange(-(-pairs // room)))
  return out.reshape(x.shape), jnp.zeros(())


def _room(pairs: int, parts: int, capacity: float) -> int:
  """Rows of a buffer from one device to another; in 8s, as tiles of a TPU are."""
  return min(-(-math.ceil(capacity * pairs / parts) // 8) * 8, pairs)


def _round(flat, slots, sizes, i, room, weights, config, parts):
  """[T, A, D]: what the experts say of the pairs in `slots`, 0 of the others."""
  owners = _inverse(slots, parts * room)
  slots = slots.reshape(len(flat), -1)
  sent = _to_slots(flat, slots, owners)
  # Which of its experts a part's slots are for, from the counts alone.
  held = sizes.shape[0] // parts
  upto = jnp.cumsum(sizes.reshape(parts, held), axis=1) - i * room
  at = jnp.arange(room)[None, :, None]
  which = (at >= upto[:, None, :]).sum(axis=-1)  # held: nothing is there

  def swap(x):
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)

  came = swap(sent.reshape(parts, room, -1)).reshape(parts * room, -1)
  order, counts = _counting_sort(swap(which).reshape(-1), held + 1)
  back = _inverse(order, order.size)
  y = _ffn(_permute(came, back, order), counts[:held], weights, config.implementation)
  y = _permute(y, order, back)
  y = swap(y.reshape(parts, room, -1)).reshape(parts * room, -1)
  return _from_slots(y, slots, owners)


# -- counting sort and moves of rows ---------------------------------------------------


def _counting_sort(keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """(where each key goes in a stable sort [n] int32, how many there are of each
  [count] int32). Args: keys [n] in 0 .. count - 1; others go to place n."""
  one = (keys[:, None] == jnp.arange(count)[None]).astype(jnp.int32)
  upto = jnp.cumsum(one, axis=0)
  sizes = upto[-1]
  first = jnp.cumsum(sizes) - sizes
  places = (one * (upto - 1 + first[None])).sum(axis=1)
  return jnp.where((keys >= 0) & (keys < count), places, keys.size), sizes


def _inverse(slots: jax.Array, count: int) -> jax.Array:
  """[count] int32, the pair in each slot; n where there is none. Args: slots [n]; one
  beyond the last is nowhere."""
  n = slots.shape[0]
  empty = jnp.full((count,), n, jnp.int32)
  return empty.at[slots].set(
    jnp.arange(n, dtype=jnp.int32), mode="drop", unique_indices=False
  )


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[index], 0 where the index is beyond the last row."""
  inside = jnp.minimum(index, x.shape[0] - 1)
  rows = x.at[inside].get(mode="promise_in_bounds")
  return jnp.where((index < x.shape[0])[..., None], rows, 0)


def _no_gradient(x):
  return np.zeros(x.shape, jax.dtypes.float0)


@jax.custom_vjp
def _to_slots(x, slots, owners):
  """Tokens [T, D] into slots [N, D]: pair p = t A + a of `owners` is token t's."""
  return _rows(x, owners // slots.shape[1])


def _to_slots_forward(x, slots, owners):
  return _to_slots(x, slots, owners), (slots, owners)


def _to_slots_back(kept, grad):
  slots, owners = kept
  return _rows(grad, slots).sum(axis=1), _no_gradient(slots), _no_gradient(owners)


_to_slots.defvjp(_to_slots_forward, _to_slots_back)


@jax.custom_vjp
def _from_slots(y, slots, owners):
  """Slots [N, D] back to their pairs [T, A, D]."""
  return _rows(y, slots)


def _from_slots_forward(y, slots, owners):
  return _from_slots(y, slots, owners), (slots, owners)


def _from_slots_back(kept, grad):
  slots, owners = kept
  flat = grad.reshape(-1, grad.shape[-1])
  return _rows(flat, owners), _no_gradient(slots), _no_gradient(owners)


_from_slots.defvjp(_from_slots_forward, _from_slots_back)


@jax.custom_vjp
def _permute(x, index, inverse):
  """x[index], a permutation; the gradient goes back by its inverse."""
  return x.at[index].get(mode="promise_in_bounds")


def _permute_forward(x, index, inverse):
  return _permute(x, index, inverse), (index, inverse)


def _permute_back(kept, grad):
  index, inverse = kept
  back = grad.at[inverse].get(mode="promise_in_bounds")
  return back, _no_gradient(index), _no_gradient(inverse)


_permute.defvjp(_permute_forward, _permute_back)
