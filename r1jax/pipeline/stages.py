"""What the stages of R1 do (arXiv 2501.12948v2, Fig. 2 and supplement B.4).

  base --zero--> R1-Zero --cold_start--> traces
  base --sft_1 on them--> Dev1 --rl_1--> Dev2 --rejection--> traces
  base --sft_3 on them--> Dev3 --rl_2, with reward models--> R1
  student_base --distill on the traces of rejection--> student; beside it, student_rl

Dev3 starts from the base again, not from Dev2. A stage is a function of its folder and
its inputs' folders; wiring.py says which reads which.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

from r1jax import loop, settings
from r1jax.data import preferences, traces
from r1jax.data.tokenizer import Tokenizer
from r1jax.models.value import Value
from r1jax.pipeline import (
  cold_start,
  distill,
  judging,
  preference_models,
  rejection,
  scoreboard,
  supervised,
)
from r1jax.pipeline.all_scenarios_rl import Scenarios, scenario_reward
from r1jax.pipeline.project import (
  Project,
  Weights,
  load_weights,
  save_weights,
  with_changes,
)
from r1jax.pipeline.sampling import Decoding, sample
from r1jax.reinforcement import reinforce, sampled_tokens
from r1jax.run import Run, rule_reward

Folder = pathlib.Path
Inputs = dict[str, pathlib.Path]
EXAMINED = 8  # samples of a held-out request, beside each evaluation of RL stage 2


class Stages:
  """The functions behind the graph, bound to a project."""

  def __init__(self, project: Project):
    self.project = project
    self.config = project.config

  def weights(self, folder: Folder, model: Mapping | None = None) -> Weights:
    policy = self.project.policy(model)
    return load_weights(folder, policy, self.project.mesh)

  # -- what all begins with

  def world(self, folder: Folder, _: Inputs) -> dict:
    """The tokenizer, and the problems for people to look at."""
    p, c = self.project, self.config
    symbols = p.world.task.symbols
    pages = [prompt + page for prompt, page in p.pages]
    made = Tokenizer.train(pages, vocab=c.pretrain.vocab, symbols=symbols)
    made.save(folder / "tokenizer.model")
    sides = ("train", "held_out", "requests", "held_out_requests")
    for side in sides:
      rows = [p_.problem for p_ in getattr(p.world, side)]
      text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
      (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")
    return {"vocab": made.vocab, **{s: len(getattr(p.world, s)) for s in sides}}

  def base(self, folder: Folder, _: Inputs) -> dict:
    return self._pretrained(folder, {})

  def student_base(self, folder: Folder, _: Inputs) -> dict:
    student = self.config.student
    return self._pretrained(folder, {"pretrain": student.pretrain}, student.model)

  def _pretrained(
    self, folder: Folder, changes: Mapping, model: Mapping | None = None
  ) -> dict:
    with self.project.run(folder, changes, model=model) as this:
      save_weights(folder, loop.pretrain(this))
      return {"nll": this.metrics.phase("pretrain")[-1]["nll"]}

  # -- supervised stages

  def sft_1(self, folder: Folder, inputs: Inputs) -> dict:
    return self._sft(folder, inputs["base"], inputs["cold_start"], self.config.sft_1)

  def sft_3(self, folder: Folder, inputs: Inputs) -> dict:
    return self._sft(folder, inputs["base"], inputs["rejection"], self.config.sft_3)

  def _sft(self, folder: Folder, base: Folder, data: Folder, sft: Mapping) -> dict:
    rows = traces.read(data / "traces.jsonl")
    with self.project.run(folder, {}) as this:
      start = self.weights(base)
      return supervised.fine_tune(self.project, this, start, rows, sft, folder)

  def distilled(self, folder: Folder, inputs: Inputs) -> dict:
    return distill.run(
      self.project,
      folder,
      student=inputs["student_base"],
      teacher=inputs.get("rl_2"),
      data=inputs["rejection"] / "traces.jsonl",
    )

  # -- data

  def cold_start(self, folder: Folder, inputs: Inputs) -> dict:
    with self.project.run(folder, {}) as this:
      zero, section = self.weights(inputs["zero"]), self.config.cold_start
      return cold_start.collect(self.project, this, zero, section, folder)

  def rejection(self, folder: Folder, inputs: Inputs) -> dict:
    with self.project.run(folder, {}) as this:
      policy, section = self.weights(inputs["rl_1"]), self.config.rejection
      return rejection.collect(self.project, this, policy, section, folder)

  def judging(self, folder: Folder, inputs: Inputs) -> dict:
    with self.project.run(folder, {}) as this:
      # One writer where a graph puts the base in Dev3's place.
      folders = {inputs[name].name: inputs[name] for name in ("base", "sft_3")}
      writers = {name: self.weights(path) for name, path in folders.items()}
      section = self.config.judging
      return judging.collect(self.project, this, writers, section, folder)

  def reward_models(self, folder: Folder, inputs: Inputs) -> dict:
    data = inputs["judging"]
    sets = {
      "helpful": {
        side: preferences.read_preferences(data / f"{side}_pairs.jsonl")[0]
        for side in judging.SIDES
      },
      "safety": {
        side: preferences.read_safety(data / f"{side}_labels.jsonl")
        for side in judging.SIDES
      },
    }
    start, section = self.weights(inputs["sft_3"]), self.config.reward_models
    with self.project.run(folder, {}) as this:
      return {
        kind: preference_models.train(
          self.project, this, start, rows, kind, section, folder
        )
        for kind, rows in sets.items()
      }

  # -- reinforcement learning

  def zero(self, folder: Folder, inputs: Inputs) -> dict:
    return self._rl(folder, inputs["base"], self.config.zero)

  def ppo(self, folder: Folder, inputs: Inputs) -> dict:
    return self._rl(folder, inputs["base"], self.config.ppo_baseline)

  def rl_1(self, folder: Folder, inputs: Inputs) -> dict:
    return self._rl(folder, inputs["sft_1"], self.config.rl_1)

  def rl_1_no_language(self, folder: Folder, inputs: Inputs) -> dict:
    changes = with_changes(self.config.rl_1, {"reward": {"language_weight": 0.0}})
    return self._rl(folder, inputs["sft_1"], changes)

  def student_rl(self, folder: Folder, inputs: Inputs) -> dict:
    card = json.loads((inputs["rejection"] / "card.json").read_text())
    student, budget = self.config.student, card["tokens"]
    figures = self._rl(
      folder, inputs["student_base"], student.rl, model=student.model, budget=budget
    )
    if figures["sampled_tokens"] < budget:
      self.project.console.print(
        f"student_rl: {figures['sampled_tokens']} of {budget} sampled tokens when"
        " config.student.rl.steps ended it; raise them for an equal comparison.",
        style="yellow",
      )
    return {"token_budget": budget, **figures}

  def _rl(
    self,
    folder: Folder,
    start: Folder,
    changes: Mapping,
    *,
    model: Mapping | None = None,
    budget: int = 0,
  ) -> dict:
    asked = self.project.world.train
    with self.project.run(folder, changes, asked=asked, model=model) as this:
      weights = self.weights(start, model)
      learned = reinforce(this, *weights, token_budget=budget)
      save_weights(folder, learned)
      return rl_figures(this)

  def rl_2(self, folder: Folder, inputs: Inputs) -> dict:
    return self._all_scenarios(folder, inputs, self.config.rl_2.window)

  def rl_2_uncapped(self, folder: Folder, inputs: Inputs) -> dict:
    return self._all_scenarios(folder, inputs, 0)

  def _all_scenarios(self, folder: Folder, inputs: Inputs, window: int) -> dict:
    """Args: window: updates with requests, at the end; 0: all of them."""
    project, section = self.project, self.config.rl_2
    world, policy = project.world, project.policy()
    asked, value = [*world.train, *world.requests], Value(policy.config)
    c = with_changes(self.config, section.changes)
    if not window:
      c = with_changes(c, {"steps": self.config.rl_2_uncapped.steps})
    reward = scenario_reward(
      rule_reward(c, project.tokenizer, asked),
      asked,
      value,
      project.tokenizer,
      model_weight=section.model_weight,
      squash=section.squash,
    )
    judges = {
      kind: load_weights(inputs["reward_models"] / kind, value, project.mesh)
      for kind in ("helpful", "safety")
    }
    k = c.grpo.minibatches
    stream = Scenarios(
      len(world.train),
      len(world.requests),
      prompts=c.prompts * settings.objective(c).pool,
      share=section.general_share,
      window_from=(c.steps - window) // k if window else 0,
      seed=c.seed,
    )
    parts = dict(asked=asked, reward=reward, judges=judges)
    with project.run(folder, c, **parts) as this:
      learned = reinforce(
        this,
        *self.weights(inputs["sft_3"]),
        stream=stream,
        examine=functools.partial(self._examine, this, folder),
      )
      save_weights(folder, learned)
      return rl_figures(this)

  def _examine(
    self, this: Run, folder: Folder, params: Any, router: Any, step: int
  ) -> dict:
    """What people would say of the replies to held-out requests; RL never hears it."""
    problems = self.project.world.held_out_requests
    path = folder / "examined" / f"{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    said = sample(
      self.project,
      this,
      (params, router),
      problems,
      path,
      samples=EXAMINED,
      decoding=Decoding(this.config.eval.temperature),
    )
    return scoreboard.examined(problems, said.texts)

  # -- the result

  def report(self, folder: Folder, inputs: Inputs) -> dict:
    return scoreboard.run(self.project, folder, inputs, self.weights)


def rl_figures(this: Run) -> dict:
  """What a stage of RL says in its manifest."""
  evals = this.metrics.phase("eval")
  kept = ("pass_at_1", "format_rate", "mean_length", "reflection_rate", "kl_to_base")
  return {
    "updates": this.metrics.phase("rl")[-1]["step"],
    "sampled_tokens": sampled_tokens(this),
    "before": {key: evals[0][key] for key in kept},
    "after": {key: evals[-1][key] for key in kept},
  }
