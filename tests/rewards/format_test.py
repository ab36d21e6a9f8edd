"""One think block, one answer block, both with text, and nothing else."""

import itertools

import pytest

from r1jax.rewards.format import format_reward

GOOD = [
  "<think>a</think><answer>b</answer>",
  " <think>a</think> <answer>b</answer> ",
  "\n<think>\na b\n</think>\n\n<answer>\n7\n</answer>\n",
  "<think>a < b > c</think><answer>d</answer>",
  "<think>.</think>\t<answer>-</answer>",
]
BAD = [
  "",
  "a",
  "<think></think><answer></answer>",
  "<think>a</think><answer> </answer>",
  "<think> \n</think><answer>b</answer>",
  "<think>a</think>",
  "<answer>b</answer>",
  "<answer>b</answer><think>a</think>",
  "x<think>a</think><answer>b</answer>",
  "<think>a</think>x<answer>b</answer>",
  "<think>a</think><answer>b</answer>x",
  "<think>a</think><answer>b",
  "<think>a<answer>b</answer>",
  "<think>a</think><answer>b</answer><answer>c</answer>",
  "<think>a</think><think>a</think><answer>b</answer>",
  "<think>a<think>c</think></think><answer>b</answer>",
  "<think>a<answer>b</answer></think>",
  "<think>a</think><answer><think>b</think></answer>",
  "</think>a<think><answer>b</answer>",
  "<think>a</think></answer>b<answer>",
  "<Think>a</Think><answer>b</answer>",
  "< think>a</think><answer>b</answer>",
]


@pytest.mark.parametrize("text", GOOD)
def test_the_layout_pays(text):
  assert format_reward(text) == 1.0


@pytest.mark.parametrize("text", BAD)
def test_anything_else_does_not(text):
  assert format_reward(text) == 0.0


@pytest.mark.parametrize("text", GOOD + BAD)
def test_with_the_opening_tag_in_the_prompt_the_rest_is_judged_alike(text):
  """What follows a prefilled `<think>` is right if and only if the whole is."""
  head, tag, rest = text.partition("<think>")
  if tag and not head.strip():
    assert format_reward(rest, prefill_think=True) == format_reward(text)


@pytest.mark.parametrize("text", GOOD)
def test_opening_a_prefilled_block_again_does_not_pay(text):
  assert format_reward(text, prefill_think=True) == 0.0


def test_of_all_orders_of_the_four_tags_one_pays():
  tags = ["<think>", "</think>", "<answer>", "</answer>"]
  paid = [
    order
    for order in itertools.permutations(tags)
    if format_reward(f"{order[0]}a{order[1]}{order[2]}b{order[3]}")
  ]
  assert paid == [tuple(tags)]
