"""The rules on tokens give what the host rules give on text; where they do not, a test
says so."""

import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.data.tokenizer import Tokenizer
from r1jax.rewards import accuracy as host_accuracy
from r1jax.rewards import format as host_format
from r1jax.rewards import in_graph
from r1jax.rewards.verdict import OUTCOMES

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def train():
  rng = random.Random(0)
  words = ["so", "wait", "we", "add", "them", "yes", "no", "+-", "*+"]
  texts = [
    f"<think>{' '.join(rng.choices(words, k=5))} {i} + {i % 7} = {i + i % 7}</think>\n"
    f"<answer>{rng.choice([i, 'yes', '+-'])}</answer>"
    for i in range(200)
  ]
  return Tokenizer.train(texts, vocab=360, symbols=(" + ", " = ", ", wait "))


TOKENIZER = train()
TABLE = in_graph.TagTable.of(TOKENIZER)
accuracy = jax.jit(lambda t, m, a: in_graph.accuracy(t, m, a, TABLE)[0])
format_reward = jax.jit(
  lambda t, m, p: in_graph.format_reward(t, m, TABLE, prefill_think=p),
  static_argnums=2,
)


def pack(rows, accepted, width=None):
  """Token lists and accepted answers -> (tokens [N, 1, T], mask, answers [N, K, L])."""
  width = width or max(map(len, rows)) + 2
  tokens = np.full((len(rows), 1, width), TOKENIZER.pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    tokens[i, 0, : len(row)] = row
    mask[i, 0, : len(row)] = True
  encoded = [[TOKENIZER.encode(a) for a in golds] for golds in accepted]
  depth = max(len(golds) for golds in encoded)
  length = max([len(a) for golds in encoded for a in golds], default=1)
  answers = np.full((len(rows), depth, length), -1, np.int32)
  for i, golds in enumerate(encoded):
    for k, gold in enumerate(golds):
      answers[i, k, : len(gold)] = gold
  return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(answers)


def verdicts(rows, accepted, *, prefill=False, width=None):
  """[(accuracy, format)] of the twins on tokens."""
  tokens, mask, answers = pack(rows, accepted, width)
  acc = accuracy(tokens, mask, answers)[:, 0]
  form = format_reward(tokens, mask, prefill)[:, 0]
  return list(zip(acc.tolist(), form.tolist(), strict=True))


def host_verdicts(rows, accepted, *, prefill=False):
  """[(accuracy, format)] of the host rules on the decoded text."""
  found = []
  for row, golds in zip(rows, accepted, strict=True):
    text = TOKENIZER.decode(row)
    form = host_format.format_reward(text, prefill_think=prefill)
    found.append((host_accuracy.accuracy(text, golds), form))
  return found


def agree(rows, accepted, **how):
  ours = verdicts(rows, accepted, **how)
  how.pop("width", None)
  for row, golds, a, b in zip(
    rows, accepted, ours, host_verdicts(rows, accepted, **how), strict=False
  ):
    assert a == b, (TOKENIZER.decode(row), golds, "tokens:", a, "host:", b)
  return ours


HAND = [
  # (completion, accepted, accuracy, format without prefill, format with prefill)
  ("<think>so</think><answer>7</answer>", ["7"], 1, 1, 0),
  ("so</think><answer>7</answer>", ["7"], 1, 0, 1),
  ("<think>so</think>\n<answer> 7 \n</answer>\n", ["7"], 1, 1, 0),
  ("\n so </think> \n <answer>\n7</answer> ", ["7"], 1, 0, 1),
  ("<think>so</think><answer>8</answer>", ["7"], 0, 1, 0),
  ("<think>so</think><answer>8</answer>", ["7", "8"], 1, 1, 0),
  ("<think>so</think><answer>42</answer>", ["4", "2", "42"], 1, 1, 0),
  ("<think>so</think><answer>42</answer>", ["4", "2"], 0, 1, 0),
  ("<think>so</think><answer>4</answer>", ["42"], 0, 1, 0),
  ("<think>so</think><answer>4 2</answer>", ["42"], 0, 1, 0),
  ("<think>so</think><answer>+-</answer>", ["*+", "+-"], 1, 1, 0),
  ("<think>so</think><answer>yes</answer>", ["yes"], 1, 1, 0),
  ("<think>so</think><answer></answer>", ["7"], 0, 0, 0),
  ("<think>so</think><answer> \n </answer>", ["7"], 0, 0, 0),
  ("<think></think><answer>7</answer>", ["7"], 1, 0, 0),
  ("<think> \n</think><answer>7</answer>", ["7"], 1, 0, 0),
  ("</think><answer>7</answer>", ["7"], 1, 0, 0),
  ("<answer>7</answer>", ["7"], 1, 0, 0),
  ("<answer>7</answer><answer>8</answer>", ["7"], 0, 0, 0),
  ("<answer>7</answer><answer>8</answer>", ["8"], 1, 0, 0),
  ("<think>so</think><answer>7</answer><answer>7</answer>", ["7"], 1, 0, 0),
  ("<answer>7<answer>8</answer>", ["8"], 1, 0, 0),
  ("<answer>7</answer>8</answer>", ["7"], 1, 0, 0),
  ("<answer>7</answer><answer>8", ["7"], 0, 0, 0),
  ("<answer>7</answer><answer></answer>", ["7"], 0, 0, 0),
  ("<think>so <answer>7</answer></think>", ["7"], 0, 0, 0),
  ("<think><answer>1</answer></think><answer>7</answer>", ["7"], 1, 0, 0),
  ("<think><answer>7</answer></think><answer>1</answer>", ["7"], 0, 0, 0),
  ("<answer>7</answer><think>so</think>", ["7"], 0, 0, 0),
  ("<think>so<answer>7</answer>", ["7"], 0, 0, 0),
  ("<think>so</think><answer>7", ["7"], 0, 0, 0),
  ("<think>so</think><think>so<answer>7</answer>", ["7"], 0, 0, 0),
  ("<think>so</think>7</answer>", ["7"], 0, 0, 0),
  ("<think>so</think></answer>7<answer>", ["7"], 0, 0, 0),
  ("<think>so</think>7", ["7"], 0, 0, 0),
  ("<think>so", ["7"], 0, 0, 0),
  ("<think>so<think>so</think><answer>7</answer>", ["7"], 1, 0, 0),
  ("<think>so</think></think><answer>7</answer>", ["7"], 1, 0, 0),
  ("so<think>so</think><answer>7</answer>", ["7"], 1, 0, 0),
  ("<think>so</think>so<answer>7</answer>", ["7"], 1, 0, 0),
  ("<think>so</think><answer>7</answer>so", ["7"], 1, 0, 0),
  ("so</think><answer>7</answer>so", ["7"], 1, 0, 0),
  ("so</think>so<answer>7</answer>", ["7"], 1, 0, 0),
  ("<think>so</think><answer><think>7</answer>", ["7"], 0, 0, 0),
  ("<think>so</think><answer>7<|User|></answer>", ["7"], 0, 1, 0),
  ("<think>\u00e9 \u6f22</think><answer>\u6f22</answer>", ["\u6f22"], 1, 1, 0),
  ("7", ["7"], 0, 0, 0),
  (" ", ["7"], 0, 0, 0),
  ("", ["7"], 0, 0, 0),
]


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "truncated"])
@pytest.mark.parametrize("prefill", [False, True])
def test_completions_written_by_hand_equal_the_host_rules(prefill, ended):
  tail = [TOKENIZER.eos_id] if ended else []
  rows = [TOKENIZER.encode(text) + tail for text, *_ in HAND]
  accepted = [case[1] for case in HAND]
  found = agree(rows, accepted, prefill=prefill)
  for case, verdict in zip(HAND, found, strict=True):
    assert verdict == (case[2], case[4 if prefill else 3]), case


