"""A profile of a few RL updates: what the devices did, by the names of the code."""

from collections.abc import Callable
import contextlib
import pathlib
from typing import Any

import jax


class Profile:
  """Traces the rollouts that lead up to some updates, on the first process.

  The names in it are those of `jax.named_scope`: rollout, reward, advantages, update
  and, in it, loss and optimizer; everywhere the blocks of the network.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    steps: tuple[int, int],
    *,
    say: Callable[[str], None],
    phase: Callable[[str], contextlib.AbstractContextManager],
  ):
    """Args:
    folder: to be made.
    steps: (first, last) update; (0, 0): none.
    say: gets where the profile is, and how it is opened.
    phase: (name) -> a context that times its beginning and end: Clock.phase.
    """
    self.folder, self.say, self.phase = folder, say, phase
    self.first, self.last = (0, 0) if jax.process_index() else steps
    self.begun = 0  # update, of the trace that is running; 0: none is

  def start(self, first: int, last: int, state: Any) -> None:
    """Before a rollout.

    Args:
      first, last: update that it leads up to.
      state: what it begins with; waited for, so that no earlier work is traced.
    """
    if self.begun or first > self.last or last < self.first:
      return
    with self.phase("profile"):
      jax.block_until_ready(state)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # programs and phases, not every call
      jax.profiler.start_trace(
        self.folder, create_perfetto_trace=True, profiler_options=options
      )
    self.begun = first

  def stop(self, step: int, state: Any, *, end: bool = False) -> None:
    """After the last update of a rollout.

    Args:
      step: that update.
      state: what came of it.
      end: there are no more.
    """
    if not self.begun or (step < self.last and not end):
      return
    with self.phase("profile"):
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
    newest = max(self.folder.glob("plugins/profile/*"))
    self.say(
      f"profile of updates {self.begun} to {step}: {self.folder}\n"
      f"  pip install xprof && xprof --logdir={self.folder}\n"
      f"  or https://ui.perfetto.dev with {newest / 'perfetto_trace.json.gz'}"
    )
    self.begun = 0
