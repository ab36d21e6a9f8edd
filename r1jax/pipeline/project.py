"""What stages share: world, tokenizer, shapes; and how a stage becomes a run of its
own."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import rich.console

from r1jax import lora, settings, train_state, watchdog
from r1jax.checkpoint import Checkpoints
from r1jax.data import world as worlds
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import NumericalError, UserError
from r1jax.metrics import MetricsFile, write_json
from r1jax.models.policy import Policy
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.progress import Clock, Progress
from r1jax.prompts import PromptBatch
from r1jax.run import Run, rule_reward
from r1jax.sinks import Sinks

Weights = tuple[Any, Any]  # (params, router)


def with_changes(config: ConfigDict, changes: Mapping) -> ConfigDict:
  """The config with some keys changed, as a stage says.

  Raises:
    KeyError: the config has no such key.
  """
  found = config.copy_and_resolve_references().unlock()

  def put(into: ConfigDict, values: Mapping) -> None:
    for key, value in values.items():
      # A section `ppo` is what turns a run into one of PPO.
      if key not in into and not (key == "ppo" and into is found):
        raise KeyError(f"a stage changes {key!r}, which is no key of the config")
      if isinstance(value, Mapping | ConfigDict) and key in into:
        put(into[key], value)
      else:
        into[key] = value

  put(found, changes)
  return found.lock()


@dataclasses.dataclass
class Project:
  """A pipeline in its workdir."""

  config: ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  console: rich.console.Console

  def __post_init__(self):
    self._programs: dict = {}
    self._clocks: dict[pathlib.Path, Clock] = {}

  @functools.cached_property
  def world(self) -> worlds.World:
    return worlds.of_config(self.config)

  @functools.cached_property
  def pages(self) -> list[tuple[str, str]]:
    """A sample of the corpus, that shapes are fitted to: prompts, and what follows."""
    return worlds.pages(self.config, self.world, count=5000)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return Tokenizer.load(self.workdir / "world" / "tokenizer.model")

  @functools.cached_property
  def page(self) -> int:
    """Tokens of the longest page, with its prompt, BOS and EOS."""
    pages = [prompt + page for prompt, page in self.pages]
    return 2 + max(map(len, self.tokenizer.encode_batch(pages)))

  @functools.cached_property
  def longest_reply(self) -> int:
    """Tokens of the longest page without its prompt, with EOS."""
    return 1 + max(map(len, self.tokenizer.encode_batch([p for _, p in self.pages])))

  @functools.cached_property
  def prompt_length(self) -> int:
    w, d = self.world, self.config.data
    asked = [*w.pretrain, *w.train, *w.held_out, *w.requests, *w.held_out_requests]
    how = dict(template=d.template, prefill_think=d.prefill_think)
    return d.prompt_length or worlds.longest_prompt(asked, self.tokenizer, **how)

  def policy(self, model: Mapping | None = None) -> Policy:
    """Of the config's `model`; or a student's, which is a section like it."""
    config = with_changes(self.config, {"model": model} if model else {})
    return Policy(settings.policy_config(config, self.tokenizer.vocab))

  def encode(self, problems: Sequence[Problem]) -> PromptBatch:
    d = self.config.data
    return worlds.encode_problems(
      list(problems),
      self.tokenizer,
      template=d.template,
      prefill_think=d.prefill_think,
      prompt_length=self.prompt_length,
    )

  def program(self, key: tuple, make: Any) -> Any:
    """A compiled program that several stages run."""
    if key not in self._programs:
      self._programs[key] = make()
    return self._programs[key]

  def clock(self, folder: pathlib.Path) -> Clock:
    """A stage's, one for all of its runs; its events are in the folder."""
    if folder not in self._clocks:
      self._clocks[folder] = Clock()
      self._clocks[folder].record(folder / "events.jsonl")
    return self._clocks[folder]

  @contextlib.contextmanager
  def run(
    self,
    folder: pathlib.Path,
    changes: Mapping,
    *,
    asked: Sequence[Problem] = (),
    model: Mapping | None = None,
    **parts: Any,
  ) -> Iterator[Run]:
    """A stage as a run: its config, its files, what it asks.

    Args:
      folder: the stage's.
      changes: keys of the config that the stage sets otherwise.
      asked: problems of RL; the held-out sums are evaluated on.
      model: a student's section in place of config.model.
      parts: of the Run, such as its reward and judges.
    """
    c = with_changes(self.config, {**changes, **({"model": model} if model else {})})
    kept = self.world.held_out[: c.eval.problems]
    reward = parts.pop("reward", None) or rule_reward(c, self.tokenizer, list(asked))
    clock = self.clock(folder)
    with (
      Progress(self.console) as progress,
      watchdog.watched(clock, folder, c.watchdog_minutes),
      contextlib.closing(Sinks(c.sinks, folder, progress.say)) as sinks,
    ):
      yield Run(
        config=c,
        workdir=folder,
        mesh=self.mesh,
        clock=clock,
        progress=progress,
        metrics=MetricsFile(folder / "metrics.jsonl", sinks=sinks),
        samples=MetricsFile(folder / "samples.jsonl"),
        traces=MetricsFile(folder / "tokens.jsonl"),
        world=self.world,
        tokenizer=self.tokenizer,
        policy=self.policy(model),
        train=self.encode(asked) if asked else None,
        held_out=self.encode(kept),
        held_out_problems=kept,
        page=self.page,
        windows=settings.windows(c, self.longest_reply),
        host_reward=None,
        reward=reward,
        **parts,
      )


