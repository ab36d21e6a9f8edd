"""Scoring a file: the table, the JSON, the rows; a mistake is one line and code 2."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import score as command
from r1jax.data.problem import Problem, Tests
from r1jax.errors import UserError
from r1jax.rewards.maths import MathsError, MathsWorker
from r1jax.rewards.sandbox import UNSAFE

SECONDS = 60  # of a command, at most
RULES = """
import math, pathlib, time

def short(completion, problem):
  return float(len(completion) < 50)

def reward(completion, problem):
  return 0.25

def nan(completion, problem):
  return math.nan

def late_nan(completion, problem):
  return math.nan if "<answer>8" in completion else 0.0

def mark(completion, problem):
  pathlib.Path(__file__).with_name("called").touch()
  return 0.0

def leaves(completion, problem):
  raise SystemExit(0)

def slow(completion, problem):
  (pathlib.Path(__file__).parent / "called").touch()
  time.sleep(0.2)
  return 0.0
"""


def done(answer, thought="We add."):
  return f"<think>{thought}</think><answer>{answer}</answer>"


GOOD = [
  {"completion": done(7), "answer": "7"},
  {"completion": done("7.0", "We 加"), "answer": 7, "problem": "2 + 5?"},
  {"completion": done(8), "answer": ["7", "9"], "question": "2 + 5?"},
  {"completion": "7", "answer": "7"},
]


def score(*args, **options):
  line = [sys.executable, "-m", "experiments.score", *map(str, args)]
  return subprocess.run(
    line, capture_output=True, text=True, timeout=SECONDS, **options
  )


def last_line(ran):
  assert ran.returncode == 0, ran.stderr
  return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def file(tmp_path):
  return write(tmp_path / "good.jsonl", GOOD)


@pytest.fixture
def rules(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(RULES)
  return path


def write(path, rows):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
  return path


# -- what it prints --------------------------------------------------------------------


def test_a_good_file_prints_the_table_of_means_and_outcomes(file):
  ran = score(file, "--maths=exact")
  assert ran.returncode == 0, ran.stderr
  assert "4 samples" in ran.stdout
  cells = [
    [c.strip() for c in line.split("│")[1:-1]] for line in ran.stdout.split("\n")
  ]
  for row in (["reward", "1.250"], ["accuracy", "0.500"], ["format", "0.750"]):
    assert row in cells
  for row in (["correct", "2"], ["wrong", "1"], ["unparsable", "1"], ["timeout", "0"]):
    assert row in cells
  assert "Traceback" not in ran.stderr


def test_the_last_line_is_json(file):
  said = last_line(score(file, "--maths=exact", "--json"))
  assert said["samples"] == 4
  assert said["mean"] == {"reward": 1.25, "accuracy": 0.5, "format": 0.75}
  outcomes = said["outcomes"]
  assert sum(outcomes.values()) == 4
  assert outcomes["correct"] == 2 and outcomes["wrong"] == outcomes["unparsable"] == 1


def test_a_run_s_own_samples_are_scored_as_lines_of_the_other_form_are(tmp_path):
  tests = Tests("stdin", cases=(("1", "2"),))
  problems = [
    Problem("3 + 4", ("7", "7.0")),
    Problem("print", ("",), kind="code", tests=tests),
  ]
  kept = [
    {"phase": "eval", "step": step, **dataclasses.asdict(problem), "correct": [True]}
    for step in (0, 8)
    for problem in problems
  ]
  kept[0]["texts"], kept[2]["texts"] = [done(7), "7"], [done(8)]
  path = write(tmp_path / "samples.jsonl", kept)
  read = command.read(str(path), judged=True)
  assert [text for text, _ in read] == [done(7), "7", done(8)]
  assert {problem for _, problem in read} == {problems[0]}
  kept[1]["texts"] = ["x"]
  (_, program) = command.read(str(write(path, kept)), judged=True)[2]
  assert program == problems[1]
  for odd in ({"phase": "eval", "texts": ["x"]}, kept[0] | {"texts": [1]}):
    with pytest.raises(UserError, match=r"no line of a run's samples\.jsonl"):
      command.read(str(write(path, [odd])), judged=True)


def test_out_holds_every_sample_s_rewards_in_order(file, rules, tmp_path):
  """The third chain is `We add`, the second `We 加`, the fourth is none."""
  out = tmp_path / "scored.jsonl"
  rewards = f"accuracy=2,format,language=0.5,{rules}:short=-1"
  ran = score(file, "--maths=exact", f"--rewards={rewards}", f"--out={out}", "--json")
  means = last_line(ran)["mean"]
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  names = ["accuracy", "format", "language", "short"]
  assert [[row[name] for name in names] for row in rows] == [
    [1.0, 1.0, 1.0, 1.0],
    [1.0, 1.0, 0.5, 1.0],
    [0.0, 1.0, 1.0, 1.0],
    [0.0, 0.0, 0.0, 1.0],
  ]
  assert [row["reward"] for row in rows] == [2.5, 2.25, 0.5, -1.0]
  assert [row["outcome"] for row in rows] == ["correct"] * 2 + ["wrong", "unparsable"]
  for name in ("reward", *names):
    assert means[name] == pytest.approx(sum(row[name] for row in rows) / 4)


def test_a_rule_called_reward_does_not_hide_the_reward(file, rules, tmp_path):
  """Either its name is refused, or the total is still there: 1.25 + 0.25/2."""
  out = tmp_path / "scored.jsonl"
  rewards = f"--rewards=accuracy,format,{rules}:reward=0.5"
  ran = score(file, "--maths=exact", rewards, f"--out={out}", "--json")
  if ran.returncode != 2:
    assert last_line(ran)["mean"]["reward"] == pytest.approx(1.375)
    assert json.loads(out.read_text().splitlines()[0])["reward"] == pytest.approx(2.125)


def test_without_accuracy_no_gold_is_needed_and_no_outcome_is_told(tmp_path):
  path = write(tmp_path / "bare.jsonl", [{"completion": done(7)}, {"completion": ""}])
  out = tmp_path / "scored.jsonl"
  ran = score(path, "--rewards=format", "--json", f"--out={out}")
  said = last_line(ran)
  assert said == {"samples": 2, "mean": {"reward": 0.5, "format": 0.5}, "outcomes": {}}
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert rows == [{"reward": 1.0, "format": 1.0}, {"reward": 0.0, "format": 0.0}]


def test_programs_are_run(tmp_path):
  tests = [{"input": "1\n", "output": "1"}, {"input": "2\n", "output": "2"}]
  programs = ["print(input())", "print(1)", "1 / 0", "while True: pass"]
  rows = [
    {"completion": done(f"```python\n{source}\n```"), "tests": tests}
    for source in programs
  ]
  path = write(tmp_path / "programs.jsonl", rows)
  ran = score(path, f"--sandbox={UNSAFE}", "--code-seconds=1", "--json")
  outcomes = {k: n for k, n in last_line(ran)["outcomes"].items() if n}
  assert outcomes == {"correct": 1, "wrong": 1, "crash": 1, "timeout": 1}


def test_algebra_is_done(tmp_path):
  pytest.importorskip("math_verify")
  rows = [{"completion": done(a), "answer": "(x+1)^2"} for a in ("x^2+2x+1", "x^2")]
  path = write(tmp_path / "algebra.jsonl", rows)
  said = last_line(score(path, "--json", "--maths-seconds=20"))
  assert said["mean"]["accuracy"] == 0.5
  said = last_line(score(path, "--json", "--maths=exact"))
  assert said["mean"]["accuracy"] == 0.0


def test_a_prefilled_tag_and_a_language_are_flags(tmp_path):
  rows = [{"completion": "我们 add</think><answer>7</answer>", "answer": "7"}]
  path = write(tmp_path / "prefilled.jsonl", rows)
  rewards = "--rewards=format,language"
  said = last_line(score(path, rewards, "--prefill-think", "--language=zh", "--json"))
  assert said["mean"]["format"] == 1.0
  assert said["mean"]["language"] == pytest.approx(2 / 3)


def test_a_text_that_is_no_unicode_is_scored(tmp_path):
  """JSON can hold half a surrogate pair, and so can a broken tokenizer's output."""
  rows = [{"completion": done("\ud800", "\udfff a"), "answer": "7"}]
  out = tmp_path / "scored.jsonl"
  path = write(tmp_path / "half.jsonl", rows)
  rewards = "--rewards=accuracy,format,language"
  said = last_line(score(path, rewards, "--maths=exact", f"--out={out}", "--json"))
  assert said["mean"]["accuracy"] == 0.0
  assert json.loads(out.read_text())["outcome"] in ("wrong", "unparsable")


