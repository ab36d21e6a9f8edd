"""The compositions of R1's stages, worked out by hand from equations 4, 7 and 8-10."""

import dataclasses
import itertools

import pytest

from r1jax.rewards.total import COMPOSITIONS, Breakdown, composed, total

PARTS = dict(accuracy=1.0, format=0.5, language=0.25, reward_model=-3.0)


@pytest.mark.parametrize(
  "composition, expected",
  [
    ("zero", 1.5),  # Eq. 4: accuracy + format
    ("stage_1", 1.75),  # Eq. 7: (accuracy + format) + language
    ("stage_2_reasoning", 1.75),  # Eq. 8, 9: the same for a reasoning problem
    ("stage_2_general", -2.25),  # Eq. 8, 10: (reward model + format) + language
  ],
)
def test_a_stage_adds_what_its_equation_adds(composition, expected):
  assert composed(composition, PARTS) == expected


@pytest.mark.parametrize(
  "composition, weights, expected",
  [
    ("zero", dict(accuracy=2.0), 2.5),
    ("zero", dict(accuracy=0.0, format=4.0), 2.0),
    ("stage_1", dict(language=0.4), 1.6),
    ("stage_1", dict(accuracy=2.0, format=3.0, language=4.0), 4.5),
    ("stage_2_reasoning", dict(language=-1.0), 1.25),
    ("stage_2_general", dict(reward_model=0.5), -0.75),
    ("stage_2_general", dict(reward_model=0.0, format=0.0, language=0.0), 0.0),
  ],
)
def test_a_weight_is_of_the_part_that_it_names(composition, weights, expected):
  assert composed(composition, PARTS, **weights) == pytest.approx(expected)


@pytest.mark.parametrize(
  "composition, low, high",
  [("zero", 0, 2), ("stage_1", 0, 3), ("stage_2_reasoning", 0, 3)],
)
def test_rewards_of_0_to_1_stay_in_the_stage_s_range(composition, low, high):
  names = COMPOSITIONS[composition]
  sums = [
    composed(composition, dict(zip(names, values, strict=True)))
    for values in itertools.product((0.0, 0.5, 1.0), repeat=len(names))
  ]
  assert (min(sums), max(sums)) == (low, high)


def test_a_general_sample_never_sees_accuracy():
  parts = dict(reward_model=0.5, format=1.0, language=1.0)
  said = {
    composed("stage_2_general", {**parts, "accuracy": a}) for a in (0.0, 1.0, 9.0)
  }
  assert said == {composed("stage_2_general", parts)} == {2.5}
  with pytest.raises(ValueError, match="accuracy"):
    composed("stage_2_general", {**parts, "accuracy": 1.0}, accuracy=1.0)


@pytest.mark.parametrize("composition", ["zero", "stage_1", "stage_2_reasoning"])
def test_a_reasoning_sample_never_sees_the_reward_model(composition):
  without = {name: part for name, part in PARTS.items() if name != "reward_model"}
  assert composed(composition, PARTS) == composed(composition, without)


@pytest.mark.parametrize(
  "composition, name", [(c, n) for c, names in COMPOSITIONS.items() for n in names]
)
def test_a_missing_part_is_named(composition, name):
  parts = {k: v for k, v in PARTS.items() if k != name}
  with pytest.raises(ValueError, match=name):
    composed(composition, parts)


def test_an_unknown_composition_names_the_known_ones():
  with pytest.raises(ValueError, match="stage_3") as caught:
    composed("stage_3", PARTS)
  assert all(name in str(caught.value) for name in COMPOSITIONS)


@pytest.mark.parametrize("name", ["formt", "language", "reward_model"])
def test_a_weight_of_no_part_is_refused(name):
  with pytest.raises(ValueError, match=name):
    composed("zero", PARTS, **{name: 1.0})


def test_total_is_the_weighted_sum():
  assert total(dict(a=2.0, b=-1.0), dict(b=3.0, a=0.5)) == -2.0
  assert total({}, {}) == 0.0


@pytest.mark.parametrize(
  "parts, weights",
  [(dict(a=1.0), {}), ({}, dict(a=1.0)), (dict(a=1.0, b=1.0), dict(a=1.0, c=1.0))],
)
def test_a_part_without_a_weight_or_the_reverse_is_refused(parts, weights):
  with pytest.raises(ValueError, match="same"):
    total(parts, weights)


def test_a_breakdown_is_not_changed_by_accident():
  said = Breakdown(1.0, dict(accuracy=1.0), "correct")
  with pytest.raises(dataclasses.FrozenInstanceError):
    said.total = 2.0
