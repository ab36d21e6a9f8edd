"""SFT of a stage: packed traces, masked prompts, a cosine from the config's rate
to a tenth of it (R1, supplement B.4.2: 5e-5 to 5e-6, 2 or 3 epochs, batch 128)."""

from collections.abc import Mapping, Sequence
import math
import pathlib

from r1jax.data import packing, traces
from r1jax.data.traces import Trace
from r1jax.fine_tuning import tune
from r1jax.optimizer import OptimizerConfig
from r1jax.pipeline.project import Project, Weights, save_weights
from r1jax.run import Run
from r1jax.sft import TuningConfig


def pack_traces(project: Project, rows: Sequence[Trace], width: int) -> packing.Packed:
  """Rows of a stage's width; 0: of the corpus's longest page."""
  c, tokenizer = project.config, project.tokenizer
  found = traces.examples(rows, tokenizer, template=c.data.template)
  return packing.pack(found, width or project.page, pad_id=tokenizer.pad_id)


def tuning_config(packed: packing.Packed, sft: Mapping) -> TuningConfig:
  """A stage's updates: whole epochs over its rows.

  Args:
    packed: the rows.
    sft: a config's section: epochs, rows, learning_rate, final_fraction, ...
  """
  steps = max(math.ceil(len(packed.rows) * sft["epochs"] / sft["rows"]), 1)
  return TuningConfig(
    rate_of(sft, steps), rows=sft["rows"], micro_batches=sft["micro_batches"]
  )


def rate_of(sft: Mapping, steps: int) -> OptimizerConfig:
  """A cosine over `steps` updates, as a section says."""
  return OptimizerConfig(
    learning_rate=sft["learning_rate"],
    steps=steps,
    warmup_steps=min(sft["warmup_steps"], steps - 1),
    schedule="cosine",
    final_fraction=sft["final_fraction"],
    b2=sft["b2"],
    weight_decay=sft["weight_decay"],
  )


def fine_tune(
  project: Project,
  this: Run,
  start: Weights,
  rows: Sequence[Trace],
  sft: Mapping,
  folder: pathlib.Path,
) -> dict:
  """Trains from `start` on traces and leaves weights/; returns the stage's figures."""
  packed = pack_traces(project, rows, sft["width"])
  config = tuning_config(packed, sft)
  tokens = packed.pages.segments > 0
  learned = tune(this, lambda: packed.pages, config, start=start, seed=this.config.seed)
  save_weights(folder, learned)
  return {
    "examples": len(rows),
    "too_long": packed.too_long,
    "rows": len(packed.rows),
    "filled": round(float(tokens.mean()), 3),
    "updates": config.optimizer.steps,
    "nll": this.metrics.phase("sft")[-1]["nll"],
  }
