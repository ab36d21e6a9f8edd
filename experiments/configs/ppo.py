"""PPO: the baseline that R1 compares GRPO with (arXiv 2501.12948v2, appendix A.3).

  python -m experiments.ppo
  python -m experiments.ppo --config.objective.lam=0.95

tiny   2 CPU cores, 5 minutes: the base, problems, rewards and number of updates of
       experiments/configs/r1_zero.py:tiny, with a value model of the policy's size.
puzzle likewise.

The paper gives neither PPO's learning rates, nor its clip, nor gamma: those are ours.
"""

from ml_collections import ConfigDict

from experiments.configs import r1_zero

PRESETS = ("tiny", "puzzle")


def get_config(preset: str = "tiny") -> ConfigDict:
  if preset not in PRESETS:
    raise ValueError(f"preset {preset!r} is not one of {PRESETS}")
  c = r1_zero.get_config(preset).unlock()
  c.objective.preset = "ppo"  # gamma 1, lambda 1: R1 A.3 finds lambda 1 near GRPO
  c.ppo = ConfigDict()
  c.ppo.value_learning_rate = 1e-3  # of the value model, with the policy's schedule
  c.ppo.value_clip = 0.2  # values stay this near to the old ones in the loss; 0: free
  c.ppo.whiten = (
    True  # advantages to mean 0, std 1 over the rollout's tokens: verl, TRL
  )
  return c.lock()
