"""What several processes must have in common before they train together: config, code,
files, and the folder that they write to. One process always agrees with itself."""

from collections import Counter
from collections.abc import Mapping
import hashlib
import json
import pathlib
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from r1jax import settings
from r1jax.errors import UserError


def several() -> bool:
  """Whether this process has met others."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def agree(facts: Mapping) -> None:
  """Compares something over the processes; all of them have to call it.

  Args:
    facts: JSON-like, {what: value or a dict of its own}.

  Raises:
    UserError: in every process, with the ones that differ from most, and in what.
  """
  if not several():
    return
  mine = json.dumps(facts, sort_keys=True).encode()
  gather = multihost_utils.process_allgather
  digests = gather(np.frombuffer(hashlib.sha256(mine).digest(), np.uint8))
  if (digests == digests[0]).all():
    return
  sizes = gather(np.array(len(mine), np.int32))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  texts = [
    row[:n].tobytes() for row, n in zip(gather(padded), sizes.ravel(), strict=True)
  ]
  usual = Counter(texts).most_common(1)[0][0]  # process 0's, where no one has more
  odd = [i for i, text in enumerate(texts) if text != usual]
  changes = settings.differences(json.loads(usual), json.loads(texts[odd[0]]))
  raise UserError(
    f"{len(odd)} of {len(texts)} processes differ from the others: process"
    f" {', '.join(map(str, odd[:8]))}{', ...' if odd[8:] else ''}"
    f" ({'; '.join(changes)}). Start all of them with the same command, the same code"
    " and the same files."
  )


def share_folder(folder: pathlib.Path, seconds: float = 30.0) -> None:
  """Makes sure that all processes write to one folder and not to one each.

  Args:
    folder: it exists.
    seconds: that a network's file system may take to show a new file.

  Raises:
    UserError: in every process, with the ones that do not see the first one's file.
  """
  if not several():
    return
  mark, first = folder / ".first_process", jax.process_index() == 0
  sign = np.array(time.time_ns() % 2**31, np.int32)
  if first:
    mark.write_text(str(sign))
  sign = str(multihost_utils.broadcast_one_to_all(sign))
  end, seen = time.monotonic() + seconds, False
  while not seen and time.monotonic() < end:
    seen = mark.exists() and mark.read_text() == sign
    if not seen:
      time.sleep(0.2)
  all_seen = multihost_utils.process_allgather(np.array(seen)).ravel()
  if first:
    mark.unlink(missing_ok=True)
  if not all_seen.all():
    blind = ", ".join(map(str, np.flatnonzero(~all_seen)[:8]))
    raise UserError(
      f"--workdir={folder} is not the same folder for all processes: process {blind}"
      " does not see what process 0 writes there. Name a folder that all hosts share."
    )


def code_digest() -> str:
  """Of the package's source, with the kernels'."""
  root = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in sorted([*root.rglob("*.py"), *(root.parent / "kernels").glob("*.py")]):
    digest.update(str(path.relative_to(root.parent)).encode() + path.read_bytes())
  return digest.hexdigest()
