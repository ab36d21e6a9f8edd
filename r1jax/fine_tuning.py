"""The host loop of next-token training: a base on pages, SFT on traces. Resumable."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from r1jax import preemption, sft, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.optimizer import make_optimizer
from r1jax.run import Run, adapters_of, compiled, host_state, put_batch, resumed
from r1jax.sft import TuningConfig


def tune(
  this: Run,
  pages: Callable[[], sft.Pages],
  config: TuningConfig,
  *,
  start: tuple[Any, Any] | None = None,
  seed: int | None = None,
  phase: str = "sft",
  step: Callable | None = None,
  teacher: Any = None,
) -> tuple[Any, Any]:
  """Trains on packed rows, or goes on where a killed run stopped. Given weights get
  adapters where the run's config says so; fresh ones are learnt whole.

  Args:
    this: the run; checkpoints go to checkpoints/<phase> in its workdir.
    pages: makes all rows (NumPy), once and only if there is something left to do.
    config: rows an update, and how.
    start: (params, router) to begin with; None: fresh ones.
    seed: of the order, a new one each time round; None: as they come.
    phase: the name in metrics and progress.
    step: (state, pages, teacher, optimizer=) -> (state, metrics) instead of sft.step,
      for distillation.
    teacher: weights that `step` reads and does not change.

  Returns:
    (params, router); with adapters as they are, which lora.merged makes plain.
  """
  policy, steps = this.policy, config.optimizer.steps
  optimizer = make_optimizer(config.optimizer)
  adapters, adapt = (None, None) if start is None else adapters_of(this)
  how = dict(reference=False)
  if start is None:
    begin = functools.partial(train_state.create, policy, optimizer, **how)
    given = (jax.random.key(this.config.seed),)
  else:

    def begin(params, router):
      return train_state.restart(adapt(params), router, optimizer, **how)

    given = start
  shardings = train_state.shardings(
    policy, optimizer, this.mesh, adapters=adapters, **how
  )
  checkpoints = Checkpoints(this.workdir / "checkpoints" / phase, say=this.progress.say)
  shapes = jax.eval_shape(begin, *given)
  found = resumed(this, checkpoints, phase, shapes.kept, shardings.kept)
  begun = found.step if found else 0
  state = found.state if found else None
  if adapters or not begun:
    first = compiled(this, begin, *given, out_shardings=shardings)(*given)
    state = state.on(first) if begun else first
  this.metrics.roll_back({phase: begun})
  if begun < steps:
    with this.clock.phase("corpus"):
      rows = pages()
    taken = functools.partial(_rows, len(rows.tokens), config.rows, seed)

    def batch(i: int) -> sft.Pages:
      return put_batch(this, jax.tree.map(lambda x: x[taken(i)], rows))

    def next_token_step(state, pages, teacher):
      if step is not None:
        return step(state, pages, teacher, optimizer=optimizer)
      return sft.step(
        state,
        pages,
        policy=policy,
        optimizer=optimizer,
        router_bias_rate=config.router_bias_rate,
        mtp_coef=config.mtp_coef,
        micro_batches=config.micro_batches,
      )

    args, out = (state, batch(0), teacher), (shardings, None)
    program = compiled(this, next_token_step, *args, donate=(0,), out_shardings=out)
    third = max(steps // 3, 1)
    for i in range(begun, steps):
      stops = preemption.asked()
      saves = (i + 1) % third == 0 or i + 1 == steps or stops
      with this.clock.phase(phase, step=i + 1):
        state, figures = program(state, batch(i), teacher)
        if i % 10 == 9 or i + 1 == steps:
          figures = {k: float(v) for k, v in figures.items()}
          this.metrics.write({"phase": phase, "step": i + 1, **figures})
          shown = {k: v for k, v in figures.items() if k in ("nll", "loss")}
          this.progress.update(phase, i + 1, steps, **shown)
        if saves:
          jax.block_until_ready(state)
      if saves:
        with this.clock.phase("save", step=i + 1):
          checkpoints.save(i + 1, state.kept, host_state(this))
      if stops and i + 1 < steps:
        checkpoints.close()
        preemption.leave()
  checkpoints.close()
  return state.params, state.router


def _rows(count: int, batch: int, seed: int | None, i: int) -> np.ndarray:
  """Which rows update i learns: [batch], every row once before any comes again."""
  at = np.arange(i * batch, (i + 1) * batch)
  if seed is None:
    return at % count
  return np.array([_order(count, seed, n // count)[n % count] for n in at])


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(count)
