"""R1's chat format and the language of the thinking, on tokens: they give what the host
rules give on text. And a mean is over what it is meant for."""

import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data import corpus
from r1jax.data.assistant import Assistant
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.rewards import in_graph
from r1jax.rewards.accuracy import accuracy
from r1jax.rewards.format import format_reward
from r1jax.rewards.in_graph import LanguageTable, Rewards, TagTable
from r1jax.rewards.language import language_consistency, thinking
from r1jax.rewards.total import composed
from r1jax.rewards.verdict import OUTCOMES

THINK = ["<think>", "</think>"]
ANSWER = ["<answer>", "</answer>"]
ROLES = ["<|User|>", "<|Assistant|>"]
LANGUAGES = ("zh", "en")
WIDTH = 24
MIX = dict(facts=0.2, bare=0.1, guess=0.2, checked=0.3, request=0.2)


def train():
  task, rng = Assistant(), random.Random(0)
  about = [task.problem(rng) for _ in range(60)] + task.requests()[::7]
  made = corpus.pages(
    task, about, 600, mix=MIX, template="short", facts_a_page=3, seed=0
  )
  return Tokenizer.train([a + b for a, b in made], vocab=480, symbols=task.symbols)


TOKENIZER = train()
TAGS = TagTable.of(TOKENIZER)
TABLE = LanguageTable.of(TOKENIZER, LANGUAGES)
# What stands for itself: no padding, BOS, EOS or unknown, and no byte of a letter.
PIECES = [
  i
  for i in range(TOKENIZER.eos_id + 1, TOKENIZER.vocab)
  if "<0x" not in TOKENIZER.piece(i)
]
TEXTS = {i: TOKENIZER.decode([i]) for i in PIECES}
SPACES = [i for i in PIECES if TEXTS[i].isspace()]


@functools.partial(jax.jit, static_argnums=3)
def both(tokens, mask, target, prefill):
  how = dict(prefill_think=prefill)
  form = in_graph.chat_format(tokens, mask, TAGS, **how)
  share = in_graph.language_consistency(tokens, mask, target, TAGS, TABLE, **how)
  return form, share


