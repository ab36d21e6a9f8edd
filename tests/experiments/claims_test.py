"""The claims: their arms are valid, effects and verdicts are those of their files, and
what has ended is not run again. Nothing is trained here."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import arms, claim_arms, claim_table, claims
from experiments.claim_table import CLAIMS, Arms, Effect
from r1jax import config_checks, settings
from r1jax.evals.report_card import ROWS
from r1jax.pipeline import display, scoreboard


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", claim_arms.ARMS)
def test_every_arm_is_a_config_that_a_run_takes(name, quick):
  arm = claim_arms.arms(quick)[name]
  config = arm.config(3)
  assert config.seed == 3
  if arm.module != "r1":
    config_checks.check(config, 1)


def test_arms_that_begin_alike_share_a_base():
  bases = {name: arm.base(0) for name, arm in claim_arms.ARMS.items()}
  assert len({bases[name] for name in bases if name != "r1"}) == 1
  assert bases["r1"] != bases["zero"] != claim_arms.ARMS["zero"].base(1)
  assert bases["zero"] != claim_arms.arms(quick=True)["zero"].base(0)


def test_there_are_twelve_claims_and_all_their_arms():
  assert [claim.number for claim in CLAIMS] == list(range(1, 13))
  assert {arm for claim in CLAIMS for arm in claim.arms} == set(claim_arms.ARMS)
  assert {claim.seeds for claim in CLAIMS} == {3, 5}


MADE = claim_arms.arms(quick=False)


def leave(root, arm, seed, *, gain=0.0, rows=(), tokens=()):
  """What an arm that has ended leaves."""
  folder = arms.folder_of(root, arm, seed)
  folder.mkdir(parents=True)
  arms.mark_of(folder).write_text(settings.sha256(MADE[arm].config(seed)))
  base = {"pass_at_1": 0.2, "mean_length": 20.0, "reflection_rate": 0.5}
  base["cons_at_16"] = 0.3
  final = {k: v + gain for k, v in base.items()}
  summary = {"base": base, "half_way": final, "final": final}
  (folder / "summary.json").write_text(json.dumps(summary))
  for name, written in (("metrics", rows), ("tokens", tokens)):
    text = "".join(json.dumps(row) + "\n" for row in written)
    (folder / f"{name}.jsonl").write_text(text)
  return folder


def test_an_effect_is_a_difference_over_seeds(tmp_path):
  for seed, gain in enumerate((0.5, 0.6, 0.7)):
    leave(tmp_path, "zero", seed, gain=gain)
  effects = claims.measured(tmp_path, MADE, {CLAIMS[0]: 5})
  (e,) = effects
  assert e.seeds == pytest.approx((0.5, 0.6, 0.7)) and e.mean == pytest.approx(0.6)
  half = 4.302653 * 0.1 / 3**0.5  # t of two degrees of freedom
  assert (e.low, e.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
  assert e.verdict == "shown"
  assert "accuracy climbs" in claims.markdown(effects)
  claims.plot(tmp_path / "a.png", effects)
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
  "values, least, verdict",
  [
    ([0.1, 0.11, 0.12], 0.0, "shown"),
    ([-0.1, 0.3, 0.1], 0.0, "not shown"),
    ([-0.3, -0.31, -0.32], 0.0, "opposite"),
    ([-0.01, -0.011, -0.009], -0.02, "shown"),  # near enough
    ([-0.03, -0.031, -0.029], -0.02, "opposite"),
    ([0.0, 0.0, 0.0], -1e-9, "shown"),
    ([0.0, 0.0, 0.0], 0.0, "not shown"),
  ],
)
def test_a_verdict_is_the_intervals(values, least, verdict):
  effect = Effect("x", lambda arms: 0.0, least)
  assert claim_table.found(CLAIMS[0], effect, values).verdict == verdict


def test_groups_of_equal_rewards_are_looked_at_alone(tmp_path):
  def output(group, reward, advantage):
    row = {"step": 2, "group": group, "reward": reward}
    return {**row, "advantage": [advantage] * 3}

  equal = [output(0, 1.0, 0.0), output(0, 1.0, 0.0)]
  others = [output(1, 1.0, 0.7), output(1, 0.0, -0.7)]
  leave(tmp_path, "zero", 0, tokens=equal + others)
  assert claim_table.silent(Arms(tmp_path, 0)) == 0.0
  leave(tmp_path, "zero", 1, tokens=[*others, output(0, 1.0, 0.01), equal[0]])
  assert claim_table.silent(Arms(tmp_path, 1)) == pytest.approx(-0.01)
  leave(tmp_path, "zero", 2, tokens=others)
  assert np.isnan(claim_table.silent(Arms(tmp_path, 2)))  # nothing was seen of it


def test_a_seed_without_a_figure_is_not_counted(tmp_path):
  effect = dataclasses.replace(CLAIMS[0].effects[0], measure=lambda x: values[x.seed])
  claim = dataclasses.replace(CLAIMS[0], effects=(effect,))
  values = [0.1, float("nan"), 0.3]
  for seed in range(3):
    leave(tmp_path, "zero", seed)
  (e,) = claims.measured(tmp_path, MADE, {claim: 3})
  assert e.seeds == (0.1, 0.3)
  values[0] = float("nan")
  assert not claims.measured(tmp_path, MADE, {claim: 3})


def test_a_cap_that_changes_evaluations_alone_shows_nothing(tmp_path):
  """Longer samples of the same policy are more often right, before and after."""
  for arm, right in (("cap", 0.3), ("cap_raised", 0.8)):
    folder = leave(tmp_path, arm, 0)
    figures = {"pass_at_1": right, "mean_length": 20 * right}
    summary = {"base": figures, "half_way": figures, "final": figures}
    (folder / "summary.json").write_text(json.dumps(summary))
  assert [e.measure(Arms(tmp_path, 0)) for e in CLAIMS[2].effects] == [0.0, 0.0]


def test_a_figure_is_a_mean_of_rollouts(tmp_path):
  rows = [{"phase": "rl", "step": i, "kl": float(i)} for i in range(4)]
  leave(tmp_path, "zero", 0, rows=[*rows, {"phase": "eval", "step": 4}])
  assert Arms(tmp_path, 0).rollouts("zero", "kl") == 1.5
  assert Arms(tmp_path, 0).rollouts("zero", "kl", since=0.5) == 2.5
  rows[3]["kl"] = None  # what is not finite is written so
  leave(tmp_path, "zero", 1, rows=rows)
  assert Arms(tmp_path, 1).rollouts("zero", "kl", since=0.5) == 2.0


def test_what_is_read_of_r1_is_in_its_report(tmp_path):
  """Columns, rows and stages by the names that the report has."""
  columns = [*scoreboard.COLUMNS, *scoreboard.ABLATIONS]
  proxy = {"proxy_first": 1.0, "proxy_last": 3.0}
  rules = {"rule_before": 0.9, "rule_after": 0.8}
  report = {
    "table": {
      c: {row: {"mean": float(i)} for row in ROWS} for i, c in enumerate(columns)
    },
    "reward_hacking": {name: proxy | rules for name in display.HACKING},
  }
  folder = arms.folder_of(tmp_path, "r1", 0) / "report"
  folder.mkdir(parents=True)
  (folder / "report.json").write_text(json.dumps(report))
  of_r1 = [claim for claim in CLAIMS if claim.arms == ("r1",)]
  found = {
    (claim.number, effect.what): effect.measure(Arms(tmp_path, 0))
    for claim in of_r1
    for effect in claim.effects
  }
  assert len(found) == 10 and np.isfinite(list(found.values())).all()
  assert found[6, "reasoning, Dev2 - Dev1"] == 1.0
  assert found[11, "the model's score, last quarter less first"] == 2.0


def test_a_slower_arm_is_behind_along_the_run(tmp_path):
  evals = [(0, 0.2), (20, 0.5), (40, 0.9)]
  rows = [{"phase": "eval", "step": step, "pass_at_1": x} for step, x in evals]
  leave(tmp_path, "zero", 0, rows=[*rows, {"phase": "rl", "step": 40}])
  assert Arms(tmp_path, 0).along("zero") == pytest.approx(0.7)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--claim=13"], ["--claim=13", "1 to 12"]),
    (["--seeds=1"], ["--seeds=1", "two or more"]),
    (["--jobs=-1"], ["--jobs=-1"]),
    (["--write", "--quick"], ["--write", "without --quick"]),
    (["--write", "--claim=1"], ["--write", "--claim"]),
    (["--write", "--seeds=2"], ["--write", "--seeds"]),
    (["--write", "--status"], ["--write", "--status"]),
  ],
)
def test_a_mistake_is_one_line_and_nothing_begins(tmp_path, capsys, flags, words):
  with pytest.raises(SystemExit, match="2"):
    claims.main([f"--workdir={tmp_path / 'new'}", *flags])
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert all(word in line for word in words), line
  assert not (tmp_path / "new").exists()


def test_the_status_says_what_has_ended(tmp_path, capsys):
  leave(tmp_path, "zero", 0, gain=0.1)
  leave(tmp_path, "zero", 1, gain=0.2)
  claims.main([f"--workdir={tmp_path}", "--claim=1", "--status"])
  assert "2 of 5 runs have ended" in capsys.readouterr().out


def test_a_part_of_the_table_does_not_get_into_the_docs(tmp_path, capsys, monkeypatch):
  for seed in range(2):
    leave(tmp_path, "zero", seed, gain=0.1)
  monkeypatch.setattr(claims.arms, "run", lambda *_, **__: ["one failed"])
  monkeypatch.setattr(claims, "write", lambda *_: pytest.fail("written"))
  monkeypatch.setattr(claim_table.Arms, "rows", lambda *_: [])
  with pytest.raises(SystemExit, match="1"):
    claims.main([f"--workdir={tmp_path}", "--write"])
  said = capsys.readouterr()
  assert "runs are missing" in said.out and "one failed" in said.err


@pytest.mark.slow
def test_all_of_it_quickly(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.claims", "--quick", f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  told = json.loads((tmp_path / "claims.json").read_text())
  assert {row["claim"] for row in told} == set(range(1, 13))
  assert all(np.isfinite([row["mean"], row["low"], row["high"]]).all() for row in told)
