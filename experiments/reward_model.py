"""A reward model on its own: from a pipeline's Dev3, on its data or on yours.

  python -m experiments.reward_model --from=runs/r1-tiny-seed0 --kind=helpful
  python -m experiments.reward_model --from=runs/r1-tiny-seed0 --kind=safety \
    --train=labels.jsonl --held_out=more_labels.jsonl

Rows of `helpful`: {"prompt", "chosen", "rejected", "delta"} or {"prompt", "a", "b",
"scores": four grades from -2 to 2 in favour of a}. Rows of `safety`: {"prompt",
"response", "safe"}. Leaves the weights, summary.json and <kind>_calibration.png.
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from experiments import command

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1.py"
flags.DEFINE_string("from", "", "workdir of python -m experiments.r1")
flags.DEFINE_string("kind", "helpful", "or safety")
flags.DEFINE_string("train", "", "JSONL to learn from; default: the pipeline's")
flags.DEFINE_string("held_out", "", "JSONL to evaluate on; default: the pipeline's")


def main(config: ConfigDict, workdir: str) -> None:
  from r1jax.pipeline import standalone

  command.use_compilation_cache(config.compilation_cache)
  command.start_alone("experiments.reward_model")
  f = flags.FLAGS
  folder = pathlib.Path(workdir or f"runs/reward_model-{f.kind}").resolve()
  standalone.reward_model(
    config, f["from"].value, folder, kind=f.kind, train=f.train, held_out=f.held_out
  )


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