def pack(rows, seed=0):
  """Token lists -> (tokens [N, 1, T], mask); what is masked is garbage."""
  width = max([WIDTH, *map(len, rows)])
  rng = np.random.default_rng(seed)
  tokens = rng.choice(PIECES, (len(rows), 1, width)).astype(np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    tokens[i, 0, : len(row)], mask[i, 0, : len(row)] = row, True
  return jnp.asarray(tokens), jnp.asarray(mask)


def verdicts(rows, languages, *, prefill, seed=0):
  """[(format, share)] on tokens."""
  target = jnp.asarray([LANGUAGES.index(x) for x in languages], jnp.int32)
  found = both(*pack(rows, seed), target, prefill)
  return np.stack([np.asarray(x)[:, 0] for x in found], axis=1)


def host(rows, languages, *, prefill):
  found = []
  for row, language in zip(rows, languages, strict=True):
    text, how = TOKENIZER.decode(row), dict(prefill_think=prefill)
    form = format_reward(text, style="chat", **how)
    found.append((form, language_consistency(text, language, **how)))
  return np.array(found)


def agree(rows, languages, *, prefill, seed=0):
  ours = verdicts(rows, languages, prefill=prefill, seed=seed)
  want = host(rows, languages, prefill=prefill)
  for row, a, b in zip(rows, ours, want, strict=True):
    assert np.allclose(a, b, atol=1e-6), (TOKENIZER.decode(row), "tokens", a, "host", b)
  return ours


# -- by hand ---------------------------------------------------------------------------

# (completion, chat format, the same with a prefilled <think>)
FORMATS = [
  ("<think>7</think>8", 1, 0),
  ("7</think>8", 0, 1),
  ("<think>7</think><answer>8</answer>", 1, 0),
  ("<think>7</think>the answer is <answer>8</answer> thank you", 1, 0),
  ("7</think>答案是<answer>8</answer>谢谢", 0, 1),
  ("<think>7</think><answer>8", 1, 0),
  ("<think>7</think>8</answer><answer>", 1, 0),
  ("<think>7</think><answer></answer>", 0, 0),
  ("<think>7</think><answer> \n</answer>", 0, 0),
  (" \n<think> 7\n</think>\n 8 ", 1, 0),
  ("<think>7</think>", 0, 0),
  ("<think>7</think> \n", 0, 0),
  ("<think></think>8", 0, 0),
  ("<think> \n</think>8", 0, 0),
  ("</think>8", 0, 0),
  (" </think>8", 0, 0),
  ("3<think>7</think>8", 0, 0),
  ("<answer><think>7</think>8", 0, 0),
  ("<think><answer>7</answer></think>8", 0, 0),
  ("<think>7<answer></think>8", 0, 0),
  ("7<answer></think>8", 0, 0),
  ("<think>7<think>7</think>8", 0, 0),
  ("<think>7</think></think>8", 0, 0),
  ("<think>7</think>8<think>", 0, 0),
  ("7</think>8<think>", 0, 0),
  ("7</think>8</think>8", 0, 0),
  ("<think>7</think>8<think>7</think>8", 0, 0),
  ("</think>7<think>8", 0, 0),
  ("<think>7", 0, 0),
  ("7", 0, 0),
  (" ", 0, 0),
  ("", 0, 0),
]


def ended(rows):
  return [[*row, TOKENIZER.eos_id] for row in rows]


@pytest.mark.parametrize("eos", [True, False], ids=["ended", "truncated"])
@pytest.mark.parametrize("prefill", [False, True])
def test_formats_by_hand(prefill, eos):
  rows = [TOKENIZER.encode(text) for text, *_ in FORMATS]
  rows = ended(rows) if eos else rows
  want = [case[1 + prefill] for case in FORMATS]
  for found in (verdicts, host):
    got = found(rows, ["en"] * len(rows), prefill=prefill)
    assert got[:, 0].tolist() == want


# (completion, share of English, the same after a prefilled <think>; None: a chain of
# nothing but a tag, see below)
SHARES = [
  ("<think>4 so 5</think>则", 1, 1),
  ("<think>4 so 5则6</think>", 1 / 2, 1 / 2),
  ("<think>4 so 5则6等7</think>", 1 / 3, 1 / 3),
  ("4 so 5则6</think> so ", 0, 1 / 2),
  ("<think>我猜</think>I guess", 0, 0),
  ("<think>I guess</think>我猜", 1, 1),  # "I" is a variable
  ("<think>I guess我猜</think>", 1 / 3, 1 / 3),
  ("<think>the answer is 答案是</think>", 1 / 2, 1 / 2),
  ("<think> I can not help我不能帮</think>", 3 / 7, 3 / 7),
  ("<think>4 + 3 = 7</think>则", 1, 1),  # no word
  ("<think> \n</think> so ", 0, None),
  ("<think></think> so ", 0, None),
  (" \n</think> so ", 0, 0),
  ("</think> so ", 0, 0),
  (" so ", 0, 1),
  ("则", 0, 0),
  ("<think>则", 0, 0),
  ("<think> so ", 1, 1),
  ("<think> so </think>则<think>等", 1 / 2, 1 / 2),
  ("则<think> so </think>等", 1, 1 / 2),
  ("<think> so <think>则</think>等", 1 / 2, 1 / 2),
  ("<think> so </think>则</think>等", 1, 1),
  ("", 0, 0),
]


@pytest.mark.parametrize("eos", [True, False], ids=["ended", "truncated"])
@pytest.mark.parametrize("prefill", [False, True])
def test_languages_by_hand(prefill, eos):
  cases = [case for case in SHARES if case[1 + prefill] is not None]
  rows = [TOKENIZER.encode(text) for text, *_ in cases]
  rows = ended(rows) if eos else rows
  found = agree(rows, ["en"] * len(rows), prefill=prefill)
  np.testing.assert_allclose(found[:, 1], [case[1 + prefill] for case in cases], 1e-6)
  agree(rows, ["zh"] * len(rows), prefill=prefill)


def test_a_table_counts_the_words_of_its_tokens():
  def count(text):
    (token,) = TOKENIZER.encode(text)
    return (*TABLE.words[:, token].tolist(), int(TABLE.every[token]))

  assert TABLE.words.shape == (2, TOKENIZER.vocab)
  assert count("the answer is ") == (0, 3, 3)
  assert count("答案是") == (3, 0, 3)
  assert count("I guess") == (0, 1, 1)
  assert count(" + ") == count("7") == count("，") == count("\n") == (0, 0, 0)
  special = [TOKENIZER.pad_id, TOKENIZER.unk_id, TOKENIZER.bos_id, TOKENIZER.eos_id]
  assert not TABLE.every[special].any() and not TABLE.words[:, special].any()


def test_an_unknown_language_is_refused():
  with pytest.raises(UserError, match=r"'xx' is not one of.*en"):
    LanguageTable.of(TOKENIZER, ["en", "xx"])


def test_without_a_target_language_any_will_do():
  tokens, mask = pack([TOKENIZER.encode(t) for t, *_ in SHARES])
  target = jnp.full(len(SHARES), -1, jnp.int32)
  assert (both(tokens, mask, target, False)[1] == 1.0).all()


def test_each_problem_of_a_batch_has_its_own_language():
  row = TOKENIZER.encode("<think> so 则等</think>")
  tokens, mask = (jnp.tile(x, (3, 2, 1)) for x in pack([row]))
  got = both(tokens, mask, jnp.asarray([0, 1, -1]), False)[1]
  np.testing.assert_allclose(got, [[2 / 3] * 2, [1 / 3] * 2, [1.0] * 2], rtol=1e-6)


# -- at random -------------------------------------------------------------------------


def apart(row):
  """The row with a space between Latin letters: on tokens a word is one of a token."""
  found = []
  for token in row:
    if found and found[-1] in TEXTS and token in TEXTS:
      left, right = TEXTS[found[-1]][-1], TEXTS[token][0]
      if all(c.isascii() and c.isalpha() for c in (left, right)):
        found.append(TOKENIZER.id("▁"))
    found.append(token)
  return found


def random_rows(kinds, count, seed):
  """Rows of tokens: anything of the kinds, or nearly right with an accident."""
  rng, rows = random.Random(seed), []
  for _ in range(count):
    if rng.random() < 0.4:
      row = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 12))]
    else:
      inner = [rng.choice(kinds[-1]) for _ in range(rng.randint(0, 4))]
      outer = [rng.choice(rng.choice(kinds[1:])) for _ in range(rng.randint(0, 3))]
      begun = [TAGS.think] if rng.random() < 0.6 else []
      row = [*begun, *inner, TAGS.end_think, *outer]
      if rng.random() < 0.4:
        row.insert(rng.randrange(len(row) + 1), rng.choice(rng.choice(kinds)))
    row = apart(row)[: WIDTH - 1]
    if rng.random() < 0.3:
      row = row[: rng.randint(0, len(row))]
    elif rng.random() < 0.7:
      row = [*row, TOKENIZER.eos_id]
    rows.append(row)
  return rows


