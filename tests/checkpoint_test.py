"""A checkpoint gives TrainState and host values back, bit for bit; what is damaged is
set aside, and the one before it is taken."""

import errno
import json
import pathlib
import shutil

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest

from r1jax import checkpoint, digest, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.errors import NumericalError, TransientError, UserError

# Orbax's threads may still work on a file that has turned out to be broken.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

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


@pytest.fixture(scope="module")
def original(tmp_path_factory, parts):
  """A folder with the checkpoints 2 and 4, closed as by an ended run."""
  folder = tmp_path_factory.mktemp("run") / "rl"
  checkpoints = Checkpoints(folder)
  checkpoints.save(2, parts[0], HOST)
  checkpoints.save(4, parts[0].replace(step=jnp.asarray(99)), HOST)
  checkpoints.close()
  return folder


@pytest.fixture
def saved(original, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(original, tmp_path / "rl"))


def restored(folder, parts, **how):
  """(what comes back, what is said)."""
  said = []
  checkpoints = Checkpoints(folder, say=said.append, **how)
  try:
    return checkpoints.restore(*parts[1:]), said
  finally:
    checkpoints.close()


def assert_is(state, want):
  assert jax.tree.structure(state) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    assert np.array_equal(x, y)


def test_a_state_comes_back_bit_for_bit_and_on_the_mesh(saved, parts):
  state, _, shardings = parts
  back, said = restored(saved, parts)
  assert back.step == 4 and back.host == HOST and not said
  assert_is(back.state, state.replace(step=jnp.asarray(99)))
  pairs = zip(jax.tree.leaves(back.state), jax.tree.leaves(shardings), strict=True)
  assert all(x.sharding == placed for x, placed in pairs)
  assert json.loads(json.dumps(back.host)) == HOST


def test_nothing_comes_back_where_nothing_was_saved(tmp_path, parts):
  assert restored(tmp_path / "new", parts) == (None, [])


def test_only_the_newest_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path / "few", keep=2)
  assert checkpoints.steps() == []
  for step in (2, 4, 6):
    checkpoints.save(step, {"x": jnp.full((2,), step)}, {"step": step})
  checkpoints.close()
  assert checkpoints.steps() == [4, 6]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  @jax.jit
  def made(i):
    return {"x": jnp.full((512, 1024), i, jnp.float32)}

  spend = jax.jit(lambda s: {"x": s["x"] * 0 - 1}, donate_argnums=0)
  checkpoints = Checkpoints(tmp_path / "few")
  for i in range(1, 4):
    state = made(i)
    checkpoints.save(i, state, {})
    jax.block_until_ready(spend(state))
  checkpoints.close()
  for i in (3, 2, 1):
    checkpoints = Checkpoints(tmp_path / "few", writes=False)
    shapes = jax.eval_shape(made, 1)
    one = jax.tree.map(lambda x: jax.devices()[0], shapes)
    place = jax.tree.map(jax.sharding.SingleDeviceSharding, one)
    back = checkpoints.restore(shapes, place)
    checkpoints.close()
    assert back.step == i
    np.testing.assert_array_equal(back.state["x"], i)
    shutil.rmtree(tmp_path / "few" / str(i))


# -- damage ----------------------------------------------------------------------------


def files(folder, *, arrays):
  """Those with the bytes of the state, or all others of the state and the record."""
  of_arrays = sorted((folder / "4" / "state").glob("ocdbt.process_*/d/*"))
  if arrays:
    return of_arrays
  return sorted(
    path
    for path in (folder / "4").rglob("*")
    if path.is_file() and path not in of_arrays
  )


