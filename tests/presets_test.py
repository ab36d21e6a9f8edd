"""Presets: what the sources say, the docs' table, contradictions and idle choices."""

import dataclasses
import pathlib

import pytest

from r1jax import presets
from r1jax.errors import UserError
from r1jax.objective import Objective, inert

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "algorithms.md"


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_is_whole_and_sets_nothing_without_effect(preset):
  o = presets.objective(preset)
  idle = inert(o)
  row = presets.PRESETS[preset]
  # A bound that says "none", and a switched-off term's shape, are said all the same.
  said = {"clip_low", "kl_max", "masked_rows"}
  assert not (set(row) & set(idle)) - said


@pytest.mark.parametrize(
  "preset, choices",
  [
    ("paper", dict(clip_low=10, clip_high=10, kl="k3", kl_coef=0.001)),
    ("deepseekmath", dict(kl="k3", kl_coef=0.04)),
    ("dr_grpo", dict(advantage="dr_grpo", kl_coef=0)),
    ("dapo", dict(clip_low=0.2, clip_high=0.28, aggregation="token-mean", kl_coef=0)),
    ("gspo", dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4)),
    ("cispo", dict(clip="cispo", aggregation="token-mean")),
    ("rloo", dict(advantage="rloo", kl="k1-in-reward")),
    ("trl", dict(std_eps=1e-4, std_ddof=1, log_ratio_clamp=0, kl_coef=0)),
    ("verl", dict(std_eps=1e-6, dual_clip=3, log_ratio_clamp=20, kl_coef=0)),
    ("tunix", dict(kl="k1-in-loss", kl_coef=0.04, masked_rows="drop", clip_high=0.2)),
  ],
)
def test_presets_hold_what_their_sources_say(preset, choices):
  o = presets.objective(preset)
  assert {name: getattr(o, name) for name in choices} == choices


def test_the_overlong_buffer_of_dapo_is_4096_of_20480_tokens():
  assert presets.objective("dapo").overlong_tokens(20_480) == 4096


def test_the_docs_hold_the_table_of_the_code():
  """To renew it: python -m r1jax.presets"""
  text = DOCS.read_text()
  begin, end = "<!-- presets: begin -->\n", "<!-- presets: end -->"
  assert text.partition(begin)[2].partition(end)[0] == presets.markdown()


def test_a_choice_beside_a_preset_wins():
  assert presets.objective("verl", dual_clip=0.0).dual_clip == 0
  with pytest.raises(UserError, match=r"no choice 'clip_hi'.*'clip_high'"):
    presets.objective("verl", clip_hi=0.3)


@pytest.mark.parametrize(
  "choices, words",
  [
    (dict(dual_clip=1.0), ["dual_clip=1.0", "above 1"]),
    (dict(dual_clip=-3.0), ["dual_clip=-3.0", "negative"]),
    (dict(clip_high=0.2, ratio_cap=1.1), ["ratio_cap=1.1", "1 + clip_high = 1.2"]),
    (
      dict(clip_high=0.2, ratio_cap=4.0, dual_clip=3.0),
      ["dual_clip=3.0", "ratio_cap=4.0", "one of them to 0"],
    ),
    (dict(clip_low=0.0), ["clip_low=0.0", "clip='none'"]),
    (dict(kl="k1-in-loss"), ["k1-in-loss", "expected gradient", "k1-in-reward"]),
    (dict(kl_coef=-0.1), ["kl_coef=-0.1", "negative"]),
    (dict(off_policy="token-mask"), ["old_logprobs='trainer'"]),
    (
      dict(off_policy="token-mask", old_logprobs="trainer", off_policy_floor=3.0),
      ["off_policy_cap=2.0", "off_policy_floor=3.0"],
    ),
    (dict(truncated="drop"), ["truncated='drop'", "keep, mask, penalise"]),
    (
      dict(truncated="penalise", truncation_penalty=0.0),
      ["truncation_penalty=0.0", "above 0"],
    ),
    (dict(masked_rows="skip"), ["masked_rows='skip'", "count, drop"]),
    (dict(pool=0), ["pool=0"]),
    (dict(lam=1.5), ["lam=1.5", "0..1"]),
    (dict(std_eps=-1.0), ["std_eps=-1.0"]),
  ],
)
def test_contradictions_are_refused_with_the_rule(choices, words):
  with pytest.raises(UserError) as error:
    Objective(**choices)
  for word in ("config.objective.", *words):
    assert word in str(error.value)


def test_k1_in_the_loss_is_allowed_where_it_is_forced_or_weighs_nothing():
  for how in (dict(force_k1_in_loss=True), dict(kl_coef=0.0)):
    assert Objective(kl="k1-in-loss", **how).kl == "k1-in-loss"


@pytest.mark.parametrize(
  "choices, idle",
  [
    (dict(advantage="dr_grpo"), ["std_ddof", "std_eps"]),
    (dict(kl_coef=0.0), ["kl", "kl_max"]),
    (dict(clip="cispo"), ["dual_clip", "ratio_cap"]),
    (dict(clip="none"), ["clip_low", "clip_high", "dual_clip"]),
    (dict(), ["clip_low", "sum_norm", "masked_rows", "off_policy_cap", "filter_on"]),
    (dict(aggregation="token-mean", truncated="mask"), ["masked_rows"]),
    (dict(off_policy="token-truncate", old_logprobs="trainer"), ["off_policy_floor"]),
    (dict(kl="k2"), ["kl_max"]),
  ],
)
def test_choices_without_effect_are_known(choices, idle):
  found = inert(Objective(**choices))
  assert set(idle) <= set(found) and all(found.values())


def test_every_choice_has_a_value_in_which_it_is_not_idle():
  """No option is dead: some combination uses it."""
  combinations = [
    Objective(),
    Objective(clip_low=0.2, truncated="mask", kl_max=1.0, overlong_buffer=0.2, pool=2),
    Objective(truncated="penalise", aggregation="seq-mean-token-sum-norm"),
    Objective(off_policy="token-mask", old_logprobs="trainer"),
    Objective(kl="k1-in-loss", force_k1_in_loss=True, advantage="gae"),
  ]
  for field in dataclasses.fields(Objective):
    assert any(field.name not in inert(o) for o in combinations), field.name
