"""What stays fixed over a run: its workdir, problems, tokenizer, policy and mesh."""

from collections.abc import Callable
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

from r1jax import lora, settings, sharding, train_state
from r1jax.agreement import agree, share_folder
from r1jax.checkpoint import Checkpoints, Restored
from r1jax.data import world as worlds
from r1jax.data.hf_tokenizer import HFTokenizer, open_tokenizer
from r1jax.data.problem import Problem
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.host_reward import HostReward
from r1jax.metrics import MetricsFile, write_json
from r1jax.models.policy import Policy
from r1jax.optimizer import make_optimizer
from r1jax.progress import Clock, Progress
from r1jax.prompts import PromptBatch
from r1jax.rewards import in_graph
from r1jax.rewards.in_graph import Rewards
from r1jax.rewards.journal import Journal
from r1jax.rewards.rules import file_digests, load_rules
from r1jax.rewards.scorer import Scorer
from r1jax.rollout import Rollout
from r1jax.sinks import Sinks
from r1jax.stopping import StopStrings
from r1jax.trained import tokenizer_of, tokenizer_place


@dataclasses.dataclass
class Run:
  """What stays fixed from the first line of a run to its last."""

  config: ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  clock: Clock
  progress: Progress
  metrics: MetricsFile
  samples: MetricsFile
  traces: MetricsFile
  world: worlds.World
  tokenizer: Tokenizer | HFTokenizer
  policy: Policy
  train: PromptBatch  # all of them; a step takes rows
  held_out: PromptBatch
  held_out_problems: list
  page: int  # tokens of the longest page of a sample
  windows: list[tuple[int, int]]  # (first update, output tokens)
  host_reward: HostReward | None  # None: rewards are read in the graph
  # (PromptBatch, Rollout) -> Rewards; with judges=, if there are some
  reward: Callable[..., Rewards]
  judges: Any = None  # the weights of reward models

  @property
  def stop_ids(self) -> tuple[int, ...]:
    ids = tuple(self.tokenizer.stop_ids)
    if self.config.data.stop_on_answer:
      ids += (self.tokenizer.id("</answer>"),)
    return ids

  @property
  def stop(self) -> StopStrings | None:
    """The strings that end an output."""
    return StopStrings.of(self.config.data.stop, self.tokenizer)

  def close(self) -> None:
    """Ends the reward's workers and the sinks."""
    if self.host_reward:
      self.host_reward.scorer.close()
    self.metrics.sinks.close()


