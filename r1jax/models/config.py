"""Sizes of a policy, and presets: DeepSeek-V3 and a miniature of it, the dense models
that R1 was distilled into and a miniature of those."""

import dataclasses

import jax.numpy as jnp

from r1jax import implementation, ops
from r1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN context extension (arXiv 2309.00071) as DeepSeek-V3 sets it.

  Queries and keys turn and grow by m(mscale) / m(mscale_all_dim), and the scores of
  latent attention by m(mscale_all_dim)^2, with m(x) = 0.1 x ln(factor) + 1. Qwen2.5's
  is mscale=1, mscale_all_dim=0.
  """

  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Context extension of Llama 3.1 (transformers, rope_type "llama3")."""

  factor: float = 8.0
  low: float = 1.0  # pairs that turn less over the original length: f / factor
  high: float = 4.0  # pairs that turn more: f; between the two a blend
  original_length: int = 8192


# Sizes and choices of one attention alone, and those of its sizes that must be set.
ONLY = {
  "mla": ("q_latent", "kv_latent", "nope_dim", "rope_dim", "v_dim"),
  "gqa": ("kv_heads", "head_dim", "qkv_bias", "qk_norm", "llama3"),
}
SIZES = {
  "mla": ("kv_latent", "nope_dim", "rope_dim", "v_dim"),
  "gqa": ("kv_heads", "head_dim"),
}


