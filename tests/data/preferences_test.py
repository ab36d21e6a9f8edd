"""Preferences: judges, length balance, and every way a user's file can be wrong."""

import gzip
import json

import numpy as np
import pytest

from r1jax.data.preferences import (
  GRADES,
  Comparison,
  Counts,
  Lengths,
  Preference,
  SafetyLabel,
  balanced,
  judged,
  read_preferences,
  read_safety,
  write,
)
from r1jax.errors import UserError

# -- judging ---------------------------------------------------------------------------


def by_quality(prompt, first, second):
  """A fair judge: each text ends in its quality."""
  gap = int(first[-1]) - int(second[-1])
  grade = max(-2, min(2, gap))
  return next(name for name, number in GRADES.items() if number == grade)


def some_pairs(*qualities):
  return [Comparison(f"q{i}", f"a {a}", f"b {b}") for i, (a, b) in enumerate(qualities)]


def test_only_pairs_that_the_judge_is_sure_of_are_kept():
  found, counts = judged(
    some_pairs((5, 1), (1, 5), (3, 3), (4, 3), (2, 3)), by_quality, seed=0
  )
  assert found == [
    Preference("q0", "a 5", "b 1", 2.0),
    Preference("q1", "b 5", "a 1", 2.0),
  ]
  assert counts == Counts(kept=2, equal=0, unsure=3)


def test_equal_texts_are_counted_and_never_judged():
  pairs = [Comparison("q", "same", "same"), *some_pairs((5, 1))]
  found, counts = judged(pairs, by_quality, seed=0)  # it would fail on "same"
  assert len(found) == 1 and counts == Counts(kept=1, equal=1, unsure=0)


@pytest.mark.parametrize("judgments", [2, 4, 6])
def test_half_of_the_judgments_are_swapped_in_an_order_of_chance(judgments):
  asked = []

  def judge(prompt, first, second):
    asked.append((prompt, first[0] + second[0]))
    return "A=B"

  pairs = some_pairs(*[(1, 2)] * 40)
  judged(pairs, judge, judgments=judgments, seed=1)
  orders = [
    [order for prompt, order in asked if prompt == pair.prompt] for pair in pairs
  ]
  for order in orders:
    assert sorted(order) == ["ab"] * (judgments // 2) + ["ba"] * (judgments // 2)
  assert len({tuple(order) for order in orders}) > 1
  before, asked[:] = list(asked), []
  judged(pairs, judge, judgments=judgments, seed=1)
  assert asked == before


@pytest.mark.parametrize("grade", GRADES)
def test_a_judge_who_only_sees_places_says_nothing(grade):
  found, counts = judged(some_pairs((5, 1)), lambda *_: grade, seed=0)
  assert found == [] and counts.unsure == 1


def test_delta_is_the_mean_in_favour_of_the_better_one():
  """Grades 2, 1, 1, 1 of b: |delta| 1.25 is above 1, and 1, 1, 1, 1 is not."""
  grades = iter(["B>>A", "B>A", "B>A", "B>A"])

  def judge(prompt, first, second):
    grade = next(grades)
    return grade if first[0] == "a" else grade.translate(str.maketrans("AB><", "BA><"))

  (found,), _ = judged(some_pairs((0, 0)), judge, seed=3)
  assert found == Preference("q0", "b 0", "a 0", 1.25)


@pytest.mark.parametrize("judgments", [0, 1, 3, -2])
def test_judgments_that_cannot_be_halved_are_refused(judgments):
  with pytest.raises(ValueError, match=f"judgments={judgments} .*even.*R1 takes 4"):
    judged([], by_quality, judgments=judgments, seed=0)


def test_a_grade_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"'A is better'.*none of A>>B, A>B"):
    judged(some_pairs((1, 2)), lambda *_: "A is better", seed=0)


# -- lengths ---------------------------------------------------------------------------


def of_lengths(*pairs):
  return [
    Preference(f"q{i}", "c" * chosen, "r" * rejected, 2.0)
    for i, (chosen, rejected) in enumerate(pairs)
  ]


def differences(preferences):
  return [len(p.chosen) - len(p.rejected) for p in preferences]


def biased_set(seed, n=400):
  """Better answers that are longer, mostly and by more."""
  rng = np.random.default_rng(seed)
  gap = rng.integers(0, 60, n) - 15
  base = rng.integers(50, 100, n)
  return of_lengths(*zip(base + gap, base, strict=True))


