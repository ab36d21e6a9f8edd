"""Everything a training step reads and writes, as one value."""

from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from r1jax import lora, sharding
from r1jax.models import policy as policy_lib


@struct.dataclass
class Reference:
  """The frozen policy of the KL term."""

  params: Any  # of a policy with adapters those alone
  router: Any


@struct.dataclass
class TrainState:
  step: jax.Array  # [] int32, updates done
  params: Any  # float32, unboxed; or frozen weights with adapters (lora.py)
  router: Any  # the router biases, moved by the load and never by a gradient
  opt_state: Any
  reference: Reference | None  # None while there is no KL term (pre-training, SFT)

  @property
  def asked(self) -> "TrainState":
    """The same with a reference of whole weights, as the forward pass takes them."""
    if self.reference is None:
      return self
    whole = lora.put(self.params, self.reference.params)
    return self.replace(reference=self.reference.replace(params=whole))

  @property
  def kept(self) -> "TrainState":
    """What a checkpoint holds: frozen weights are those that the stage began with."""
    return self.replace(params=lora.trained(self.params))

  def on(self, begun: "TrainState") -> "TrainState":
    """What a checkpoint held, on the frozen weights of a state that has just begun."""
    return self.replace(params=lora.put(begun.params, self.params))


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
  """Step 0 of a new stage from given weights, with adapters or without; the reference
  is a copy of them (of the adapters alone: at first B = 0, so that it is the base)."""
  learnt = lora.trained(params)
  copy = Reference(jax.tree.map(jnp.copy, learnt), jax.tree.map(jnp.copy, router))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    router=router,
    opt_state=optimizer.init(learnt),
    reference=copy if reference else None,
  )


def shardings(
  policy: policy_lib.Policy,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  reference: bool,
  adapters: lora.LoraConfig | None = None,
) -> TrainState:
  """The TrainState's NamedShardings, from the weights' logical axes."""
  rules = policy.config.rules

  # Keys are made where they are traced: the mesh may be of devices that are not here.
  def weights():
    return policy_lib.init(policy, jax.random.key(0))

  def boxed():
    params, router = weights()
    if adapters is not None:
      params = lora.init(policy, adapters, jax.random.key(0))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      router=router,
      opt_state=optimizer.init(params),  # moments inherit their weight's box
      reference=Reference(params, router) if reference else None,
    )

  found = sharding.tree_shardings(jax.eval_shape(boxed), mesh, rules)
  if adapters is None:
    return found
  base, _ = sharding.tree_shardings(jax.eval_shape(weights), mesh, rules)
  return found.replace(params=lora.joined(base, found.params, adapters.scale))
