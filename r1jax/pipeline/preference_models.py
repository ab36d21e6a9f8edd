"""Training of the two reward models: helpful on pairs of summaries, safety on single
responses with their thinking (R1, sections 3.1 and B.2: one epoch, batch 256)."""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import pathlib
import shutil

import numpy as np

from r1jax import prompts, reward_model, train_state
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.evals import calibration
from r1jax.metrics import write_json
from r1jax.models.value import Value, from_policy
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.pipeline import calibration_plot
from r1jax.pipeline.project import Project, Weights, load_weights, save_weights
from r1jax.reward_model import Labelled, Pairs, Responses
from r1jax.run import Run, compiled, put_batch

Encode = Callable[[Sequence[tuple[str, str]]], Responses]
VIEW = {"helpful": "summary", "safety": "all"}


def responses(
  rows: Sequence[tuple[str, str]],
  tokenizer: Tokenizer,
  *,
  template: str,
  prompt_length: int,
  length: int,
) -> Responses:
  """(prompt, response) texts as NumPy rows; a response is cut at `length` tokens, EOS
  included.

  Raises:
    UserError: a prompt is longer than `prompt_length`.
  """
  asked = [
    prompts.encode(prompt, tokenizer, template=template, prefill_think=False)
    for prompt, _ in rows
  ]
  tokens, mask = prompts.pad_left(asked, prompt_length, tokenizer.pad_id)
  said = np.full((len(rows), length), tokenizer.pad_id, np.int32)
  kept = np.zeros((len(rows), length), bool)
  for i, (_, text) in enumerate(rows):
    ids = [*tokenizer.encode(text), tokenizer.eos_id][:length]
    said[i, : len(ids)], kept[i, : len(ids)] = ids, True
  return Responses(tokens, mask, said, kept)


def train(
  project: Project,
  this: Run,
  start: Weights,
  data: Mapping[str, list],
  kind: str,
  section: Mapping,
  folder: pathlib.Path,
) -> dict:
  """One reward model from a policy's trunk; leaves <kind>/ and <kind>.json, and returns
  its figures. What a killed call has finished is not done again; a model that was
  on its way begins anew.

  Args:
    project, this: the pipeline and the stage.
    start: (params, router) of a policy.
    data: {"train", "held_out"}: Preferences for `helpful`, SafetyLabels for `safety`.
    kind: `helpful` or `safety`.
    section: learning_rate, rows, epochs, ...
    folder: the stage's.
  """
  finished = folder / f"{kind}.json"
  if finished.exists():
    return json.loads(finished.read_text())
  value, template = Value(this.policy.config), this.config.data.template
  encode = functools.partial(
    responses,
    tokenizer=this.tokenizer,
    template=template,
    prompt_length=_longest(data, ("prompt",), this.tokenizer, asked=template),
    length=_longest(data, ("chosen", "rejected", "response"), this.tokenizer),
  )
  model = folder / kind
  if (model / "weights.json").exists():
    weights = load_weights(model, value, project.mesh)
  else:
    shutil.rmtree(model, ignore_errors=True)  # arrays without their name
    weights = learn(this, value, start, data["train"], kind, section, encode)
    model.mkdir()
    save_weights(model, weights)
  scores = functools.partial(
    scored, this, value, weights, kind, encode=encode, size=section["rows"]
  )
  figures = evaluated(kind, data["held_out"], scores)
  plot = folder / f"{kind}_calibration.png"
  calibration_plot.draw(plot, figures["reliability"], kind)
  write_json(finished, figures)
  return figures


def learn(
  this: Run,
  value: Value,
  start: Weights,
  rows: list,
  kind: str,
  section: Mapping,
  encode: Encode,
) -> Weights:
  """The weights of a reward model after its epochs over `rows`."""
  this.metrics.roll_back({kind: 0})
  epochs = section["epochs" if kind == "helpful" else "safety_epochs"]
  batches = _batches(rows, section["rows"], epochs, this.config.seed)
  optimizer = make_optimizer(
    OptimizerConfig(
      learning_rate=section["learning_rate"],
      steps=len(batches),
      warmup_steps=min(section["warmup_steps"], len(batches) - 1),
      schedule=section["schedule"],
      weight_decay=section["weight_decay"],
    )
  )
  layout = train_state.shardings(value, optimizer, this.mesh, reference=False)

  def begin(params, router):
    trunk = from_policy(params, router, this.policy.config.width)
    return train_state.restart(*trunk, optimizer, reference=False)

  state = compiled(this, begin, *start, out_shardings=layout)(*start)
  one = reward_model.pairwise_step if kind == "helpful" else reward_model.pointwise_step

  def reward_model_step(state, batch):
    return one(
      state,
      batch,
      value=value,
      optimizer=optimizer,
      view=VIEW[kind],
      end_think_id=this.tokenizer.id("</think>"),
      micro_batches=section["micro_batches"],
    )

  out, program = (layout, None), None
  for i, (places, valid) in enumerate(batches):
    batch = put_batch(this, _batch(kind, [rows[at] for at in places], valid, encode))
    program = program or compiled(
      this, reward_model_step, state, batch, donate=(0,), out_shardings=out
    )
    with this.clock.phase("train", event=kind, step=i + 1):
      state, figures = program(state, batch)
      figures = {k: float(v) for k, v in figures.items()}
    this.metrics.write({"phase": kind, "step": i + 1, **figures})
    this.progress.update(kind, i + 1, len(batches), accuracy=figures["accuracy"])
  return state.params, state.router


