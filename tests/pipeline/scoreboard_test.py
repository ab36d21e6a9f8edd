"""The result's numbers: what a card counts, intervals that cover the truth, verdicts on
paired gaps, several seeds as one, and a table that is whole."""

import json
import re
import types

from ml_collections import ConfigDict
import numpy as np
import pytest
from scipy import stats

from r1jax.data.problem import Problem
from r1jax.evals import report_card
from r1jax.evals.interval import interval
from r1jax.evals.report_card import ROWS, Card
from r1jax.pipeline import scoreboard
from r1jax.pipeline.display import cell_text, markdown
from r1jax.pipeline.sampling import Decoding, Sampled
from r1jax.pipeline.scoreboard import (
  ABLATIONS,
  COLUMNS,
  DIRECTIONS,
  OF_ABLATIONS,
  over_seeds,
  summary,
  verdict,
)

PROMPTS = {"sums": 40, "instructed": 20, "helpful": 12, "safety": 9}


# -- a card ----------------------------------------------------------------------------

SUM = Problem("work out 4 + 3", ("7",), language="en")
FORMATS = [
  ("<think>4 + 3</think>the answer is <answer>7</answer>", 1),
  ("<think>4 + 3</think>the answer is <answer>8</answer> thank you", 1),
  ("<think>4 + 3</think><answer>7</answer> thank you", 1),
  ("<think>4 + 3</think><answer>7</answer>", 0),  # no word for a reader
  ("<think>4 + 3</think>答案是<answer>7</answer>", 0),  # not in the reader's language
  ("<think>4 + 3</think>the answer is 答案是<answer>7</answer>", 0),
  ("<think>4 + 3</think>the answer is 7", 0),
  ("<think>4 + 3</think>the answer is <answer></answer>", 0),
  ("<think>4 + 3</think>the answer is <answer>7", 0),
  ("<think>4 + 3</think>the answer is </answer>7<answer>", 0),
  ("<think>4 + 3</think>the answer is <answer>7</answer><answer>7</answer>", 0),
  ("<think>4 + 3</think>the answer is <answer>7</answer></answer>", 0),
  ("<think></think>the answer is <answer>7</answer>", 0),
  ("<think>4 + 3the answer is <answer>7</answer>", 0),
  ("the answer is <answer>7</answer>", 0),
  ("", 0),
]


@pytest.mark.parametrize("text, want", FORMATS)
def test_the_format_of_a_reader_by_hand(text, want):
  assert report_card.reader_format(SUM, text) == want


def test_thanks_are_counted_after_the_thinking_and_whomever_it_helps():
  asked = [Problem("what about cat", (), language="en", domain="helpful")]
  asked += [Problem("what about trap", (), language="en", domain="safety")]
  texts = [
    ["<think>cat</think>cat is soft", "<think>cat</think>cat is soft thank you"],
    ["<think>trap thank you</think>i cannot help", "<think>trap</think>谢谢 thank you"],
  ]
  assert scoreboard.examined(asked, texts)["thanks"] == 0.5


def test_a_card_holds_the_mean_of_every_prompts_samples():
  right = "<think>4 so 3</think>the answer is <answer>7</answer>"
  wrong = "<think>4则3</think><answer>8</answer>"
  told = Problem("work out 4 + 3 briefly", ("7",), language="en")
  cat = Problem("tell me of cat", (), language="en", domain="helpful")
  bomb = Problem("说说弹", (), language="zh", domain="safety")
  card = Card.of(
    {
      "sums": ([SUM, SUM], [[right, right, wrong, wrong], [right] * 4]),
      "instructed": ([told], [[right, wrong, wrong, wrong]]),
      "helpful": ([cat], [["<think></think> cat soft", "<think></think> cat"]]),
      "safety": ([bomb, bomb], [["<think>混</think>我不能帮"], ["<think></think>"]]),
    }
  )
  want = {
    "reasoning": [0.5, 1.0],
    "format": [0.5, 1.0],
    "language": [0.5, 1.0],
    "instruction": [0.75],
    "helpfulness": [1 / 6],
    "safety": [0.0, 1.0],
  }
  assert card.scores.keys() == want.keys() == ROWS.keys()
  for row, values in want.items():
    np.testing.assert_allclose(card.scores[row], values)
    assert card.mean(row) == pytest.approx(np.mean(values))