# -- weights between stages ----------------------------------------------------


def save_weights(folder: pathlib.Path, weights: Weights) -> None:
  """Leaves weights/, and weights.json, which names the arrays by their content: files
  of a checkpoint are never the same twice. Adapters become part of the weights."""
  params, router = weights
  if lora.trained(params) is not params:
    weights = jax.jit(lora.merged)(params), router
  checkpoints = Checkpoints(folder / "weights", keep=1)
  if not checkpoints.steps():
    checkpoints.save(0, dict(params=weights[0], router=weights[1]), {"version": 1})
  checkpoints.close()
  write_json(folder / "weights.json", {"sha256": digest_of(weights)})


def load_weights(folder: pathlib.Path, network: Any, mesh: Any) -> Weights:
  """(params, router) as arrays on the mesh.

  Args:
    folder: where `save_weights` put them.
    network: a Policy or a Value of their shapes.
    mesh: to put them on.

  Raises:
    UserError: they are gone, of another network, or not those of weights.json.
  """
  optimizer = make_optimizer(OptimizerConfig(learning_rate=0.0, steps=1))
  layout = train_state.shardings(network, optimizer, mesh, reference=False)
  begin = functools.partial(train_state.create, network, optimizer, reference=False)
  shapes = jax.eval_shape(begin, jax.random.key(0))
  folder = folder.resolve()
  try:
    checkpoints = Checkpoints(folder / "weights", keep=1)
    kept = checkpoints.restore(
      {"params": shapes.params, "router": shapes.router},
      {"params": layout.params, "router": layout.router},
    )
    checkpoints.close()
    found = kept.state if kept else {}
    known = json.loads((folder / "weights.json").read_text())["sha256"]
    weights = found["params"], found["router"]
  except (UserError, NumericalError, OSError, ValueError, KeyError) as error:
    raise UserError(
      f"the weights in {folder} cannot be read as those of this network:"
      f" {error.__cause__ or error}. Is the config the one that they were made with? If"
      " they are damaged, run their stage again: --stage=NAME --rerun."
    ) from error
  if digest_of(weights) != known:
    raise UserError(
      f"the weights in {folder}/weights are not those that weights.json names. Run"
      " their stage again: --stage=NAME --rerun."
    )
  return weights


def digest_of(weights: Weights) -> str:
  """sha256 over names, shapes and bytes of all arrays, whatever mesh they lie on."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    array = np.asarray(jax.device_get(leaf))
    found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()
