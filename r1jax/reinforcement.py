"""The host loop of reinforcement learning: from given weights to the last update, with
evaluations and checkpoints on the way. R1-Zero and every RL stage of R1 run it."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from r1jax import (
  diagnostics,
  digest,
  doctor,
  grpo,
  lora,
  ppo,
  preemption,
  rollout,
  segments,
  settings,
  token_report,
  train_state,
)
from r1jax.checkpoint import Checkpoints
from r1jax.data import problems
from r1jax.errors import NumericalError, UserError
from r1jax.evals import generate
from r1jax.evaluator import Evaluator
from r1jax.optimizer import make_optimizer
from r1jax.profiling import Profile
from r1jax.run import (
  Run,
  adapters_of,
  compiled,
  host_state,
  put_batch,
  readable,
  resumed,
  take,
)
from r1jax.stragglers import Stragglers


def reinforce(
  this: Run,
  params: Any,
  router: Any,
  *,
  stream: Iterator | None = None,
  token_budget: int = 0,
  examine: Callable[[Any, Any, int], dict] | None = None,
) -> tuple[Any, Any]:
  """RL from given weights to the last update, with evaluations on the way.

  Args:
    this: the run; it says what is asked, and what rewards it.
    params, router: the weights to begin with; the first reference. With adapters the
      params are given up: the state has its own, in the dtype of computation.
    stream: the problems of each rollout, indices of this.train, with get_state and
      set_state; None: all of them, shuffled again and again.
    token_budget: sampled tokens, with which it ends; 0: there is none.
    examine: (params, router, update) -> figures, asked beside each evaluation.

  Returns:
    (params, router) after the last update; adapters as they are, which lora.merged
    makes plain.
  """
  c = this.config
  if stream is None:
    pool = c.prompts * settings.objective(c).pool
    stream = problems.stream(len(this.train.ids), pool, seed=c.seed)
  key = jax.random.fold_in(jax.random.key(c.seed), 1)
  checkpoints = Checkpoints(this.workdir / "checkpoints" / "rl", say=this.progress.say)
  state, step, frozen = begun(this, params, router, stream, checkpoints)
  if frozen:
    jax.tree.map(lambda x: x.delete(), params)
    params = lora.frozen(state.params)
  evaluator = Evaluator(this, (params, router), state)

  def evaluate(state: Any, step: int) -> None:
    evaluator(state, step)
    if examine is not None:
      figures = examine(state.params, state.router, step)
      this.metrics.write({"phase": "examined", "step": step, **figures})

  if not step:
    evaluate(state, 0)
  programs = {}
  how = dict(say=this.progress.say, phase=this.clock.phase)
  profile = Profile(this.workdir / "profile", c.profile_steps, **how)
  pending = None  # the step whose figures are still on their way
  last = token_budget and sampled_tokens(this) >= token_budget
  complaints: set[str] = set()  # that have been made
  early = (doctor.LOOK + 1) * c.grpo.minibatches
  stragglers = Stragglers(this.workdir, this.progress.say)
  while step < c.steps and not last:
    window = settings.window_at(this.windows, step)
    following = step + c.grpo.minibatches
    with this.clock.phase("rl", event="data", step=following):
      batch = put_batch(this, take(this.train, np.asarray(next(stream))))
    if window not in programs:
      programs[window] = make_step(this, window, state, batch, key)
    profile.start(step + 1, following, state)
    # In segments rollouts and rewards have lines of their own: the rest is the update.
    name = "update" if c.segment_tokens else "step"
    with this.clock.phase("rl", event=name, step=following):
      state, *made = programs[window](state, batch, key, this.judges)
      said, figures, trace = readable(this, made)
      step = following
      if pending is not None:
        record(this, *pending)
      pending = (step, said, figures, trace)
      last = step == c.steps
      stops = preemption.asked() and not last
      if token_budget:
        record(this, *pending)
        pending = None
        last = last or sampled_tokens(this) >= token_budget
      saves = last or stops or step % c.checkpoint_every == 0
      if pending and (saves or step % c.eval.every == 0):
        record(this, *pending)
        pending = None
    profile.stop(step, state, end=bool(last))
    if this.host_reward:
      this.host_reward.check(float(figures["outcome_infrastructure"]))
    if last or step % c.eval.every == 0:
      stragglers.look(step, this.host_reward.seconds if this.host_reward else 0.0)
      evaluate(state, step)
    # The figures of a rollout are read while the next one is under way.
    if last or step % c.eval.every == 0 or step == early:
      warn(this, step, complaints)
    if saves:
      with this.clock.phase("save", step=step):
        host = {**host_state(this), "stream": stream.get_state(), "frozen": frozen}
        checkpoints.save(step, state.kept, host)
      if this.host_reward:
        this.host_reward.journal.begin(step)
    if stops:
      break
  checkpoints.close()
  if step < c.steps and not last:
    preemption.leave()
  return state.params, state.router


def begun(
  this: Run, params: Any, router: Any, stream: Iterator, checkpoints: Checkpoints
) -> tuple[Any, int, dict | None]:
  """Where RL begins, or goes on: files are rolled back to it, the stream is set.

  Returns:
    (state, updates done, checksums of the weights under adapters or None).
  """
  begin, shardings = beginning(this)
  shapes = jax.eval_shape(begin, params, router)
  found = resumed(this, checkpoints, "rl", shapes.kept, shardings.kept)
  step, state, frozen = 0, None, None
  if found:
    step, state = found.step, found.state
    stream.set_state(found.host["stream"])
  adapters, _ = adapters_of(this)
  if adapters or not found:
    make = compiled(this, begin, params, router, out_shardings=shardings)
    first = make(params, router)
    state = state.on(first) if found else first
  if adapters:
    frozen = digest.of_tree(lora.frozen(state.params))[0]
    if found:
      check_base(this.workdir, found.host.get("frozen") or frozen, frozen)
  if this.host_reward:
    this.host_reward.journal.resume(step)
  evaluated = step if step else -1
  done = {"rl": step, "eval": evaluated, "examined": evaluated}
  for file in (this.metrics, this.samples, this.traces):
    file.roll_back(done)
  return state, step, frozen


def warn(this: Run, step: int, made: set[str]) -> None:
  """Says what the figures so far complain of. Args: made: complaints that have been
  made, once each; it grows."""
  rows, drop = this.metrics.phase, this.config.reward.alarm.hacking
  for phase, score in (("eval", "pass_at_1"), ("examined", "helpfulness")):
    if warning := diagnostics.hacked(rows("rl"), rows(phase), drop, score):
      this.progress.say(f"update {step}: {warning}")
  for complaint in doctor.examine(rows("rl")):
    if complaint.name not in made:
      this.progress.say(f"update {step}: {complaint.name}: {complaint.text}")
      made.add(complaint.name)


def check_base(workdir: pathlib.Path, then: dict, now: dict) -> None:
  """Adapters mean nothing without the weights that they were learned on.

  Args:
    workdir: of the run.
    then, now: checksums of those weights, path -> digits.

  Raises:
    UserError: they differ.
  """
  if then != now:
    odd = min(k for k in {*then, *now} if then.get(k) != now.get(k))
    raise UserError(
      f"the base is not the one whose adapters {workdir} holds: other bits in {odd}."
      " Put back what config.model.folder or config.init_from had, or use another"
      " --workdir."
    )


def sampled_tokens(this: Run) -> int:
  """All that RL has sampled so far."""
  rows = this.metrics.phase("rl")
  return round(sum(row["length"] * row["samples"] for row in rows))


def beginning(this: Run) -> tuple[Any, Any]:
  """(function of the base's (params, router) to a first state, its shardings)."""
  c = this.config
  optimizer = make_optimizer(settings.optimizer_config(c))
  adapters, adapt = adapters_of(this)
  how = dict(reference=settings.objective(c).needs_reference)
  layout = train_state.shardings
  if "ppo" in c:
    how["value_optimizer"] = make_optimizer(settings.value_optimizer_config(c))
    layout = ppo.shardings

  def begin(params, router):
    if "ppo" in c:
      return ppo.restart(params, router, optimizer, adapt=adapt, **how)
    return train_state.restart(adapt(params), router, optimizer, **how)

  how_laid = dict(mesh=this.mesh, adapters=adapters)
  return begin, layout(this.policy, optimizer, **how, **how_laid)


def make_step(this: Run, window: int, state, batch, key) -> Any:
  """The step for one output window: one program, or segments of it."""
  c = this.config
  parts = dict(
    policy=this.policy,
    optimizer=make_optimizer(settings.optimizer_config(c)),
    config=dataclasses.replace(settings.step_config(c, window), stop=this.stop),
    stop_ids=this.stop_ids,
    pad_id=this.tokenizer.pad_id,
  )
  # The state comes back laid out as it went in.
  layout = jax.tree.map(lambda x: x.sharding, state)
  if c.segment_tokens:
    pieces = segments.make_segments(
      segment_tokens=c.segment_tokens,
      ahead=this.host_reward.ahead if this.host_reward else None,
      state_shardings=layout,
      phase=this.clock.phase,
      reward_fn=judged(this, this.judges),
      **parts,
    )
    return lambda state, batch, key, _: pieces(state, batch, key)
  learn = grpo.whole_step
  if "ppo" in c:
    learn = ppo.whole_step
    parts["value_optimizer"] = make_optimizer(settings.value_optimizer_config(c))

  def whole_step(state, batch, key, judges):
    return learn(state, batch, key, reward_fn=judged(this, judges), **parts)

  out = layout, None, None, None
  args = state, batch, key, this.judges
  return compiled(this, whole_step, *args, donate=(0,), out_shardings=out)


def judged(this: Run, judges: Any) -> Any:
  """The run's reward function, with the weights of its reward models if it has some."""
  if judges is None:
    return this.reward
  return functools.partial(this.reward, judges=judges)


def broken_off(this: Run, step: int, said: rollout.Rollout, share: float) -> str:
  """What is known of a rollout whose logits were not finite."""
  text = f"the rollout before update {step} was broken off: logits are not finite"
  for row, sample in np.argwhere(np.asarray(said.nonfinite))[:1]:
    norms = ", ".join(f"{x:.3g}" for x in np.asarray(said.norms)[row, sample])
    text += (
      f" at token {int(said.lengths[row, sample])} of output {sample} of row {row};"
      f" norms of the layers' outputs there, from the first on: {norms}"
    )
  return (
    f"{text}. The checkpoints before hold finite numbers, or the base does not: lower"
    " config.optimizer.learning_rate, or look at the weights that the run began with"
    f" ({this.workdir})."
  )


def skipped(this: Run, step: int, said: rollout.Rollout, figures: dict) -> None:
  """Keeps the outputs of a rollout that had an update without a finite gradient, which
  moved nothing.

  Raises:
    NumericalError: it is the third rollout in a row.
  """
  place = this.workdir / "bad_steps" / f"{step}.npz"
  if jax.process_index() == 0:
    place.parent.mkdir(exist_ok=True)
    names = ("tokens", "mask", "logprobs")
    kept = {name: np.asarray(getattr(said, name)) for name in names}
    np.savez_compressed(place, **kept, **figures)
  text = (
    f"update {step}: {figures['skipped']:.0%} of the rollout's updates were skipped"
  )
  text += f", their gradients were not finite; its outputs and figures: {place}"
  before = this.metrics.phase("rl")[-2:]
  if len(before) == 2 and all(row.get("skipped") for row in before):
    raise NumericalError(
      f"{text}. It is the third rollout in a row. The weights are finite: lower"
      " config.optimizer.learning_rate, or look at the rewards and ratios there."
    )
  this.progress.say(text)


def record(
  this: Run, step: int, said: rollout.Rollout, figures: dict, trace: diagnostics.Trace
) -> None:
  """Writes a step's figures, and now and then its tokens; the reflection words are
  counted in the text of the groups that were trained on."""
  if "first_rl_step" not in this.clock.seconds:
    jax.block_until_ready(said)
    this.clock.seconds["first_rl_step"] = this.clock.elapsed
  texts = [t for group in generate.texts_of(said, this.tokenizer) for t in group if t]
  figures = {name: float(value) for name, value in figures.items()}
  drawn = figures["waves"] * this.config.prompts * this.config.grpo.group_size
  figures["samples"] = drawn
  if figures["nonfinite"]:
    raise NumericalError(broken_off(this, step, said, figures["nonfinite"]))
  if figures["skipped"]:
    skipped(this, step, said, figures)
  for sentence in diagnostics.alarms(figures, this.config.reward.alarm):
    this.progress.say(f"update {step}: {sentence}")
  counted = [generate.reflections(t) for t in texts]
  figures["reflection_rate"] = float(np.mean(counted)) if counted else 0.0
  this.metrics.write({"phase": "rl", "step": step, **figures})
  every = this.config.eval.every
  if this.config.grpo.traced_groups and step % every in (
    0,
    this.config.grpo.minibatches,
  ):
    group = this.config.grpo.group_size
    for row in token_report.rows(trace, this.tokenizer, group, this.train):
      this.traces.write({"phase": "rl", "step": step, **row})
  this.progress.update(
    "rl",
    step,
    this.config.steps,
    reward=figures["reward"],
    accuracy=figures["accuracy"],
    length=figures["length"],
  )
