"""Problems: files good and bad, sides that never mix, and a stream that resumes."""

import json
import random

import numpy as np
import pytest

from r1jax.data import problems, sources
from r1jax.data.chain import Chain
from r1jax.data.problem import Problem
from r1jax.errors import UserError


def write(tmp_path, *lines):
  path = tmp_path / "set.jsonl"
  path.write_bytes(
    b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n"
  )
  return path


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "line, want",
  [
    ('{"problem": "1 + 1", "answer": "2"}', Problem("1 + 1", ("2",))),
    ('{"question": " 1 + 1 ", "answer": " 2 "}', Problem("1 + 1", ("2",))),
    ('{"problem": "p", "answer": ["1/2", "0.5"]}', Problem("p", ("1/2", "0.5"))),
    ('{"problem": "p", "answer": 7}', Problem("p", ("7",))),
    ('{"problem": "p", "answer": -0.5}', Problem("p", ("-0.5",))),
    ('{"problem": "p", "answer": 0}', Problem("p", ("0",))),
    ('{"problem": "p", "answer": "2 + 3 = 5\\n#### 5"}', Problem("p", ("5",))),
    ('{"problem": "p", "answer": "#### 1\\n#### 5"}', Problem("p", ("5",))),
    ('{"problem": "p", "answer": "5", "level": 3}', Problem("p", ("5",))),
    (
      '{"problem": "\u00e9\u6f22", "answer": "\u6f22"}',
      Problem("\u00e9\u6f22", ("\u6f22",)),
    ),
    ('{"problem": "p", "answer": "5"}\r', Problem("p", ("5",))),
  ],
)
def test_a_good_line_is_read(tmp_path, line, want):
  assert sources.read("jsonl", write(tmp_path, line)) == [want]


def test_empty_lines_are_no_lines(tmp_path):
  path = write(tmp_path, "", '{"problem": "p", "answer": "1"}', "  ", "\r", "")
  assert sources.read("jsonl", str(path)) == [Problem("p", ("1",))]


BAD = [
  ("{", "not JSON"),
  ("plain text", "not JSON"),
  ('{"problem": "p", "answer": "1"} x', "not JSON"),
  ("[1, 2]", "not a JSON object"),
  ("7", "not a JSON object"),
  ("null", "not a JSON object"),
  ("{}", 'under "problem"'),
  ('{"problem": "", "answer": "1"}', 'under "problem"'),
  ('{"problem": "  ", "answer": "1"}', 'under "problem"'),
  ('{"problem": 7, "answer": "1"}', 'under "problem"'),
  ('{"problem": null, "answer": "1"}', 'under "problem"'),
  ('{"problem": "p"}', 'under "answer"'),
  ('{"problem": "p", "answer": ""}', 'under "answer"'),
  ('{"problem": "p", "answer": " "}', 'under "answer"'),
  ('{"problem": "p", "answer": null}', 'under "answer"'),
  ('{"problem": "p", "answer": true}', 'under "answer"'),
  ('{"problem": "p", "answer": []}', 'under "answer"'),
  ('{"problem": "p", "answer": ["1", null]}', 'under "answer"'),
  ('{"problem": "p", "answer": {"a": 1}}', 'under "answer"'),
  (b'{"problem": "\xff", "answer": "1"}', "not UTF-8"),
]


@pytest.mark.parametrize("line, why", BAD)
def test_a_bad_line_is_refused_by_number_with_both_remedies(tmp_path, line, why):
  good = '{"problem": "p", "answer": "1"}'
  path = write(tmp_path, good, "", line, good)
  with pytest.raises(UserError) as error:
    sources.read("jsonl", path)
  text = str(error.value)
  assert f"{path}:3: " in text and why in text
  assert '{"problem": "...", "answer": "..."}' in text
  assert "--config.data.skip_malformed=True" in text
  kept = sources.read("jsonl", path, skip_malformed=True)
  assert kept == [Problem("p", ("1",))] * 2


@pytest.mark.parametrize(
  "line",
  [
    pytest.param('{"problem": "p", "answer": "2 + 3 ####"}', id="nothing after ####"),
    pytest.param('{"problem": "\\ud800", "answer": "1"}', id="half a surrogate pair"),
  ],
)
def test_a_line_that_no_later_room_can_use_is_malformed(tmp_path, line):
  """An empty answer can never be given; half a surrogate pair cannot be encoded."""
  with pytest.raises(UserError, match=":1: "):
    sources.read("jsonl", write(tmp_path, line))


def test_more_bad_lines_are_counted(tmp_path):
  with pytest.raises(UserError, match=r":1: .*and 2 more such lines"):
    sources.read("jsonl", write(tmp_path, "{", "{", "{"))