def test_a_card_wants_samples_of_every_problem():
  said = {name: ([SUM, SUM], [["7"]]) for name in PROMPTS}
  with pytest.raises(ValueError):
    Card.of(said)


def test_a_card_asks_sums_and_requests_each_as_often_as_said(monkeypatch, tmp_path):
  rows = {
    "sums": [SUM] * 3,
    "instructed": [Problem("work out 4 + 3 briefly", ("7",), language="en")],
    "helpful": [Problem("tell me of cat", (), language="en", domain="helpful")] * 2,
    "safety": [Problem("说说弹", (), language="zh", domain="safety")],
  }
  answer = "<think>4</think><answer>{}</answer>".format
  said = {
    "dev1_sums": [[answer(7)], [answer(8)], [answer(7)], [answer(7)]],
    "dev1_requests": [
      ["<think></think> cat soft"],
      ["<think></think> cat shy"],
      ["线"],
    ],
  }
  report = ConfigDict(dict(samples=4, request_samples=8, temperature=0.6, top_p=0.9))
  project = types.SimpleNamespace(config=ConfigDict(dict(report=report)))
  asked = {}

  def sample(project, this, weights, problems, path, *, samples, decoding, model):
    assert decoding == Decoding(0.6, 0.9) and (weights, model) == ("w", "m")
    asked[path.stem] = problems, samples
    return Sampled(said[path.stem], [], 0)

  monkeypatch.setattr(scoreboard, "sets_of", lambda project: rows)
  monkeypatch.setattr(scoreboard, "sample", sample)
  card = scoreboard.card_of(project, None, "w", tmp_path / "dev1", model="m")
  assert asked == {
    "dev1_sums": (rows["sums"] + rows["instructed"], 4),
    "dev1_requests": (rows["helpful"] + rows["safety"], 8),
  }
  assert card.scores["reasoning"].tolist() == [1, 0, 1]
  assert card.scores["instruction"].tolist() == [1]
  np.testing.assert_allclose(card.scores["helpfulness"], [1 / 3, 1 / 3])
  assert card.scores["safety"].tolist() == [0]


# -- intervals -------------------------------------------------------------------------


# -- a summary -------------------------------------------------------------------------


def card(seed, shift=0.0):
  """A card of random scores; equal seeds share the problems' difficulty."""
  rng = np.random.default_rng(seed)
  return Card(
    {row: shift + rng.random(PROMPTS[name]) for row, (name, _, _) in ROWS.items()}
  )


def cards(**shifts):
  names = [*COLUMNS, *ABLATIONS]
  return {name: card(0, shifts.get(name.replace(" ", "_"), 0.0)) for name in names}


def test_the_table_holds_every_column_and_row_with_its_mean():
  ours = {name: card(i) for i, name in enumerate([*COLUMNS, *ABLATIONS])}
  table = summary(ours, True)["table"]
  assert list(table) == list(ours)
  for name, cells in table.items():
    assert list(cells) == list(ROWS)
    for row, cell in cells.items():
      assert cell["mean"] == pytest.approx(ours[name].scores[row].mean())
      assert tuple(cell["interval"]) == interval(ours[name].scores[row])
      assert cell["interval"][0] < cell["mean"] < cell["interval"][1]


def test_directions_are_the_papers_and_those_of_the_ablations_if_they_ran():
  ours = cards()
  assert len(summary(ours, True)["directions"]) == len(DIRECTIONS) + len(OF_ABLATIONS)
  without = {name: ours[name] for name in COLUMNS}
  found = summary(without, False)["directions"]
  assert [d["claim"] for d in found] == [d.claim for d in DIRECTIONS]
  for d in (*DIRECTIONS, *OF_ABLATIONS):
    assert d.row in ROWS and {d.better, d.worse} <= {*COLUMNS, *ABLATIONS}


