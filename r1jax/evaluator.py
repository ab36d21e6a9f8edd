"""Held-out problems, sampled and read as text, again and again during a run."""

import dataclasses
from typing import Any

import jax
import numpy as np

from r1jax import experience, rollout, train_state
from r1jax.evals import generate
from r1jax.run import Run, compiled, put_batch, readable, take

SHOWN = 3, 4  # problems and responses of each that are kept for people to read


class Evaluator:
  """Samples the held-out problems with a policy and writes the figures.

  One program of config.prompts problems runs again and again: its cache stays small.
  The same program says how far the policy has gone from the base.
  """

  def __init__(self, this: Run, base: tuple[Any, Any], state: train_state.TrainState):
    c = this.config
    # Its own copy: the state that begins with the base is donated.
    self.base = jax.tree.map(jax.numpy.copy, base)

    temperature = c.eval.temperature or c.grpo.temperature

    def evaluate(params, router, base, prompts, key):
      said = rollout.sample(
        this.policy,
        params,
        router,
        prompts,
        key,
        group_size=c.eval.samples,
        max_tokens=max(tokens for _, tokens in this.windows),
        temperature=temperature,
        stop_ids=this.stop_ids,
        stop=this.stop,
        pad_id=this.tokenizer.pad_id,
        top_k=c.grpo.top_k,
        top_p=c.grpo.top_p,
        min_p=c.grpo.min_p,
      )
      rows = experience.rows_of(prompts, said)
      # A sample of every problem at a time, or a few problems with all of theirs.
      parts, group = c.eval.samples, 1
      if c.grpo.whole_groups:
        parts, group = c.grpo.minibatches * c.grpo.micro_batches, c.eval.samples

      def by_base(part):
        return experience.completion_logprobs(
          this.policy, *base, part, temperature, group=group
        )[0]

      logprobs = experience.by_parts(by_base, rows, parts, group)
      return said.spoken(), (rows.sampler_logprobs - logprobs).reshape(said.mask.shape)

    self.this = this
    count = len(this.held_out_problems)
    # The last chunk is filled up with the first problems, and what is over is cut off.
    places = np.arange(-(-count // c.prompts) * c.prompts) % count
    self.chunks = [
      put_batch(this, take(this.held_out, part))
      for part in places.reshape(-1, c.prompts)
    ]
    self.key = jax.random.fold_in(jax.random.key(c.seed), 2)
    self.program = compiled(
      this, evaluate, state.params, state.router, self.base, self.chunks[0], self.key
    )

  def __call__(self, state: train_state.TrainState, step: int) -> None:
    this = self.this
    with this.clock.phase("evaluate", step=step):
      said = [
        readable(
          this,
          self.program(
            state.params, state.router, self.base, part, jax.random.fold_in(self.key, i)
          ),
        )
        for i, part in enumerate(self.chunks)
      ]
      said = jax.tree.map(lambda *x: np.concatenate(x), *said)
      said, gap = jax.tree.map(lambda x: x[: len(this.held_out_problems)], said)
      texts = generate.texts_of(said, this.tokenizer)
      samples = generate.Samples(
        this.held_out_problems, texts, said.lengths, said.ended
      )
      how = dict(prefill_think=this.config.data.prefill_think)
      marks = generate.mark(
        samples,
        format_style=this.config.reward.format_style,
        scorer=this.host_reward.scorer if this.host_reward else None,
        **how,
      )
      figures = generate.summarise(samples, marks, **how)
      # k1: the mean of log pi - log base over tokens that pi sampled.
      figures["kl_to_base"] = float(gap[said.mask].mean())
    this.metrics.write({"phase": "eval", "step": step, **figures})
    for i, problem in enumerate(this.held_out_problems):
      row = {"phase": "eval", "step": step, **dataclasses.asdict(problem)}
      row["correct"] = marks.correct[i].tolist()
      row["format"] = marks.format[i].tolist()
      if i < SHOWN[0]:
        row["texts"] = texts[i][: SHOWN[1]]
      this.samples.write(row)
    this.progress.say(
      f"held out, update {step}: "
      + ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
    )
