"""Distillation on its own: a pipeline's R1 taught to a dense student.

  python -m experiments.distill --from=runs/r1-tiny-seed0
  python -m experiments.distill --from=runs/r1-tiny-seed0 --traces=FILE.jsonl
  python -m experiments.distill --from=runs/r1-tiny-seed0 --config.distill.mode=logits
      (also --config.distill.mode=on_policy)

The student's base is the pipeline's student_base, or that of --student=DIR, another
pipeline with the same tokenizer. Rows of traces: {"problem", "completion"}.
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from experiments import command

CONFIG = pathlib.Path(__file__).parent / "configs" / "r1.py"
flags.DEFINE_string("from", "", "workdir of python -m experiments.r1, the teacher's")
flags.DEFINE_string("student", "", "workdir of the student's; default: the teacher's")
flags.DEFINE_string("traces", "", "JSONL of traces; default: of rejection sampling")


def main(config: ConfigDict, workdir: str) -> None:
  from r1jax.pipeline import standalone

  command.use_compilation_cache(config.compilation_cache)
  command.start_alone("experiments.distill")
  f, mode = flags.FLAGS, config.distill.mode
  folder = pathlib.Path(workdir or f"runs/distill-{mode}").resolve()
  standalone.student(
    config, f["from"].value, folder, student_from=f.student, file=f.traces
  )


if __name__ == "__main__":
  command.run(main, f"{CONFIG}:tiny")
