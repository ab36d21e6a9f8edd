"""RL stage 2, for all scenarios (R1, section 3.2.2, Eq. 8-10).

Reasoning problems are rewarded by rules, requests by the reward model of their set
(helpful: the summary alone; safety: everything) and the format; all for the language of
their thinking. Requests, and with them the preference reward, come in the last window
of updates only (400 of 1,700 in R1): with more, the policy learns to please the model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import reward_model
from r1jax.data import problems as problems_lib
from r1jax.data.problem import DOMAINS, Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.value import Value
from r1jax.prompts import PromptBatch
from r1jax.reward_model import Responses
from r1jax.rewards.in_graph import Rewards, TagTable
from r1jax.rewards.verdict import OUTCOMES
from r1jax.rollout import Rollout

SQUASH: dict[str, Callable[[jax.Array], jax.Array]] = {
  "none": lambda s: s,
  "sigmoid": jax.nn.sigmoid,  # in [0, 1], as the rules' rewards are
}


def scenario_reward(
  rules: Callable[[PromptBatch, Rollout], Rewards],
  asked: Sequence[Problem],
  value: Value,
  tokenizer: Tokenizer,
  *,
  model_weight: float,
  squash: str,
) -> Callable[..., Rewards]:
  """The stage's reward function (PromptBatch, Rollout, judges=) -> Rewards.

  Args:
    rules: accuracy, format and language, as in stage 1.
    asked: the stage's problems, in the order of their ids.
    value: the reward models' network.
    tokenizer: of the policy.
    model_weight: of the reward model's part.
    squash: a name in SQUASH: what is done with its score. The paper says nothing of the
      scale; within a group of requests only the balance against format and language
      depends on it.
  """
  domains = np.array([DOMAINS.index(p.domain) for p in asked])
  tags = TagTable.of(tokenizer)

  def reward(prompts: PromptBatch, rollout: Rollout, *, judges: Mapping) -> Rewards:
    said, domain = rules(prompts, rollout), jnp.asarray(domains)[prompts.ids]
    reasoning = domain == DOMAINS.index("reasoning")

    def models():
      scores = {
        kind: judged(prompts, rollout, value, judges[kind], view, tags)
        for kind, view in (("helpful", "summary"), ("safety", "all"))
      }
      helpful = domain == DOMAINS.index("helpful")
      return jnp.where(helpful[:, None], scores["helpful"], scores["safety"])

    # Before the window nothing has to be judged, and nothing is.
    shape = said.total.shape
    score = jax.lax.cond(reasoning.all(), lambda: jnp.zeros(shape), models)
    part = jnp.where(reasoning[:, None], 0.0, SQUASH[squash](score))
    right = said.parts["accuracy"] * reasoning[:, None]
    weights = {**dict(said.weights), "reward_model": model_weight}
    parts = {**said.parts, "accuracy": right, "reward_model": part}
    outcome = jnp.where(reasoning[:, None], said.outcome, OUTCOMES.index("judged"))
    found = Rewards.of(outcome, **{k: (weights[k], x) for k, x in parts.items()})
    return found.replace(meant={"accuracy": reasoning, "reward_model": ~reasoning})

  return reward


def judged(
  prompts: PromptBatch,
  rollout: Rollout,
  value: Value,
  weights: tuple[Any, Any],
  view: str,
  tags: TagTable,
) -> jax.Array:
  """A reward model's scores of all outputs, [B, G] float32."""
  b, g, t = rollout.tokens.shape
  rows = Responses(
    prompts=jnp.repeat(prompts.tokens, g, axis=0),
    prompt_mask=jnp.repeat(prompts.mask, g, axis=0),
    completions=rollout.tokens.reshape(b * g, t),
    completion_mask=rollout.mask.reshape(b * g, t),
  )
  scores = reward_model.score(value, *weights, rows, view, tags.end_think).reshape(b, g)
  if view == "all":
    return scores
  # A reply without a summary says nothing that could help: the least of its group.
  kept = reward_model.VIEWS[view](rows, tags.end_think)
  kept = kept & ~jnp.asarray(tags.silent)[rows.completions]
  some = kept.any(axis=1).reshape(b, g)
  least = jnp.where(some, scores, jnp.inf).min(axis=1, keepdims=True)
  return jnp.where(some, scores, jnp.where(jnp.isfinite(least), least, 0.0))


class Scenarios:
  """The problems of each rollout: reasoning alone, then a share of requests.

  Indices into [reasoning problems..., requests...]; `get_state` and `set_state` let it
  go on exactly.
  """

  def __init__(
    self,
    reasoning: int,
    requests: int,
    *,
    prompts: int,
    share: float,
    window_from: int,
    seed: int,
  ):
    """Args:
    reasoning, requests: how many there are of each.
    prompts: of a rollout, B.
    share: of requests in a rollout of the window.
    window_from: the first rollout of the window.
    seed: of the order.
    """
    self.asked = round(prompts * share)
    self.first, self.prompts, self.window_from = reasoning, prompts, window_from
    self.at = 0
    self._reasoning = problems_lib.stream(reasoning, 1, seed=seed)
    self._requests = problems_lib.stream(requests, 1, seed=seed + 1)

  def __next__(self) -> np.ndarray:
    asked = self.asked if self.at >= self.window_from else 0
    self.at += 1
    rows = [int(next(self._reasoning)[0]) for _ in range(self.prompts - asked)]
    rows += [self.first + int(next(self._requests)[0]) for _ in range(asked)]
    # Mixed, so that no shard of the batch has one kind alone but by chance.
    order = np.random.default_rng(self.at).permutation(self.prompts)
    return np.array(rows)[order]

  def __iter__(self) -> "Scenarios":
    return self

  def get_state(self) -> dict:
    return {
      "at": self.at,
      "reasoning": self._reasoning.get_state(),
      "requests": self._requests.get_state(),
    }

  def set_state(self, state: dict) -> None:
    self.at = state["at"]
    self._reasoning.set_state(state["reasoning"])
    self._requests.set_state(state["requests"])