def test_a_missing_file_is_refused_by_name(tmp_path):
  with pytest.raises(UserError, match=r"config\.data\.problems=.*none\.jsonl.*no such"):
    sources.read("jsonl", tmp_path / "none.jsonl")
  with pytest.raises(UserError, match="no such file"):
    sources.read("jsonl", tmp_path)  # a folder


@pytest.mark.parametrize("lines", [[], [""], ["{", "{"]])
def test_a_file_without_a_problem_is_refused(tmp_path, lines):
  with pytest.raises(UserError, match=r"no usable problem \(\d malformed"):
    sources.read("jsonl", write(tmp_path, *lines), skip_malformed=True)


# -- sides -----------------------------------------------------------------------------


def test_the_bucket_depends_on_the_text_alone_and_is_uniform():
  assert problems.bucket("a") == problems.bucket("a") != problems.bucket("b")
  values = [problems.bucket(str(i)) for i in range(4000)]
  assert min(values) >= 0 and max(values) < 1
  np.testing.assert_allclose(np.histogram(values, 4, (0, 1))[0], 1000, atol=120)


def test_generated_sides_are_full_and_share_no_text():
  split = problems.generate(Chain(), pretrain=60, train=50, held_out=20)
  sides = [split.pretrain, split.train, split.held_out]
  assert [len(s) for s in sides] == [60, 50, 20]
  texts = [p.problem for side in sides for p in side]
  assert len(set(texts)) == len(texts)


def test_runs_of_other_sizes_never_mix_sides():
  small = problems.generate(Chain(), pretrain=20, train=20, held_out=10)
  large = problems.generate(Chain(), pretrain=90, train=90, held_out=40)
  for a, b in [("pretrain", "train"), ("train", "held_out"), ("held_out", "pretrain")]:
    for one, other in [(small, large), (large, small)]:
      texts = {p.problem for p in getattr(one, a)}
      assert not texts & {p.problem for p in getattr(other, b)}


def test_a_task_with_too_few_problems_is_refused():
  with pytest.raises(UserError, match=r"too few distinct problems.*'train': 500"):
    problems.generate(
      Chain(min_terms=2, max_terms=2), pretrain=10, train=500, held_out=10
    )


def test_a_file_is_split_by_text_and_duplicates_land_on_one_side():
  rows = [Problem(f"p{i % 20}", (str(i),)) for i in range(60)]
  train, kept = problems.split_file(rows, held_out=0.25)
  assert len(kept) == 5 and len(train) == 15
  assert not {p.problem for p in train} & {p.problem for p in kept}
  random.Random(0).shuffle(rows)
  again = problems.split_file(rows, held_out=0.25)
  assert {p.problem for p in again[1]} == {p.problem for p in kept}


@pytest.mark.parametrize("count, held_out", [(1, 0.5), (4, 0.01), (4, 0.99)])
def test_a_side_may_not_be_empty(count, held_out):
  rows = [Problem(f"p{i}", ("1",)) for i in range(count)]
  with pytest.raises(UserError, match=f"config.data.held_out={held_out}"):
    problems.split_file(rows, held_out=held_out)


# -- the stream ------------------------------------------------------------------------


def draw(stream, count):
  return [np.asarray(next(stream)).tolist() for _ in range(count)]


def test_the_stream_continues_exactly_from_its_state():
  stream = problems.stream(10, 3, seed=0)
  draw(stream, 5)
  state = json.loads(json.dumps(stream.get_state()))  # as a checkpoint keeps it
  want = draw(stream, 9)
  fresh = problems.stream(10, 3, seed=0)
  fresh.set_state(state)
  assert draw(fresh, 9) == want


def test_the_stream_is_a_function_of_its_seed():
  first = draw(problems.stream(10, 3, seed=0), 6)
  assert first == draw(problems.stream(10, 3, seed=0), 6)
  assert first != draw(problems.stream(10, 3, seed=1), 6)


def test_every_epoch_holds_every_problem_once_in_another_order():
  flat = [i for batch in draw(problems.stream(12, 4, seed=3), 6) for i in batch]
  epochs = flat[:12], flat[12:]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
  assert epochs[0] != epochs[1] and epochs[0] != list(range(12))


def test_a_batch_of_all_problems_works_and_a_larger_one_is_refused():
  assert sorted(draw(problems.stream(4, 4, seed=0), 1)[0]) == [0, 1, 2, 3]
  with pytest.raises(UserError, match=r"4 training problems.*config\.prompts=5"):
    problems.stream(4, 5, seed=0)
