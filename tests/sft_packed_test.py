"""SFT on packed traces: the loss and gradient of the sequences one a row, those of
transformers' models on the same batch, and nothing of prompts and padding."""

import functools

import jax
from models import gqa_test, policy_test
import numpy as np
import pytest
from trees import assert_same, host

from r1jax import sft
from r1jax.data import packing
from r1jax.data.packing import Example
from r1jax.models import policy

VOCAB, WIDTH, PAD = 16, 12, 0
LAMBDA = 0.3
NETWORKS = {
  "moe": policy_test.small(layers=1, dense_layers=0),
  "moe-mtp": policy_test.small(layers=1, dense_layers=0, mtp_depth=1),
  "dense": gqa_test.small(head_dim=8),
}


def some_examples(seed=0, count=9):
  """Lengths 2 to 9; prompts of all lengths, and one example that is all prompt."""
  rng = np.random.default_rng(seed)
  lengths = [WIDTH, *rng.integers(2, 10, count - 1).tolist()]
  found = [
    Example(rng.integers(1, VOCAB, n).tolist(), prompt=int(rng.integers(1, n)))
    for n in lengths
  ]
  return [*found, Example([3, 5, 2, 4], prompt=4)]


EXAMPLES = some_examples()


def packed():
  """Rows that hold several examples, and room at their ends."""
  pages = packing.pack(EXAMPLES, WIDTH, pad_id=PAD).pages
  assert pages.segments.max() > 1 and (pages.segments == 0).any()
  return filled(pages)


def apart():
  """Each example in a row of its own."""
  shape = len(EXAMPLES), WIDTH
  pages = sft.Pages(np.full(shape, PAD, np.int32), np.zeros(shape, np.int32), None)
  targets = np.zeros(shape, bool)
  for i, example in enumerate(EXAMPLES):
    n = len(example.tokens)
    pages.tokens[i, :n], pages.segments[i, :n] = example.tokens, 1
    targets[i, example.prompt : n] = True
  return filled(pages.replace(targets=targets))


def filled(pages):
  """As many rows for either, so that they share a program; the last ones are empty."""
  more = ((0, len(EXAMPLES) - len(pages.tokens)), (0, 0))
  return jax.tree.map(lambda x: np.pad(x, more), pages)


@functools.partial(jax.jit, static_argnums=0)
def learned(network, params, router, pages):
  """((loss, (metrics, load)), gradient by the params)."""
  counts = tuple(sft.targets_ahead(pages, ahead).sum() for ahead in (1, 2))
  mtp_coef = LAMBDA if network.config.mtp_depth else 0.0

  def loss(params):
    return sft.loss_fn(network, params, router, pages, counts=counts, mtp_coef=mtp_coef)

  return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
  return request.param


@pytest.fixture
def learn(name, random_weights):
  network = policy.Policy(NETWORKS[name])
  weights = random_weights(network, seed=3)
  return lambda pages: host(learned(network, *weights, pages))


def assert_close(got, want):
  for path, x in jax.tree_util.tree_leaves_with_path(want):
    y = got
    for key in path:
      y = y[getattr(key, "key", getattr(key, "idx", None))]
    scale = max(np.abs(x).max(), 1e-3)
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * scale, err_msg=where)


def test_packed_rows_teach_what_the_sequences_teach_one_a_row(learn, name):
  got, want = learn(packed()), learn(apart())
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert_close(got, want)
  (loss, (metrics, load)), gradients = got
  assert loss > 1 and all(g.any() for g in jax.tree.leaves(gradients))
  assert ("mtp_nll" in metrics) == (name == "moe-mtp")
  # Loads are counts: equal, one by one.
  assert_same(load, want[0][1][1])
  tokens = {"moe_layers": [len(e.tokens) for e in EXAMPLES]}
  # The MTP module reads a token and the next: a page's last one has no next.
  tokens["mtp_layer"] = [n - 1 for n in tokens["moe_layers"]]
  wanted = {"moe": {"moe_layers"}, "moe-mtp": {"moe_layers", "mtp_layer"}, "dense": ()}
  assert set(load) == set(wanted[name])
  active = NETWORKS[name].active_experts
  for stack, served in load.items():
    a_layer = served.reshape(-1, served.shape[-1]).sum(axis=-1)
    np.testing.assert_array_equal(a_layer, active * sum(tokens[stack]))


