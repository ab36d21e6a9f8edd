"""report.html: a run in one file that opens without a server and without a network.

What the policy wrote is not trusted: all data stands in one block of JSON, page.js puts
it into the page as text, and a content security policy lets that one script run.
"""

import base64
import hashlib
import json
import pathlib
import string

from r1jax.html_report import excerpt, sections
from r1jax.html_report.sections import stage, title

__all__ = ["page", "stage", "title"]

HERE = pathlib.Path(__file__).parent
LIMIT = 5_000_000  # bytes of a page; the budgets of its parts add up to less
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def page(workdir: pathlib.Path | str, usual: dict | None = None) -> str:
  """The HTML page of a run, or of a stage of R1, that goes on or has ended: at most
  LIMIT bytes of UTF-8.

  Args:
    workdir: the run's folder.
    usual: a config to compare the run's with, as nested dicts.

  Raises:
    UserError: the folder has no whole row of metrics.
  """
  workdir = pathlib.Path(workdir)
  rows = sections.metrics(workdir)
  of = stage(workdir)
  config = excerpt.json_object(workdir / "config.json") or of.get("config", {})
  summary = excerpt.json_object(workdir / "summary.json")
  data = {
    "title": excerpt.cut(title(config, workdir, of), 200),
    "folder": excerpt.cut("/".join(workdir.resolve().parts[-2:]), 500),
    "verdict": sections.verdict(config, summary, rows, of),
    "table": sections.table(summary),
    "stage": bool(of),
    "figures": sections.figures(of),
    "curves": sections.curves(rows),
    "doctor": sections.complaints(rows),
    "groups": excerpt.groups(workdir / "tokens.jsonl"),
    "samples": excerpt.samples(workdir / "samples.jsonl"),
    "cost": sections.cost(summary, workdir / "events.jsonl", of),
    "config": sections.configuration(config, usual or {}),
  }
  return _render(data)


def _render(data: dict) -> str:
  style, script = ((HERE / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
  policy = (
    f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)};"
    " base-uri 'none'; form-action 'none'"
  )
  frame = string.Template((HERE / "page.html").read_text("utf-8"))
  return frame.substitute(
    policy=policy, style=style, script=script, data=_embedded(data)
  )


def _embedded(data: dict) -> str:
  """JSON that HTML cannot mistake for its own: ASCII, without <, > and &."""
  text = json.dumps(data, allow_nan=False, separators=(",", ":"))
  return text.translate(ESCAPES)


def _source(text: str) -> str:
  """What lets an inline script or style of exactly this text in."""
  digest = hashlib.sha256(text.encode("utf-8")).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"