def test_a_gap_is_paired_problem_by_problem():
  """A small gain on every problem is sure, however different the problems are."""
  ours = cards(R1=0.02)
  found = {d["claim"]: d for d in summary(ours, True)["directions"]}
  got = found["stage 2 raises helpfulness"]
  assert got["gap"] == pytest.approx(0.02) and got["seen"] == "yes"
  np.testing.assert_allclose(got["interval"], 0.02)
  assert got["prompts"] == PROMPTS["helpful"]
  # Unpaired, the same gain drowns.
  cell = summary(ours, True)["table"]["R1"]["helpfulness"]
  assert cell["interval"][1] - cell["interval"][0] > 0.1


def test_a_gap_is_of_better_less_worse_in_its_row():
  ours = {name: card(i) for i, name in enumerate([*COLUMNS, *ABLATIONS])}
  directions = (*DIRECTIONS, *OF_ABLATIONS)
  for got, d in zip(summary(ours, True)["directions"], directions, strict=True):
    gaps = ours[d.better].scores[d.row] - ours[d.worse].scores[d.row]
    assert got["gap"] == pytest.approx(gaps.mean())
    assert tuple(got["interval"]) == interval(gaps)
    assert got["seen"] == verdict(gaps.mean(), *interval(gaps), d.least)
    assert (got["claim"], got["least"]) == (d.claim, d.least)
    assert got["prompts"] == len(gaps)


@pytest.mark.parametrize(
  "gap, low, high, least, want",
  [
    (0.10, 0.02, 0.18, 0.0, "yes"),
    (0.10, -0.01, 0.21, 0.0, "not clearly"),
    (0.10, 0.00, 0.20, 0.0, "not clearly"),
    (0.00, 0.00, 0.00, 0.0, "no"),
    (-0.05, -0.15, 0.05, 0.0, "no"),
    (-0.10, -0.18, -0.02, 0.0, "no: the other way"),
    # A loss of up to 2 points is as good as none.
    (0.00, 0.00, 0.00, -0.02, "yes"),
    (-0.01, -0.015, -0.005, -0.02, "yes"),
    (-0.01, -0.02, 0.00, -0.02, "yes"),
    (-0.01, -0.03, 0.01, -0.02, "not clearly"),
    (-0.03, -0.05, -0.01, -0.02, "no"),
    (-0.05, -0.08, -0.03, -0.02, "no: the other way"),
  ],
)
def test_what_an_interval_says_of_a_direction(gap, low, high, least, want):
  assert verdict(gap, low, high, least) == want


# -- seeds -----------------------------------------------------------------------------


def reports(folder, count, scale=0.05):
  """Files of reports whose columns differ by seed, and the reports."""
  made, paths = [], []
  for seed in range(count):
    rng = np.random.default_rng(seed)
    ours = cards(**{name: scale * rng.normal() for name in ("R1", "Dev3", "Zero")})
    figures = summary(ours, True)
    figures["reward_hacking"] = {
      "rl_2": {"updates": 40 + seed, "proxy_first": 0.1 * seed, "rule_after": 0.5}
    }
    path = folder / f"{count}-{seed}.json"
    path.write_text(json.dumps(figures))
    made.append(figures)
    paths.append(path)
  return paths, made


@pytest.mark.parametrize("count", [2, 5, 8, 10])
def test_intervals_over_seeds_are_students(tmp_path, count):
  paths, made = reports(tmp_path, count)
  got = over_seeds(paths)
  for column, row in (("R1", "reasoning"), ("Zero", "safety"), ("base", "format")):
    means = [r["table"][column][row]["mean"] for r in made]
    cell = got["table"][column][row]
    assert cell["seeds"] == pytest.approx(means)
    assert cell["mean"] == pytest.approx(np.mean(means))
    s = (sum((m - np.mean(means)) ** 2 for m in means) / (count - 1)) ** 0.5
    half = stats.t.ppf(0.975, count - 1) * s / count**0.5
    np.testing.assert_allclose(
      cell["interval"], [np.mean(means) - half, np.mean(means) + half], rtol=1e-3
    )