REMAT = ("all", "dots", "attention", "nothing")
SCORING = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """A pre-norm decoder; the letters are the README's.

  With attention "mla": DeepSeek-V3 (arXiv 2412.19437, section 2.1), and with scoring
  "softmax" V2 (2405.04434). With "gqa" and dense layers alone: Llama 3 (2407.21783),
  Qwen2.5 (2412.15115), Qwen3 (2505.09388); with experts, Qwen3's (the same report).
  """

  vocab: int  # V
  width: int  # D
  layers: int  # N, dense ones included
  dense_layers: int  # the first k layers have a dense FFN instead of experts
  heads: int  # H
  dense_ffn: int
  attention: str = "mla"  # or "gqa"
  # -- multi-head latent attention
  q_latent: int | None = None  # Q; None: one full-rank query projection
  kv_latent: int = 0  # C
  nope_dim: int = 0  # K, the part of a query or key head without position
  rope_dim: int = 0  # R, the part with RoPE; the key's is one head shared by all
  v_dim: int = 0
  latent_eps: float = 1e-6  # of the latents' norms; released code has it apart
  # -- grouped-query attention (arXiv 2305.13245)
  kv_heads: int = 0  # Hk, key and value heads; each serves H / Hk query heads
  head_dim: int = 0  # K
  qkv_bias: bool = False  # Qwen2: of queries, keys and values; none of the output
  qk_norm: bool = False  # Qwen3: RMSNorm of query and key heads before RoPE
  llama3: Llama3 | None = None
  yarn: Yarn | None = None  # of either attention
  # -- experts, of layers that are not dense and of the MTP module
  expert_ffn: int = 0  # F
  experts: int = 0  # E, routed
  active_experts: int = 0  # A
  shared_experts: int = 0  # one FFN of width shared_experts * F
  expert_groups: int = 1
  active_groups: int = 1
  scoring: str = "sigmoid"  # an expert's affinity by itself; "softmax": among all
  renormalise: bool = True  # gate values divided by their sum
  route_scale: float = 1.0  # and multiplied by this
  mtp_depth: int = 0  # multi-token-prediction modules (0 or 1)
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tied_embeddings: bool = False  # logits by the embedding, without a head
  init_std: float | None = None  # None: 1/sqrt(fan-in)
  dtype: str = "float32"  # of activations; parameters are float32
  moe: str = "dense"  # "dense": every expert on every token; "ragged": sorted tokens
  expert_capacity: float = 1.5  # of a round of buffers to an expert's device: its even
  # share of the tokens times this (models/dispatch.py)
  drop_tokens: bool = False  # what does not fit into the first round is dropped
  # What a layer keeps for the backward pass, which computes the rest again: "all";
  # "dots": its products with weights; "attention": attention's output; "nothing"
  remat: str = "all"
  # Layers a turn of the loop over them: more compile longer, and on a CPU save copies.
  unroll: int = 1
  implementation: str = "auto"  # of attention and experts (implementation.py)
  rules: str = "fsdp"  # how weights lie on the mesh (sharding.RULES)

  def __post_init__(self):
    if self.attention not in ONLY:
      raise UserError(
        f"config.model: attention={self.attention!r} must be 'mla' or 'gqa'."
      )
    sizes = ("vocab", "width", "layers", "heads", "dense_ffn", *SIZES[self.attention])
    of_experts = ("expert_ffn", "experts", "active_experts")
    for_experts = " for layers with experts; without: dense_layers=layers, mtp_depth=0"
    has_experts = self.moe_layers > 0 or self.mtp_depth > 0
    rules = [
      *(
        (getattr(self, s) >= 1, f"{s}={getattr(self, s)} must be 1 or more")
        for s in sizes
      ),
      *(
        (
          not has_experts or getattr(self, s) >= 1,
          f"{s}={getattr(self, s)} must be 1 or more{for_experts}",
        )
        for s in of_experts
      ),
      *(
        (
          not getattr(self, s),
          f"{s}={getattr(self, s)} is of attention={other!r} and this policy has"
          f" attention={self.attention!r}; leave it out",
        )
        for other in ONLY
        if other != self.attention
        for s in ONLY[other]
      ),
      (not (self.yarn and self.llama3), "yarn and llama3 exclude each other"),
      (
        self.scoring in SCORING,
        f"scoring={self.scoring!r} must be one of {list(SCORING)}",
      ),
      (self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even"),
      (self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even"),
      (
        self.heads % max(self.kv_heads, 1) == 0,
        f"heads={self.heads} must divide into kv_heads={self.kv_heads}",
      ),
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
      (self.unroll >= 1, f"unroll={self.unroll} must be 1 or more"),
      (self.mtp_depth in (0, 1), f"mtp_depth={self.mtp_depth} must be 0 or 1"),
      (
        self.implementation in implementation.NAMES,
        f"implementation={self.implementation!r} must be one of {implementation.NAMES}",
      ),
      (
        self.moe in ("dense", "ragged"),
        f"moe={self.moe!r} must be 'dense' or 'ragged'",
      ),
      (self.remat in REMAT, f"remat={self.remat!r} must be one of {list(REMAT)}"),
      (
        self.expert_capacity > 0,
        f"expert_capacity={self.expert_capacity} must be above 0",
      ),
    ]
    for ok, rule in rules:
      if not ok:
        raise UserError(f"config.model: {rule}.")

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers

  @property
  def cache(self) -> ops.Layout:
    """Of an entry of the cache. MLA: kv latent and shared rope key. GQA: key after RoPE
    and value of each key head."""
    if self.attention == "gqa":
      return ops.Layout.gqa(self.kv_heads, self.head_dim)
    return ops.Layout.mla(self.kv_latent, self.rope_dim)

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
    remat="nothing",
  )
  return PolicyConfig(vocab=vocab, **{**sizes, **changes})


def moonlight_16b(vocab: int = 163_840, **changes) -> PolicyConfig:
  """Moonlight-16B-A3B (arXiv 2502.16982): V3's architecture at 16 B parameters, 3 B
  active a token, without query latent, groups of experts and YaRN."""
  sizes = dict(
    width=2048,
    layers=27,
    dense_layers=1,
    heads=16,
    kv_latent=512,
    nope_dim=128,
    rope_dim=64,
    v_dim=128,
    dense_ffn=11_264,
    expert_ffn=1408,
    experts=64,
    active_experts=6,
    shared_experts=2,
    route_scale=2.446,
    rope_theta=50_000.0,
    norm_eps=1e-5,
    init_std=0.02,
    dtype="bfloat16",
    moe="ragged",
    remat="nothing",
  )
  return PolicyConfig(vocab=vocab, **{**sizes, **changes})


def _dense(vocab: int, sizes: dict, changes: dict) -> PolicyConfig:
  sizes = dict(attention="gqa") | sizes | changes
  return PolicyConfig(vocab=vocab, **{"dense_layers": sizes["layers"], **sizes})


def tiny_dense(vocab: int, **changes) -> PolicyConfig:
  """The miniature's student: every part of Qwen2.5 at 0.2 M parameters."""
  sizes = dict(
    width=80,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=20,
    qkv_bias=True,
    dense_ffn=160,
    rope_theta=100.0,  # as `tiny`
  )
  return _dense(vocab, sizes, changes)


LARGE = dict(head_dim=128, init_std=0.02, dtype="bfloat16", remat="nothing")
QWEN = dict(qkv_bias=True, **LARGE)
LLAMA = dict(rope_theta=500_000.0, llama3=Llama3(), norm_eps=1e-5, **LARGE)


def qwen2_5_1_5b(vocab: int = 151_936, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Qwen-1.5B: Qwen2.5-Math-1.5B, which has tied_embeddings=True,
  with a head of its own."""
  sizes = dict(width=1536, layers=28, heads=12, kv_heads=2, dense_ffn=8960)
  return _dense(vocab, QWEN | sizes, changes)


def qwen2_5_1_5b_base(vocab: int = 151_936, **changes) -> PolicyConfig:
  """Qwen2.5-1.5B, whose embedding is its head (1.54 B parameters)."""
  return qwen2_5_1_5b(vocab, **dict(tied_embeddings=True, rope_theta=1e6) | changes)


def qwen3_0_6b(vocab: int = 151_936, **changes) -> PolicyConfig:
  """Qwen3-0.6B, whose embedding is its head (0.60 B parameters)."""
  sizes = dict(width=1024, layers=28, heads=16, kv_heads=8, dense_ffn=3072)
  sizes |= dict(qk_norm=True, rope_theta=1e6, tied_embeddings=True)
  return _dense(vocab, LARGE | sizes, changes)


def qwen2_5_7b(vocab: int = 152_064, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Qwen-7B, of Qwen2.5-Math-7B."""
  sizes = dict(width=3584, layers=28, heads=28, kv_heads=4, dense_ffn=18_944)
  return _dense(vocab, QWEN | sizes, changes)


def qwen2_5_14b(vocab: int = 152_064, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Qwen-14B, of Qwen2.5-14B."""
  sizes = dict(width=5120, layers=48, heads=40, kv_heads=8, dense_ffn=13_824)
  sizes |= dict(rope_theta=1e6, norm_eps=1e-5)
  return _dense(vocab, QWEN | sizes, changes)


def qwen2_5_32b(vocab: int = 152_064, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Qwen-32B, of Qwen2.5-32B."""
  sizes = dict(width=5120, layers=64, heads=40, kv_heads=8, dense_ffn=27_648)
  sizes |= dict(rope_theta=1e6, norm_eps=1e-5)
  return _dense(vocab, QWEN | sizes, changes)


def llama_8b(vocab: int = 128_256, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Llama-8B, of Llama-3.1-8B."""
  sizes = dict(width=4096, layers=32, heads=32, kv_heads=8, dense_ffn=14_336)
  return _dense(vocab, LLAMA | sizes, changes)


def llama_70b(vocab: int = 128_256, **changes) -> PolicyConfig:
  """DeepSeek-R1-Distill-Llama-70B, of Llama-3.3-70B-Instruct."""
  sizes = dict(width=8192, layers=80, heads=64, kv_heads=8, dense_ffn=28_672)
  return _dense(vocab, LLAMA | sizes, changes)


PRESETS = {
  preset.__name__: preset
  for preset in (
    *(tiny, v3_671b, moonlight_16b, tiny_dense, qwen3_0_6b, qwen2_5_1_5b_base),
    *(qwen2_5_1_5b, qwen2_5_7b, qwen2_5_14b, qwen2_5_32b, llama_8b, llama_70b),
  )
}
