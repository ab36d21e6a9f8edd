"""Distillation into a dense student: SFT on the teacher's accepted traces (R1, section
2.4 of v1 and supplement B.4.3; batch 64, cosine to a tenth, 2 or 3 epochs).

Two options that R1 does not use: the teacher's distributions on its traces (`logits`),
or on what the student says itself (`on_policy`).
"""

import dataclasses
import functools
import pathlib

import jax
from ml_collections import ConfigDict
import numpy as np

from r1jax import distillation, preemption, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.data import problems, traces
from r1jax.distillation import DistillConfig, OnPolicyConfig
from r1jax.errors import UserError
from r1jax.fine_tuning import tune
from r1jax.models.policy import Policy
from r1jax.optimizer import make_optimizer
from r1jax.pipeline import supervised
from r1jax.pipeline.project import (
  Project,
  Weights,
  load_weights,
  save_weights,
  with_changes,
)
from r1jax.run import (
  Run,
  adapters_of,
  compiled,
  host_state,
  put_batch,
  resumed,
  take,
)

MODES = ("sft", "logits", "on_policy")

# Initial learning rates of R1's students (B.4.3); each is divided by ten by a cosine.
RATES = {
  "tiny_dense": 1e-3,  # ours
  "qwen2_5_1_5b": 1e-4,
  "qwen2_5_7b": 8e-5,
  "qwen2_5_14b": 7e-5,
  "qwen2_5_32b": 6e-5,
  "llama_8b": 5e-5,
  "llama_70b": 2e-5,
}


def check_mode(mode: str) -> None:
  """Raises UserError: there is no such mode."""
  if mode not in MODES:
    raise UserError(f"config.distill.mode={mode!r} is not one of {', '.join(MODES)}.")


def same_tokenizer(student: pathlib.Path, teacher: pathlib.Path) -> None:
  """A student learns its teacher's tokens: both must have the same tokenizer.

  Args:
    student, teacher: folders with a tokenizer.model.

  Raises:
    UserError: they differ, or one is missing.
  """
  found = []
  for folder in (student, teacher):
    path = folder / "tokenizer.model"
    if not path.exists():
      raise UserError(f"{path} does not exist: a pipeline leaves it in its `world`.")
    found.append(path.read_bytes())
  if found[0] != found[1]:
    raise UserError(
      f"the student's tokenizer {student / 'tokenizer.model'} is not the teacher's,"
      f" {teacher / 'tokenizer.model'}: its tokens would mean something else. Make the"
      " student's base with the teacher's tokenizer, or distil by traces as text."
    )


def with_rate(config: ConfigDict) -> ConfigDict:
  """The config's `distill`, its learning rate that of the student's size if not set.

  Raises:
    UserError: it is not set, and the paper has none for that size.
  """
  section, preset = config.distill, config.student.model.preset
  if section.learning_rate is not None:
    return section
  if preset not in RATES:
    raise UserError(
      "config.distill.learning_rate is not set, and for student.model.preset="
      f"{preset!r} there is no rate of the paper, only for {', '.join(RATES)}. Set it."
    )
  return with_changes(section, {"learning_rate": RATES[preset]})


def logit_config(section: ConfigDict) -> DistillConfig:
  same = ("divergence", "beta", "teacher_temperature", "alpha", "micro_batches")
  return DistillConfig(**{key: section[key] for key in same}, router_bias_rate=0.0)


def on_policy_config(section: ConfigDict, window: int) -> OnPolicyConfig:
  """Args: the config's `distill`; window: output tokens."""
  more = ("temperature", "group_size")
  return OnPolicyConfig(
    **dataclasses.asdict(logit_config(section)),
    **{key: section[key] for key in more},
    max_tokens=window,
  )


