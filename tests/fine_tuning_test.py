"""The loop of SFT: rows in an order of its own every epoch, and a run that was killed
and called again ends with the bits of one that was not."""

import dataclasses
import types

import grpo_golden as golden
import jax
from meshes import mesh_of
import numpy as np
import pytest
from trees import assert_same, host

from r1jax import fine_tuning, sft
from r1jax.checkpoint import Checkpoints
from r1jax.fine_tuning import tune
from r1jax.metrics import MetricsFile
from r1jax.optimizer import OptimizerConfig
from r1jax.progress import Clock
from r1jax.run import Run

COUNT, WIDTH, BATCH, STEPS, SEED = 7, 6, 4, 23, 5  # checkpoints at 7, 14, 21 and 23
CONFIG = sft.TuningConfig(
  OptimizerConfig(
    learning_rate=1e-2, steps=STEPS, warmup_steps=3, schedule="cosine", weight_decay=0.1
  ),
  rows=BATCH,
  micro_batches=2,
  router_bias_rate=1e-2,
)


# -- the order -------------------------------------------------------------------------


def order_of(count, batch, seed, updates):
  taken = [fine_tuning._rows(count, batch, seed, i) for i in range(updates)]
  assert all(rows.shape == (batch,) for rows in taken)
  return np.concatenate(taken)


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("count, batch", [(7, 3), (8, 4), (3, 8), (1, 2), (5, 5)])
def test_every_row_comes_once_an_epoch_before_any_comes_again(count, batch, seed):
  order = order_of(count, batch, seed, 12)
  for at in range(0, len(order) - count + 1, count):
    assert sorted(order[at : at + count]) == list(range(count))
  rest = order[len(order) // count * count :]
  assert len(set(rest)) == len(rest)


def test_the_order_is_a_function_of_the_seed_and_another_one_each_epoch():
  order, count = order_of(50, 25, 3, 8), 50
  np.testing.assert_array_equal(order, order_of(50, 25, 3, 8))
  assert (order != order_of(50, 25, 4, 8)).any()
  epochs = {tuple(order[at : at + count]) for at in range(0, len(order), count)}
  assert len(epochs) == 4 and tuple(range(50)) not in epochs
  np.testing.assert_array_equal(order_of(50, 25, None, 4), np.tile(np.arange(50), 2))


def test_the_order_does_not_depend_on_the_rows_an_update():
  whole = order_of(7, 1, 3, 84)
  for batch in (2, 3, 4, 12):
    np.testing.assert_array_equal(order_of(7, batch, 3, 84 // batch), whole)


# -- a run -----------------------------------------------------------------------------


class Killed(Exception):
  pass


@dataclasses.dataclass
class Console:
  """A progress that kills the run as it shows an update."""

  kill_at: int | None = None
  said: list = dataclasses.field(default_factory=list)

  def say(self, text):
    self.said.append(text)

  def update(self, phase, done, total, **figures):
    if done == self.kill_at:
      raise Killed


def rows():
  """Seven rows of two pages, whose first token is the row's number and 4."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, golden.VOCAB, (COUNT, WIDTH)).astype(np.int32)
  tokens[:, 0] = 4 + np.arange(COUNT)
  segments = np.tile(np.array([1, 1, 1, 1, 2, 2], np.int32), (COUNT, 1))
  return sft.Pages(tokens, segments, np.tile(segments[0] > 0, (COUNT, 1)))


FIRST = dict(start=golden.weights(golden.tiny_policy()), seed=SEED)
PROGRAMS = {}  # (function, rest of what makes it) -> program


def call(workdir, *, kill_at=None, pages=rows, config=CONFIG, **how):
  """(weights, what was said, numbers of the rows of each update) of one process."""
  workdir.mkdir(exist_ok=True)
  parts = dict.fromkeys(field.name for field in dataclasses.fields(Run))
  this = Run(
    **parts
    | dict(
      config=types.SimpleNamespace(seed=1),
      workdir=workdir,
      mesh=mesh_of((1, 1, 1), jax.devices()[:1]),
      clock=Clock(),
      progress=Console(kill_at),
      metrics=MetricsFile(workdir / "metrics.jsonl"),
      policy=golden.tiny_policy(),
      tokenizer=types.SimpleNamespace(model=b"a tokenizer"),
    )
  )
  taken, put, compiled = [], fine_tuning.put_batch, fine_tuning.compiled

  def record(this, batch):
    taken.append((np.asarray(batch.tokens)[:, 0] - 4).tolist())
    return put(this, batch)

  def once(this, function, *args, **jit):
    """Every process compiles the same program; here the first does it for all."""
    key = getattr(function, "__name__", "begin"), config, how.get("step")
    if key not in PROGRAMS:
      PROGRAMS[key] = compiled(this, function, *args, **jit)
    return PROGRAMS[key]

  kept_save = Checkpoints.save

  def save(self, *args):
    kept_save(self, *args)
    self.wait()  # a kill comes later

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, "save", save)
    patch.setattr(fine_tuning, "put_batch", record)
    patch.setattr(fine_tuning, "compiled", once)
    try:
      learned = host(tune(this, pages, config, **(FIRST | how)))
    except Killed:
      learned = None
  return learned, this.progress.said, taken[1:]  # the first has shapes for compilation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing disturbed: (workdir, what `call` returned)."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, call(workdir)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
  """The same, killed as it shows update 10 and update 20, and called a third time."""
  workdir = tmp_path_factory.mktemp("resumed") / "run"
  return workdir, [call(workdir, kill_at=n) for n in (10, 20, None)]


def steps_of(workdir):
  return [row["step"] for row in MetricsFile(workdir / "metrics.jsonl").phase("sft")]


def test_updates_take_the_rows_in_that_order(whole):
  _, (_, _, taken) = whole
  assert len(taken) == STEPS
  assert np.concatenate(taken).tolist() == order_of(COUNT, BATCH, SEED, STEPS).tolist()


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_bit_for_bit(whole, resumed):
  _, (want, said, order) = whole
  _, (first, second, third) = resumed
  assert first[0] is None and second[0] is None
  assert_same(third[0], want)
  assert said == first[1] == []
  assert second[1] == ["sft: continuing from update 7"]
  assert third[1] == ["sft: continuing from update 14"]
  assert [c[2] for c in (first, second, third)] == [order[:10], order[7:20], order[14:]]


def test_a_killed_run_leaves_the_metrics_of_one_that_was_not(whole, resumed):
  assert steps_of(resumed[0]) == steps_of(whole[0]) == [10, 20, STEPS]
  got, want = (MetricsFile(w / "metrics.jsonl").rows() for w, _ in (resumed, whole))
  assert got == want


def test_a_run_that_is_done_makes_no_page_and_gives_its_weights_again(whole):
  workdir, (want, _, _) = whole

  def pages():
    raise AssertionError("there is nothing left to do")

  got, _, taken = call(workdir, pages=pages)
  assert_same(got, want)
  assert taken == [] and steps_of(workdir) == [10, 20, STEPS]


def test_it_learns_and_moves_router_biases(whole):
  workdir, ((_, router), _, _) = whole
  losses = [r["nll"] for r in MetricsFile(workdir / "metrics.jsonl").phase("sft")]
  assert losses[2] < losses[1] < losses[0]
  bias = router["moe_layers"]["moe"]["bias"]
  moved = bias / CONFIG.router_bias_rate
  np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)
  assert moved.any()


def by_data(state, pages, teacher, *, optimizer):
  """A step that is easy to follow: each update adds the teacher's number."""
  params = jax.tree.map(lambda x: x + teacher, state.params)
  return state.replace(step=state.step + 1, params=params), {"loss": teacher}


def test_given_weights_and_a_given_step_are_used_and_stay_as_they_are(tmp_path):
  start, teacher = FIRST["start"], np.float32(0.5)
  before = host(start)
  few = dataclasses.replace(
    CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, steps=2)
  )
  how = dict(config=few, seed=None, step=by_data, teacher=teacher)
  (params, router), _, taken = call(tmp_path / "run", phase="other", **how)
  assert_same(params, jax.tree.map(lambda x: x + 0.5 + 0.5, before[0]))
  assert_same(router, before[1])
  assert taken == [[0, 1, 2, 3], [4, 5, 6, 0]]
  assert_same(host(start), before)  # not donated: two stages may begin with them
  metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl").rows()
  assert metrics == [{"phase": "other", "step": 2, "loss": 0.5}]
  assert (tmp_path / "run" / "checkpoints" / "other").is_dir()
