"""A run as one HTML page, to open in a browser and to send to somebody.

  python -m experiments.report runs/r1_zero-tiny-seed0
  python -m experiments.report runs/r1_zero-tiny-seed0 --open    # and shows it
  python -m experiments.report runs/r1-tiny-seed0       # a page for each of its stages

Writes report.html into the folder, whether the run goes on or has ended; where the
folder holds runs (the stages of R1, the seeds of a sweep), into each of theirs. The
page needs no server and no network; --open shows it, of several the first. Exit
codes: 0 done, 2 a mistake in the command or a folder, 42 stopped by SIGTERM, 130 by
Ctrl-C, 1 anything else.
"""

import argparse
import pathlib
import sys
import webbrowser

from experiments import exits, folders
from experiments.configs import r1, r1_zero
from r1jax import html_report, settings
from r1jax.errors import UserError
from r1jax.metrics import MetricsFile

FILE = "metrics.jsonl"


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words():
    pages = write(options.folder, options.out)
  if options.open and not webbrowser.open(pages[0].resolve().as_uri()):
    print(f"there is no browser here: open {pages[0]} yourself.", file=sys.stderr)


def write(folder: str, out: str | None) -> list[pathlib.Path]:
  """Writes the pages, prints where they are and their sizes, and returns the files.

  Args:
    folder: of a run or of runs.
    out: the file for the page of a single run.

  Raises:
    UserError: no run there, several for one file, or a file that cannot be written.
  """
  found = folders.runs([folder], FILE, MetricsFile.rows_of)
  if out and len(found) > 1:
    raise UserError(
      f"{folder} has {len(found)} runs and --out is one file. Leave it out: each run's"
      " page goes into its own folder."
    )
  pages = []
  for _, path in found:
    usual = r1 if html_report.stage(path.parent) else r1_zero
    page = html_report.page(path.parent, settings.plain(usual.get_config("tiny")))
    target = pathlib.Path(out) if out else path.parent / "report.html"
    try:
      target.write_text(page, encoding="utf-8")
    except OSError as error:
      raise UserError(f"{target} cannot be written: {error.strerror}.") from error
    print(f"{target}  {target.stat().st_size / 1e6:.2f} MB")
    pages.append(target)
  return pages


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", help="of a run")
  parser.add_argument("--out", metavar="FILE", help="instead of FOLDER/report.html")
  parser.add_argument("--open", action="store_true", help="in a browser")
  return parser


if __name__ == "__main__":
  main(sys.argv[1:])