def run(
  project: Project,
  folder: pathlib.Path,
  *,
  student: pathlib.Path,
  teacher: pathlib.Path | None,
  data: pathlib.Path,
) -> dict:
  """Distils and leaves weights/; returns figures.

  Args:
    project: whose config's `student` and `distill` say how.
    folder: the stage's.
    student: the folder of its base.
    teacher: the folder of a policy; the mode `sft` needs none.
    data: the accepted traces.
  """
  c = project.config
  model, section = c.student.model, with_rate(c)
  rows = traces.read(data)
  with project.run(folder, {}, asked=project.world.train, model=model) as this:
    start = load_weights(student, this.policy, project.mesh)
    if section.mode == "sft":
      return supervised.fine_tune(project, this, start, rows, section, folder)
    master = project.policy()
    taught_by = load_weights(teacher, master, project.mesh)
    if section.mode == "on_policy":
      learned, figures = _on_policy(this, start, taught_by, master, section)
    else:
      learned, figures = _logits(project, this, start, taught_by, master, rows, section)
    save_weights(folder, learned)
    return figures


def _logits(
  project: Project,
  this: Run,
  start: Weights,
  teacher: Weights,
  master: Policy,
  rows: list,
  section: ConfigDict,
) -> tuple[Weights, dict]:
  packed = supervised.pack_traces(project, rows, section.width)
  config = supervised.tuning_config(packed, section)
  step = functools.partial(
    distillation.logit_step,
    student=this.policy,
    teacher_policy=master,
    config=logit_config(section),
  )
  learned = tune(
    this,
    lambda: packed.pages,
    config,
    start=start,
    seed=this.config.seed,
    step=step,
    teacher=teacher,
  )
  return learned, {"examples": len(rows), "loss": this.metrics.phase("sft")[-1]["loss"]}


def _on_policy(
  this: Run, start: Weights, teacher: Weights, master: Policy, section: ConfigDict
) -> tuple[Weights, dict]:
  c = this.config
  steps = section["on_policy_steps"]
  optimizer = make_optimizer(
    supervised.rate_of(section, steps)  # a cosine over the updates
  )
  adapters, adapt = adapters_of(this)
  how = dict(adapters=adapters, reference=False)
  layout = train_state.shardings(this.policy, optimizer, this.mesh, **how)

  def begin(params, router):
    return train_state.restart(adapt(params), router, optimizer, reference=False)

  stream = problems.stream(len(this.train.ids), c.prompts, seed=c.seed)
  key = jax.random.fold_in(jax.random.key(c.seed), 4)
  checkpoints = Checkpoints(
    this.workdir / "checkpoints" / "on_policy", say=this.progress.say
  )
  shapes = jax.eval_shape(begin, *start)
  found = resumed(this, checkpoints, "on_policy", shapes.kept, layout.kept)
  step = found.step if found else 0
  if found:
    state = found.state
    stream.set_state(found.host["stream"])
  if adapters or not found:
    first = compiled(this, begin, *start, out_shardings=layout)(*start)
    state = state.on(first) if found else first
  this.metrics.roll_back({"on_policy": step})

  def on_policy_step(state, batch, key, teacher):
    return distillation.on_policy_step(
      state,
      batch,
      key,
      teacher,
      student=this.policy,
      teacher_policy=master,
      optimizer=optimizer,
      config=on_policy_config(section, this.windows[-1][1]),
      stop_ids=this.stop_ids,
      pad_id=this.tokenizer.pad_id,
    )

  program = None
  while step < steps:
    batch = put_batch(this, take(this.train, np.asarray(next(stream))))
    args = state, batch, key, teacher
    out = layout, None, None
    program = program or compiled(
      this, on_policy_step, *args, donate=(0,), out_shardings=out
    )
    step += 1
    with this.clock.phase("on_policy", step=step):
      state, _, figures = program(*args)
      figures = {name: float(x) for name, x in figures.items()}
    this.metrics.write({"phase": "on_policy", "step": step, **figures})
    this.progress.update("on_policy", step, steps, loss=figures["loss"])
    stops = preemption.asked()
    if stops or step % c.checkpoint_every == 0 or step == steps:
      with this.clock.phase("save", step=step):
        host = {**host_state(this), "stream": stream.get_state()}
        checkpoints.save(step, state.kept, host)
    if stops:
      break
  checkpoints.close()
  if step < steps:
    preemption.leave()
  loss = this.metrics.phase("on_policy")[-1]["loss"]
  return (state.params, state.router), {"rollouts": steps, "loss": loss}