def ids(pieces):
  return [TOKENIZER.id(piece) for piece in pieces]


@pytest.mark.parametrize("prefill", [False, True])
def test_formats_of_random_tokens_equal_the_host_rule(prefill):
  words = [i for i in PIECES if i not in {*ids(THINK), *ids(ANSWER), *SPACES}]
  rows = random_rows([ids(THINK), ids(ANSWER), SPACES, words], 4000, int(prefill))
  ours = verdicts(rows, ["en"] * len(rows), prefill=prefill)[:, 0]
  want = host(rows, ["en"] * len(rows), prefill=prefill)[:, 0]
  wrong = [TOKENIZER.decode(rows[i]) for i in np.flatnonzero(ours != want)]
  assert not wrong
  assert 200 < ours.sum() < 3800  # both verdicts do occur


@pytest.mark.parametrize("prefill", [False, True])
def test_languages_of_random_tokens_equal_the_host_rule(prefill):
  tags = {*ids(THINK), *ids(ANSWER), *ids(ROLES)}
  words = [i for i in PIECES if i not in {*tags, *SPACES}]
  rows = random_rows([ids(THINK), SPACES, words], 4000, 10 + prefill)
  # A chain of nothing but tags is tested below.
  some = []
  for row in rows:
    chain = thinking(TOKENIZER.decode(row), prefill_think=prefill)
    if "<think>" not in chain or chain.replace("<think>", "").strip():
      some.append(row)
  rng = random.Random(0)
  languages = [rng.choice(LANGUAGES) for _ in some]
  found = agree(some, languages, prefill=prefill, seed=1)[:, 1]
  assert min(np.mean(found == 0), np.mean(found == 1)) > 0.05
  assert np.mean((found > 0) & (found < 1)) > 0.1


