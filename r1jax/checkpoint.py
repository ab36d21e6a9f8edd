"""Checkpoints at step boundaries: the whole TrainState and what the host needs.

Orbax's v1 API behind a few verbs, and what it leaves open: each checkpoint carries a
digest of every leaf (digest.py), and what does not give it back is set aside, in
quarantine/ beside the folder, and the one before it is taken. `host` is JSON-like: the
position of the problem stream, and the clock by phase.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import shutil
import sys
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from r1jax import digest, lock
from r1jax.errors import NumericalError, TransientError, UserError

SCHEMA = 1  # of what lies beside the state; a checkpoint of a later one is not read
# Of an error's text: the storage's or the machine's own trouble, no damage.
TROUBLE = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Out of memory")
ERRNOS = {errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT}
FULL = ("RESOURCE_EXHAUSTED", "No space left", "os_error_code='28'")
DIGESTS = ".digests.jsonl"  # after a stage's name: the state's digest at each save
LISTED = 20  # leaves that do not fit, in an error


class Damaged(Exception):
  """A checkpoint that does not give back what was saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
  step: int
  state: Any
  host: dict


class Checkpoints:
  """The numbered checkpoints of one stage of a run."""

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    keep: int = 3,
    writes: bool = True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
  ):
    """Args: keep: how many of the newest stay; writes: False where another process may
    be writing, whose files are left as they are; say: is told what is passed over."""
    folder = folder.absolute()  # Orbax reads no other
    self.folder, self.writes, self.say = folder, writes, say
    self.quarantine = folder.parent / "quarantine"
    policies = ocp.training.save_decision_policies
    preserve = ocp.training.preservation_policies
    self._checkpointer = ocp.training.Checkpointer(
      folder,
      save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when
      preservation_policy=preserve.LatestN(keep),
      cleanup_tmp_directories=writes,
    )
    self._pending: Any = None  # the save that is on its way
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")

  def steps(self) -> list[int]:
    """Of all checkpoints that were finished, whole or not, from the oldest on."""
    names = (path.name for path in self.folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())

  # -- saving

  def save(self, step: int, state: Any, host: dict) -> None:
    """Writes a temporary folder in the background, then renames it: a killed save
    leaves the last one. The state may be donated as soon as this returns.

    Raises:
      NumericalError: a number of the state is not finite; nothing is written.
      UserError: another run has begun in the folder.
      TransientError: no room for it, now or while the one before was written.
    """
    self.wait()
    lock.check(self.folder)
    leaves, finite = digest.of_tree(state)
    if not finite:
      raise NumericalError(
        f"the state of step {step} holds numbers that are not finite, and is not saved;"
        f" {self.folder} keeps the steps {self.steps()}."
      )
    self._check_room(step, state)
    text = json.dumps({"schema": SCHEMA, "digest": leaves, "host": host})
    # The number is there for Orbax, which warns of a tree without arrays.
    record = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    record["schema"] = SCHEMA
    with self._storage(f"step {step}"):
      self._log(step, leaves)
      self._pending = self._begin(step, state, record)

  def _begin(self, step: int, state: Any, record: dict) -> Any:
    """A save that is on its way. To begin one takes Orbax 0.1 s and more: on CPUs, of
    one process, that is done beside the loop too, on a copy. Elsewhere it begins with
    the copy to the host, which must be over before the state is donated."""
    save = self._checkpointer.save_checkpointables_async
    if jax.default_backend() != "cpu":
      return save(step, {"state": state, "record": record})
    what = {"state": _copied(state), "record": record}
    if jax.process_count() > 1:
      return save(step, what)
    return self._thread.submit(lambda: save(step, what).result())

  def _log(self, step: int, leaves: dict) -> None:
    """One line a save, by the first process: runs that are the same have the same."""
    if self.writes and jax.process_index() == 0:
      whole = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()
      line = json.dumps({"step": step, "digest": whole[:16]})
      path = self.folder.parent / f"{self.folder.name}{DIGESTS}"
      with path.open("a") as file:
        file.write(line + "\n")

  def wait(self) -> None:
    """Until the last save is on the disk. Raises TransientError: there was no room."""
    pending, self._pending = self._pending, None
    if pending is not None:
      with self._storage("the last one"):
        pending.result()

  def close(self) -> None:
    self.wait()
    self._thread.shutdown()
    self._checkpointer.close()

  def _check_room(self, step: int, state: Any) -> None:
    shards = (s for x in jax.tree.leaves(state) for s in x.addressable_shards)
    need = sum(s.data.nbytes for s in shards if s.replica_id == 0)
    free = shutil.disk_usage(self.folder).free
    if free < 1.1 * need:
      raise TransientError(
        self._no_room(f"step {step} needs {need / 1e6:,.0f} MB", free)
      )

  def _no_room(self, what: str, free: int) -> str:
    return (
      f"no room for a checkpoint in {self.folder}: {what} and {free / 1e6:,.0f} MB are"
      f" free. The steps {self.steps()} are whole. Make room; the same command goes on."
    )

  @contextlib.contextmanager
  def _storage(self, what: str) -> Iterator[None]:
    """Raises TransientError, in words, where the disk is full."""
    try:
      yield
    except Exception as error:
      if not any(word in str(root_cause(error)) for word in FULL):
        raise
      free = shutil.disk_usage(self.folder).free
      raise TransientError(self._no_room(f"{what} did not fit", free)) from error

  # -- reading

  def restore(self, shapes: Any, shardings: Any) -> Restored | None:
    """The newest checkpoint that is whole, as arrays on the mesh of `shardings`; None
    where there has never been one.

    Args:
      shapes: the state's tree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of shardings.

    Raises:
      UserError: a whole one of other shapes, dtypes or a later schema.
      NumericalError: there were some, and none is whole.
      TransientError: of several processes this one found damage; another start takes
        the one before.
    """
    abstract = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
    return self._newest(lambda step: self._read(step, abstract))

  def weights(self) -> tuple[Any, Any] | None:
    """(params, router) of the newest step's policy, whatever stage it is of. Errors as
    `restore`."""

    def read(step: int) -> tuple[Any, Any]:
      with warnings.catch_warnings():  # of another mesh than the run's: it is told none
        warnings.simplefilter("ignore")
        state = self._read(step, None).state
      state = state.get("policy", state)  # PPO's beside its value model
      return state["params"], state.get("router") or {}

    return self._newest(read)

  def _newest(self, read: Callable[[int], Any]) -> Any:
    self.wait()
    for step in reversed(self.steps()):
      try:
        return read(step)
      except Damaged as error:
        text = f"checkpoint {step} in {self.folder} is damaged ({error})"
        if self.writes:
          text += f": now {self._set_aside(step)}"
        if jax.process_count() > 1:
          raise TransientError(
            f"{text}. Another start takes the one before."
          ) from error
        self.say(f"{text}; taking the one before")
    gone = self._aside()
    if gone:
      raise NumericalError(
        f"no checkpoint in {self.folder} is whole; those that were are in"
        f" {self.quarantine}: {', '.join(gone)}. Start in another --workdir."
      )
    return None

  def _aside(self) -> list[str]:
    return sorted(path.name for path in self.quarantine.glob(f"{self.folder.name}-*"))

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a checkpoint; nothing is deleted. Of several processes one moves it."""
    self.quarantine.mkdir(exist_ok=True)
    name = f"{self.folder.name}-{step}"
    place = self.quarantine / f"{name}.{len(self._aside())}"
    with contextlib.suppress(FileNotFoundError):
      (self.folder / str(step)).rename(place)
    self._checkpointer.reload()
    return place

  def _read(self, step: int, abstract: Any) -> Restored:
    """Raises Damaged; UserError: it does not fit."""
    record = self._load(step, {"record": None})["record"]
    text, known = record.get("text"), record.get("sha256")
    if not isinstance(text, str):
      raise Damaged("its record has no text")
    if hashlib.sha256(text.encode()).hexdigest() != known:
      raise Damaged("its record is not what was written")
    said = json.loads(text)
    if said["schema"] > SCHEMA:
      raise UserError(
        f"checkpoint {step} in {self.folder} was written by a later r1jax (schema"
        f" {said['schema']}; this one reads up to {SCHEMA}). Use that one."
      )
    if abstract is not None:
      self._check_fit(step, abstract, said["digest"])
    state = self._load(step, {"state": abstract})["state"]
    found, _ = digest.of_tree(state)
    if found != said["digest"]:
      wrong = sorted(
        k for k in {*found, *said["digest"]} if found.get(k) != said["digest"].get(k)
      )
      raise Damaged(f"other bits than were saved in {', '.join(wrong[:5])}")
    return Restored(step, state, said["host"])

  def _check_fit(self, step: int, abstract: Any, saved: dict) -> None:
    """Raises UserError: a table of the leaves that differ; a cast would be silent."""
    try:
      stored = self._checkpointer.checkpointables_metadata(step).metadata["state"]
    except Exception as error:
      raise self._of(error) from error
    there, here = (
      {
        digest.name(path): f"{tuple(x.shape)} {jnp.dtype(x.dtype).name}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
      }
      for tree in (stored, abstract)
    )
    if there.keys() != saved.keys():
      raise Damaged("its list of leaves is not what was written")
    wrong = [k for k in {**here, **there} if here.get(k) != there.get(k)]
    if wrong:
      width = max(map(len, wrong[:LISTED]))
      lines = [
        f"  {k:<{width}}  {there.get(k, 'missing')}, must be {here.get(k, 'absent')}"
        for k in wrong[:LISTED]
      ]
      more = len(wrong) - LISTED
      lines += [f"  and {more} more"] if more > 0 else []
      raise UserError(
        f"checkpoint {step} in {self.folder} is of another policy or optimizer:"
        f" {len(wrong)} leaves differ. Use the config that it was made with, or another"
        " --workdir.\n" + "\n".join(lines)
      )

  def _load(self, step: int, what: dict) -> dict:
    try:
      return self._checkpointer.load_checkpointables(step, what)
    except Exception as error:
      raise self._of(error) from error

  def _of(self, error: Exception) -> Exception:
    """What an error of Orbax means, by its first cause."""
    cause = root_cause(error)
    machine = isinstance(cause, MemoryError) or getattr(cause, "errno", 0) in ERRNOS
    if machine or any(word in str(cause) for word in TROUBLE):
      return TransientError(f"{self.folder} cannot be read now: {cause}")
    return Damaged(" ".join(str(cause).split())[:300] or type(cause).__name__)


@jax.jit
def _copied(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def root_cause(error: BaseException) -> BaseException:
  """The first of a chain of errors."""
  while (inner := error.__cause__ or error.__context__) is not None:
    error = inner
  return error