def make_folder(workdir: pathlib.Path) -> None:
  """Raises UserError: it cannot be made, or not be written to."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may have been here
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}). Choose another one."
    ) from error


# What a run may be continued with otherwise: its end, how it is computed, and when it
# looks up. All but the end change figures by rounding alone, or not at all.
CHANGEABLE = ("steps", "checkpoint_every", "segment_tokens", "mesh.", "reward.workers")
CHANGEABLE += ("model.remat", "model.implementation", "model.rules")


def open_workdir(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
  """Makes the folder; refuses one that holds a run of another config.

  Returns:
    what is changed of the run that it holds, of what may be.
  """
  make_folder(workdir)
  path = workdir / "config.json"
  if not path.exists():
    return []
  changes = settings.differences(json.loads(path.read_text()), identity(config))
  refused = [x for x in changes if not x.startswith(CHANGEABLE)]
  if refused:
    raise UserError(
      f"--workdir={workdir} holds a run of another config ({'; '.join(refused)})."
      " Use another --workdir, or the config it was started with."
    )
  return changes


def identity(config: ConfigDict) -> dict:
  """What a run must share with the one that its workdir holds: the config, and the
  content of the files that it names."""
  named = file_digests(config.data.problems, config.reward.rules)
  return {**settings.plain(config), **named}


def prepare(
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  clock: Clock,
  progress: Progress,
) -> Run:
  """Problems, tokenizer and policy."""
  c, d = config, config.data
  world = worlds.of_config(c)
  pages = [] if c.model.folder else worlds.pages(config, world, count=5000)
  tokenizer = tokenizer_for(config, workdir, world, pages)
  kept = world.held_out[: c.eval.problems]
  check_counts(config, len(world.train), len(kept))
  how = dict(template=d.template, prefill_think=d.prefill_think, examples=d.examples)
  length = d.prompt_length or worlds.longest_prompt(
    [*world.train, *kept], tokenizer, **how
  )
  encode = functools.partial(
    worlds.encode_problems, tokenizer=tokenizer, prompt_length=length, **how
  )

  def longest(rows: list[str]) -> int:
    return max(map(len, tokenizer.encode_batch(rows)), default=0)

  policy = Policy(settings.policy_config(config, tokenizer.vocab))
  optimizer = make_optimizer(settings.optimizer_config(c))
  parts = dict(reference=True, adapters=settings.lora_config(c))
  train_state.shardings(policy, optimizer, mesh, **parts)  # do weights divide?
  encoded, asked = encode(world.train), encode(kept)
  windows = settings.windows(c, 1 + longest([page for _, page in pages]))
  page = 2 + longest([prompt + page for prompt, page in pages])  # BOS and EOS
  check_lengths(config, mesh, length, windows, page)
  host_reward = host_reward_of(config, workdir, world, kept, tokenizer, progress)
  share_folder(workdir)
  made = hashlib.sha256(tokenizer.model).hexdigest()
  agree({"files": identity(config), "tokenizer": made})
  # Only now is the folder claimed: a mistake found above leaves nothing behind.
  first = jax.process_index() == 0
  sinks = {"metrics": Sinks(c.sinks, workdir, progress.say)}
  files = {
    name: MetricsFile(workdir / f"{name}.jsonl", writes=first, sinks=sinks.get(name))
    for name in ("metrics", "samples", "tokens")
  }
  if first:
    tokenizer.save(tokenizer_place(workdir, c))
    write_json(workdir / "config.json", identity(config))
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    clock=clock,
    progress=progress,
    metrics=files["metrics"],
    samples=files["samples"],
    traces=files["tokens"],
    world=world,
    tokenizer=tokenizer,
    policy=policy,
    train=encoded,
    held_out=asked,
    held_out_problems=kept,
    page=page,
    windows=windows,
    host_reward=host_reward,
    reward=host_reward or rule_reward(config, tokenizer, world.train),
  )


def tokenizer_for(
  config: ConfigDict,
  workdir: pathlib.Path,
  world: worlds.World,
  pages: list[tuple[str, str]],
) -> Tokenizer | HFTokenizer:
  """The workdir's, else that of what the config begins with, else one that is trained
  on the pages."""
  path, folder = tokenizer_place(workdir, config), config.model.folder
  if path.exists() or folder or config.init_from:
    source = path
    if not path.exists():
      source = pathlib.Path(folder or tokenizer_of(pathlib.Path(config.init_from)))
    vocab = settings.policy_config(config, 0).vocab if folder else None
    return open_tokenizer(source, vocab)
  texts = [prompt + page for prompt, page in pages]
  symbols = world.task.symbols
  return Tokenizer.train(texts, vocab=config.pretrain.vocab, symbols=symbols)


def check_counts(config: ConfigDict, train: int, held_out: int) -> None:
  """Raises UserError: fewer problems than a rollout or an evaluation takes."""
  pool = settings.objective(config).pool
  several = f" (times objective.pool={pool})"
  for key, wanted, found, side, times in (
    ("eval.problems", config.eval.problems, held_out, "to evaluate on", ""),
    ("prompts", config.prompts * pool, train, "to train on", several),
  ):
    if found < wanted:
      raise UserError(
        f"config.{key}={settings.config_get(config, key)}{times} and there are only"
        f" {found} problems {side}. Lower config.{key} or give more problems."
      )


def check_lengths(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  prompt: int,
  windows: list[tuple[int, int]],
  page: int,
) -> None:
  """Raises UserError: rows of prompts and outputs, or pages, that the mesh cannot cut.

  Args:
    prompt: tokens of the longest.
    page: likewise.
  """
  pack = config.grpo.pack
  for _, tokens in windows:
    settings.step_config(config, tokens).check_pack(prompt)
    row = f"rows of data.prompt_length {prompt} + config.windows {tokens}"
    sharding.check_length(mesh, pack or prompt + tokens, row)
  if config.pretrain.steps:
    width = config.pretrain.width or page
    sharding.check_length(mesh, width, "pages (pretrain.width)")


def host_reward_of(
  config: ConfigDict,
  workdir: pathlib.Path,
  world: worlds.World,
  kept: list[Problem],
  tokenizer: Tokenizer | HFTokenizer,
  progress: Progress,
) -> HostReward | None:
  """The host's rules with their workers, tried on the golds; None where rewards are
  read in the graph.

  Raises:
    UserError: what the rules need is missing, or problems need them and config.reward
      does not have them.
  """
  problems = [*world.train, *kept]
  if not config.reward.host:
    if needs_host := sorted({p.kind for p in problems} - {"answer", "text"}):
      raise UserError(
        f"config.reward.host=False and there are problems of kind {needs_host[0]!r}:"
        " only the host's rules can judge them. Set config.reward.host=True."
      )
    return None
  progress.say("reward: trying the golds, the rules and what they need")
  rules = load_rules(config.reward.rules)
  scorer = Scorer(settings.scorer_config(config), problems, rules)
  for note in scorer.notes:
    progress.say(f"reward: {note}")
  journal = Journal(workdir / "rewards", jax.process_index())
  return HostReward(scorer, world.train, tokenizer, journal)


def rule_reward(
  config: ConfigDict, tokenizer: Tokenizer, asked: list[Problem]
) -> Callable[[PromptBatch, Rollout], Rewards]:
  """The config's rewards, read from tokens.

  Args:
    config: its `reward` and `data`.
    tokenizer: of the policy.
    asked: the problems that RL asks, in the order of their ids.
  """
  r, languages = config.reward, {}
  if r.language_weight:
    names = sorted({p.language or r.language for p in asked})
    table = in_graph.LanguageTable.of(tokenizer, names)
    targets = np.array([names.index(p.language or r.language) for p in asked])
    languages = dict(table=table, targets=targets, language_weight=r.language_weight)
  return in_graph.rule_reward(
    in_graph.TagTable.of(tokenizer),
    prefill_think=config.data.prefill_think,
    accuracy_weight=r.accuracy_weight,
    format_weight=r.format_weight,
    format_style=r.format_style,
    **languages,
  )


def adapters_of(this: Run) -> tuple[lora.LoraConfig | None, Callable[[Any], Any]]:
  """(the config's adapters or None, function that gives fresh ones to weights)."""
  found = settings.lora_config(this.config)
  key = jax.random.fold_in(jax.random.key(this.config.seed), 3)
  return found, functools.partial(lora.adapt, this.policy, config=found, key=key)


def resumed(
  this: Run, checkpoints: Checkpoints, phase: str, shapes: Any, shardings: Any
) -> Restored | None:
  """What a phase of the run has left, and the run's clock as it was then; None where it
  has not begun. Args and errors: as Checkpoints.restore."""
  steps = checkpoints.steps()
  timed = contextlib.nullcontext()
  if steps:
    timed = this.clock.phase("restore", step=steps[-1])
  with timed:
    found = checkpoints.restore(shapes, shardings)
  if found:
    made = found.host.get("tokenizer")
    if made and made != hashlib.sha256(this.tokenizer.model).hexdigest():
      raise UserError(
        f"{tokenizer_place(this.workdir, this.config)} is not the tokenizer that this"
        f" run was trained with ({made[:12]}...). Put that one back, or use another"
        " --workdir."
      )
    this.clock.restore(found.host["clock"])
    this.progress.say(f"{phase}: continuing from update {found.step}")
  return found


def host_state(this: Run) -> dict:
  """What every checkpoint of the run carries, for `resumed`."""
  made = hashlib.sha256(this.tokenizer.model).hexdigest()
  return {"clock": this.clock.state(), "tokenizer": made}


def compiled(this: Run, function, *args, donate: tuple[int, ...] = (), **jit) -> Any:
  """Ahead-of-time compilation: what runs afterwards cannot compile again."""
  with this.clock.phase("compile"):
    return jax.jit(function, donate_argnums=donate, **jit).lower(*args).compile()


def take(problems: PromptBatch, index: np.ndarray) -> PromptBatch:
  return jax.tree.map(lambda x: x[index], problems)


def put_batch(this: Run, batch: Any) -> Any:
  """Rows of a batch on their devices. Every process knows all of them, in the same
  order, and hands over those of its own devices.

  Args:
    batch: arrays [B, ...] of NumPy.
  """
  layout = sharding.batch_sharding(this.mesh)

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, layout, lambda rows: x[rows])

  return jax.tree.map(lambda x: put(np.asarray(x)), batch)


def _same(x: Any) -> Any:
  return x


def readable(this: Run, tree: Any) -> Any:
  """The same arrays, laid out so that every process can read all of their rows. Called
  right after the program that makes them, it does not wait for the next one."""
  if jax.process_count() == 1:
    return tree
  return jax.jit(_same, out_shardings=sharding.replicated(this.mesh))(tree)
