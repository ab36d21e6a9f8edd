"""Verifiable instructions: what follows each, what does not, what is refused."""

import json
import sys
import time

import numpy as np
import pytest

from r1jax.data.problem import Problem
from r1jax.errors import UserError
from r1jax.evals.generate import Samples, ballots, mark
from r1jax.rewards.accuracy import answered
from r1jax.rewards.golds import gold_error
from r1jax.rewards.instructions import INSTRUCTIONS, followed, read_spec, spec_of
from r1jax.rewards.scorer import Scorer, ScorerConfig


def spec(*instructions):
  return json.dumps([{"id": name, "kwargs": kwargs} for name, kwargs in instructions])


def follows(reply, name, *, loose=False, **kwargs):
  verdict = followed(reply, spec((name, kwargs)), loose=loose)
  assert verdict.outcome in ("correct", "wrong")
  assert verdict.detail == ("" if verdict.outcome == "correct" else name)
  return verdict.outcome == "correct"


GERMAN = "Das ist ganz klar ein deutscher Text. Ich glaube, wir gehen heute nach Hause."
ENGLISH = "This is clearly a text in English. I believe that we are going home today."
BENGALI = "আমি বাংলায় গান গাই। আমি বাংলার গান গাই।"
# Id, kwargs, replies that follow, replies that do not.
CASES = [
  (
    *("keywords:existence", {"keywords": ["rain", "café"]}),
    ["Rain at the café.", "CAFÉ, trains"],  # in any case, inside a word
    ["Rain.", "cafe rain", "the café"],
  ),
  (
    *("keywords:existence", {"keywords": ["c++ (new)"]}),
    ["It is C++ (new)."],  # a text, no pattern
    ["ccc new"],
  ),
  (
    "keywords:frequency",
    {"keyword": " rain ", "frequency": 2, "relation": "at least"},
    ["rain, Rain", "trains rain", "rain rain rain"],
    ["rain", "sun"],
  ),
  (
    "keywords:frequency",
    {"keyword": "rain", "frequency": 2, "relation": "less than"},
    ["rain", "sun"],
    ["rain rain", "RAIN rain rain"],
  ),
  (
    *("keywords:forbidden_words", {"forbidden_words": ["cat", "naïve", "C++"]}),
    ["concatenate", "cats and dogs", "naïveté", "C"],  # whole words alone
    ["A Cat.", "so NAÏVE!", "c++ is", "the cat's"],
  ),
  (
    "keywords:letter_frequency",
    {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
    ["Qq", "quick quack"],
    ["q", "none"],
  ),
  (
    "keywords:letter_frequency",
    {"letter": "#", "let_frequency": 1, "let_relation": "less than"},
    ["none"],
    ["#", "a # b"],
  ),
  (
    *("language:response_language", {"language": "bn"}),
    [BENGALI, "12 34 !", BENGALI + " (OK)"],
    [ENGLISH, "नमस्ते, आप कैसे हैं", BENGALI[:10] + ENGLISH],
  ),
  (
    *("language:response_language", {"language": "de"}),
    [GERMAN],
    [BENGALI, "Это русский текст", "你好，世界"],
  ),
  (
    "length_constraints:number_sentences",
    {"num_sentences": 2, "relation": "at least"},
    [
      "One. Two.",
      "One! Two",
      "One?\n\nTwo?",
      "好。很好。",
      '"One." Two.',
      "नमस्ते। ठीक है।",
    ],
    ["One.", "One\nTwo\nThree", "Mr. Smith and Dr. Wu, e.g. 3.5 cm.", "Well... ok."],
  ),
  (
    "length_constraints:number_sentences",
    {"num_sentences": 3, "relation": "less than"},
    ["One. Two.", "One", "?! 🎉 One. …", "1. Mix it.\n2. Bake it.", "J. K. Rowling"],
    ["One. Two. Three.", "Why? No! Yes.", "**One.** *Two!* (Three.)", "a. b. c"],
  ),
  (
    *("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ["a\n***\nb", "a***b", "***\na\n\nb\n***\nc\n***"],
    ["a\n\nb", "a *** b *** c", "a\n***\n\n***\nb", "a"],
  ),
  (
    "length_constraints:number_words",
    {"num_words": 3, "relation": "at least"},
    ["one two three", "1, 2, 3", "don't go", "één twee drie"],  # don't is two runs
    ["one two", "..., ... ...", "世界 你好"],
  ),
  (
    "length_constraints:number_words",
    {"num_words": 3, "relation": "less than"},
    ["one two", "!!! - ...", "one"],
    ["one two three", "one two three four"],
  ),
  (
    "length_constraints:nth_paragraph_first_word",
    {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
    ["One.\n\nSo it is.", "One.\n\nso", "One.\n\n'SO,' she said", 'One.\n\n"so" it'],
    ["One.\n\nIt is so.", "So.\n\nOne.", "One.\nSo.", "One.\n\nSome", "a\n\nso\n\nb"],
  ),
  (
    *("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ["[name], [street 5]", "[a][b][c]", "[a [b] c] [d]"],
    ["[name]", "(a) (b)", "[a\n] [b]", "[[a]]", "no"],
  ),
  (
    *("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ["Bye.\n\nP.S. Call me.", "Bye.\np. s. call"],
    ["Bye.", "PS: call me"],
  ),
  (
    *("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ["P.P.S. Call me.", "P. P. S Call me."],
    ["P.S. Call me."],
  ),
  (
    *("detectable_content:postscript", {"postscript_marker": "N.B. (*)"}),
    ["x\nn.b. (*) y"],
    ["N.B. y", "NXB"],
  ),
  (
    *("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ["* a\n* b", "- a\n  - b", "x\n\n* a\ny\n- b\n", "* a\n**bold**\n* b"],
    ["* a", "* a\n* b\n* c", "a * b - c", "1. a\n2. b"],
  ),
  (
    *("detectable_format:number_bullet_lists", {"num_bullets": 0}),
    ["no list"],
    ["* a"],
  ),
  (
    *("detectable_format:constrained_response", {}),
    ["My answer is yes.", "Well. My answer is maybe."],
    ["My answer is yes", "my answer is no.", "yes"],
  ),
  (
    *("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ["*a* and *b*", "**a** and *b c*", "**a** **b**"],
    ["*a*", "a * b", "**** **", "*a\n* *b*", "* *  * *"],
  ),
  (
    "detectable_format:multiple_sections",
    {"section_spliter": "Section", "num_sections": 2},
    ["Section 1\na\nSection 2\nb", "Section1 Section2 Section3"],
    ["Section 1\na", "SECTION 1 SECTION 2", "Section A Section B", "1 2"],
  ),
  (
    *("detectable_format:json_format", {}),
    [
      '{"a": [1, {"b": null}]}',
      '```json\n{"a": {"b": {"c": [[], {}]}}}\n```',
      "```\n[1]\n```",
      "```JSON {}```",
      '"é"',
    ],
    ["{'a': 1}", "{", 'Here:\n{"a": 1}', '```json\n{"a": 1}\n``` Done.', "[" * 10**5],
  ),
  (
    *("detectable_format:title", {}),
    ["<<Rain>>\nIt rains.", "x <<Ода радости>> y"],
    ["<Rain>", "<<>>", "<<  >>", "<<a\nb>>", ">>a<<", "Rain"],
  ),
  (
    *("combination:two_responses", {}),
    ["a\n******\nb", "******a******b******"],
    ["a", "a ****** a", "a ****** b ****** c", "a ****** ****** b", "a *** b"],
  ),
  (
    *("combination:repeat_prompt", {"prompt_to_repeat": "Say (hi)? "}),
    ["Say (hi)? Hi.", "SAY (HI)?\n\nHi."],
    ["Hi.", "Sure: Say (hi)? Hi.", "Say hi? Hi."],
  ),
  (
    *("startend:end_checker", {"end_phrase": " Any questions? "}),
    ["Bye. Any questions?", '"Bye. ANY QUESTIONS?"', "Any questions?\n"],
    ["Any questions? Bye.", "Any questions", "questions?"],
  ),
  (
    *("startend:quotation", {}),
    ['"Rain."', ' "a" and "b"\n'],
    ["Rain.", '"', '"Rain.', "“Rain.”", "'Rain.'"],
  ),
  (
    "change_case:capital_word_frequency",
    {"capital_frequency": 2, "capital_relation": "at least"},
    ["NASA and ESA", "A ÉTÉ", "WELL-KNOWN: B2"],
    ["NASA", "WELL-KNOWN", "Nasa Esa", "DON'T go", "12 34"],
  ),
  (
    "change_case:capital_word_frequency",
    {"capital_frequency": 1, "capital_relation": "less than"},
    ["quiet", "Nasa"],
    ["LOUD", "NASA-ESA"],
  ),
  (
    *("change_case:english_capital", {}),
    [ENGLISH.upper(), "ROOM 5!"],
    [ENGLISH, "12 34", "ЭТО РУССКИЙ ТЕКСТ"],
  ),
  (
    *("change_case:english_lowercase", {}),
    [ENGLISH.lower(), "room 5!"],
    [ENGLISH, "12 34", "это русский текст"],
  ),
  (
    *("punctuation:no_comma", {}),
    ["a; b", "1.000"],
    ["a, b", "1,000"],
  ),
]
IDS = [f"{i} {case[0]}" for i, case in enumerate(CASES)]


@pytest.fixture(params=["with pycld2", "without"])
def detector(request, monkeypatch):
  if request.param == "without":
    monkeypatch.setitem(sys.modules, "pycld2", None)
  else:
    pytest.importorskip("pycld2")


def test_there_are_ifevals_25_instructions_and_all_are_tried():
  assert len(INSTRUCTIONS) == 25
  assert {case[0] for case in CASES} == INSTRUCTIONS.keys()


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=IDS)
def test_what_follows_an_instruction_and_what_does_not(
  name, kwargs, good, bad, detector
):
  assert [r for r in good if not follows(r, name, **kwargs)] == []
  assert [r for r in bad if follows(r, name, **kwargs)] == []


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=IDS)
def test_the_loose_variant_never_takes_what_the_strict_one_gave(
  name, kwargs, good, bad
):
  for reply in good:
    assert follows(reply, name, loose=True, **kwargs)


LIMITS = [
  ("keywords:frequency", "frequency", "relation", {"keyword": "x"}),
  ("keywords:letter_frequency", "let_frequency", "let_relation", {"letter": "x"}),
  ("length_constraints:number_words", "num_words", "relation", {}),
  ("length_constraints:number_sentences", "num_sentences", "relation", {}),
  ("change_case:capital_word_frequency", "capital_frequency", "capital_relation", {}),
]


@pytest.mark.parametrize("name, limit, relation, more", LIMITS)
def test_at_least_and_less_than_part_all_counts(name, limit, relation, more):
  for count in (1, 2, 5):
    reply = " ".join(["X."] * count) if "sentences" not in name else "Xx. " * count
    for wanted in range(7):
      kwargs = {limit: wanted, **more}
      assert follows(reply, name, **kwargs, **{relation: "at least"}) == (
        count >= wanted
      )
      assert follows(reply, name, **kwargs, **{relation: "less than"}) == (
        count < wanted
      )


def test_pycld2_tells_languages_of_one_script_apart():
  pytest.importorskip("pycld2")
  name = "language:response_language"
  assert follows(ENGLISH, name, language="en")
  assert not follows(ENGLISH, name, language="de")
  assert not follows(GERMAN, name, language="en")
  assert not follows(GERMAN.upper(), "change_case:english_capital")
  assert not follows(GERMAN.lower(), "change_case:english_lowercase")


# -- several instructions, strict and loose --------------------------------------------

COMMA, QUOTES = ("punctuation:no_comma", {}), ("startend:quotation", {})
END = "startend:end_checker", {"end_phrase": "Bye."}


def test_all_are_followed_or_the_first_that_is_broken_is_told():
  asked = spec(COMMA, END, QUOTES)
  assert followed('"So. Bye."', asked).outcome == "correct"
  for reply, broken in (("So, bye", COMMA), ("So. bye", END), ("So. Bye.", QUOTES)):
    verdict = followed(reply, asked)
    assert (verdict.outcome, verdict.detail) == ("wrong", broken[0])
    assert verdict.score == 0.0


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("reply", ["", " \n\t"])
def test_an_empty_reply_follows_nothing(reply, loose):
  none = spec(
    ("length_constraints:number_words", {"num_words": 9, "relation": "less than"})
  )
  assert followed(reply, none, loose=loose).outcome == "unparsable"


@pytest.mark.parametrize(
  "reply, asked",
  [
    ("Sure, here it is:\nIt rains.", COMMA),  # without the first line
    ("It rains.\nHope that helps, dear!", COMMA),  # without the last
    ("Sure, here:\n\nIt rains.\n\nI hope, I helped.", COMMA),  # without both
    ("So. **Bye.**", END),  # without asterisks
    ("Sure:\n**So. Bye.**\nMore?", END),  # without all of these
  ],
)
def test_loose_leaves_out_first_and_last_lines_and_asterisks(reply, asked):
  assert followed(reply, spec(asked)).outcome == "wrong"
  assert followed(reply, spec(asked), loose=True).outcome == "correct"


def test_loose_leaves_out_no_second_line_and_each_instruction_has_its_own_variant():
  assert followed("a,\nb,\nc\nd", spec(COMMA), loose=True).outcome == "wrong"
  assert followed("a, b", spec(COMMA), loose=True).outcome == "wrong"
  reply = "So, so.\nBye.\nMore"
  assert followed(reply, spec(COMMA, END), loose=True).outcome == "correct"
  assert followed(reply, spec(COMMA, END, QUOTES), loose=True).detail == QUOTES[0]


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=IDS)
@pytest.mark.parametrize("piece", ["[", "*", "<<", " ", "\n", "a.", "* ", '"', "Dr. "])
def test_no_reply_takes_long(name, kwargs, good, bad, piece):
  begin = time.monotonic()
  followed("x" + piece * 30_000 + "x", spec((name, kwargs)))
  assert time.monotonic() - begin < 2


# -- where the reply is ----------------------------------------------------------------


@pytest.mark.parametrize(
  "completion, outcome",
  [
    ("No commas here.", "correct"),
    ("<think>well, well</think>\n\nNo commas here.", "correct"),
    ("<think>so</think> <answer>No commas here.</answer>\n", "correct"),
    ("<think>so</think>Here, I think.", "wrong"),
    ("<think>so</think><answer>Here, too.</answer>", "wrong"),
    ("<think>so", "unparsable"),
    ("<think>so</think>", "unparsable"),
    ("<think>so</think><answer> </answer>", "unparsable"),
    ("", "unparsable"),
  ],
)
def test_what_follows_the_thinking_is_judged(completion, outcome):
  assert answered(completion, [spec(COMMA)], kind="instructions").outcome == outcome


def test_tags_that_wrap_the_whole_reply_are_no_part_of_it():
  ask = dict(kind="instructions")
  assert answered('<answer>"Hi."</answer>', [spec(QUOTES)], **ask).score == 1.0
  assert answered('So: <answer>"Hi."</answer>', [spec(QUOTES)], **ask).score == 0.0


def test_a_prefilled_thought_that_never_ends_is_no_reply():
  for completion, outcome in (("so", "unparsable"), ("so</think>Hi.", "correct")):
    verdict = answered(
      completion, [spec(COMMA)], kind="instructions", prefill_think=True
    )
    assert verdict.outcome == outcome


def test_a_scorer_scores_them_and_they_do_not_vote():
  problems = [Problem("Hi?", (spec(COMMA),), "instructions"), Problem("7?", ("7",))]
  good, bad = "<think>t</think>Hi.", "<think>t</think>Hi, you."
  seven = "<think>t</think><answer>7</answer>"
  ones = np.ones((2, 2))
  samples = Samples(problems, [[good, bad], [seven, seven]], ones, ones > 0)
  with Scorer(ScorerConfig(maths="exact", workers=1), problems) as scorer:
    found = scorer.score([(good, problems[0]), (bad, problems[0])])
    assert [one.outcome for one in found] == ["correct", "wrong"]
    assert found[1].detail == COMMA[0]
    marks = mark(samples, prefill_think=False, scorer=scorer)
  assert marks.correct.tolist() == [[True, False], [True, True]]
  voted, right = ballots(samples, marks, prefill_think=False)
  assert voted.tolist() == [[0, 0]] and right.tolist() == [[True, True]]


# -- refusals --------------------------------------------------------------------------

FREQUENCY = {"keyword": "x", "frequency": 1, "relation": "at least"}
NTH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "x"}
REFUSED = [
  ("keywords:exist", {"keywords": ["x"]}, "keywords:existence"),
  ("", {}, "there is no instruction"),
  ("keywords:existence", {}, 'has no "keywords"'),
  ("keywords:existence", {"keywords": None}, 'has no "keywords"'),
  ("keywords:existence", {"keywords": "x"}, "'x', not a list of texts"),
  ("keywords:existence", {"keywords": []}, "[], not a list of texts"),
  ("keywords:existence", {"keywords": ["x", 7]}, "not a list of texts"),
  ("keywords:forbidden_words", {"forbidden_words": [" "]}, "not a list of texts"),
  ("keywords:frequency", {**FREQUENCY, "frequency": "1"}, "not a whole number"),
  ("keywords:frequency", {**FREQUENCY, "frequency": 1.5}, "not a whole number"),
  ("keywords:frequency", {**FREQUENCY, "frequency": True}, "not a whole number"),
  ("keywords:frequency", {**FREQUENCY, "frequency": -1}, "not a whole number"),
  ("keywords:frequency", {**FREQUENCY, "relation": "at most"}, "less than or at least"),
  ("keywords:frequency", {**FREQUENCY, "relation": ["at least"]}, "less than or"),
  ("keywords:frequency", {**FREQUENCY, "keyword": ""}, "'', not a text"),
  ("keywords:frequency", {**FREQUENCY, "word": "x"}, "not 'word'"),
  (
    "keywords:letter_frequency",
    {"letter": "xy", "let_frequency": 1, "let_relation": "at least"},
    "'xy', not one character",
  ),
  ("language:response_language", {"language": "English"}, "not one of en, "),
  ("language:response_language", {"language": ["en"]}, "not one of en, "),
  ("startend:end_checker", {"end_phrase": " "}, "not a text"),
  ("length_constraints:nth_paragraph_first_word", NTH | {"nth_paragraph": 3}, "is 3"),
  ("length_constraints:nth_paragraph_first_word", NTH | {"nth_paragraph": 0}, "is 0"),
  ("punctuation:no_comma", {"commas": 0}, "takes nothing, not 'commas'"),
]


@pytest.mark.parametrize("name, kwargs, why", REFUSED)
def test_an_instruction_that_cannot_be_checked_is_refused(name, kwargs, why):
  with pytest.raises(ValueError) as error:
    spec_of([{"id": name, "kwargs": kwargs}])
  assert why in str(error.value) and name in str(error.value)
  assert "\n" not in str(error.value) and len(str(error.value)) < 300
  problem = Problem("p", (spec((name, kwargs)),), "instructions")
  assert gold_error(problem) == str(error.value)


@pytest.mark.parametrize(
  "text, why",
  [
    ("", "not JSON"),
    ("[" * 10**5, "not JSON"),
    ("7", "a list of"),
    ("[]", "a list of"),
    ("[7]", '"id"'),
    ('[{"kwargs": {}}]', '"id"'),
    ('[{"id": ["punctuation:no_comma"]}]', '"id"'),
    ('[{"id": "punctuation:no_comma", "kwargs": []}]', "not an object"),
  ],
)
def test_a_gold_that_is_no_list_of_instructions_is_refused(text, why):
  said = gold_error(Problem("p", (text,), "instructions"))
  assert why in said and len(said) < 300
  with pytest.raises(ValueError):
    followed("x", text)


@pytest.mark.parametrize("golds", [(), (spec(COMMA), spec(QUOTES))])
def test_a_problem_has_one_list_of_instructions(golds):
  assert "one JSON list" in gold_error(Problem("p", golds, "instructions"))


def test_a_scorer_refuses_them_with_their_line():
  bad = Problem("p", (spec(("keywords:existence", {})),), "instructions", where="f:3")
  with pytest.raises(UserError, match=r'^f:3: keywords:existence has no "keywords"\.'):
    Scorer(ScorerConfig(maths="exact", workers=1), [bad])


def test_kwargs_that_are_null_or_missing_are_not_given():
  name = COMMA[0]
  for kwargs in ({}, None, {"num_words": None, "relation": None}):
    assert read_spec(spec_of([{"id": name, "kwargs": kwargs}])) == [(name, {})]
  assert read_spec(spec_of([{"id": name}])) == [(name, {})]


@pytest.mark.parametrize("name, kwargs, good, bad", CASES, ids=IDS)
def test_a_spec_says_what_it_was_made_of(name, kwargs, good, bad):
  assert gold_error(Problem("p", (spec((name, kwargs)),), "instructions")) == ""
  assert read_spec(spec_of([{"id": name, "kwargs": kwargs}])) == [(name, kwargs)]
