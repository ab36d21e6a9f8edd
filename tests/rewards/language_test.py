r"""The share of target-language words in the chain of thought, counted by hand."""

import random
import subprocess
import sys
import textwrap
import unicodedata

import pytest

from r1jax.errors import UserError
from r1jax.rewards.language import LANGUAGES, cld2_detector, language_consistency


def share(thought, target, **options):
  text = f"<think>{thought}</think><answer>7</answer>"
  return language_consistency(text, target, **options)


# thought, target, words of the target, words
COUNTED = [
  ("First we add two and three.", "en", 6, 6),
  ("First we add two and three.", "zh", 0, 6),
  ("我们先加二和三。", "zh", 7, 7),
  ("我们先加二和三。", "en", 0, 7),
  ("So 答案 is five", "en", 3, 5),
  ("So 答案 is five", "zh", 2, 5),
  ("答案is正确", "zh", 4, 5),  # no white space between them
  ("答案is正确", "en", 1, 5),
  ("我们先加, then we stop. 答案", "zh", 6, 9),
  ("two-digit number 数", "en", 3, 4),
  ("snake_case 数", "en", 2, 3),
  ("don't stop 数", "en", 2, 3),
  ("don’t stop 数", "en", 2, 3),
  ("ALL Caps done 数", "en", 3, 4),
  ("ＡＢ done", "en", 2, 2),  # full width
  ("㐀 \uf900 𠀀", "zh", 3, 3),  # an extension, a compatibility form, beyond 16 bits
  ("まず 足す ことば", "ja", 4, 4),  # まず 足 す ことば
  ("まず 足す ことば", "zh", 1, 4),
  ("ラーメン and ごはん", "ja", 2, 3),
  ("ラーメン and ごはん", "en", 1, 3),
  ("먼저 둘을 더한다", "ko", 3, 3),
  ("먼저 둘을 더한다 then 数", "ko", 3, 5),
  ("Сначала сложим два числа", "ru", 4, 4),
  ("Сначала add числа", "ru", 2, 3),
  ("Сначала add числа", "en", 1, 3),
  ("Ёж ещё тут", "ru", 3, 3),
  ("πρώτα προσθέτουμε then", "el", 2, 3),
  ("أولا نجمع then", "ar", 2, 3),
  ("קודם נחבר then", "he", 2, 3),
  ("Wir addieren zwei Zahlen für euch", "de", 6, 6),
  ("Wir addieren zwei Zahlen für euch", "en", 6, 6),  # one script: blind
  ("l'été déjà 数", "fr", 2, 3),
]


@pytest.mark.parametrize("thought, target, ours, every", COUNTED)
def test_it_is_target_words_over_words(thought, target, ours, every):
  assert share(thought, target) == pytest.approx(ours / every)


# thought, English words, words
NO_WORDS = [
  ("x plus y 是 z", 1, 2),  # variables
  ("I saw a cat 猫", 2, 3),  # one ASCII letter is always a variable
  ("x1 and n2 数", 1, 2),
  ("3 plus 44 等于 47", 1, 3),
  ("1,234.5 and 6e7 数", 1, 2),
  ("٣ and ４ 数", 1, 2),  # digits of other scripts
  ("add, (then) - stop! ... 数?", 3, 4),
  ("good 😀👍🏽🇩🇪 1️⃣ 数", 1, 2),
  ("done ✓ → ∞ ≤ ∑ 数", 1, 2),
]


@pytest.mark.parametrize("thought, ours, every", NO_WORDS)
def test_variables_digits_signs_and_emoji_are_no_words(thought, ours, every):
  assert share(thought, "en") == pytest.approx(ours / every)


@pytest.mark.parametrize("thought", ["x² plus y³ 是", "½ plus ¾ 是", "① plus ② 是"])
def test_powers_fractions_and_numerals_are_no_words(thought):
  """They are digits: plus and 是 are left."""
  assert share(thought, "en") == pytest.approx(1 / 2)
  assert share(thought, "zh") == pytest.approx(1 / 2)


# thought, English words, words that are left
LEFT_OUT = [
  ("We run\n```python\nprint(答案)\n```\nand stop 好", 4, 5),
  ("We run\n```\n答案\n```\nand\n```\n答案\n```\nstop 好", 4, 5),
  ("We run 好\n```python\n代码 code", 4, 7),  # not closed: it hides nothing
  ("We call `函数 f` now 好", 3, 4),
  ("so $数 = word$ holds 好", 2, 3),
  ("so $$数\n= word$$ holds 好", 2, 3),
  (r"so \(数 = word\) holds 好", 2, 3),
  ("so \\[数\n= word\\] holds 好", 2, 3),
  (r"so \(a\) and \(b\) hold 好", 3, 4),
  (r"thus \frac{ab}{cd} and \alpha 好", 2, 3),
  (r"thus \mathrm{word} 好", 1, 2),
  ("see https://example.com/page?word=abc now 好", 2, 3),
  ("see http://数.org/数 now 好", 2, 3),
  ("so <answer> then <|im_end|> </b> 好", 2, 3),
  ("so 3 < word and word > 2 好", 4, 5),  # no tag
]