def test_help_names_rewards_and_exit_codes():
  ran = score("--help")
  assert ran.returncode == 0
  for word in ("accuracy", "format", "language", "FILE.py:function", "Exit codes"):
    assert word in ran.stdout


# -- what it refuses -------------------------------------------------------------------


def refused(*args, **options):
  """The message of a mistake: one line and code 2."""
  ran = score(*args, **options)
  assert ran.returncode == 2, (ran.returncode, ran.stdout, ran.stderr)
  assert "Traceback" not in ran.stderr
  lines = [line for line in ran.stderr.splitlines() if line.strip()]
  assert len(lines) == 1 and lines[0].startswith("error: "), ran.stderr
  assert not ran.stdout.strip()
  return lines[0]


LINE = {"completion": "7", "answer": "7"}


@pytest.mark.parametrize(
  "rows, words",
  [
    ([LINE, {"answer": "7"}], [":2", "completion"]),
    ([LINE, LINE, {"completion": 7, "answer": "7"}], [":3", "completion"]),
    ([LINE, "{bad"], [":2", "not JSON"]),
    ([LINE, "", "[1]"], [":3", "not a JSON object"]),
    (['{"completion": "7", "answer": NaN}'], [":1", "NaN"]),
    ([{"completion": "7"}], [":1", "answer"]),
    ([{"completion": "7", "answer": ""}], [":1", "answer"]),
    ([{"completion": "7", "answer": "(1, 2"}], [":1", "(1, 2", "cannot be read"]),
    ([{"completion": "7", "tests": [{"input": "1"}]}], [":1", "tests[0]", "output"]),
    ([{"completion": "7", "tests": []}], [":1", "tests"]),
    ([{"completion": "7", "tests": "x"}], [":1", "tests"]),
    ([LINE, {**LINE, "kind": "poem"}], [":2", "'poem'", "choice"]),
    ([], ["rows.jsonl"]),
    (["", " "], ["rows.jsonl"]),
  ],
  ids=lambda value: str(value)[:40] if isinstance(value, list) else None,
)
def test_a_bad_line_is_named(tmp_path, rows, words):
  message = refused(write(tmp_path / "rows.jsonl", rows))
  assert all(word in message for word in words), message