def scored(
  this: Run,
  value: Value,
  weights: Weights,
  kind: str,
  rows: Sequence[tuple[str, str]],
  *,
  encode: Encode,
  size: int,
) -> np.ndarray:
  """A reward model's scores of (prompt, response) texts, `size` of them at a time."""
  end_think, found, program = this.tokenizer.id("</think>"), [], None

  def score(params, router, part):
    return reward_model.score(value, params, router, part, VIEW[kind], end_think)

  for i in range(0, len(rows), size):
    part = list(rows[i : i + size])
    filled = put_batch(this, encode(part + part[:1] * (size - len(part))))
    program = program or compiled(this, score, *weights, filled)
    found.append(np.asarray(program(*weights, filled))[: len(part)])
  scores = np.concatenate(found)
  if not np.isfinite(scores).all():
    raise UserError(
      f"the {kind} reward model's scores are not finite: its training has diverged."
      " Lower config.reward_models.learning_rate."
    )
  return scores


def evaluated(
  kind: str, rows: list, scores: Callable[[Sequence[tuple[str, str]]], np.ndarray]
) -> dict:
  """Accuracy, or AUC, and calibration on held-out data."""
  if kind == "helpful":
    chosen = scores([(r.prompt, r.chosen) for r in rows])
    rejected = scores([(r.prompt, r.rejected) for r in rows])
    # Half of the pairs the other way round, so that there is something to predict.
    flip = np.arange(len(rows)) % 2 == 1
    margin, positive = np.where(flip, rejected - chosen, chosen - rejected), ~flip
    figures = {"accuracy": calibration.pairwise_accuracy(chosen, rejected)}
  else:
    margin = scores([(r.prompt, r.response) for r in rows])
    positive = np.array([r.safe for r in rows])
    figures = {
      "auc": calibration.auc(margin, positive),
      "accuracy": float(np.mean((margin > 0) == positive)),
    }
  p = 1 / (1 + np.exp(-margin.astype(np.float64)))
  return {
    **figures,
    "held_out": len(rows),
    "calibration_error": calibration.expected_calibration_error(p, positive),
    "brier": calibration.brier_score(p, positive),
    "reliability": [row._asdict() for row in calibration.reliability(p, positive)],
  }


def _longest(
  data: Mapping[str, list],
  names: tuple[str, ...],
  tokenizer: Tokenizer,
  asked: str = "",
) -> int:
  """Tokens of the longest of these texts, BOS or EOS included, in fours.

  Args:
    data: the sets.
    names: of the rows' texts.
    tokenizer: of the policy.
    asked: the template of prompts.
  """
  rows = [row for rows in data.values() for row in rows]
  texts = [getattr(row, name) for row in rows for name in names if hasattr(row, name)]
  if asked:
    how = dict(template=asked, prefill_think=False)
    lengths = [len(prompts.encode(text, tokenizer, **how)) for text in set(texts)]
  else:
    lengths = [1 + len(ids) for ids in tokenizer.encode_batch(texts)]
  return -(-max(lengths) // 4) * 4


def _batches(
  rows: list, size: int, epochs: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(rows, which of them count) of every update: whole epochs, each in a new order; the
  last batch of one is filled up with rows that have no loss."""
  found = []
  for epoch in range(epochs):
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    for i in range(0, len(order), size):
      part = order[i : i + size]
      valid = np.arange(size) < len(part)
      found.append((np.resize(part, size), valid))
  return found


def _batch(
  kind: str, rows: list, valid: np.ndarray, encode: Encode
) -> Pairs | Labelled:
  if kind == "helpful":
    chosen = encode([(r.prompt, r.chosen) for r in rows])
    return Pairs(chosen, encode([(r.prompt, r.rejected) for r in rows]), valid)
  said = encode([(r.prompt, r.response) for r in rows])
  return Labelled(said, np.array([r.safe for r in rows]), valid)