def test_the_report_by_hand():
  kept, before, after = balanced(of_lengths((9, 3), (2, 5), (4, 4), (8, 5)), len, 0)
  assert differences(kept) == [-3, 0, 3]
  assert before == Lengths(4, chosen=23 / 4, rejected=17 / 4)
  assert after == Lengths(3, chosen=14 / 3, rejected=14 / 3)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_as_equal_as_the_pairs_allow(seed, mirrored):
  preferences = biased_set(seed)
  if mirrored:
    preferences = [
      Preference(p.prompt, p.rejected, p.chosen, p.delta) for p in preferences
    ]
  kept, before, after = balanced(preferences, len, seed)
  assert abs(before.chosen - before.rejected) > 5
  assert abs(sum(differences(kept))) <= 1  # half the least difference, which is 1 to 3
  np.testing.assert_allclose(after.chosen, np.mean([len(p.chosen) for p in kept]))
  np.testing.assert_allclose(after.rejected, np.mean([len(p.rejected) for p in kept]))
  assert (before.pairs, after.pairs) == (len(preferences), len(kept))
  # Nothing is lost of the side that was behind, and everything stays in its order.
  sign = -1 if mirrored else 1
  chosen = set(map(id, kept))
  assert [p for p in preferences if id(p) in chosen] == kept
  behind = [p for p in preferences if sign * differences([p])[0] <= 0]
  assert all(id(p) in chosen for p in behind)


def test_length_alone_no_longer_tells_the_chosen_one():
  """Where the shorter side's sizes have a partner each, both sides are equally many."""
  gaps = [*range(1, 41), *range(1, 41), *range(-20, 0)]
  preferences = of_lengths(*[(50 + d, 50) for d in gaps])
  kept, _, _ = balanced(preferences, len, seed=0)
  assert sorted(differences(kept)) == [d for d in range(-20, 21) if d]


def test_a_balanced_set_stays_whole():
  preferences = of_lengths((110, 10), *[(10, 20)] * 10)
  kept, before, after = balanced(preferences, len, seed=0)
  assert kept == preferences and before == after


def test_sides_of_other_sizes_balance_too():
  """Ten pairs of +100 against ten of -10: one of the first outweighs the second."""
  kept, _, _ = balanced(of_lengths(*[(110, 10), (10, 20)] * 10), len, seed=0)
  assert sorted(differences(kept)) == [*[-10] * 10, 100]


def test_the_last_one_is_dropped_if_the_sum_below_0_is_nearer_than_the_one_above():
  """5 + 5 - 6 is 4 above 0, and 5 - 6 is 1 below."""
  kept, _, _ = balanced(of_lengths((15, 10), (10, 16), (15, 10)), len, seed=0)
  assert sorted(differences(kept)) == [-6, 5]


def test_the_seed_chooses_and_nothing_else_does():
  preferences = biased_set(0)
  a, b, c = (balanced(preferences, len, seed)[0] for seed in (0, 0, 1))
  assert a == b != c


def test_a_set_that_leans_one_way_is_refused():
  with pytest.raises(UserError, match=r"all 2 pairs the chosen .*14 chosen, 10 rej"):
    balanced(of_lengths((15, 10), (12, 10)), len, seed=0)
  with pytest.raises(UserError, match="the rejected response is the longer"):
    balanced(of_lengths((1, 10)), len, seed=0)
  nothing = Lengths(0, 0.0, 0.0)
  assert balanced([], len, seed=0) == ([], nothing, nothing)


# -- files -----------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "c", "rejected": "r", "delta": 1.5}
SCORED = {"prompt": "q", "a": "x", "b": "y", "scores": [2, 2, 1, 0.5]}
LABEL = {"prompt": "q", "response": "c", "safe": True}


def put(tmp_path, *rows, name="file.jsonl"):
  path = tmp_path / name
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text("\n".join(lines), encoding="utf-8")
  return path


def without(row, name):
  return {k: v for k, v in row.items() if k != name}


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "file.jsonl"
  pairs = [
    Preference("q\n\u2028 ü", "<think>\r\n</think> 好", '"r"', 2.0),
    Preference("q", "c", "r", 1.25),
  ]
  write(path, pairs)
  assert read_preferences(path) == (pairs, Counts(kept=2, equal=0, unsure=0))
  assert [set(json.loads(x)) for x in path.read_bytes().splitlines()] == [set(PAIR)] * 2
  labels = [SafetyLabel("q", "c", True), SafetyLabel("q ", "ü", False)]
  write(path, labels)
  assert read_safety(path) == labels
  zipped = tmp_path / "file.jsonl.gz"
  zipped.write_bytes(gzip.compress(path.read_bytes()))
  assert read_safety(zipped) == labels


def test_scores_are_judged_as_a_judge_would_be(tmp_path):
  rows = [
    SCORED,
    {**SCORED, "scores": [-2, -2, -2, -1]},
    {**SCORED, "scores": [1, 1, 1, 1]},
    {**SCORED, "scores": [2, 2, -2, -2]},
    PAIR,
  ]
  found, counts = read_preferences(put(tmp_path, *rows))
  assert found == [
    Preference("q", "x", "y", 1.375),
    Preference("q", "y", "x", 1.75),
    Preference("q", "c", "r", 1.5),
  ]
  assert counts == Counts(kept=3, equal=0, unsure=2)
  two = put(tmp_path, {**SCORED, "scores": [2, 1]})
  assert read_preferences(two, judgments=2)[0] == [Preference("q", "x", "y", 1.5)]


