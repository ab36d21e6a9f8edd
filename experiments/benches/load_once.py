"""A checkpoint loaded once, in a process of its own whose peak of memory is its own.

  python -m experiments.benches.load_once r1jax FOLDER bfloat16

The last line is JSON: `seconds`, `peak_bytes` (resident, of which `before_bytes` before
the load) and `array_bytes` of what was loaded.
"""

import json
import pathlib
import sys
import time


def resident(name: str) -> int:
  """Bytes of this process: VmRSS now, VmHWM at its peak."""
  text = pathlib.Path("/proc/self/status").read_text()
  return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def r1jax(folder: str, dtype: str) -> int:
  import jax

  from r1jax.models import hf

  jax.block_until_ready(jax.numpy.zeros(1))
  yield
  _, params, router = hf.load(folder, params_dtype=dtype)
  yield sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready((params, router))))


def transformers(folder: str, dtype: str) -> int:
  import torch
  from transformers import AutoModelForCausalLM
  from transformers.utils import logging

  logging.disable_progress_bar()
  kind = getattr(torch, dtype)
  yield
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
  for x in model.parameters():  # what is mapped and not read yet
    x.data = x.data.clone()
  yield sum(x.nbytes for x in model.state_dict().values())


def main(library: str, folder: str, dtype: str) -> None:
  load = {"r1jax": r1jax, "transformers": transformers}[library](folder, dtype)
  next(load)
  before, begun = resident("VmRSS"), time.perf_counter()
  array_bytes = next(load)
  found = dict(
    seconds=time.perf_counter() - begun,
    before_bytes=before,
    peak_bytes=resident("VmHWM"),
    array_bytes=array_bytes,
  )
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