@pytest.mark.parametrize("prefill", [False, True])
def test_random_mixtures_equal_the_host_rules(prefill):
  """Digits without 0: `07` is 7 on the host alone."""
  rng = random.Random(int(prefill))
  words = ["so", "wait", "yes", "we", "them", " + ", " = ", ", wait "]
  space, digits = [" ", "\n", "  ", "\t"], list("123456789")
  rows, accepted = [], []
  for _ in range(400):
    if rng.random() < 0.5:  # anything at all
      kinds = rng.choices([TAGS, words, digits, space], k=rng.randint(0, 12))
      parts = [rng.choice(kind) for kind in kinds]
    else:  # nearly right, with one accident
      parts = ["<think>", "so", "</think>", "<answer>", rng.choice(digits), "</answer>"]
      if prefill and rng.random() < 0.7:
        parts = parts[1:]
      at = rng.randrange(len(parts) + 1)
      what = rng.choice([*TAGS, *space, *words, *digits, ""])
      if rng.random() < 0.5:
        parts.insert(at, what)
      elif at < len(parts):
        parts[at] = what
    row = TOKENIZER.encode("".join(parts))
    if rng.random() < 0.5:
      row = [*row, TOKENIZER.eos_id]
    elif rng.random() < 0.3:
      row = row[: rng.randint(0, len(row))]  # cut by the window
    rows.append(row)
    golds = rng.choices([*digits, "12", "37", "yes", "345"], k=rng.randint(1, 3))
    answer = host_accuracy.extract_answer("".join(parts))
    if answer is not None and answer.isdigit() and rng.random() < 0.6:
      golds[rng.randrange(len(golds))] = answer
    accepted.append(golds)
  found = agree(rows, accepted, prefill=prefill)
  assert 40 < sum(a for a, _ in found) < 360  # both verdicts do occur
  assert 20 < sum(f for _, f in found) < 380