@pytest.mark.parametrize(
  "text",
  [
    "<think>则<answer>7</answer>",  # truncated, or never ended
    "<think> so 则<answer>7</answer></think>7",
    "<think>则<|User|></think>",
    "<think> so <|Assistant|>则</think>",
  ],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tag_is_no_word_of_the_thinking(text, language):
  agree([TOKENIZER.encode(text)], [language], prefill=False)


@pytest.mark.parametrize("prefill", [False, True])
def test_a_chain_of_nothing_but_an_opening_tag_is_what_it_is_on_the_host(prefill):
  agree([ids(["<think>", "<think>", "</think>"])], ["en"], prefill=prefill)


# -- the reward of a rule --------------------------------------------------------------


def rule(prefill=False, **changes):
  how = dict(accuracy_weight=2.0, format_weight=0.5, language_weight=0.25)
  how |= dict(format_style="chat", table=TABLE, targets=np.array([1, 0, -1]))
  return in_graph.rule_reward(TAGS, prefill_think=prefill, **(how | changes))


SAID = [
  "<think>4 so 7</think><answer>7</answer>",
  "<think>4则7</think>the answer is <answer>8</answer>",
  "4 so 5则7</think>答案是<answer>7</answer>谢谢",
  "<think>4 so 5则7</think>",
]


def rolled(prefill=False):
  """Problems 2, 0 and 1, each with the same four completions; 7 is right."""
  tokens, mask = pack([TOKENIZER.encode(text) for text in SAID])
  tokens, mask = (jnp.tile(x[:, 0][None], (3, 1, 1)) for x in (tokens, mask))
  seven = jnp.full((3, 1, 1), TOKENIZER.encode("7")[0], jnp.int32)
  asked = types.SimpleNamespace(answers=seven, ids=jnp.asarray([2, 0, 1]))
  return asked, types.SimpleNamespace(tokens=tokens, mask=mask)


@pytest.mark.parametrize("prefill", [False, True])
def test_the_reward_of_stage_1_is_composed_of_the_host_rules(prefill):
  got = jax.jit(lambda: rule(prefill)(*rolled()))()
  assert list(got.parts) == ["accuracy", "format", "language"]
  for b, language in enumerate(["", "en", "zh"]):
    for g, text in enumerate(SAID):
      how = dict(prefill_think=prefill)
      share = language_consistency(text, language, **how) if language else 1.0
      parts = {
        "accuracy": accuracy(text, ["7"], **how),
        "format": format_reward(text, style="chat", **how),
        "language": share,
      }
      for name, x in parts.items():
        np.testing.assert_allclose(got.parts[name][b, g], x, err_msg=name, rtol=1e-6)
      weights = dict(accuracy=2.0, format=0.5, language=0.25)
      want = composed("stage_1", parts, **weights)
      np.testing.assert_allclose(got.total[b, g], want, rtol=1e-6)
  assert OUTCOMES[int(got.outcome[0, 0])] == "correct"


def test_without_a_table_no_language_is_rewarded_and_tags_are_the_style():
  got = rule(table=None, format_style="tags")(*rolled())
  assert list(got.parts) == ["accuracy", "format"]
  assert got.parts["format"][0].tolist() == [1, 0, 0, 0]
  np.testing.assert_allclose(
    got.total, 2 * got.parts["accuracy"] + 0.5 * got.parts["format"]
  )


# -- means -----------------------------------------------------------------------------

VALUES = jnp.asarray([[1.0, 3.0], [5.0, 11.0], [20.0, 40.0]])
MEANT = {"model": jnp.asarray([True, False, True]), "none": jnp.zeros(3, bool)}


def some_rewards(lost=()):
  outcome = np.full((3, 2), OUTCOMES.index("wrong"))
  for place in lost:
    outcome[place] = OUTCOMES.index("infrastructure")
  made = Rewards.of(jnp.asarray(outcome), model=(1.0, VALUES), rule=(2.0, VALUES))
  return made.replace(meant=MEANT)


def test_a_mean_is_over_the_problems_that_a_part_is_meant_for():
  ours = some_rewards()
  assert ours.mean(VALUES, "model") == 64 / 4
  assert ours.mean(VALUES, "rule") == ours.mean(VALUES) == 80 / 6
  assert ours.mean(VALUES, "none") == 0.0


def test_a_mean_leaves_out_what_was_lost():
  ours = some_rewards(lost=[(0, 1), (1, 0)])
  assert ours.mean(VALUES) == pytest.approx(72 / 4)
  assert ours.mean(VALUES, "model") == pytest.approx(61 / 3)
  every = some_rewards(lost=[(0, 0), (0, 1), (2, 0), (2, 1)])
  assert every.mean(VALUES, "model") == 0.0 and every.mean(VALUES) == 8.0


def test_what_a_part_is_meant_for_survives_jit_and_another_part():
  ours = jax.jit(lambda r: r.plus("more", 0.5, VALUES))(some_rewards())
  assert ours.mean(VALUES, "model") == 16.0
  assert ours.mean(VALUES, "more") == 80 / 6


def test_nan_outside_of_what_is_meant_does_not_reach_the_mean():
  ours = some_rewards()
  values = VALUES.at[1].set(jnp.nan)
  assert ours.mean(values, "model") == 16.0