PAIR_MISTAKES = [
  *((without(PAIR, name), f'no text under "{name}"') for name in list(PAIR)[:3]),
  (without(PAIR, "delta"), r'no number under "delta", but None'),
  *((without(SCORED, name), f'no text under "{name}"') for name in ("prompt", "a")),
  ({**PAIR, "chosen": " "}, 'no text under "chosen"'),
  ({**PAIR, "chosen": 3}, 'no text under "chosen"'),
  ({**PAIR, "chosen": "\ud800"}, 'half a surrogate pair in "chosen"'),
  ({**PAIR, "chosen": "r"}, '"chosen" and "rejected" are equal'),
  ({**SCORED, "a": "y"}, '"a" and "b" are equal'),
  ({**PAIR, "delta": "1.5"}, "no number under \"delta\", but '1.5'"),
  ({**PAIR, "delta": True}, 'no number under "delta", but True'),
  ({**PAIR, "delta": 1}, '"delta" is 1, not above 1 and at most 2'),
  ({**PAIR, "delta": -1.5}, r'"delta" is -1\.5, not above 1'),
  ({**PAIR, "delta": 9}, '"delta" is 9, not above 1 and at most 2'),
  ({**SCORED, "scores": [2, 2, 2]}, r"\[2, 2, 2\], not a list of 4 grades"),
  ({**SCORED, "scores": 2}, '"scores" is 2, not a list'),
  ({k: SCORED[k] for k in ("prompt", "a", "b")}, '"scores" is None, not a list'),
  ({**SCORED, "scores": [2, 2, "1", 2]}, "no number under \"scores\", but '1'"),
  ({**SCORED, "scores": [2, 2, None, 2]}, 'no number under "scores", but None'),
  ({**SCORED, "scores": [2, 2, 5, 2]}, r"grade outside -2\.\.2"),
  ("[1]", "not a JSON object"),
  ("{", "not JSON"),
  (json.dumps(PAIR).replace("1.5", "NaN"), "not JSON"),
]


@pytest.mark.parametrize("row, said", PAIR_MISTAKES)
def test_a_malformed_pair_is_named_with_what_is_needed(tmp_path, row, said):
  path = put(tmp_path, PAIR, SCORED, row)
  with pytest.raises(UserError, match=said) as error:
    read_preferences(path)
  said = str(error.value)
  assert said.startswith(f"{path}:3: ") and len(said) < 600
  assert '"chosen": "...", "rejected": "...", "delta": 1.5}' in said
  assert "[4 grades]" in said and "mend it or take it out" in said


@pytest.mark.parametrize(
  "row, said",
  [
    (without(LABEL, "safe"), '"safe" is None, not true or false'),
    ({**LABEL, "safe": 1}, '"safe" is 1, not true or false'),
    ({**LABEL, "safe": "false"}, "\"safe\" is 'false', not true or false"),
    (without(LABEL, "response"), 'no text under "response"'),
    (without(LABEL, "prompt"), 'no text under "prompt"'),
  ],
)
def test_a_malformed_label_is_named_with_what_is_needed(tmp_path, row, said):
  path = put(tmp_path, LABEL, row, "", row)
  with pytest.raises(UserError, match=said) as error:
    read_safety(path)
  assert str(error.value).startswith(f"{path}:2: ")
  assert "(and 1 more such rows)" in str(error.value)
  assert '{"prompt": "...", "response": "...", "safe": true}' in str(error.value)


def test_a_file_from_which_nothing_remains_is_refused_with_its_counts(tmp_path):
  unsure = {**SCORED, "scores": [1, 1, 1, 1]}
  path = put(tmp_path, unsure, unsure)
  with pytest.raises(UserError, match=r"no preference: 2 rows, 2 of them with a mean"):
    read_preferences(path)
  with pytest.raises(UserError, match="no preference: 0 rows"):
    read_preferences(put(tmp_path, ""))
  for labels, said in (
    ([], "0 safe and 0 unsafe"),
    ([LABEL] * 3, "3 safe and 0 unsafe"),
    ([{**LABEL, "safe": False}], "0 safe and 1 unsafe"),
  ):
    with pytest.raises(UserError, match=f"{said} .*needs both"):
      read_safety(put(tmp_path, *labels))


@pytest.mark.parametrize("read", [read_preferences, read_safety])
def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path, read):
  with pytest.raises(UserError, match="no such file"):
    read(tmp_path / "none.jsonl")
  with pytest.raises(UserError, match=r"ends in none of \.jsonl"):
    read(put(tmp_path, PAIR, name="file.txt"))
  with pytest.raises(UserError, match="cannot be read"):
    read(put(tmp_path, PAIR, name="file.jsonl.gz"))
