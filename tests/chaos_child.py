"""R1-Zero as the first command starts it, or with one thing of a resumed run broken.

python -m tests.chaos_child NAME FLAGS...
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from experiments import command, r1_zero
from r1jax import digest, reinforcement, settings
from r1jax.data import problems


def leaves(change):
  """(this, Restored) -> Restored, by (path, leaf) -> leaf of its state."""

  def changed(this, found):
    state = jax.tree_util.tree_map_with_path(
      lambda path, x: change(digest.name(path), x), found.state
    )
    return dataclasses.replace(found, state=state)

  return changed


def stream(this, found):
  pool = this.config.prompts * settings.objective(this.config).pool
  fresh = problems.stream(len(this.train.ids), pool, seed=this.config.seed)
  return dataclasses.replace(found, host={**found.host, "stream": fresh.get_state()})


def flip_one_bit():
  left = [True]

  def change(path, x):
    if not (path.startswith("params") and left):
      return x
    left.clear()
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    first = (0,) * x.ndim
    return jax.lax.bitcast_convert_type(bits.at[first].set(bits[first] ^ 1), x.dtype)

  return leaves(change)


BROKEN = {
  "stream": stream,
  "count": leaves(lambda path, x: x * 0 if path.endswith("count") else x),
  "router": leaves(lambda path, x: x * 0 if path.startswith("router") else x),
  "bit": flip_one_bit(),
}


def break_resume(name: str) -> None:
  resumed = reinforcement.resumed

  def broken(this, *args):
    found = resumed(this, *args)
    return found and BROKEN[name](this, found)

  reinforcement.resumed = broken


def break_key() -> None:
  make_step = reinforcement.make_step

  def made(this, *args):
    step = make_step(this, *args)
    other = jax.jit(lambda key: jax.random.fold_in(key, 7))
    return lambda state, batch, key, judges: step(state, batch, other(key), judges)

  reinforcement.make_step = made


def main() -> None:
  name = sys.argv.pop(1)
  if name == "key":
    break_key()
  elif name != "whole":
    break_resume(name)
  command.run(r1_zero.main, f"{r1_zero.CONFIG}:tiny")


if __name__ == "__main__":
  main()
