"""Folders of runs, as commands that look at runs are given them."""

from collections.abc import Callable
import pathlib

from r1jax.errors import UserError


def runs(
  folders: list[str], file: str, read: Callable[[pathlib.Path], list]
) -> list[tuple[str, pathlib.Path]]:
  """(name, the file) of every run: of a folder itself, or else of the folders in it.

  Args:
    folders: as typed.
    file: the name of a file that a run writes line by line.
    read: its whole lines.

  Raises:
    UserError: no such folder, or one where nothing has been written.
  """
  files = []
  for name in folders:
    folder = pathlib.Path(name)
    if not folder.is_dir():
      raise UserError(f"there is no folder {name}. Give the --workdir of a run.")
    here = [folder / file] if (folder / file).exists() else folder.glob(f"*/{file}")
    here = [path for path in sorted(here) if read(path)]
    if not here:
      raise UserError(
        f"{name} has no whole line in {file}, here or in the folders in it. Is it the"
        " folder of a run, and has the run begun?"
      )
    files += [(str(path.parent), path) for path in here]
  return files
