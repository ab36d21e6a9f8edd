"""A checkpoint gives TrainState and host values back; a broken one says so."""

import json

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest

from r1jax import train_state
from r1jax.checkpoint import Checkpoints
from r1jax.errors import UserError

HOST = {
  "stream": {"next_index": 7, "nested": {"list": [1, 2, 3], "name": "x", "none": 0}},
  "seconds": {"rl": 1.25, "compile": 3.5},
}


@pytest.fixture(scope="module")
def parts():
  """(a state with moments that are not zero, its shapes, its shardings on a mesh)."""
  policy, optimizer = golden.tiny_policy(), golden.optimizer()
  state = golden.new_state(policy)
  noise = np.random.default_rng(0)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(noise.normal(size=x.shape), x.dtype)
    return x + 3

  state = jax.tree.map(fill, state)
  mesh = mesh_of((2, 2, 2))
  shardings = train_state.shardings(policy, optimizer, mesh, reference=True)
  return state, jax.eval_shape(lambda: state), shardings


@pytest.fixture
def saved(tmp_path, parts):
  """A folder with the checkpoints 2 and 4, closed as by an ended run."""
  checkpoints = Checkpoints(tmp_path / "rl")
  checkpoints.save(2, parts[0], HOST)
  checkpoints.save(4, parts[0].replace(step=jnp.asarray(99)), HOST)
  checkpoints.close()
  return tmp_path / "rl"


def test_a_state_comes_back_bit_for_bit_and_on_the_mesh(saved, parts):
  state, shapes, shardings = parts
  checkpoints = Checkpoints(saved)
  assert checkpoints.latest() == 4
  back = checkpoints.restore(2, shapes, shardings)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  pairs = zip(
    jax.tree.leaves(back),
    jax.tree.leaves(state),
    jax.tree.leaves(shardings),
    strict=True,
  )
  for x, want, placed in pairs:
    assert np.array_equal(x, want)
    assert x.dtype == want.dtype
    assert x.sharding == placed
  assert int(checkpoints.restore(4, shapes, shardings).step) == 99
  checkpoints.close()


def test_the_hosts_values_come_back(saved):
  checkpoints = Checkpoints(saved)
  host = checkpoints.restore_host(4)
  assert host == HOST
  assert json.loads(json.dumps(host)) == HOST
  checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path / "few", keep=2)
  assert checkpoints.latest() is None
  for step in (2, 4, 6):
    checkpoints.save(step, {"x": jnp.full((2,), step)}, {"step": step})
  assert checkpoints.latest() == 6
  checkpoints.close()
  kept = {p.name for p in (tmp_path / "few").iterdir() if p.name.isdigit()}
  assert kept == {"4", "6"}


def test_a_step_that_cannot_be_read_says_which_and_what_to_do(saved, parts):
  for path in (saved / "4").rglob("*"):
    if path.is_file():
      path.write_bytes(b"broken")
  checkpoints = Checkpoints(saved)
  for read in (
    lambda: checkpoints.restore(4, *parts[1:]),
    lambda: checkpoints.restore_host(4),
  ):
    with pytest.raises(UserError) as error:
      read()
    text = str(error.value)
    assert f"checkpoint 4 in {saved} cannot be read" in text
    assert f"Remove {saved / '4'}" in text and "--workdir" in text
  state = checkpoints.restore(2, *parts[1:])  # the older one still works
  assert int(state.step) == 3
  checkpoints.close()


def test_a_state_of_another_shape_is_refused(saved, parts):
  _, shapes, shardings = parts
  wrong = shapes.replace(params={"other": shapes.step})
  where = shardings.replace(params={"other": shardings.step})
  checkpoints = Checkpoints(saved)
  with pytest.raises(UserError, match=r"checkpoint 2 .* cannot be read"):
    checkpoints.restore(2, wrong, where)
  checkpoints.close()
