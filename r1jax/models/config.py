"""Sizes of a DeepSeek-V3 policy, and the two presets `tiny` and `v3_671b`."""

import dataclasses

import jax.numpy as jnp

from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN context extension (arXiv 2309.00071) as DeepSeek-V3 sets it."""

  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """DeepSeek-V3 (arXiv 2412.19437, section 2.1); the letters are the README's."""

  vocab: int  # V
  width: int  # D
  layers: int  # N, dense ones included
  dense_layers: int  # the first k layers have a dense FFN instead of experts
  heads: int  # H
  q_latent: int | None  # Q; None: one full-rank query projection
  kv_latent: int  # C
  nope_dim: int  # K, the part of a query or key head without position
  rope_dim: int  # R, the part with RoPE; the key's is one head shared by all
  v_dim: int
  dense_ffn: int
  expert_ffn: int  # F
  experts: int  # E, routed
  active_experts: int  # A
  shared_experts: int  # one FFN of width shared_experts * F
  expert_groups: int = 1
  active_groups: int = 1
  renormalise: bool = True  # gate values divided by their sum
  route_scale: float = 1.0  # and multiplied by this
  mtp_depth: int = 0  # multi-token-prediction modules (0 or 1)
  rope_theta: float = 10_000.0
  yarn: Yarn | None = None
  norm_eps: float = 1e-6
  init_std: float | None = None  # None: 1/sqrt(fan-in)
  dtype: str = "float32"  # of activations; parameters are float32
  moe: str = "dense"  # "dense": every expert on every token; "ragged": sorted tokens
  remat: bool = False  # recompute each layer in the backward pass

  def __post_init__(self):
    sizes = ("vocab", "width", "layers", "heads", "kv_latent", "nope_dim", "rope_dim")
    sizes += ("v_dim", "dense_ffn", "expert_ffn", "experts", "active_experts")
    rules = [
      *(
        (getattr(self, s) >= 1, f"{s}={getattr(self, s)} must be 1 or more")
        for s in sizes
      ),
      (self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even"),
      (
        self.experts % self.expert_groups == 0,
        f"experts={self.experts} must divide into expert_groups={self.expert_groups}",
      ),
      (
        1 <= self.active_groups <= self.expert_groups,
        f"active_groups={self.active_groups} must lie in 1..{self.expert_groups}",
      ),
      (
        self.active_experts
        <= self.experts // max(self.expert_groups, 1) * self.active_groups,
        f"active_experts={self.active_experts} exceeds the experts that"
        f" {self.active_groups} active groups hold",
      ),
      (
        0 <= self.dense_layers <= self.layers,
        f"dense_layers={self.dense_layers} must lie in 0..layers={self.layers}",
      ),
      (self.mtp_depth in (0, 1), f"mtp_depth={self.mtp_depth} must be 0 or 1"),
      (
        self.moe in ("dense", "ragged"),
        f"moe={self.moe!r} must be 'dense' or 'ragged'",
      ),
    ]
    for ok, rule in rules:
      if not ok:
        raise UserError(f"config.model: {rule}.")

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  @property
  def latent(self) -> int:
    """Width of a cache entry: kv latent and shared rope key, C + R."""
    return self.kv_latent + self.rope_dim

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)


def tiny(vocab: int, **changes) -> PolicyConfig:
  """The miniature: every part of V3 at 0.38 M parameters."""
  sizes = dict(
    width=96,
    layers=3,
    dense_layers=1,
    heads=4,
    q_latent=48,
    kv_latent=32,
    nope_dim=16,
    rope_dim=16,
    v_dim=24,
    dense_ffn=192,
    expert_ffn=64,
    experts=4,
    active_experts=2,
    shared_experts=1,
    rope_theta=100.0,  # a window of under 100 tokens
  )
  return PolicyConfig(vocab=vocab, **{**sizes, **changes})


def v3_671b(vocab: int = 129_280, **changes) -> PolicyConfig:
  """DeepSeek-V3 as released: 671 B parameters, 37 B active a token (report, 4.2)."""
  sizes = dict(
    width=7168,
    layers=61,
    dense_layers=3,
    heads=128,
    q_latent=1536,
    kv_latent=512,
    nope_dim=128,
    rope_dim=64,
    v_dim=128,
    dense_ffn=18_432,
    expert_ffn=2048,
    experts=256,
    active_experts=8,
    shared_experts=1,
    expert_groups=8,
    active_groups=4,
    route_scale=2.5,
    mtp_depth=1,
    yarn=Yarn(),
    init_std=0.006,
    dtype="bfloat16",
    moe="ragged",
    remat=True,
  )
  return PolicyConfig(vocab=vocab, **{**sizes, **changes})


PRESETS = {"tiny": tiny, "v3_671b": v3_671b}