def test_the_remedy_is_one_that_the_command_has(tmp_path):
  """It has no --config."""
  message = refused(write(tmp_path / "rows.jsonl", ["{bad"]))
  assert "--config" not in message
  assert "config." not in refused(tmp_path / "nowhere.jsonl")


def test_a_missing_file_is_named(tmp_path):
  assert "nowhere.jsonl" in refused(tmp_path / "nowhere.jsonl")
  (tmp_path / "folder.jsonl").mkdir()
  assert "folder.jsonl" in refused(tmp_path / "folder.jsonl")


@pytest.mark.parametrize(
  "rewards, words",
  [
    ("acuracy", ["'acuracy'", "accuracy", "FILE.py:function"]),
    ("accuracy,lenght=2", ["lenght", "accuracy"]),
    ("", ["accuracy"]),
    ("accuracy=x", ["accuracy=x"]),
    ("accuracy=nan", ["accuracy=nan"]),
    ("format=inf", ["format=inf"]),
    ("accuracy,{rules}:short=much", ["short=much"]),
    ("accuracy,{rules}:nothing", ["'nothing'", "mine.py"]),
    ("accuracy,nowhere.py:short", ["nowhere.py"]),
    ("accuracy,{rules}:short,{rules}:short=2", ["'short'"]),
    ("accuracy,{rules}:nan", ["'nan'", "returned nan", "finite number"]),
    ("accuracy,{rules}:late_nan", ["'late_nan'", "<answer>8"]),
    ("accuracy,{rules}:leaves", ["'leaves'", "SystemExit"]),
  ],
)
def test_a_bad_reward_is_named(file, rules, rewards, words):
  message = refused(file, "--maths=exact", "--rewards=" + rewards.format(rules=rules))
  assert all(word in message for word in words), message


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--language=tlh", ["'tlh'", "en", "zh"]),
    ("--workers=-1", ["workers=-1"]),
    ("--maths-seconds=0", ["maths-seconds=0"]),
    ("--maths-seconds=inf", ["maths-seconds=inf"]),
  ],
)
def test_a_bad_value_is_named(file, flag, words):
  message = refused(file, flag)
  assert all(word in message for word in words), message


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_bad_seconds_of_programs_are_named(tmp_path, seconds):
  """Not every program timed out, nor a traceback."""
  tests = [{"input": "1\n", "output": "1"}]
  rows = [{"completion": done("```python\nprint(input())\n```"), "tests": tests}]
  path = write(tmp_path / "programs.jsonl", rows)
  message = refused(path, f"--sandbox={UNSAFE}", f"--code-seconds={seconds}")
  assert "seconds" in message