def test_a_flipped_byte_in_any_file_changes_no_value_silently(
  original, parts, tmp_path
):
  """Every file of arrays at several places, and every other one: the state that comes
  back is that of step 4, or that of step 2 with a sentence."""
  state, rng = parts[0], np.random.default_rng(0)
  places = [(p, n) for p in files(original, arrays=True) for n in (0, 1, 2)]
  places += [(p, 0) for p in files(original, arrays=False)]
  noticed = 0
  for i, (path, _) in enumerate(places):
    folder = pathlib.Path(shutil.copytree(original, tmp_path / str(i) / "rl"))
    broken = folder / path.relative_to(original)
    content = bytearray(broken.read_bytes())
    if not content:
      continue
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    broken.write_bytes(content)
    back, said = restored(folder, parts)
    if back.step == 4:
      assert_is(back.state, state.replace(step=jnp.asarray(99)))
      assert back.host == HOST and not said
    else:
      noticed += 1
      assert back.step == 2
      assert_is(back.state, state)
      assert "checkpoint 4" in said[0] and "damaged" in said[0]
      assert [p.name for p in (folder.parent / "quarantine").iterdir()] == ["rl-4.0"]
    shutil.rmtree(tmp_path / str(i))
  assert noticed > len(places) / 3


DAMAGE = {
  "arrays cut short": lambda f: [
    p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
    for p in f.glob("state/ocdbt.process_*/d/*")
  ],
  "arrays gone": lambda f: shutil.rmtree(f / "state" / "ocdbt.process_0"),
  "no index of the arrays": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
  "no list of leaves": lambda f: (f / "state" / "_METADATA").unlink(),
  "half a list of leaves": lambda f: (f / "state" / "_METADATA").write_text("{"),
  "no state": lambda f: shutil.rmtree(f / "state"),
  "no record": lambda f: shutil.rmtree(f / "record"),
  "half a record": lambda f: (f / "record" / "_strings.json").write_text('{"te'),
  "another record": lambda f: (f / "record" / "_strings.json").write_text(
    (f / "record" / "_strings.json").read_text().replace("next_index", "next_indes")
  ),
  "nothing": lambda f: [shutil.rmtree(f), f.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_taken(damage, saved, parts):
  DAMAGE[damage](saved / "4")
  back, (said,) = restored(saved, parts)
  assert back.step == 2 and back.host == HOST
  assert_is(back.state, parts[0])
  assert f"checkpoint 4 in {saved} is damaged" in said and "one before" in said
  aside = saved.parent / "quarantine" / "rl-4.0"
  assert aside.is_dir() and not (saved / "4").exists()
  # The number is free again.
  checkpoints = Checkpoints(saved)
  checkpoints.save(4, parts[0], HOST)
  checkpoints.close()
  assert restored(saved, parts)[0].step == 4


@pytest.mark.parametrize(
  "extra",
  [
    lambda f: (f / "8").mkdir(),
    lambda f: (f / "9").write_text("a file"),
    lambda f: (f / "notes").mkdir(),
    lambda f: (f / "6.orbax-checkpoint-tmp").mkdir(),
  ],
)
def test_what_is_no_checkpoint_is_no_newest_one(extra, saved, parts):
  extra(saved)
  back, _ = restored(saved, parts)
  assert back.step == 4
  assert not (saved / "6.orbax-checkpoint-tmp").exists()  # what a kill left behind


def test_what_orbax_does_not_need_may_be_missing(saved, parts):
  for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/_sharding"):
    (saved / "4" / name).unlink()
  back, said = restored(saved, parts)
  assert back.step == 4 and not said


def test_without_a_whole_one_nothing_begins_anew(saved, parts):
  for step in ("2", "4"):
    shutil.rmtree(saved / step / "state")
  for _ in range(2):  # and not at the next start either
    with pytest.raises(
      NumericalError, match=r"no checkpoint in .*rl is whole.*rl-2\.1"
    ):
      restored(saved, parts)


def test_one_who_reads_moves_nothing(saved, parts):
  shutil.rmtree(saved / "4" / "state")
  (saved / "6.orbax-checkpoint-tmp").mkdir()  # another process writes it now
  checkpoints = Checkpoints(saved, writes=False, say=lambda text: None)
  params, _ = checkpoints.weights()
  checkpoints.close()
  assert_is(params, parts[0].params)
  assert {"2", "4", "6.orbax-checkpoint-tmp"} <= {p.name for p in saved.iterdir()}


# -- what does not fit -----------------------------------------------------------------


def test_other_leaves_shapes_and_dtypes_are_listed_and_nothing_is_moved(saved, parts):
  state, shapes, shardings = parts

  def half(x):
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if floats else x.dtype)

  wide = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*x.shape, 1), x.dtype), shapes.router
  )
  for wrong, where, words in (
    (jax.tree.map(half, shapes), shardings, ["float32, must be", "bfloat16"]),
    (shapes.replace(router=wide), shardings, ["router/", "1) float32"]),
    (
      shapes.replace(reference=None),
      shardings.replace(reference=None),
      ["reference/params/", "must be absent"],
    ),
  ):
    with pytest.raises(UserError) as error:
      restored(saved, (state, wrong, where))
    text = str(error.value)
    assert f"checkpoint 4 in {saved} is of another policy or optimizer" in text
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 22
  assert {"2", "4"} <= {p.name for p in saved.iterdir()}


