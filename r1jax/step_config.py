"""The settings of a step that GRPO and PPO share, and the rules they obey."""

import dataclasses
from typing import Any

from r1jax import support
from r1jax.errors import UserError
from r1jax.objective import Objective
from r1jax.sampling import Sampler
from r1jax.stopping import StopStrings


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """R1-Zero's settings; their sources stand in experiments/configs/r1_zero.py."""

  group_size: int = 16  # G
  minibatches: int = 16  # K updates a rollout, each output in one of them
  micro_batches: int = 1  # parts of a minibatch whose gradients are summed
  whole_groups: bool = False  # a minibatch has whole groups; each prompt computed once
  pack: int = 0  # tokens a row that outputs are packed into (packing.py); 0: a row each
  max_tokens: int = 32_768  # T
  temperature: float = 1.0
  top_k: int = 0  # sample from the k most likely tokens; 0: from all
  top_p: float = 1.0  # sample from the nucleus of this probability; 1: from all
  min_p: float = 0.0  # and from tokens this times as likely as the likeliest; 0: all
  slots: int = 0  # outputs that decode at once; 0: all of them
  cache_tokens: int = 0  # of outputs that the cache may hold; 0: no bound
  prefill_parts: int = 1  # that the prompts are read in, one after another
  gather_weights: bool = True  # for decoding: once, not by each layer at every token
  record_experts: bool = True  # the router's choices are kept; for routing_replay
  speculative: str = "off"  # "on": draft tokens by the MTP module; "auto" (Sampler)
  stop: StopStrings | None = None  # strings that end an output
  keep_sampling_mask: bool = True  # the ratio is taken over the sampled support
  reference_refresh: int = 400  # updates; 0 never
  router_bias_rate: float = 0.001  # of the aux-loss-free balance
  freeze_router_bias: bool = False
  balance_coef: float = 0.0  # alpha of the sequence-wise balance loss
  mtp_coef: float = 0.0  # of the MTP loss; it trains the MTP module alone
  routing_replay: bool = False  # the update uses the experts that the sampler chose
  traced_groups: int = 2  # groups whose tokens are kept for the report
  objective: Objective = dataclasses.field(default_factory=Objective)

  def __post_init__(self):
    """Raises UserError: what came, the rule and the remedy."""
    if min(self.minibatches, self.micro_batches, self.max_tokens) < 1:
      raise UserError(
        "config.grpo: grpo.minibatches, grpo.micro_batches and max_tokens must be at"
        f" least 1, got {self.minibatches}, {self.micro_batches}, {self.max_tokens}."
      )
    if self.reference_refresh % self.minibatches:
      raise UserError(
        f"config.grpo.reference_refresh={self.reference_refresh} must be a multiple of"
        f" minibatches={self.minibatches}: the reference is refreshed between rollouts."
      )
    if not self.temperature > 0 or self.top_k == 1:
      raise UserError(
        f"config.grpo.temperature={self.temperature} must be above 0 and top_k="
        f"{self.top_k} not 1; a group of greedy outputs is one output G times."
      )
    bounds = self.top_k, self.top_p, self.min_p
    if support.truncates(*bounds) and not self.keep_sampling_mask:
      raise UserError(
        f"config.grpo.keep_sampling_mask=False with top_k={self.top_k},"
        f" top_p={self.top_p}, min_p={self.min_p}: probabilities over the whole"
        " vocabulary are not those that were sampled from, so every ratio would be"
        " wrong. Keep the mask, or sample with top_k=0, top_p=1 and min_p=0."
      )
    if self.pack and (self.whole_groups or self.balance_coef):
      raise UserError(
        f"config.grpo.pack={self.pack} goes with neither grpo.whole_groups="
        f"{self.whole_groups} nor grpo.balance_coef={self.balance_coef}, which need an"
        " output or a group a row; set pack=0, or whole_groups=False, balance_coef=0."
      )
    if self.routing_replay and not self.record_experts:
      raise UserError(
        "config.grpo.routing_replay=True replays the experts that the sampler chose,"
        " and record_experts=False keeps none. Set record_experts=True."
      )
    Sampler(**self.sampling(pad_id=0))
    self.objective.overlong_tokens(self.max_tokens)

  def check_pack(self, prompt: int) -> None:
    """Raises UserError where a packed row cannot hold a prompt of so many tokens and
    the longest output."""
    longest = prompt + self.max_tokens
    if self.pack and self.pack < longest:
      raise UserError(
        f"config.grpo.pack={self.pack} must be 0 (off) or at least {longest}, a prompt"
        f" of {prompt} tokens and an output of {self.max_tokens}."
      )

  def sampling(self, **more: Any) -> dict[str, Any]:
    """The settings of the rollout, for `rollout.sample`."""
    names = ("group_size", "max_tokens", "temperature", "top_k", "top_p", "min_p")
    names += ("slots", "cache_tokens", "prefill_parts", "gather_weights")
    names += ("record_experts", "speculative", "stop")
    return {name: getattr(self, name) for name in names} | more

  @property
  def unit(self) -> int:
    """Outputs that stay together when a rollout is cut into parts."""
    return self.group_size if self.whole_groups else 1

  @property
  def bias_rate(self) -> float:
    return 0.0 if self.freeze_router_bias else self.router_bias_rate