@pytest.mark.parametrize("thought, ours, every", LEFT_OUT)
def test_code_formulas_links_and_tags_are_left_out(thought, ours, every):
  assert share(thought, "en") == pytest.approx(ours / every)
  assert share(thought, "zh") == pytest.approx((every - ours) / every)


def test_a_link_ends_where_chinese_goes_on():
  """看 这 是 the answer: the full stop is not the link's."""
  assert share("看https://a.org/b。这是 the answer", "zh") == pytest.approx(3 / 5)


@pytest.mark.parametrize(
  "thought", ["$x+y$", "3 + 4 = 7", "...", r"\[x^2\]", "x", "`答案`", "😀"]
)
def test_a_chain_without_words_is_neutral(thought):
  assert share(thought, "en") == 1.0
  assert share(thought, "zh") == 1.0


@pytest.mark.parametrize(
  "completion",
  [
    "",
    "<think></think>",
    "<think> \n\t</think><answer>7</answer>",
    "<think>",
    "<think> </think><think>\n</think>",
    "We add. <answer>7</answer>",
    "We add.</think><answer>7</answer>",
    "< think>We add.</think>",
  ],
)
def test_an_empty_chain_or_none_earns_nothing(completion):
  assert language_consistency(completion, "en") == 0.0


@pytest.mark.parametrize("completion", ["", " \n", "</think>add", "  </think>add"])
def test_an_empty_prefilled_chain_earns_nothing(completion):
  assert language_consistency(completion, "en", prefill_think=True) == 0.0


@pytest.mark.parametrize(
  "completion, options, expected",
  [
    ("<think>so 好", {}, 1 / 2),  # still open
    ("<think>so</think>中中<think>好</think>中", {}, 1 / 2),  # two blocks
    ("<think>so</think>中<think>好好", {}, 1 / 3),
    ("中<think>so</think>中<answer>中</answer>", {}, 1.0),
    ("so 好</think>中中", dict(prefill_think=True), 1 / 2),
    ("so 好", dict(prefill_think=True), 1 / 2),
    ("so</think>中<think>好</think>", dict(prefill_think=True), 1 / 2),
    ("<think>so</think>中", dict(prefill_think=True), 1.0),
  ],
)
def test_what_stands_in_think_blocks_counts(completion, options, expected):
  assert language_consistency(completion, "en", **options) == pytest.approx(expected)


# -- letters and their marks -----------------------------------------------------------


@pytest.mark.parametrize(
  "thought, target",
  [
    ("naïve 好", "en"),
    ("déjà été là 好", "fr"),
    ("знайте 你", "ru"),
    ("が か a", "ja"),
  ],
)
def test_composed_and_combining_accents_count_alike(thought, target):
  composed = unicodedata.normalize("NFC", thought)
  combining = unicodedata.normalize("NFD", thought)
  assert share(combining, target) == share(composed, target)


@pytest.mark.parametrize(
  "word, target",
  [("नमस्ते", "hi"), ("สวัสดี", "th"), ("مَرْحَبًا", "ar"), ("שָׁלוֹם", "he")],
)
def test_vowel_signs_belong_to_their_word(word, target):
  assert share(f"{word} hello", target) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
  "thought, target",
  [
    ("人々", "ja"),
    ("人々", "zh"),
    ("二〇二四", "zh"),
    ("ｶﾅ", "ja"),
    ("ジョン・スミス", "ja"),
  ],
)
def test_all_letters_of_a_script_are_the_languages(thought, target):
  assert share(thought, target) == 1.0


def test_a_word_is_of_one_script():
  """A Latin beginning does not make a Russian word English."""
  assert share("abпривет", "en") == pytest.approx(1 / 2)
  assert share("приветab", "ru") == pytest.approx(1 / 2)


# -- between languages of one script ---------------------------------------------------


def fake(sentence):
  return "de" if " und " in sentence else "en" if " and " in sentence else None


@pytest.mark.parametrize(
  "thought, target, expected",
  [
    ("Two and two. Zwei und drei.", "en", 3 / 6),
    ("Two and two. Zwei und drei.", "de", 3 / 6),
    ("Zwei und drei sind fünf", "en", 0.0),
    ("Zwei und drei sind fünf", "de", 1.0),
    ("Zwei plus drei", "en", 1.0),  # it cannot tell: the script counts
    ("Two and two 二. Zwei und drei.", "en", 3 / 7),
    ("Two and two！Zwei und drei\nTwo and two", "en", 6 / 9),
  ],
)
def test_a_detector_tells_languages_of_one_script_apart(thought, target, expected):
  assert share(thought, target, detector=fake) == pytest.approx(expected)


