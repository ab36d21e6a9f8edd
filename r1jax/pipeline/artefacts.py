"""What lies in a stage's artefacts, and a digest of it that is cheap to take again."""

import functools
import hashlib
import itertools
import json
import pathlib


def contents(
  folder: pathlib.Path, artefacts: tuple[str, ...], known: dict[str, dict]
) -> dict[str, dict]:
  """{path: its sha256, size and mtime_ns} of every file in the artefacts.

  Like git's index: a file of `known` whose size and time are unchanged is not read.

  Args:
    folder: what the paths are relative to.
    artefacts: files and folders in it; one that is not there holds nothing.
    known: an earlier answer, or {}.
  """
  found, tops = {}, [folder / artefact for artefact in artefacts]
  for path in itertools.chain(tops, *(top.rglob("*") for top in tops)):
    if path.is_file():
      name, stat = path.relative_to(folder).as_posix(), path.stat()
      same = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
      if same.items() <= known.get(name, {}).items():
        found[name] = known[name]
      else:
        found[name] = {"sha256": _sha256(path, stat.st_ino, *same.values()), **same}
  return found


# A copied workdir has new times: even then a process reads each file once.
@functools.cache
def _sha256(path: pathlib.Path, inode: int, size: int, mtime_ns: int) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def digest(files: dict[str, dict]) -> str:
  """Of `contents`: the paths and what is in them, whatever their times."""
  pairs = {path: entry["sha256"] for path, entry in files.items()}
  return hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()
