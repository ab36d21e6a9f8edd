"""Drafts by a trained MTP module in `bench rollout`, against none."""

import contextlib
import functools
import pathlib
import statistics
import tempfile

import jax
import numpy as np
import rich.console

from experiments.benches import rollout_parts as parts
from experiments.configs import r1_zero
from r1jax import loop, run, sharding
from r1jax.progress import Clock, Progress


def trained(updates: int) -> tuple:
  """The base of R1-Zero in miniature with an MTP module, after so many updates, and
  held-out problems: (policy, (params, router), prompts, output tokens, stop ids)."""
  config = r1_zero.get_config("tiny")
  with config.unlocked():
    config.model.mtp_depth = 1
    config.pretrain.mtp_coef = 0.3
    config.pretrain.steps = updates
  console = rich.console.Console(quiet=True)
  mesh = sharding.make_mesh(jax.devices()[:1])
  with (
    tempfile.TemporaryDirectory() as folder,
    jax.set_mesh(mesh),
    Progress(console) as progress,
  ):
    this = run.prepare(config, pathlib.Path(folder), mesh, Clock(), progress)
    with contextlib.closing(this):
      weights = jax.device_get(loop.pretrain(this))
      window = this.windows[0][1]
      return this.policy, weights, this.held_out, window, this.stop_ids


def speculative(z: parts.Sizes, repeats: int) -> dict:
  """Tokens a second, tokens a row and step, and the share of the drafts taken."""
  network, weights, held_out, window, stop_ids = trained(z.draft_pretrain)
  prompts = run.take(held_out, np.arange(z.draft_prompts))
  args = *weights, prompts, jax.random.key(0)
  programs, runs, drawn = {}, {}, {}

  def keep(name):
    drawn[name] = programs[name](*args)
    return drawn[name]

  for name in ("off", "on"):
    how = dict(group_size=z.draft_group, max_tokens=window, stop_ids=stop_ids)
    run_ = parts.sampler(network, **how, speculative=name)
    programs[name], _ = parts.compiled(run_, *args)
    runs[name] = functools.partial(parts.timed, keep, name)
  times = parts.interleaved(repeats, runs)
  total = {name: int(x.lengths.sum()) for name, x in drawn.items()}
  speed = {name: total[name] / statistics.median(t) for name, t in times.items()}
  on = drawn["on"]
  # A turn of a row writes the token that it drew, and the draft where it was taken.
  taken = int(on.accepted.sum())
  return {
    "speculative_ratio": speed["on"] / speed["off"],
    "speculative_tokens_per_s": speed["on"],
    "plain_tokens_per_s": speed["off"],
    "speculative_acceptance": taken / max(int(on.drafted.sum()), 1),
    "speculative_tokens_a_step": total["on"] / max(total["on"] - taken, 1),
    "speculative_updates": z.draft_pretrain,
    "speculative_runs": times,
  }