def test_the_loss_is_the_sum_over_all_targets_by_their_number(learn, name):
  """Examples do not weigh the same: a token does."""
  (loss, (metrics, _)), _ = learn(packed())
  count = sum(len(e.tokens) - e.prompt for e in EXAMPLES)
  pages, total = apart(), 0.0
  for i, example in enumerate(EXAMPLES):
    one = pages.replace(
      targets=pages.targets & (np.arange(len(EXAMPLES)) == i)[:, None]
    )
    (_, (alone, _)), _ = learn(one)
    total += float(alone["nll"]) * (len(example.tokens) - example.prompt)
  np.testing.assert_allclose(metrics["nll"], total / count, rtol=1e-5)
  if name != "moe-mtp":
    np.testing.assert_array_equal(loss, metrics["nll"])


def test_what_stands_in_padding_has_no_influence(learn):
  pages = packed()
  other = pages.replace(tokens=np.where(pages.segments > 0, pages.tokens, 7))
  assert (other.tokens != pages.tokens).any()
  assert_same(learn(other), learn(pages))


def test_nobody_learns_to_say_a_prompt(learn):
  """A prompt is read, so its tokens move the loss; but none of them is predicted: the
  last token of an example that is all prompt, which nobody reads, moves nothing."""
  pages = apart()
  want = learn(pages)
  unread, read = pages.tokens.copy(), pages.tokens.copy()
  unread[len(EXAMPLES) - 1, 3], read[0, 0] = 9, read[0, 0] - 1
  got = learn(pages.replace(tokens=unread))
  assert_same(got[0][0], want[0][0])
  assert_same(got[1], want[1])
  moved = learn(pages.replace(tokens=read))
  assert abs(moved[0][0] - want[0][0]) > 1e-4


def test_the_gradient_by_the_logits_stands_at_targets_alone(random_weights):
  """Through the last layer's hidden states: those that predict a prompt or padding have
  no gradient, so their logits are free."""
  network = policy.Policy(NETWORKS["dense"])
  params, router = random_weights(network, seed=3)
  pages = packed()

  class Shifted:
    """The policy with something added to its last hidden states."""

    def __init__(self, shift):
      self.shift = shift

    def apply(self, variables, *args, **how):
      out = network.apply(variables, *args, **how)
      return out if "method" in how else out.replace(hidden=out.hidden + self.shift)

  count = np.int32(pages.targets.sum())

  @jax.jit
  @jax.grad
  def by_hidden(shift):
    how = dict(counts=(count, count))
    return sft.loss_fn(Shifted(shift), params, router, pages, **how)[0]

  moved = (
    np.abs(by_hidden(np.zeros((*pages.tokens.shape, 32), np.float32))).max(axis=-1) > 0
  )
  predicts = np.pad(pages.targets[:, 1:], ((0, 0), (0, 1)))
  np.testing.assert_array_equal(moved, predicts)


# -- transformers ----------------------------------------------------------------------


def theirs_on(model, pages):
  """Their loss with -100 on prompts and padding, and its gradient by weight."""
  torch = pytest.importorskip("torch")
  tokens = torch.tensor(pages.tokens, dtype=torch.long)
  labels = tokens.masked_fill(~torch.tensor(pages.targets), -100)
  mask = torch.tensor(pages.segments > 0, dtype=torch.long)
  out = model(input_ids=tokens, attention_mask=mask, labels=labels)
  out.loss.backward()
  return out.loss.item(), {k: w.grad for k, w in model.named_parameters()}


@pytest.mark.parametrize("name", ["dense", "moe"], scope="module")
def test_loss_and_gradient_equal_transformers(learn, name, random_weights):
  """Theirs has a row an example, ours packs them."""
  c = NETWORKS[name]
  params, router = random_weights(policy.Policy(c), seed=3)
  if name == "dense":
    model = gqa_test.hugging_face("Qwen2", c, params)
  else:
    model = policy_test.hugging_face(c, params, router)
  want, grads = theirs_on(model, apart())
  (loss, _), gradient = learn(packed())
  np.testing.assert_allclose(loss, want, rtol=0, atol=1e-5)
  for key, ours in {
    "model.embed_tokens.weight": gradient["embedding"],
    "lm_head.weight": gradient["head"].T,
    "model.norm.weight": gradient["final_norm"]["scale"],
  }.items():
    scale = np.abs(ours).max()
    np.testing.assert_allclose(grads[key], ours, rtol=0, atol=1e-5 * scale, err_msg=key)
