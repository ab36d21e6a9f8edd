"""The runs that the paper's claims are read from."""

from experiments.arms import Arm

# Sixteen updates a rollout: the last of them are far from the policy that sampled.
STALE = {"grpo.minibatches": 16, "grpo.micro_batches": 2, "steps": 640}
STALE |= {"eval.every": 80, "checkpoint_every": 80, "grpo.reference_refresh": 160}
# Tokens. A working with every step written twice, as three of four are, takes 41; one
# that leaves out a second look takes 35, and is the longest that this cap lets end.
NARROW = 38


def clip(epsilon: float) -> Arm:
  bounds = {"objective.clip_low": epsilon, "objective.clip_high": epsilon}
  return Arm("r1_zero", {**STALE, **bounds})


ARMS = {
  "zero": Arm("r1_zero"),
  "dr_grpo": Arm("r1_zero", {"objective.preset": "dr_grpo"}),
  "cap": Arm("r1_zero", {"windows": ((0, NARROW),)}),
  "cap_raised": Arm("r1_zero", {"windows": ((0, NARROW), (80, 64))}),
  "clip_0.2": clip(0.2),
  "clip_1": clip(1.0),
  "clip_10": clip(10.0),
  "ppo_0.95": Arm("ppo", {"objective.lam": 0.95}),
  "ppo_1": Arm("ppo"),
  "no_refresh": Arm("r1_zero", {"grpo.reference_refresh": 0}),
  "r1": Arm("r1", {"ablations": True}),
}

# Sizes at which every arm takes seconds, and nothing is learned that would mean much.
QUICK = {
  "r1_zero": {"pretrain.steps": 30, "steps": 16, "eval.every": 16, "prompts": 8}
  | {"checkpoint_every": 16, "grpo.group_size": 8, "grpo.micro_batches": 2}
  | {"eval.problems": 16, "eval.samples": 4, "grpo.reference_refresh": 4}
  | {"model.layers": 1, "model.dense_layers": 0},
  "r1": {"pretrain.steps": 100, "model.width": 48, "model.layers": 2, "steps": 4}
  | {"pretrain.rows": 24, "pretrain.micro_batches": 2, "prompts": 8, "model.heads": 2}
  | {"grpo.group_size": 4, "grpo.micro_batches": 2, "grpo.reference_refresh": 4}
  | {"eval.problems": 8, "eval.samples": 4, "eval.every": 4, "checkpoint_every": 2}
  | {"rl_2.changes.steps": 6, "rl_2.window": 4, "rl_2_uncapped.steps": 4}
  | {"student.rl.steps": 4, "cold_start.prompts": 128, "cold_start.samples": 8}
  | {"cold_start.most": 20, "sft_1.epochs": 1, "sft_3.epochs": 1, "distill.epochs": 1}
  | {"rejection.prompts": 128, "rejection.samples": 8, "judging.samples": 8}
  | {"rejection.least_consistency": 0.0, "judging.pairs_a_prompt": 8}
  | {"reward_models.epochs": 1, "counts.pretrain": 400, "counts.train": 128}
  | {"counts.held_out": 64, "report.problems": 32, "report.samples": 4}
  | {"report.request_samples": 4},
}
QUICK["ppo"] = QUICK["r1_zero"]
QUICK_STALE = {"steps": 32, "grpo.micro_batches": 1, "grpo.reference_refresh": 16}
QUICK_ARMS = {
  "cap_raised": {"windows": ((0, NARROW), (8, 64))},
  "clip_0.2": QUICK_STALE,
  "clip_1": QUICK_STALE,
  "clip_10": QUICK_STALE,
  "no_refresh": {"grpo.reference_refresh": 0},
}


def arms(quick: bool) -> dict[str, Arm]:
  """All of them. Args: quick: at the sizes that take seconds."""
  if not quick:
    return ARMS
  return {
    name: Arm(
      arm.module, {**arm.changes, **QUICK[arm.module], **QUICK_ARMS.get(name, {})}
    )
    for name, arm in ARMS.items()
  }
