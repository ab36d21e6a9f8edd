"""Everything a training step reads and writes, as one value."""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import sharding
from r1jax.models import policy as policy_lib


@struct.dataclass
class Reference:
  """The frozen policy of the KL term."""

  params: Any
  router: Any


@struct.dataclass
class TrainState:
  step: jax.Array  # [] int32, updates done
  params: Any  # float32, unboxed
  router: Any  # the router biases, moved by the load and never by a gradient
  opt_state: Any
  reference: Reference | None  # None while there is no KL term (pre-training, SFT)


def create(
  policy: policy_lib.Policy,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  reference: bool,
) -> TrainState:
  """A fresh state; arrays in `nn.Partitioned` boxes have been unboxed."""
  params, router = nn.unbox(policy_lib.init(policy, key))
  return restart(params, router, optimizer, reference=reference)


def restart(
  params: Any,
  router: Any,
  optimizer: optax.GradientTransformation,
  *,
  reference: bool,
) -> TrainState:
  """Step 0 of a new stage from given weights; the reference is a copy of them."""
  copy = Reference(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, router))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    router=router,
    opt_state=optimizer.init(params),
    reference=copy if reference else None,
  )


def shardings(
  policy: policy_lib.Policy,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  reference: bool,
) -> TrainState:
  """The TrainState's NamedShardings, from the weights' logical axes."""

  def boxed():
    params, router = policy_lib.init(policy, jax.random.key(0))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      router=router,
      opt_state=optimizer.init(params),  # moments inherit their weight's box
      reference=Reference(params, router) if reference else None,
    )

  return sharding.tree_shardings(jax.eval_shape(boxed), mesh, policy.config.rules)