def test_a_later_schema_is_refused(saved, parts, monkeypatch):
  monkeypatch.setattr(checkpoint, "SCHEMA", 0)
  with pytest.raises(UserError, match="written by a later r1jax"):
    restored(saved, parts)


def test_numbers_that_are_not_finite_are_not_saved(saved, parts):
  bad = parts[0].replace(router=jax.tree.map(lambda x: x * jnp.nan, parts[0].router))
  checkpoints = Checkpoints(saved)
  with pytest.raises(NumericalError, match=r"step 6 .*not finite.*\[2, 4\]"):
    checkpoints.save(6, bad, HOST)
  checkpoints.close()
  assert checkpoints.steps() == [2, 4]


def test_without_room_it_is_said_before_anything_is_written(saved, parts, monkeypatch):
  usage = shutil.disk_usage(saved)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  checkpoints = Checkpoints(saved)
  with pytest.raises(TransientError, match=r"no room .* step 6 needs .*\[2, 4\] are"):
    checkpoints.save(6, parts[0], HOST)
  checkpoints.close()
  assert restored(saved, parts)[0].step == 4


# -- the digest ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 4, 2), (4, 2, 1)])
def test_a_digest_is_the_same_on_every_mesh(shape, parts):
  policy, optimizer = golden.tiny_policy(), golden.optimizer()
  mesh = mesh_of(shape)
  layout = train_state.shardings(policy, optimizer, mesh, reference=True)
  with jax.set_mesh(mesh):
    there = digest.of_tree(jax.device_put(parts[0], layout))
  assert there == digest.of_tree(parts[0])


def test_a_digest_sees_a_bit_and_an_exchange():
  x = jnp.arange(1.0, 13.0).reshape(3, 4)
  tree = {"x": x, "h": x.astype(jnp.bfloat16), "i": jnp.int32(3), "b": x > 5}
  want, finite = digest.of_tree(tree)
  assert finite
  for row, column, bit in ((0, 0, 0), (2, 3, 31), (1, 2, 13)):
    bits = np.asarray(x).view(np.uint32).copy()
    bits[row, column] ^= np.uint32(1 << bit)
    got, _ = digest.of_tree(tree | {"x": jnp.asarray(bits.view(np.float32))})
    assert {k for k in want if got[k] != want[k]} == {"x"}
  got, _ = digest.of_tree(tree | {"x": x[::-1], "b": ~tree["b"]})
  assert {k for k in want if got[k] != want[k]} == {"x", "b"}
  assert not digest.of_tree({"x": x.at[0, 0].set(jnp.inf)})[1]


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("UNAVAILABLE: the storage does not answer"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
  ],
)
def test_storage_that_cannot_be_read_now_is_no_damage(saved, parts, monkeypatch, error):
  def fails(*_, **__):
    raise ValueError("could not load") from error

  checkpoints = Checkpoints(saved)
  monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", fails)
  with pytest.raises(TransientError, match="cannot be read now"):
    checkpoints.restore(*parts[1:])
  checkpoints.close()
  assert not checkpoints.quarantine.exists() and checkpoints.steps() == [2, 4]


def test_one_too_many_after_a_kill_goes_with_the_next_save(tmp_path):
  folder = tmp_path / "few"
  for step, keep in ((2, 5), (4, 5), (6, 5), (8, 2)):
    checkpoints = Checkpoints(folder, keep=keep)
    checkpoints.save(step, {"x": jnp.full((2,), step)}, {})
    checkpoints.close()
  assert checkpoints.steps() == [6, 8]
