"""Commands in processes that are forked from one which has imported what they need: the
imports are most of what a command takes that ends at a mistake."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

PRELOADED = ["r1jax.loop", "r1jax.pipeline.run", "experiments.command"]


def run(module: str, *arguments: str, timeout: float = 120):
  """What `python -m MODULE ARGUMENTS` does: its exit code, and what it printed."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(PRELOADED)
  with tempfile.TemporaryDirectory() as place:
    out, err = (pathlib.Path(place) / name for name in ("out", "err"))
    process = context.Process(target=_main, args=(module, arguments, out, err))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
      process.kill()
      raise subprocess.TimeoutExpired(module, timeout)
    said = out.read_text(), err.read_text()
  return subprocess.CompletedProcess([module, *arguments], process.exitcode, *said)


def _main(module, arguments, out, err):
  for path, number in ((out, 1), (err, 2)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, number)
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)