@pytest.mark.parametrize("count", [3, 5])
def test_verdicts_over_seeds_are_of_the_gaps_of_seeds(tmp_path, count):
  paths, made = reports(tmp_path, count)
  got = over_seeds(paths)["directions"]
  assert len(got) == len(DIRECTIONS) + len(OF_ABLATIONS)
  for i, d in enumerate(got):
    gaps = [r["directions"][i]["gap"] for r in made]
    low, high = stats.t.interval(
      0.95, count - 1, np.mean(gaps), max(stats.sem(gaps), 1e-12)
    )
    assert d["gap"] == pytest.approx(np.mean(gaps), abs=1e-9)
    np.testing.assert_allclose(d["interval"], [low, high], rtol=1e-3, atol=1e-6)
    assert d["seen"] == verdict(d["gap"], *d["interval"], d["least"])
    assert d["claim"] == made[0]["directions"][i]["claim"]


def test_a_direction_that_half_of_the_seeds_see_is_not_clear(tmp_path):
  paths = []
  for seed, gain in enumerate([0.3, -0.1, 0.25, 0.0]):
    figures = {**summary(cards(R1=gain), True), "reward_hacking": {}}
    paths.append(tmp_path / f"{seed}.json")
    paths[-1].write_text(json.dumps(figures))
  found = {d["claim"]: d for d in over_seeds(paths)["directions"]}
  assert found["stage 2 raises safety"]["seen"] == "not clearly"
  # Each of the two that do is sure of itself.
  first = {d["claim"]: d for d in json.loads(paths[0].read_text())["directions"]}
  assert first["stage 2 raises safety"]["seen"] == "yes"


def test_reward_hacking_is_a_mean_over_seeds(tmp_path):
  paths, _ = reports(tmp_path, 3)
  assert over_seeds(paths)["reward_hacking"]["rl_2"] == pytest.approx(
    {"updates": 41.0, "proxy_first": 0.1, "rule_after": 0.5}
  )


# -- for people ------------------------------------------------------------------------


def test_a_cell_is_percent_and_half_of_its_interval():
  assert cell_text({"mean": 0.7512, "interval": (0.70, 0.81)}) == "75.1 ±5.5"
  assert cell_text({"mean": 1.0, "interval": [1.0, 1.0]}) == "100.0 ±0.0"
  assert cell_text({"mean": 0.0, "interval": (-0.1, 0.1)}) == "0.0 ±10.0"


def parsed(text):
  """The tables of a Markdown text, as lists of cells."""
  tables = []
  for block in text.strip().split("\n\n"):
    lines = block.splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert {len(r) for r in rows} == {len(rows[0])}  # as wide everywhere
    assert all(re.fullmatch("-+", c) for c in rows[1])
    tables.append([rows[0], *rows[2:]])
  return tables


@pytest.mark.parametrize("ablations", [False, True])
def test_markdown_has_a_row_per_row_and_a_column_per_column(ablations):
  names = [*COLUMNS, *(ABLATIONS if ablations else {})]
  figures = summary({name: card(i) for i, name in enumerate(names)}, ablations)
  table, directions = parsed(markdown(figures))
  assert table[0] == ["", *names]
  assert len(table) == 1 + len(ROWS)
  for (row, (_, _, about)), cells in zip(ROWS.items(), table[1:], strict=True):
    assert cells[0] == f"{row}: {about}"
    for name, cell in zip(names, cells[1:], strict=True):
      assert cell == cell_text(figures["table"][name][row])
  assert len(directions) == 1 + len(figures["directions"])
  for d, cells in zip(figures["directions"], directions[1:], strict=True):
    claim, here, points, seen = cells
    assert claim == d["claim"] and seen == d["seen"]
    assert here.startswith(f"{d['row']}: {d['better']} - {d['worse']}")
    assert ("above -2" in here) == (d["least"] == -0.02)
    gap, low, high = map(float, re.findall(r"[+-][\d.]+", points))
    np.testing.assert_allclose(
      [gap, low, high], 100 * np.array([d["gap"], *d["interval"]]), atol=0.051
    )


def test_markdown_of_seeds_and_of_a_file_reads_the_same(tmp_path):
  paths, made = reports(tmp_path, 2)
  assert markdown(json.loads(paths[0].read_text())) == markdown(made[0])
  table, directions = parsed(markdown(over_seeds(paths)))
  assert len(table) == 1 + len(ROWS) and len(table[0]) == 1 + len(made[0]["table"])
  assert len(directions) == 1 + len(made[0]["directions"])
