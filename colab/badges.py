"""The notebooks as they are kept: badges and installation of the repository that
setup.py names, no outputs, no counts, an id a cell that stays.

  python -m colab.badges             # rewrites those that differ
  python -m colab.badges --check     # says which would be; exit code 1 if there are any

The second cell of a notebook installs r1jax where Google Colab has none; it is replaced
whole.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
SETUP = (HERE.parent / "setup.py").read_text()
REPOSITORY = re.search(r'^REPOSITORY = "(.*)"', SETUP, re.MULTILINE)[1]
INSTALL = f"""import importlib.util
import subprocess
import sys

if "google.colab" in sys.modules and not importlib.util.find_spec("r1jax"):
  pip = [sys.executable, "-m", "pip", "install", "-q"]
  subprocess.run([*pip, "git+{REPOSITORY}"], check=True)
  importlib.invalidate_caches()
  # Should an import fail below, restart the session once and run all cells."""
_BADGE = re.compile(r"^\[!\[Open in Colab\]\(.*$", re.MULTILINE)
METADATA = {
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
  "language_info": {"name": "python"},
}


def badge(name: str) -> str:
  """The Markdown of a notebook's badge."""
  path = REPOSITORY.removeprefix("https://github.com/")
  colab = "https://colab.research.google.com"
  image = f"{colab}/assets/colab-badge.svg"
  link = f"{colab}/github/{path}/blob/main/colab/{name}.ipynb"
  return f"[![Open in Colab]({image})]({link})"


def kept(name: str, notebook: dict) -> dict:
  """The notebook as it is kept.

  Args:
    name: of its file, without the ending.
    notebook: of nbformat 4; a title in Markdown is its first cell, its second installs.

  Raises:
    ValueError: the first two cells are not those.
  """
  cells, known = [], set()
  kinds = [cell["cell_type"] for cell in notebook["cells"][:2]]
  if kinds != ["markdown", "code"]:
    raise ValueError(
      f"{name}: the first cells are {kinds}, not a title and a code cell"
    )
  for i, cell in enumerate(notebook["cells"]):
    text = source = "".join(cell["source"])
    if i == 0:
      text = _BADGE.sub("", source).rstrip()
      title, _, rest = text.partition("\n")
      if not title.startswith("# "):
        raise ValueError(f"{name}: the first line is no title: {title!r}")
      text = f"{title}\n\n{badge(name)}\n\n{rest.strip()}"
    if i == 1:
      text = INSTALL
    here = cell.get("id", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", here) or here in known:
      here = hashlib.sha256(f"{i} {source}".encode()).hexdigest()[:8]
    known.add(here)
    made = {"cell_type": cell["cell_type"], "id": here, "metadata": {}}
    if cell["cell_type"] == "code":
      made |= {"execution_count": None, "outputs": []}
    cells.append({**made, "source": text.strip().splitlines(keepends=True)})
  return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def text_of(name: str, notebook: dict) -> str:
  """The file of `kept(name, notebook)`."""
  return json.dumps(kept(name, notebook), indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m colab.badges",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--check", action="store_true", help="rewrite nothing")
  check, odd = parser.parse_args(argv).check, []
  for path in sorted(HERE.glob("*.ipynb")):
    old = path.read_text(encoding="utf-8")
    new = text_of(path.stem, json.loads(old))
    if new != old:
      odd.append(path.name)
      if not check:
        path.write_text(new, encoding="utf-8")
  print(f"{'differ' if check else 'rewritten'}: {', '.join(odd) or 'none'}")
  if check and odd:
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1:])
