"""R1-Zero on the host: base, RL, evaluation, result. The only room that calls others.

All that a run does lies in its workdir: config.json, tokenizer.model, metrics.jsonl,
samples.jsonl, tokens.jsonl, checkpoints/, summary.json, curves.png, tokens.html. The
same command again resumes a run, and shows the result of one that has ended.
"""

import contextlib
import functools
import json
import pathlib
import resource
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import rich.console

from r1jax import (
  diagnostics,
  grpo,
  ppo,
  report,
  rollout,
  segments,
  settings,
  sft,
  sharding,
  token_report,
  train_state,
)
from r1jax.checkpoint import Checkpoints
from r1jax.data import corpus, problems
from r1jax.errors import UserError
from r1jax.evals import generate
from r1jax.evaluator import Evaluator
from r1jax.metrics import MetricsFile, write_json
from r1jax.optimizer import make_optimizer
from r1jax.progress import Clock, Progress
from r1jax.rewards import in_graph
from r1jax.rewards.verdict import OUTCOMES
from r1jax.run import Run, compiled, make_pages, open_workdir, prepare, put_batch, take

PROGRAMS = (
  *("pretrain_step", "evaluate", "whole_step"),
  # a step in segments
  *("wave", "start", "advance", "score", "fill", "experience", "update", "trace"),
)


def run(config: ConfigDict, workdir: pathlib.Path, clock: Clock) -> dict:
  """A whole run, or what is left of it. Returns the summary."""
  console = rich.console.Console()
  settings.check(config, len(jax.devices()))
  if not config.pretrain.steps:
    raise UserError(
      "config.pretrain.steps=0: RL starts from a base, and r1jax cannot read a"
      " published one. Set pretrain.steps to train one on the task's pages."
    )
  for sentence in settings.idle(config):
    console.print(sentence, style="yellow", highlight=False, soft_wrap=True)
  open_workdir(config, workdir)
  if (workdir / "summary.json").exists():
    summary = json.loads((workdir / "summary.json").read_text())
    show(console, workdir, summary)
    console.print(
      f"This run has ended; its files are in {workdir}.",
      highlight=False,
      soft_wrap=True,
    )
    return summary
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), Progress(console) as progress:
    with clock.phase("prepare"):
      this = prepare(config, workdir, mesh, clock, progress)
    with contextlib.closing(this):
      params, router = pretrain(this)
      reinforce(this, params, router)
      summary = conclude(this)
  show(console, workdir, summary)
  console.print(f"Files: {workdir}", highlight=False, soft_wrap=True)
  return summary


# -- the base ------------------------------------------------------------------


