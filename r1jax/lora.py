"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / r * A B, W frozen.

A weight with an adapter stands among the parameters as an `Adapted`, in place of its
array, and whatever reads the parameters finds the sum. A layer finds it inside the loop
over the layers: one layer's sum at a time, made again in the backward pass where
`remat` has it so, and the gradient of no frozen weight is kept. A rollout, which casts
the whole tree once (policy.gathered), finds whole weights and not a sum at every token.
So sampler and trainer agree, and only a step, which learns the adapters alone, knows of
them: by `split`, `trained` and `put`, that do nothing to parameters without adapters.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any
import zlib

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from r1jax import sharding
from r1jax.errors import UserError
from r1jax.models import hf, hf_names
from r1jax.models import policy as policy_lib
from r1jax.models.policy import Policy


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which matrices have adapters, and of what rank."""

  rank: int  # r
  alpha: float = 16.0  # an adapter counts alpha / r
  targets: tuple[str, ...] = ("attention",)  # as `matrices` has them

  def __post_init__(self):
    """Raises UserError: what came, the rule and the remedy."""
    rules = [
      (self.rank >= 1, f"rank={self.rank} must be 0 (off) or more; 8 to 64 are usual"),
      (self.alpha > 0, f"alpha={self.alpha} must be above 0; 2 * rank is usual"),
      (
        self.targets and not isinstance(self.targets, str),
        f"targets={self.targets!r} must be a tuple of names, such as ('attention',)",
      ),
    ]
    for ok, rule in rules:
      if not ok:
        raise UserError(f"config.lora.{rule}.")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Adapted(struct.PyTreeNode, nn.meta.AxisMetadata):
  """A weight with its adapter, of a whole stack of layers or of one.

  Axes before those of the matrix are layers and experts, which have adapters of their
  own; a matrix may have several axes on either side, as heads and their channels.
  """

  w: Any  # [..., in, out]
  a: Any  # [..., in, r] float32
  b: Any  # [..., r, out] float32
  scale: float = struct.field(pytree_node=False)  # alpha / r

  def unbox(self) -> jax.Array:
    """W + scale A B, float32. flax calls this where a module reads its parameter."""
    ours, theirs = self.a.ndim - 1, self.b.ndim + self.a.ndim - self.w.ndim - 2
    before = tuple(range(theirs))
    contracted = (ours,), (theirs,)
    low = jax.lax.dot_general(self.a, self.b, (contracted, (before, before)))
    return self.w.astype(jnp.float32) + self.scale * low

  def astype(self, dtype: Any) -> jax.Array:
    return self.unbox().astype(dtype)

  def fits(self) -> bool:
    """Whether the three are of one matrix."""
    at = self.b.ndim + self.a.ndim - self.w.ndim - 2
    both = self.a.shape[:-1] + self.b.shape[at + 1 :]
    rank = self.a.shape[-1:], self.b.shape[at : at + 1]
    return at >= 0 and both == self.w.shape and rank[0] == rank[1]

  def replace_boxed(self, val: Any) -> "Adapted":
    raise NotImplementedError("the weights of a module with adapters are not assigned")

  def add_axis(self, index: int, params: dict) -> "Adapted":
    return self

  def remove_axis(self, index: int, params: dict) -> "Adapted":
    return self


def is_adapted(x: Any) -> bool:
  return isinstance(x, Adapted)


# -- which matrices --------------------------------------------------------------------


def chosen_by(path: str) -> tuple[str, ...]:
  """The targets that mean a parameter, if it is a matrix: a group of matrices, and one
  of attention by its name. The MTP module has none: it is no layer of the policy."""
  match path.split("/"):
    case ["dense_layers" | "moe_layers", "attention", name]:
      return "attention", name
    case ["dense_layers", "ffn", _]:
      return ("ffn",)
    case ["moe_layers", "moe", "shared", _]:
      return ("shared",)
    case ["moe_layers", "moe", "w_gate" | "w_up" | "w_down"]:
      return ("experts",)
  return ()


def matrices(policy: Policy, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
  """{path with slashes: (axes of layers and experts, axes of what goes in)}; the rest
  of a matrix's axes are what comes out. The axes are those of hf_names' table.

  Args:
    policy: the network.
    targets: "attention", "ffn" of dense layers, "shared" experts, routed "experts", or
      matrices of attention such as "w_q".

  Raises:
    UserError: a target that this policy does not have.
  """
  found, known = {}, {}
  for path, leaf in hf_names.leaves(policy.config, hf.shapes(policy)).items():
    if len(leaf.order) == leaf.rows:  # a vector
      continue
    names = chosen_by(path)
    known |= dict.fromkeys(names)
    if set(names) & set(targets):
      found[path] = leaf.stacked, len(leaf.order) - leaf.rows
  if unknown := sorted(set(targets) - set(known)):
    raise UserError(
      f"config.lora.targets={tuple(targets)}: this policy has no matrices"
      f" {', '.join(unknown)}. It has {', '.join(known)}."
    )
  return found


# -- adapters --------------------------------------------------------------------------


@functools.cache
def _boxes(policy: Policy) -> dict:
  """{path with slashes: the weight's box}, of shapes and logical axes."""
  boxed = policy_lib.boxes(policy)[0]
  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
  pairs = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  return {"/".join(key.key for key in path): box for path, box in pairs}


def init(policy: Policy, config: LoraConfig, key: jax.Array) -> dict:
  """{...: {"a", "b"}}: fresh adapters, float32, at the places of their weights, in
  boxes that carry logical axes: A has those that go in, B those that come out, where
  the weight itself is cut along them.

  B is 0, and A uniform in +-1 / sqrt(in), as peft has it (kaiming_uniform with
  a=sqrt(5)); the paper draws A from a normal distribution of no stated width.

  Raises:
    UserError: as `matrices`.
  """
  found: dict = {}
  for path, (before, inside) in matrices(policy, config.targets).items():
    box = _boxes(policy)[path]
    shape, cut = box.value.shape, sharding.tree_specs(box, policy.config.rules)
    names = [n if at else None for n, at in zip(box.names, cut, strict=True)]
    middle = before + inside
    bound = math.prod(shape[before:middle]) ** -0.5
    of = jax.random.fold_in(key, zlib.crc32(path.encode()))
    shape_a = (*shape[:middle], config.rank)
    a = jax.random.uniform(of, shape_a, jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:before], config.rank, *shape[middle:]), jnp.float32)
    into, (*folders, name) = found, path.split("/")
    for folder in folders:
      into = into.setdefault(folder, {})
    names_b = (*names[:before], None, *names[middle:])
    into[name] = {
      "a": nn.LogicallyPartitioned(a, (*names[:middle], None)),
      "b": nn.LogicallyPartitioned(b, names_b),
    }
  return found