def outcomes(rows, accepted, prefill):
  tokens, mask, answers = pack(rows, accepted)
  acc, outcome = in_graph.accuracy(tokens, mask, answers, TABLE, prefill_think=prefill)
  names = [OUTCOMES[i] for i in outcome[:, 0].tolist()]
  assert [n == "correct" for n in names] == acc[:, 0].astype(bool).tolist()
  return names


@pytest.mark.parametrize("prefill", [False, True])
def test_outcomes_equal_the_host_rules(prefill):
  rng = random.Random(7)
  rows = [TOKENIZER.encode(text) for text, *_ in HAND]
  accepted = [case[1] for case in HAND]
  for _ in range(200):
    parts = rng.choices([*TAGS, "so", "7", "8", " "], k=rng.randint(0, 9))
    rows.append(TOKENIZER.encode("".join(parts)))
    accepted.append(["7"])
  found = outcomes(rows, accepted, prefill)
  for row, golds, ours in zip(rows, accepted, found, strict=True):
    text = TOKENIZER.decode(row)
    said = host_accuracy.answered(text, golds, prefill_think=prefill).outcome
    if host_accuracy.answered(text, golds).detail != "4 2":
      assert ours == said, (text, golds)
  assert set(found) == {"correct", "wrong", "unparsable"}


@pytest.mark.parametrize("width_left", [0, 1])
def test_an_answer_at_the_end_of_the_window_counts(width_left):
  row = TOKENIZER.encode("<think>so</think><answer>7</answer>")
  wide = ["7", "123456789"]  # accepted answers longer than what is left of the window
  assert agree([row], [wide], width=len(row) + width_left) == [(1.0, 1.0)]
  cut = row[:-1]
  assert agree([cut], [wide], width=len(cut)) == [(0.0, 0.0)]


def test_what_stands_outside_the_mask_does_not_count():
  row = TOKENIZER.encode("<think>so</think><answer>7</answer>")
  more = TOKENIZER.encode("<answer>8</answer>so")
  tokens, mask, answers = pack([row + more, row + more], [["7"], ["8"]])
  mask = mask.at[:, :, len(row) :].set(False)
  assert accuracy(tokens, mask, answers)[:, 0].tolist() == [1.0, 0.0]
  assert format_reward(tokens, mask, False)[:, 0].tolist() == [1.0, 1.0]


def test_a_row_without_accepted_answers_is_never_right():
  texts = ["<answer></answer>", "<answer>7</answer>", "", "<answer> </answer>"]
  tokens, mask, answers = pack([TOKENIZER.encode(t) for t in texts], [["7"]] * 4)
  assert not accuracy(tokens, mask, jnp.full_like(answers, -1)).any()


def test_each_row_of_a_group_is_judged_against_its_own_problem():
  texts = ["<answer>7</answer>", "<answer>8</answer>"]
  tokens, mask, answers = pack([TOKENIZER.encode(t) for t in texts], [["7"], ["8"]])
  tokens, mask = (jnp.concatenate([x, x[::-1]], axis=1) for x in (tokens, mask))
  got, _ = in_graph.accuracy(tokens, mask, answers, TABLE)
  assert got.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("prefill", [False, True])