def pretrain(this: Run) -> tuple[Any, Any]:
  """The base model's (params, router), trained on the task's pages or restored."""
  c, p = this.config, this.config.pretrain
  optimizer = make_optimizer(settings.pretrain_optimizer_config(c))
  create = functools.partial(
    train_state.create, this.policy, optimizer, reference=False
  )
  shardings = train_state.shardings(this.policy, optimizer, this.mesh, reference=False)
  key = jax.random.key(c.seed)
  checkpoints = Checkpoints(this.workdir / "checkpoints" / "base")
  begun = checkpoints.latest() or 0
  if begun:
    state = checkpoints.restore(begun, jax.eval_shape(create, key), shardings)
    this.clock.restore(checkpoints.restore_host(begun)["clock"])
    this.progress.say(f"base: continuing from update {begun}")
  else:
    state = compiled(this, create, key, out_shardings=shardings)(key)
  # RL's rows stay where they are: it will roll them back itself.
  this.metrics.roll_back({"pretrain": begun, "rl": c.steps, "eval": c.steps})
  if begun < p.steps:
    with this.clock.phase("corpus"):
      # Enough at 14 tokens a page; with shorter ones the rows come round again.
      width = p.width or this.page
      pages = make_pages(c, this.world, count=p.steps * p.rows * width // 14)
      texts = [prompt + page for prompt, page in pages]
      tokens, segs = corpus.pack(texts, this.tokenizer, width)

    def batch(i: int) -> sft.Pages:
      rows = np.arange(i * p.rows, (i + 1) * p.rows) % len(tokens)
      return put_batch(this, sft.Pages(tokens[rows], segs[rows], segs[rows] > 0))

    def pretrain_step(state, pages):
      return sft.step(
        state,
        pages,
        policy=this.policy,
        optimizer=optimizer,
        router_bias_rate=p.router_bias_rate,
        mtp_coef=p.mtp_coef,
        micro_batches=p.micro_batches,
      )

    program = compiled(
      this,
      pretrain_step,
      state,
      batch(0),
      donate=(0,),
      out_shardings=(shardings, None),
    )
    third = max(p.steps // 3, 1)
    for i in range(begun, p.steps):
      with this.clock.phase("pretrain"):
        state, figures = program(state, batch(i))
        if i % 10 == 9 or i + 1 == p.steps:
          figures = {k: float(v) for k, v in figures.items()}
          this.metrics.write({"phase": "pretrain", "step": i + 1, **figures})
          this.progress.update("base", i + 1, p.steps, nll=figures["nll"])
      if (i + 1) % third == 0 or i + 1 == p.steps:
        checkpoints.save(i + 1, state, {"clock": this.clock.state()})
  checkpoints.close()
  return state.params, state.router


# -- reinforcement learning ----------------------------------------------------


def reinforce(this: Run, params: Any, router: Any) -> None:
  """RL from the base to the last update, with evaluations on the way."""
  c = this.config
  begin, shardings = beginning(this)
  pool = c.prompts * settings.objective(c).pool
  stream = problems.stream(len(this.world.train), pool, seed=c.seed)
  key = jax.random.fold_in(jax.random.key(c.seed), 1)
  checkpoints = Checkpoints(this.workdir / "checkpoints" / "rl")
  step = checkpoints.latest() or 0
  if step:
    shapes = jax.eval_shape(begin, params, router)
    state = checkpoints.restore(step, shapes, shardings)
    host = checkpoints.restore_host(step)
    this.clock.restore(host["clock"])
    stream.set_state(host["stream"])
    this.progress.say(f"rl: continuing from update {step}")
  else:
    state = compiled(this, begin, params, router, out_shardings=shardings)(
      params, router
    )
  done = {"pretrain": c.pretrain.steps, "rl": step, "eval": step if step else -1}
  for file in (this.metrics, this.samples, this.traces):
    file.roll_back(done)

  evaluate = Evaluator(this, (params, router), state)
  if not step:
    evaluate(state, 0)
  programs = {}
  pending = None  # the step whose figures are still on their way
  while step < c.steps:
    window = settings.window_at(this.windows, step)
    with this.clock.phase("rl"):
      batch = put_batch(this, take(this.train, np.asarray(next(stream))))
    if window not in programs:
      programs[window] = make_step(this, window, state, batch, key)
    with this.clock.phase("rl"):
      state, said, figures, trace = programs[window](state, batch, key)
      step += c.grpo.minibatches
      if pending is not None:
        record(this, *pending)
      pending = (step, said, figures, trace)
      last = step == c.steps
      if last or step % c.eval.every == 0 or step % c.checkpoint_every == 0:
        record(this, *pending)
        pending = None
    if this.host_reward:
      this.host_reward.check(float(figures["outcome_infrastructure"]))
    if last or step % c.eval.every == 0:
      evaluate(state, step)
    if last or step % c.checkpoint_every == 0:
      with this.clock.phase("save"):
        host = {"stream": stream.get_state(), "clock": this.clock.state()}
        checkpoints.save(step, state, host)
  checkpoints.close()


def beginning(this: Run) -> tuple[Any, Any]:
  """(function of the base's (params, router) to a first state, its shardings)."""
  c = this.config
  optimizer = make_optimizer(settings.optimizer_config(c))
  how = dict(reference=settings.objective(c).needs_reference)
  if "ppo" not in c:
    begin = functools.partial(train_state.restart, optimizer=optimizer, **how)
    return begin, train_state.shardings(this.policy, optimizer, this.mesh, **how)
  how["value_optimizer"] = make_optimizer(settings.value_optimizer_config(c))
  begin = functools.partial(ppo.restart, optimizer=optimizer, **how)
  return begin, ppo.shardings(this.policy, optimizer, mesh=this.mesh, **how)


def make_step(this: Run, window: int, state, batch, key) -> Any:
  """The step for one output window: one program, or segments of it."""
  c = this.config
  parts = dict(
    policy=this.policy,
    optimizer=make_optimizer(settings.optimizer_config(c)),
    reward_fn=this.host_reward
    or in_graph.rule_reward(
      in_graph.TagTable.of(this.tokenizer),
      prefill_think=c.data.prefill_think,
      accuracy_weight=c.reward.accuracy_weight,
      format_weight=c.reward.format_weight,
    ),
    config=settings.step_config(c, window),
    stop_ids=this.stop_ids,
    pad_id=this.tokenizer.pad_id,
  )
  # The state comes back laid out as it went in.
  layout = jax.tree.map(lambda x: x.sharding, state)
  if c.segment_tokens:
    return segments.make_segments(
      segment_tokens=c.segment_tokens, state_shardings=layout, **parts
    )
  learn = grpo.whole_step
  if "ppo" in c:
    learn = ppo.whole_step
    parts["value_optimizer"] = make_optimizer(settings.value_optimizer_config(c))

  def whole_step(state, batch, key):
    return learn(state, batch, key, **parts)

  out = layout, None, None, None
  return compiled(this, whole_step, state, batch, key, donate=(0,), out_shardings=out)


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
    for row in token_report.rows(trace, this.tokenizer, group):
      this.traces.write({"phase": "rl", "step": step, **row})
  this.progress.update(
    "rl",
    step,
    this.config.steps,
    reward=figures["reward"],
    accuracy=figures["accuracy"],
    length=figures["length"],
  )


# -- the result -----------------------------------------------------


def conclude(this: Run) -> dict:
  """summary.json, curves.png and tokens.html."""
  c, clock = this.config, this.clock
  evals, train = this.metrics.phase("eval"), this.metrics.phase("rl")
  half = min(evals, key=lambda row: abs(row["step"] - c.steps / 2))

  def figures(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "phase"}

  spent = {k: round(v, 1) for k, v in clock.seconds.items()}
  unit = 2**20 if sys.platform == "linux" else 2**30  # ru_maxrss: KiB, bytes on macOS
  summary = {
    "task": c.task if not c.data.problems else c.data.problems,
    "base": figures(evals[0]),
    "half_way": figures(half),
    "final": figures(evals[-1]),
    "steps": c.steps,
    "outcomes": outcomes(train),
    "seconds": {**spent, "total": round(clock.elapsed, 1)},
    "compilations": {
      name: clock.compilations[name] for name in PROGRAMS if clock.compilations[name]
    },
    "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2),
    "seed": c.seed,
    "config_sha256": settings.sha256(c),
    "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
  }
  name = "PPO" if "ppo" in c else "R1-Zero"
  title = f"{name} in miniature: {c.task}, {c.objective.preset}, seed {c.seed}"
  report.curves(this.workdir / "curves.png", train, evals, title)
  if c.grpo.traced_groups:
    page = token_report.page(this.traces.rows(), title)
    (this.workdir / "tokens.html").write_text(page, encoding="utf-8")
  write_json(this.workdir / "summary.json", summary)
  return summary


def outcomes(rows: list[dict]) -> dict[str, int]:
  """How many of all samples drawn in RL ended how, and their number."""
  counts = {
    name: sum(round(row[f"outcome_{name}"] * row["samples"]) for row in rows)
    for name in OUTCOMES
  }
  return {**counts, "samples": round(sum(row["samples"] for row in rows))}


def show(console: rich.console.Console, workdir: pathlib.Path, summary: dict) -> None:
  """The result in the terminal: groups before and after, the table, the verdict."""
  rows = MetricsFile(workdir / "samples.jsonl").rows()
  for heading, name in (("Before RL", "base"), ("After RL", "final")):
    step = summary[name]["step"]
    report.show_groups(console, [r for r in rows if r["step"] == step], heading)
  report.show_table(console, summary)
  console.print(report.verdict(summary), highlight=False, soft_wrap=True)
