"""report.html: hostile text stays data, the size has a bound, files may be missing."""

import base64
import hashlib
from html.parser import HTMLParser
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from experiments import report as command
from r1jax import html_report
from r1jax.errors import UserError
from r1jax.html_report import excerpt

HOSTILE = (
  "</script><img src=x onerror=alert(1)>",
  "<!-- <script> <!--",
  "]]>",
  "\u2028 and \u2029",
  "${data} $data &lt;b&gt; \ud800 \x00",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl(step, **more):
  return {"phase": "rl", "step": step, "reward": 0.1, "accuracy": 0.1, **more}


def evaluation(step, value):
  return {"phase": "eval", "step": step, "pass_at_1": value, "cons_at_4": value}


def traced(step, group, sample, tokens, **more):
  numbers = {
    name: [0.1234] * len(tokens)
    for name in ("logprob", "ratio", "advantage", "kl")  # and what later rows have
  }
  row = {"phase": "rl", "step": step, "group": group, "sample": sample}
  return row | {"tokens": tokens, **numbers, "clipped": [""] * len(tokens)} | more


def judged(step, problem, texts):
  row = {"phase": "eval", "step": step, "problem": problem, "answers": ["7"]}
  marks = {"correct": [True] + [False] * 7, "format": [1.0] * 8}
  return row | marks | {"texts": texts}


def whole_run(folder, text="plain"):
  """A run that has ended, with `text` wherever a run has text."""
  write(folder / "metrics.jsonl", [*map(rl, range(1, 9)), evaluation(0, 0.2)])
  reward = {"reward": 1.1, "parts": {text: 1.0}, "outcome": text}
  said = traced(8, 0, 0, [text, "x"], problem=text, answers=[text], **reward)
  write(folder / "tokens.jsonl", [said])
  write(folder / "samples.jsonl", [judged(0, text, [text, text])])
  figures = {"step": 0, "pass_at_1": 0.2, "mean_length": 9.0, "reflection_rate": 0.1}
  ends = {"base": [0.1, 0.3], "final": [0.4, 0.6], "change": [0.1, 0.5]}
  summary = {
    **{"base": figures, "half_way": figures},
    "final": figures | {"step": 8, "pass_at_1": 0.5},
    "intervals": {"pass_at_1": ends},
    "seconds": {"rl": 3.0, "total": 5.0},
    "devices": text,
  }
  (folder / "summary.json").write_text(json.dumps(summary))
  config = {"task": text, "objective": {"preset": "paper"}, "deep": {"er": text}}
  (folder / "config.json").write_text(json.dumps(config))
  event = {"time": 10.0, "seconds": 2.0, "name": "step", "step": 2}
  write(folder / "events.jsonl", [event, event | {"name": text, "time": 12.0}])
  return folder


class Page(HTMLParser):
  """Its tags in order, their attributes, and what stands in scripts and styles."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.inside, self.comments = [], [], [], []
    self.reads = False
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    self.reads = tag in ("script", "style")
    if self.reads:
      self.inside.append([tag, dict(attributes).get("id"), ""])

  def handle_endtag(self, tag):
    self.reads = False

  def handle_comment(self, data):
    self.comments.append(data)

  def handle_data(self, data):
    if self.reads:
      self.inside[-1][2] += data

  def data(self):
    return next(json.loads(text) for _, name, text in self.inside if name == "data")

  def source(self, tag):
    return next(text for kind, name, text in self.inside if kind == tag and not name)


def data_of(folder, **how):
  return Page(html_report.page(folder, **how)).data()


# -- hostile text --------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_run_says_stays_data(tmp_path, text):
  page = Page(html_report.page(whole_run(tmp_path / "hostile", text)))
  plain = Page(html_report.page(whole_run(tmp_path / "plain")))
  assert page.tags == plain.tags and page.attributes == plain.attributes
  assert page.tags.count("script") == 2 and not page.comments
  data = page.data()
  group = data["groups"]["list"][0]
  assert group["problem"] == text and group["answers"] == [text]
  output = group["outputs"][0]
  assert output["tokens"] == [text, "x"] and output["outcome"] == text
  assert output["parts"] == [[text, 1.0]] and output["reward"] == 1.1
  assert data["samples"]["rows"][0]["texts"] == [text, text]
  values = {key: json.loads(value) for key, value, _ in data["config"]["rows"]}
  assert values["deep.er"] == text and text in data["title"]
  assert ["devices", text] in data["cost"]["facts"]


def test_the_policy_lets_in_one_script_and_one_style_and_nothing_else(tmp_path):
  text = html_report.page(whole_run(tmp_path))
  page = Page(text)
  policy = next(v for k, v in page.attributes if k == "content" and "default-src" in v)
  for tag, kind in (("script", "script-src"), ("style", "style-src")):
    digest = hashlib.sha256(page.source(tag).encode()).digest()
    assert f"{kind} 'sha256-{base64.b64encode(digest).decode()}';" in policy
  assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_nothing_is_fetched(tmp_path):
  text = html_report.page(whole_run(tmp_path))
  # The name of SVG is no address that anybody asks.
  assert "//" not in re.sub(r"http://www\.w3\.org/2000/svg|^ *// .*$|; // .*$", "",
                            text, flags=re.M)  # fmt: skip
  names = {name for name, _ in Page(text).attributes}
  assert not names & {"src", "srcset", "action", "data", "style", "onerror", "onclick"}
  links = [value for name, value in Page(text).attributes if name == "href"]
  assert links and all(link.startswith("#") for link in links)


def test_the_script_makes_no_html_of_data():
  source = (pathlib.Path(html_report.__file__).parent / "page.js").read_text("utf-8")
  for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
    assert word not in source
  assert "</script" not in source and "<!--" not in source


# -- size ----------------------------------------------------------------------


def test_a_run_of_ten_thousand_updates_and_long_texts_is_under_5_mb(tmp_path):
  figures = {f"metric_{i}": 0.123456789 * i for i in range(30)}
  rows = [rl(i, **figures) for i in range(1, 10_001)]
  rows[4_321]["metric_7"] = 1e6
  write(tmp_path / "metrics.jsonl", rows)
  token = "<long>"
  write(
    tmp_path / "tokens.jsonl",
    (
      traced(step, group, sample, [token] * 2_000)
      for step in range(0, 10_001, 5_000)
      for group in range(2)
      for sample in range(16)
    ),
  )
  long = "<think>" * 4_000
  write(
    tmp_path / "samples.jsonl",
    (
      judged(step, f"p{i}", [long] * 4)
      for step in range(0, 10_001, 500)
      for i in (1, 2)
    ),
  )
  text = html_report.page(tmp_path)
  assert 1e6 < len(text.encode()) < html_report.LIMIT
  data = Page(text).data()
  series = {(s["phase"], s["name"]): s for s in data["curves"]["series"]}
  curve = series["rl", "metric_7"]
  assert len(curve["x"]) <= 1_001 and curve["x"] == sorted(set(curve["x"]))
  assert (curve["x"][0], curve["x"][-1]) == (1, 10_000)
  assert max(curve["y"]) == 1e6 and curve["x"][curve["y"].index(1e6)] == 4_322
  assert "thinned" in data["curves"]["note"]
  steps = [group["step"] for group in data["groups"]["list"]]
  assert (steps[0], steps[-1]) == (0, 10_000)
  assert "tokens.jsonl" in data["groups"]["note"]
  evaluated = [row["step"] for row in data["samples"]["rows"]]
  assert (evaluated[0], evaluated[-1]) == (0, 10_000)
  assert "samples.jsonl" in data["samples"]["note"]


def test_no_text_and_no_number_of_anything_makes_a_page_too_large(tmp_path):
  big = "<" * 5_000
  names = {f"{big[:300]}{i}": float(i) for i in range(600)}
  write(tmp_path / "metrics.jsonl", [rl(i, **names) for i in range(70)])
  parts = {f"{i}{big[:500]}": 1.0 for i in range(100)}
  hostile = dict(problem=big, answers=[big] * 12, parts=parts, outcome=big)
  write(
    tmp_path / "tokens.jsonl",
    (traced(1, g, s, [big[:300]] * 50, **hostile) for g in range(2) for s in range(70)),
  )
  write(tmp_path / "samples.jsonl", [judged(i, big, [big] * 40) for i in range(20)])
  (tmp_path / "config.json").write_text(
    json.dumps({f"{i}{big}": big for i in range(99)})
  )
  counts = {f"{i}{big}": 1 for i in range(200)}
  summary = dict(seconds=counts, compilations=counts, outcomes=counts, devices=big)
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  text = html_report.page(tmp_path)
  assert len(text.encode()) < html_report.LIMIT
  data = Page(text).data()
  for name in ("curves", "config"):
    assert data[name]["note"]
  output = data["groups"]["list"][0]["outputs"][0]
  assert output["whole"] == 50 and len(output["tokens"]) < 50
  assert data["groups"]["list"][0]["whole"] == 70


def test_what_is_left_out_of_outputs_is_counted_as_the_file_has_it(tmp_path):
  write(tmp_path / "metrics.jsonl", [rl(2)])
  long = "x" * 500_000
  write(tmp_path / "samples.jsonl", [judged(0, "p", [long, "short"] * 10)])
  data = data_of(tmp_path)["samples"]
  assert len(data["rows"][0]["texts"]) == 16
  assert data["note"].startswith("16 of the 20 outputs")
  texts = set(data["rows"][0]["texts"])
  assert texts == {"short", "x" * 8_000 + " … (of 500,000 characters)"}


@pytest.mark.parametrize("count", [1, 2, 3, 999, 1_000, 1_001, 1_502, 9_999])
def test_thinning_keeps_the_ends_and_the_extremes(count):
  values = [(i * 7_919) % 1_009 + (1e4 if i == count // 3 else 0) for i in range(count)]
  places = excerpt.thinned(values)
  assert places == sorted(set(places)) and len(places) <= 1_000
  assert places[0] == 0 and places[-1] == count - 1
  kept = [values[i] for i in places]
  assert (min(kept), max(kept)) == (min(values), max(values))


def test_what_is_shown_of_many_is_evenly_spaced():
  assert excerpt.spread(5, 9) == [0, 1, 2, 3, 4]
  assert excerpt.spread(101, 5) == [0, 25, 50, 75, 100]
  assert excerpt.fitting(["x" * 97] * 10, 300) == ["x" * 97] * 3


# -- what a folder may lack ----------------------------------------------------


def test_a_folder_without_a_row_is_a_mistake(tmp_path):
  with pytest.raises(UserError, match=r"no whole line in metrics\.jsonl"):
    html_report.page(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "st')
  with pytest.raises(UserError, match="Give the --workdir"):
    html_report.page(tmp_path)


def test_metrics_alone_are_enough(tmp_path):
  write(tmp_path / "metrics.jsonl", [{"phase": "pretrain", "step": 10, "nll": 2.5}])
  data = data_of(tmp_path)
  assert "pretrain to step 10" in data["verdict"] and data["table"] is None
  assert data["title"] == tmp_path.name
  for name in ("groups", "samples", "config"):
    assert ".json" in data[name]["note"]
  assert len(data["cost"]["notes"]) == 2
  assert data["curves"]["figures"][0]["name"] == "nll"


def test_a_half_written_last_line_is_passed_over(tmp_path):
  folder = whole_run(tmp_path)
  before = data_of(folder)
  for file in folder.glob("*.jsonl"):
    with file.open("a") as opened:
      opened.write('{"phase": "rl", "step": 9, "tokens": ["a", "')
  assert data_of(folder) == before


def test_rows_of_older_runs_and_of_other_kinds(tmp_path):
  folder = whole_run(tmp_path)
  old = traced(8, 0, 1, ["a", "b"])
  del old["kl"]
  odd = {
    "step": None,
    "group": [1],
    "sample": {},
    "tokens": [1, None],
    "kl": [None, "x"],
  }
  write(folder / "tokens.jsonl", [old, odd, {"tokens": 3}])
  nan = rl(2, kl=float("nan"), reward=True, note="text")
  write(
    folder / "metrics.jsonl", [nan, {"phase": "said", "step": "why"}, evaluation(0, 1)]
  )
  data = data_of(folder)
  first, second = (group["outputs"][0] for group in data["groups"]["list"])
  assert "kl" not in first and "parts" not in first and first["reward"] is None
  assert second["tokens"] == ["1", "None"] and second["kl"] == [None, None]
  named = {(s["phase"], s["name"]) for s in data["curves"]["series"]}
  assert ("rl", "accuracy") in named and ("rl", "kl") not in named


# -- what the page says --------------------------------------------------------


def test_a_run_that_has_ended_has_its_verdict_and_its_table(tmp_path):
  data = data_of(whole_run(tmp_path))
  assert data["verdict"].startswith("RL learned: pass@1 0.20 -> 0.50")
  name, base, _, final, change = data["table"]["rows"][0]
  assert (name, base, final) == ("pass@1", ["0.200", "[0.100, 0.300]"],
                                 ["0.500", "[0.400, 0.600]"])  # fmt: skip
  assert change == ["+0.300", "[+0.100, +0.500]"]
  assert ["wall time", "4.0 s"] in data["cost"]["facts"]
  assert data["doctor"]["rollouts"] == 8


def test_a_run_that_goes_on_says_how_far_it_came(tmp_path):
  rows = [evaluation(0, 0.25), rl(2), rl(4), evaluation(4, 0.5)]
  write(tmp_path / "metrics.jsonl", rows)
  (tmp_path / "config.json").write_text('{"steps": 10}')
  said = data_of(tmp_path)["verdict"]
  assert "update 4 of 10" in said and "0.25 -> 0.50 at update 4" in said


def stage(folder, file, phases, **more):
  """A stage of R1, whose folder has neither config.json nor summary.json."""
  rows = [row for name in phases for row in ({"phase": name, "step": 2, "loss": 0.5},)]
  write(folder / "metrics.jsonl", rows)
  config = {"seed": 3, "task": "assistant", "model": {"folder": ""}, "steps": 60}
  record = {"stage": "rl_1", "inputs": {}, "config": config}
  (folder / file).write_text(json.dumps(record | more))
  return data_of(folder)


@pytest.mark.parametrize("phases", [("eval", "rl"), ("helpful", "safety")])
def test_a_stage_that_is_done_has_its_config_its_figures_and_a_true_sentence(
  tmp_path, phases
):
  figures = {"updates": 4, "after": {"pass_at_1": 0.5}, "bins": [1], "name": "x"}
  stage(tmp_path, "begun.json", phases)
  data = stage(tmp_path, "manifest.json", phases, figures=figures, seconds=9.5)
  said = json.dumps(data)
  assert data["title"] == "R1 in miniature: assistant, stage rl_1, seed 3"
  assert "rl_1 of R1 is done, in 10 s" in data["verdict"]
  assert all(name in data["verdict"] for name in {*phases} - {"eval", "rl"})
  assert ["seed", "3", None] in data["config"]["rows"]
  assert data["figures"] == [["updates", 4], ["after.pass_at_1", 0.5]]
  for false in ("Without a result", "No update", "summary.json", "no config.json"):
    assert false not in said


def test_a_stage_that_goes_on_says_that_it_is_not_done(tmp_path):
  data = stage(tmp_path, "begun.json", ("rl",))
  assert "has begun and is not done: update 2, not" in data["verdict"]
  assert data["config"]["rows"] and data["stage"] and not data["figures"]


@pytest.mark.parametrize(
  ("problems", "named"), [("", "chain"), ("/some/where/mine.jsonl", "mine.jsonl")]
)
def test_the_title_says_what_was_asked_and_which_objective(problems, named, tmp_path):
  config = {
    **{"task": "chain", "seed": 1, "data": {"problems": problems}},
    **{"objective": {"preset": "dapo"}, "model": {"folder": "models/smollm2"}},
  }
  said = html_report.title(config, tmp_path)
  assert said == f"R1-Zero smollm2: {named}, objective dapo, seed 1"


def test_the_page_does_not_say_where_the_folder_lies(tmp_path):
  folder = whole_run(tmp_path / "runs" / "mine")
  assert data_of(folder)["folder"] == "runs/mine"
  assert str(tmp_path) not in html_report.page(folder)


def test_the_first_figures_are_those_of_the_paper(tmp_path):
  row = rl(2, length=9.0, entropy=1.0, kl=0.1, kl_old=0.2, reflection_rate=0.0)
  write(tmp_path / "metrics.jsonl", [row, evaluation(2, 0.5)])
  curves = data_of(tmp_path)["curves"]
  names = [figure["name"].partition(",")[0] for figure in curves["figures"][:6]]
  assert names[:3] == ["reward", "accuracy and pass@1", "tokens a response"]
  assert names[3:5] == ["KL", "entropy"]
  accuracy = [curves["series"][place] for place, _ in curves["figures"][1]["lines"]]
  assert [s["name"] for s in accuracy] == ["accuracy", "pass_at_1", "cons_at_4"]
  assert len([f for f in curves["figures"] if f["set"]]) == len(curves["series"])


def test_values_that_differ_from_the_usual_are_marked(tmp_path):
  write(tmp_path / "metrics.jsonl", [rl(2)])
  (tmp_path / "config.json").write_text('{"a": {"b": 1, "c": 2}, "d": null}')
  rows = data_of(tmp_path, usual={"a": {"b": 1, "c": 3}})["config"]["rows"]
  assert rows == [["a.b", "1", None], ["a.c", "2", "3"], ["d", "null", "not there"]]
  assert [row[2] for row in data_of(tmp_path)["config"]["rows"]] == [None] * 3


# -- the command ---------------------------------------------------------------


def test_the_command_writes_a_page_for_every_run(tmp_path, capsys):
  for name in ("seed0", "seed1"):
    whole_run(tmp_path / name)
  command.main([str(tmp_path)])
  assert "seed0/report.html" in capsys.readouterr().out
  for name in ("seed0", "seed1"):
    page = (tmp_path / name / "report.html").read_text("utf-8")
    assert Page(page).data()["config"]["compared"]
  command.main([str(tmp_path / "seed0"), "--out", str(tmp_path / "one.html")])
  assert (tmp_path / "one.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("there", [True, False])
def test_the_first_page_is_shown_where_there_is_a_browser(
  there, tmp_path, capsys, monkeypatch
):
  for name in ("seed0", "seed1"):
    whole_run(tmp_path / name)
  shown = []
  monkeypatch.setattr(command.webbrowser, "open", lambda x: shown.append(x) or there)
  command.main([str(tmp_path), "--open"])
  page = tmp_path / "seed0" / "report.html"
  assert shown == [page.as_uri()] and page.exists()
  assert (f"open {page} yourself" in capsys.readouterr().err) != there
  command.main([str(tmp_path)])
  assert len(shown) == 1


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
  for name in ("seed0", "seed1"):
    whole_run(tmp_path / name)
  (tmp_path / "empty").mkdir()
  for arguments, word in (
    ([str(tmp_path / "no")], "there is no folder"),
    ([str(tmp_path / "empty")], "no whole line"),
    ([str(tmp_path), "--out", str(tmp_path / "x.html")], "2 runs"),
    (
      [str(tmp_path / "seed0"), "--out", str(tmp_path / "no/x.html")],
      "cannot be written",
    ),
  ):
    with pytest.raises(SystemExit) as left:
      command.main(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2 and word in said and said.count("\n") == 1


# -- a browser -----------------------------------------------------------------


needs_browser = pytest.mark.skipif(
  not any(map(shutil.which, BROWSERS)), reason="needs Chromium"
)


def drawn(folder):
  """The page of a folder as a browser has drawn it, without a complaint."""
  file = folder / "report.html"
  file.write_text(html_report.page(folder), "utf-8")
  options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom")
  options += ("--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0")
  done = subprocess.run(
    [
      *(next(filter(None, map(shutil.which, BROWSERS))), *options),
      *(f"--user-data-dir={folder / 'profile'}", file.as_uri()),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert "CONSOLE" not in done.stderr
  return done.stdout


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("text", [HOSTILE[0], "plain"])
def test_a_browser_draws_it_without_a_complaint(tmp_path, text):
  said = drawn(whole_run(tmp_path, text))
  page = Page(said)
  assert "img" not in page.tags and page.tags.count("script") == 2
  assert page.tags.count("svg") >= 2 and "article" in page.tags
  shown = said.partition('<script type="application/json"')[0]
  assert text.replace("<", "&lt;").replace(">", "&gt;") in shown


@pytest.mark.slow
@needs_browser
def test_a_group_shows_its_answer_and_the_range_of_its_advantages(tmp_path):
  folder = whole_run(tmp_path)
  rows = [
    traced(8, 0, i, ["a", "b", "c"], advantage=values, problem="3 + 4", answers=["7"])
    | {"parts": {"format": 1.0}}
    for i, values in enumerate([[0.5, -0.25, 1.0], [2.0, 2.0, 2.0], []])
  ]
  write(folder / "tokens.jsonl", rows)
  shown = drawn(folder).partition('<script type="application/json"')[0]
  for words in ("advantages -0.25 to +1<", "advantage +2<", "no loss<", "answer 7<"):
    assert words in shown, words
  assert "before weights: format 1" in shown
  boxes = re.findall(r'<(\w+) class="(?:text|problem)"([^>]*)>', shown)
  assert len(boxes) >= 4
  assert all("tabindex" in rest and "aria-label" in rest for _, rest in boxes)


@pytest.mark.slow
@needs_browser
def test_a_stage_is_drawn_with_its_figures(tmp_path):
  stage(tmp_path, "manifest.json", ("safety",), figures={"auc": 0.75}, seconds=1.0)
  shown = drawn(tmp_path).partition('<script type="application/json"')[0]
  assert re.search(r">auc</th><td[^>]*>0\.75", shown) and "summary.json" not in shown


def test_what_is_read_stands_out_from_its_ground():
  """4.5 for text and 3 for curves, as WCAG 2 asks, on cards of the light theme."""
  css = (pathlib.Path(html_report.__file__).parent / "page.css").read_text("utf-8")
  colours = dict(re.findall(r"--(\w+): (#\w+);", css.partition("@media")[0]))

  def light(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

  for name in ("ink", "soft", "accent", "warm", "third", "fourth", "quiet"):
    contrast = (light(colours["card"]) + 0.05) / (light(colours[name]) + 0.05)
    assert contrast >= (3 if name == "quiet" else 4.5), name