@pytest.mark.parametrize("flag", ["--maths=sympy", "--sandbox=none", "--wrkers=2"])
def test_an_unknown_flag_or_choice_ends_with_code_2(file, flag):
  ran = score(file, flag)
  assert ran.returncode == 2 and "Traceback" not in ran.stderr
  assert "usage" in ran.stderr


@pytest.mark.parametrize("out", ["nowhere/scored.jsonl", "."])
def test_an_unwritable_out_is_named(file, tmp_path, out):
  ran = score(file, "--maths=exact", f"--out={tmp_path / out}")
  assert ran.returncode == 2 and "Traceback" not in ran.stderr
  assert str(tmp_path) in ran.stderr and "error: " in ran.stderr


def test_an_unwritable_out_is_said_before_hours_of_scoring(file, rules, tmp_path):
  out = f"--out={tmp_path / 'nowhere' / 'scored.jsonl'}"
  refused(file, "--maths=exact", f"--rewards={rules}:mark", out)
  assert not (tmp_path / "called").exists()


# -- how it ends otherwise -------------------------------------------------------------


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_a_signal_ends_it(tmp_path, rules, sent, code):
  path = write(tmp_path / "many.jsonl", [LINE] * 1000)
  args = [path, "--maths=exact", f"--rewards=accuracy,{rules}:slow", "--workers=2"]
  line = [sys.executable, "-m", "experiments.score", *map(str, args)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with subprocess.Popen(line, **pipes, start_new_session=True) as running:
    end = time.monotonic() + SECONDS
    while not (tmp_path / "called").exists() and time.monotonic() < end:
      time.sleep(0.02)
    os.kill(running.pid, sent)
    out, err = running.communicate(timeout=SECONDS)
  assert running.returncode == code, err
  assert "stopped" in err and "Traceback" not in err and not out.strip()


def test_what_our_side_lost_is_in_no_mean(tmp_path, monkeypatch, capsys):
  """Of three samples one needs a worker that is lost: means are of the other two."""

  def lost(self, gold, answer, *_):
    if gold == answer:  # a trial of the gold
      return "equal"
    raise MathsError("the maths worker was lost")

  monkeypatch.setattr(MathsWorker, "__call__", lost)
  answers = ["x+1", "1+x", ""]
  rows = [{"completion": done(a), "answer": "x+1"} for a in answers]
  out = tmp_path / "scored.jsonl"
  command.main([str(write(tmp_path / "a.jsonl", rows)), "--json", f"--out={out}"])
  said = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert said["samples"] == 3 and said["outcomes"]["infrastructure"] == 1
  assert said["mean"] == {"reward": 1.0, "accuracy": 0.5, "format": 0.5}
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r["outcome"] for r in rows] == ["correct", "infrastructure", "unparsable"]