def test_a_detector_sees_no_code_and_no_sentence_without_target_words():
  asked = []
  thought = "We add `secret`. 我们加。 $secret$ Then stop."
  assert share(thought, "en", detector=asked.append) == pytest.approx(4 / 7)
  assert len(asked) == 2
  assert "We add" in asked[0] and "Then stop" in asked[1]
  assert not any("secret" in sentence for sentence in asked)


ENGLISH = "First we have to solve the equation, and then we check whether it holds."
GERMAN = "Zuerst müssen wir die Gleichung lösen, und danach prüfen wir das Ergebnis."
OTHERS = {
  "zh": "我们首先需要解这个方程,然后检查结果是否正确。",
  "ja": "まず方程式を解いてから、結果が正しいかどうかを確認します。",
  "ko": "먼저 방정식을 풀고 결과가 맞는지 확인합니다.",
  "ru": "Сначала нужно решить уравнение и проверить ответ.",
  "el": "Πρώτα πρέπει να λύσουμε την εξίσωση και να ελέγξουμε το αποτέλεσμα.",
  "ar": "يجب علينا أولا حل المعادلة ثم التحقق من النتيجة.",
  "he": "אנחנו צריכים לפתור את המשוואה ואז לבדוק את התוצאה שקיבלנו בסוף.",
  "es": "Primero debemos resolver la ecuación y luego comprobar el resultado.",
  "fr": "Nous devons d'abord résoudre l'équation puis vérifier le résultat.",
  "it": "Dobbiamo prima risolvere l'equazione e poi verificare il risultato.",
  "pt": "Primeiro temos de resolver a equação e depois verificar o resultado.",
}


@pytest.fixture(scope="module")
def cld2():
  pytest.importorskip("pycld2")
  return cld2_detector()


def test_cld2_tells_german_from_english(cld2):
  assert share(ENGLISH, "en", detector=cld2) == 1.0
  assert share(GERMAN, "en", detector=cld2) == 0.0
  assert share(GERMAN, "de", detector=cld2) == 1.0
  english, german = 14, 12  # words
  both = share(f"{ENGLISH} {GERMAN}", "en", detector=cld2)
  assert both == pytest.approx(english / (english + german))


@pytest.mark.parametrize("target", OTHERS)
def test_cld2_leaves_a_language_its_own_sentences(cld2, target):
  assert share(OTHERS[target], target, detector=cld2) == 1.0


@pytest.mark.parametrize(
  "thought", ["we \x00 add", "we \ud800 add", "we \udfff", "é" * 9]
)
def test_cld2_does_not_raise(cld2, thought):
  assert 0.0 <= share(thought, "en", detector=cld2) <= 1.0


# -- all of it -------------------------------------------------------------------------


def test_an_unknown_language_names_the_known_ones():
  with pytest.raises(UserError) as caught:
    share("We add.", "tlh")
  assert "'tlh'" in str(caught.value)
  assert all(language in str(caught.value) for language in LANGUAGES)


def test_whatever_comes_the_shares_lie_in_0_to_1():
  """And two languages of different scripts have at most 1 together."""
  pieces = "so 好 か 한 да \\ [ ] ( ) { } $ $$ ` ``` ' ’ < > / | 7 \n \u0301 \ud800 é"
  pieces = [*pieces.split(" "), " ", "<think>", "</think>", "\\[", "\\text", "https://"]
  rng = random.Random(0)
  for _ in range(2000):
    text = "<think>" + "".join(rng.choices(pieces, k=rng.randrange(30)))
    of = {target: language_consistency(text, target) for target in ("en", "zh", "ru")}
    assert all(isinstance(v, float) and 0.0 <= v <= 1.0 for v in of.values()), text
    without_words = set(of.values()) == {1.0}
    assert without_words or sum(of.values()) <= 1.0 + 1e-9, text


def test_a_text_of_other_languages_never_raises_the_share():
  before = share("We add two and three.", "en")
  for more in ("好", "да", "か", "한"):
    assert share(f"We add two and three. {more}", "en") < before


LONG = {
  "prose": "'We add 中 to x, and $y$ holds; 你好. ' * 6000",
  "one_line": "'word' * 50_000",
  **{
    repr(unit): f"{unit!r} * 10**5"
    for unit in ("$", "`", "\\[", "\\(", "<", "a'", "$$", "\\a{", "<a", "https://")
  },
  "blocks": "'<think>' * 10**5",
  "open_and_shut": "'<think></think>' * 10**5",
  "display_over_inline": "'\\\\[x$' * 10**5",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_and_hostile_chains_take_less_than_two_seconds(text):
  """In a process of its own, for nothing else stops a regular expression."""
  program = f"""
    import time
    from r1jax.rewards.language import language_consistency
    text = "<think>" + {text}
    begin = time.monotonic()
    language_consistency(text, "en")
    print(time.monotonic() - begin)
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=3)
  except subprocess.TimeoutExpired:
    pytest.fail("it hangs")
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 2.0
