"""One fixed tiny step, and the golden metrics that it gives.

  python -m tests.grpo_golden

writes tests/golden/whole_step.json. Run it, from the root, only after a change that is
meant to change the numbers (another loss, another draw of tokens, another forward
pass), look at the difference, and say in the commit which change moved which figure. A
difference that nobody can name is a bug.

The weights come from NumPy, so that the figures depend on no initialiser.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import grpo, train_state
from r1jax.models import config as sizes
from r1jax.models.policy import Policy
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.prompts import PromptBatch
from r1jax.rewards.in_graph import Rewards

PATH = pathlib.Path(__file__).parent / "golden" / "whole_step.json"
VOCAB, PAD = 16, 0
STOP_IDS = (3, 4, 5)  # three, so that rows end early and are ragged
CONFIG = grpo.GRPOConfig(
  group_size=4,
  minibatches=2,
  micro_batches=2,
  max_tokens=6,
  reference_refresh=4,
  objective=Objective(clip_low=0.2, clip_high=0.2, kl_coef=0.04),
)


def tiny_policy(**changes) -> Policy:
  """One layer, of experts alone: what compiles in seconds."""
  small = dict(
    width=32,
    heads=2,
    layers=1,
    dense_layers=0,
    q_latent=None,
    kv_latent=16,
    nope_dim=8,
    rope_dim=8,
    v_dim=8,
    expert_ffn=16,
  )
  return Policy(sizes.tiny(VOCAB, **{**small, **changes}))


def optimizer(learning_rate: float = 1e-2):
  return make_optimizer(OptimizerConfig(learning_rate=learning_rate, steps=100))


def weights(policy: Policy, seed: int = 0) -> tuple[Any, Any]:
  """(params, router) drawn by NumPy: norms' scales 1, the rest N(0, 0.2^2)."""
  create = functools.partial(train_state.create, policy, optimizer(), reference=False)
  shapes = jax.eval_shape(create, jax.random.key(0))
  rng = np.random.default_rng(seed)

  def fill(path, x):
    if path[-1].key == "scale":
      return jnp.ones(x.shape, x.dtype)
    return jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)

  fill_all = jax.tree_util.tree_map_with_path
  router = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.router)
  return fill_all(fill, shapes.params), router


def new_state(policy: Policy, *, reference: bool = True) -> train_state.TrainState:
  """A fresh state whose reference differs from the policy a little, so that KL > 0."""
  state = train_state.restart(*weights(policy), optimizer(), reference=reference)
  if not reference:
    return state
  moved = jax.tree.map(
    lambda a, b: a + 0.1 * b, state.params, weights(policy, seed=1)[0]
  )
  return state.replace(reference=state.reference.replace(params=moved))


def prompt_batch(batch: int = 4, length: int = 5, seed: int = 0) -> PromptBatch:
  """Ragged prompts, the shortest of 2 tokens; `answers` is the token a row rewards."""
  rng = np.random.default_rng(seed)
  lengths = 2 + np.arange(batch) % (length - 1)
  mask = np.arange(length)[None] >= length - lengths[:, None]
  tokens = np.where(mask, rng.integers(4, VOCAB, (batch, length)), PAD)
  return PromptBatch(
    tokens=jnp.asarray(tokens, jnp.int32),
    mask=jnp.asarray(mask),
    answers=jnp.asarray(rng.integers(4, VOCAB, (batch, 1, 1)), jnp.int32),
    ids=jnp.arange(batch, dtype=jnp.int32),
  )


def reward_fn(prompts: PromptBatch, rollout: Any) -> Rewards:
  """Counts tokens above half the vocabulary; 0.1 for all where `answers` is -1."""
  good = (rollout.tokens >= VOCAB // 2) & rollout.mask
  counted = good.sum(axis=-1).astype(jnp.float32)
  return Rewards.of(count=(1.0, jnp.where(prompts.answers[:, :, 0] < 0, 0.1, counted)))


def make_step(policy: Policy, config: grpo.GRPOConfig = CONFIG, **changes):
  return functools.partial(
    grpo.whole_step,
    **{
      **dict(
        policy=policy,
        optimizer=optimizer(),
        reward_fn=reward_fn,
        config=config,
        stop_ids=STOP_IDS,
        pad_id=PAD,
      ),
      **changes,
    },
  )


def counted(step):
  """The step as a function whose list `traces` grows whenever jit traces it. (The size
  of jit's own cache says 0 once thousands of other programs have filled it.)"""

  def traced(*args):
    traced.traces.append(None)
    return step(*args)

  traced.traces = []
  return traced


def figures(metrics: dict) -> dict[str, float]:
  return {name: float(x) for name, x in sorted(metrics.items())}


def main() -> None:
  policy = tiny_policy()
  step = jax.jit(make_step(policy))
  _, _, metrics, _ = step(new_state(policy), prompt_batch(), jax.random.key(7))
  PATH.parent.mkdir(exist_ok=True)
  PATH.write_text(json.dumps(figures(metrics), indent=2) + "\n")
  print(PATH.read_text())


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