def test_the_rule_reward_is_the_weighted_sum(prefill):
  texts = ["<think>so</think><answer>7</answer>", "so</think><answer>8</answer>"]
  tokens, mask, answers = pack([TOKENIZER.encode(t) for t in texts], [["7"], ["7"]])
  reward = in_graph.rule_reward(
    TABLE, accuracy_weight=2.0, format_weight=0.5, prefill_think=prefill
  )
  got = reward(
    types.SimpleNamespace(answers=answers),
    types.SimpleNamespace(tokens=tokens, mask=mask),
  )
  assert set(got.parts) == {"accuracy", "format"}
  assert got.parts["accuracy"].tolist() == [[1.0], [0.0]]
  assert got.parts["format"].tolist() == [[float(not prefill)], [float(prefill)]]
  assert got.weights == (("accuracy", 2.0), ("format", 0.5))
  want = [[2.5 - 0.5 * prefill], [0.5 * prefill]]
  assert got.total.tolist() == want
  assert got.total.dtype == jnp.float32


def test_a_further_part_has_its_weight_and_leaves_the_others_as_they_were():
  first, price = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[-0.5, 0.25]])
  one = in_graph.Rewards.of(accuracy=(2.0, first))
  both = one.plus("price", 2.0, price)
  assert one.total.tolist() == [[2.0, 0.0]] and set(one.parts) == {"accuracy"}
  assert both.total.tolist() == [[1.0, 0.5]]
  assert both.parts["accuracy"].tolist() == [[1.0, 0.0]]
  assert both.parts["price"].tolist() == [[-0.5, 0.25]]
  assert both.weights == (("accuracy", 2.0), ("price", 2.0))


# -- where tokens and text part, on purpose --------------------------------------------


def spelled(tag):
  """A tag in single characters instead of its own token."""
  row = [i for c in tag for i in TOKENIZER.encode(c)]
  assert TOKENIZER.id(tag) not in row and TOKENIZER.decode(row) == tag
  return row


def test_known_difference_a_spelled_out_tag_is_no_tag_on_tokens():
  text = TOKENIZER.encode
  right = text("<think>so</think><answer>7</answer>")
  rows = [
    spelled("<think>") + right[1:],
    right[:-1] + spelled("</answer>"),
    right + spelled("<answer>"),
    text("<think>") + spelled("<think>") + right[1:],
  ]
  accepted = [["7"]] * 4
  assert host_verdicts(rows, accepted) == [(1, 1), (1, 1), (0, 0), (1, 0)]
  # The last two are more lenient than the host: nothing there but plain text.
  assert verdicts(rows, accepted) == [(1, 0), (0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(
  "said, gold",
  [("07", "7"), ("7.0", "7"), ("+7", "7"), ("1/2", "0.5"), ("0.50", "0.5")],
)
def test_known_difference_numbers_are_equal_as_numbers_on_the_host_alone(said, gold):
  rows = [TOKENIZER.encode(f"<think>so</think><answer>{said}</answer>")]
  assert host_verdicts(rows, [[gold]]) == [(1, 1)]
  assert verdicts(rows, [[gold]]) == [(0, 1)]


def test_known_difference_white_space_within_a_piece_is_part_of_the_answer():
  """A word with its space in front can be one piece, and then is another answer."""
  rows = [TOKENIZER.encode("<think>so</think><answer> yes</answer>")]
  assert host_verdicts(rows, [["yes"]]) == [(1, 1)]
  joined = TOKENIZER.encode(" yes")[-len(TOKENIZER.encode("yes")) :]
  same = joined == TOKENIZER.encode("yes")
  assert verdicts(rows, [["yes"]]) == [(float(same), 1)]


def test_known_difference_white_space_of_many_bytes_is_text_on_tokens():
  """A no-break space falls back to two byte pieces, neither of which is a space."""
  rows = [
    TOKENIZER.encode("<think>so</think><answer>\u00a07</answer>"),
    TOKENIZER.encode("<think>\u00a0</think><answer>7</answer>"),
  ]
  assert host_verdicts(rows, [["7"]] * 2) == [(1, 1), (1, 0)]
  assert verdicts(rows, [["7"]] * 2) == [(0, 1), (1, 1)]