def adapt(
  policy: Policy, params: dict, config: LoraConfig | None, key: jax.Array
) -> dict:
  """Parameters with fresh adapters, which say what those without say.

  The weights are held in the dtype that layers cast them to (policy.cast): nothing
  moves them, so nothing is lost.

  Args:
    policy, params: the network.
    config: None gives params as they are.
    key: of A.

  Raises:
    UserError: as `matrices`.
  """
  if config is None:
    return params
  fresh = nn.unbox(init(policy, config, key))
  return joined(policy_lib.cast(policy, params), fresh, config.scale)


def joined(params: dict, adapters: dict, scale: float) -> dict:
  """Parameters with given adapters.

  Args:
    params: weights, or their shardings.
    adapters: likewise, as `trained` gives them.
    scale: alpha / r.

  Raises:
    UserError: adapters of another base.
  """
  left = _pairs(adapters)

  def one(path, w):
    name = "/".join(key.key for key in path)
    pair = left.pop(name, None)
    if pair is None:
      return w
    found = Adapted(w, pair["a"], pair["b"], scale)
    if hasattr(w, "shape") and not found.fits():
      raise UserError(
        f"the adapter of {name} is of another base: A {pair['a'].shape} and B"
        f" {pair['b'].shape} are not of a weight {w.shape}. Name the base that it was"
        " made with."
      )
    return found

  whole = jax.tree_util.tree_map_with_path(one, params)
  if left:
    raise UserError(
      f"adapters of another base: it has no weights {', '.join(sorted(left))}. Name the"
      " base that they were made with."
    )
  return whole


def _pairs(adapters: dict, prefix: str = "") -> dict[str, dict]:
  """{path with slashes: {"a", "b"}}."""
  if adapters.keys() == {"a", "b"}:
    return {prefix: adapters}
  found = {}
  for name, inner in adapters.items():
    found |= _pairs(inner, f"{prefix}/{name}" if prefix else name)
  return found


# -- what a step learns ----------------------------------------------------------------


def trained(params: Any) -> Any:
  """What the optimizer moves: the adapters alone, {...: {"a", "b"}}; all parameters
  where there are none."""
  found: dict = {}
  pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted)
  for path, x in pairs:
    if is_adapted(x):
      into = found
      for key in path:
        into = into.setdefault(key.key, {})
      into |= {"a": x.a, "b": x.b}
  return found or params


def put(params: Any, new: Any) -> Any:
  """The parameters with what `trained` gave, moved."""
  if trained(params) is params:
    return new

  def one(path, x):
    if not is_adapted(x):
      return x
    return x.replace(**functools.reduce(lambda t, key: t[key.key], path, new))

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_adapted)


def split(policy: Policy, params: Any) -> tuple[Any, Callable[[Any], Any]]:
  """(what a gradient is taken by, function from it to the policy's parameters):
  adapters, float32; without any all weights, in the dtype of computation."""
  learnt = trained(params)
  if learnt is params:
    return policy_lib.cast(policy, params), lambda x: x
  return learnt, functools.partial(put, params)


def frozen(params: Any) -> Any:
  """The parameters without their adapters."""
  return jax.tree.map(lambda x: x.w if is_adapted(x) else x, params, is_leaf=is_adapted)


def merged(params: Any) -> Any:
  """Plain float32 parameters that say the same: W + alpha / r * A B."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), nn.unbox(params))
