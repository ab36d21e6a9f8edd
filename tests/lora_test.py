"""Low-rank adapters: the sum that layers find, the gradient of its two factors, and
steps, loops, meshes and files that move nothing else."""

import dataclasses
import functools
import json
import types

import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK
from trees import assert_same, host

from experiments.configs import ppo as ppo_config
from experiments.configs import r1 as r1_config
from experiments.configs.r1_zero import get_config
from r1jax import (
  config_checks,
  distillation,
  fine_tuning,
  lora,
  peft,
  ppo,
  settings,
  sft,
  sharding,
  train_state,
  trained,
)
from r1jax.checkpoint import Checkpoints
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.lora import LoraConfig
from r1jax.metrics import MetricsFile
from r1jax.models import config as sizes
from r1jax.models import hf
from r1jax.models import policy as policy_lib
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence
from r1jax.optimizer import OptimizerConfig, make_optimizer
from r1jax.pipeline.project import load_weights, save_weights
from r1jax.progress import Clock
from r1jax.run import Run

POLICY = golden.tiny_policy()
EVERY = LoraConfig(2, alpha=6.0, targets=("attention", "shared", "experts"))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, steps=100, eps=1e-2))
QWEN = Policy(
  sizes.tiny_dense(golden.VOCAB, width=32, layers=2, heads=4, head_dim=8, dense_ffn=24)
)


def some(policy=POLICY, config=EVERY, seed=3):
  """(parameters with adapters that do something, router biases)."""
  params, router = golden.weights(policy)
  whole = lora.adapt(policy, params, config, jax.random.key(seed))
  rng = np.random.default_rng(seed)

  def drawn(x):
    return jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype)

  return lora.put(whole, jax.tree.map(drawn, lora.trained(whole))), router


def boxes(params):
  """{path with slashes: the weight with its adapter}."""
  pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=lora.is_adapted)
  pairs = [(path, x) for path, x in pairs if lora.is_adapted(x)]
  return {"/".join(key.key for key in path): x for path, x in pairs}


def axes_before(x):
  """Of layers and experts."""
  return x.a.ndim + x.b.ndim - x.w.ndim - 2


def bytes_of(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def logits(policy, params, router, tokens):
  variables = {"params": params, "router": router}
  seq = Sequence.of_mask(jnp.ones(tokens.shape, bool))
  hidden = policy.apply(variables, tokens, seq).hidden
  return policy.apply(variables, hidden, method="logits")


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, golden.VOCAB, (3, 7)))


# -- the sum ---------------------------------------------------------------------------


def test_without_adapters_parameters_are_what_they_were():
  assert settings.lora_config(get_config()) is None
  params, _ = golden.weights(POLICY)
  new = jax.tree.map(lambda x: x + 1, params)
  assert lora.adapt(POLICY, params, None, jax.random.key(0)) is params
  assert lora.trained(params) is params and lora.put(params, new) is new
  weights, whole = lora.split(POLICY, params)
  assert whole(weights) is weights
  assert_same(weights, params)


@pytest.mark.parametrize("policy", [POLICY, QWEN], ids=["mla", "gqa"])
def test_fresh_adapters_say_exactly_what_the_base_says(policy):
  targets = EVERY.targets if policy is POLICY else ("attention", "ffn")
  config = dataclasses.replace(EVERY, targets=targets)
  params, router = golden.weights(policy)
  whole = lora.adapt(policy, params, config, jax.random.key(0))
  a, b = (logits(policy, x, router, TOKENS) for x in (params, whole))
  assert np.array_equal(a, b)
  assert_same(lora.frozen(whole), params)
  for name, x in boxes(whole).items():
    bound = np.prod(x.a.shape[axes_before(x) : -1]) ** -0.5
    assert 0.7 * bound < np.abs(x.a).max() <= bound, name
    assert not x.b.any()


LETTERS = {  # as the layers multiply
  "attention/w_q": ("bd,dhk->bhk", "bd,dr,rhk->bhk"),
  "attention/w_dkv": ("bd,dc->bc", "bd,dr,rc->bc"),
  "attention/w_uk": ("bc,chk->bhk", "bc,cr,rhk->bhk"),
  "attention/w_o": ("bhv,hvd->bd", "bhv,hvr,rd->bd"),
  "moe/shared/down": ("bf,fd->bd", "bf,fr,rd->bd"),
  "moe/w_gate": ("bd,edf->ebf", "bd,edr,erf->ebf"),
  "moe/w_down": ("bf,efd->ebd", "bf,efr,erd->ebd"),
}


@pytest.mark.parametrize("name", LETTERS)
def test_the_sum_is_w_x_and_a_share_of_b_a_x(name):
  params, _ = some()
  x = boxes(params)[f"moe_layers/{name}"]
  layer = jax.tree.map(lambda leaf: leaf[0], x)  # as the loop over layers cuts it
  whole, low = LETTERS[name]
  rng = np.random.default_rng(1)
  letters = dict(zip(whole[:-1].split(",")[1].split("->")[0], layer.w.shape))  # noqa: B905
  given = whole.split(",")[0]
  v = rng.normal(size=[letters.get(letter, 5) for letter in given])
  w, a, b = (np.asarray(leaf, np.float64) for leaf in (layer.w, layer.a, layer.b))
  want = np.einsum(whole, v, w) + 6.0 / 2 * np.einsum(low, v, a, b)
  np.testing.assert_allclose(
    np.einsum(whole, v, layer.unbox()), want, rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(x.unbox()[0], layer.unbox(), rtol=1e-6, atol=1e-6)


def test_layers_and_a_cast_tree_find_what_merged_weights_are():
  params, router = some()
  plain = lora.merged(params)
  assert {x.dtype.name for x in jax.tree.leaves(plain)} == {"float32"}
  want = logits(POLICY, plain, router, TOKENS)
  got = logits(POLICY, params, router, TOKENS)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(want - logits(POLICY, lora.frozen(params), router, TOKENS)).max() > 0.1
  assert_same(policy_lib.gathered(POLICY, params), plain)


def test_a_base_of_bfloat16_is_held_as_layers_cast_it_and_the_sum_is_not_rounded():
  policy = Policy(dataclasses.replace(POLICY.config, dtype="bfloat16"))
  params, _ = some(policy)
  leaves = jax.tree_util.tree_leaves_with_path(lora.frozen(params))
  for path, x in leaves:
    name = jax.tree_util.keystr(path)
    wide = "router" in name or "norm" in name
    assert x.dtype == (jnp.float32 if wide else jnp.bfloat16), name
  assert {x.dtype.name for x in jax.tree.leaves(lora.trained(params))} == {"float32"}
  for x in boxes(params).values():
    assert x.unbox().dtype == jnp.float32
    cast = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(cast, x.unbox().astype(jnp.bfloat16))


# -- its gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["all", "nothing"])
def test_gradients_of_a_and_b_are_those_through_the_weight(remat):
  """dA = s dW B^T and dB = s A^T dW, of dW at the merged weights."""
  policy = golden.tiny_policy(remat=remat)
  params, router = some(policy)

  def loss(params):
    out = logits.__wrapped__(policy, params, router, TOKENS)
    return jnp.square(jax.nn.log_softmax(out)).mean()

  weights, whole = lora.split(policy, params)
  how = functools.partial(jax.jit, compiler_options=QUICK)
  got = how(jax.grad(lambda x: loss(whole(x))))(weights)
  full = how(jax.grad(loss))(lora.merged(params))
  for path, x in boxes(params).items():
    dw, da_db = full, got
    for key in path.split("/"):
      dw, da_db = dw[key], da_db[key]
    s, before = 6.0 / 2, axes_before(x)
    r, (n, e) = 2, (dw.shape[0], dw.shape[1] if before == 2 else 1)
    inside = int(np.prod(x.a.shape[before:-1]))
    dw, a, b = (
      np.asarray(y, np.float64).reshape(n, e, *shape)
      for y, shape in ((dw, (inside, -1)), (x.a, (inside, r)), (x.b, (r, -1)))
    )
    for name, want in (
      ("a", s * np.einsum("neio,nero->neir", dw, b)),
      ("b", s * np.einsum("neir,neio->nero", a, dw)),
    ):
      found = np.asarray(da_db[name]).reshape(want.shape)
      assert np.abs(want).max() > 1e-5, (path, name)
      near = dict(rtol=1e-4, atol=2e-5 * np.abs(want).max())
      np.testing.assert_allclose(found, want, **near, err_msg=path)


# -- steps -----------------------------------------------------------------------------


CONFIG = dataclasses.replace(golden.CONFIG, reference_refresh=4)


@pytest.fixture(scope="module")
def steps():
  """(two states before and after steps of two updates each, their figures)."""
  params, router = golden.weights(POLICY)
  whole = lora.adapt(POLICY, params, EVERY, jax.random.key(1))
  state = train_state.restart(whole, router, golden.optimizer(), reference=True)
  step = golden.make_step(POLICY, CONFIG)
  args = state, golden.prompt_batch(), jax.random.key(7)
  program = jax.jit(step).lower(*args).compile(QUICK)
  states, figures = [state], []
  for _ in range(2):
    state, _, metrics, _ = program(state, *args[1:])
    states.append(state)
    figures.append(golden.figures(metrics))
  return states, figures


def test_a_step_of_grpo_moves_adapters_and_router_biases_alone(steps):
  (first, second, third), _ = steps
  for state in (second, third):
    assert_same(lora.frozen(state.params), lora.frozen(first.params))
  for path, x in boxes(second.params).items():
    before = boxes(first.params)[path]
    assert not np.array_equal(x.b, before.b), path
  moved = [
    not np.array_equal(x.a, boxes(second.params)[path].a)
    for path, x in boxes(third.params).items()
  ]
  assert all(moved)
  biases = (jax.tree.leaves(state.router) for state in (first, second))
  assert any(not np.array_equal(a, b) for a, b in zip(*biases, strict=True))


def test_the_first_rollout_is_the_bases(steps):
  """Figures of sampling and reward, before an update, are those of the golden step."""
  want, got = json.loads(golden.PATH.read_text()), steps[1][0]
  for name in ("reward", "length", "entropy", "truncated", "reward_std"):
    if name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  assert {"reward", "length"} <= want.keys() and want.keys() == got.keys()


def test_the_reference_is_the_base_until_a_refresh_and_then_the_adapters(steps):
  (first, second, third), figures = steps
  assert not any(np.any(x.b) for x in boxes(first.asked.reference.params).values())
  assert_same(second.reference, first.reference)  # refreshed at update 4
  assert_same(lora.frozen(first.asked.reference.params), lora.frozen(first.params))
  assert_same(third.reference.params, lora.trained(third.params))
  assert figures[0]["kl"] > 0 and figures[1]["kl"] > 0


def test_a_state_has_moments_and_a_reference_of_the_adapters_size(steps):
  state = steps[0][0]
  small, big = bytes_of(lora.trained(state.params)), bytes_of(lora.frozen(state.params))
  assert bytes_of(lora.split(POLICY, state.params)[0]) == small  # and so a gradient
  counts = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if not x.ndim)
  assert bytes_of(state.opt_state) - counts == 2 * small
  assert bytes_of(state.reference.params) == small
  assert bytes_of(state.params) == small + big
  assert bytes_of(state.kept) < bytes_of(state) - 0.99 * big


def test_an_update_holds_neither_merged_weights_nor_their_gradient():
  """Beside its arguments it has less than the matrices that have adapters."""
  how = dict(width=256, layers=12, heads=4, head_dim=64, dense_ffn=1024)
  policy = Policy(sizes.tiny_dense(golden.VOCAB, remat="nothing", **how))

  config = LoraConfig(4, targets=("attention", "ffn"))

  def begin():
    state = train_state.create(policy, OPTIMIZER, jax.random.key(0), reference=False)
    whole = lora.adapt(policy, state.params, config, jax.random.key(1))
    return train_state.restart(whole, state.router, OPTIMIZER, reference=False)

  def step(state, batch):
    return sft.step(
      state, batch, policy=policy, optimizer=OPTIMIZER, router_bias_rate=0.0
    )

  state = jax.eval_shape(begin)
  frozen = sum(x.w.size * 4 for x in boxes(state.params).values())
  program = jax.jit(step, donate_argnums=0).lower(state, pages(2)).compile(QUICK)
  assert program.memory_analysis().temp_size_in_bytes < 0.3 * frozen


def pages(rows=8):
  rng = np.random.default_rng(2)
  tokens = rng.integers(1, golden.VOCAB, (rows, 6)).astype(np.int32)
  segments = np.tile(np.array([1, 1, 1, 1, 2, 2], np.int32), (rows, 1))
  return sft.Pages(tokens, segments, np.tile(segments[0] > 0, (rows, 1)))


def tuned(mesh=None):
  """(before, after, figures) of a step of SFT, on a mesh or one device."""
  how = dict(reference=False)
  state = train_state.restart(*some(), OPTIMIZER, **how)
  batch = jax.tree.map(jnp.asarray, pages())
  out = None
  if mesh is not None:
    layout = train_state.shardings(POLICY, OPTIMIZER, mesh, adapters=EVERY, **how)
    out = layout, None
    state = jax.device_put(state, layout)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

  def step(state, batch):
    how = dict(router_bias_rate=1e-2, micro_batches=2)
    return sft.step(state, batch, policy=POLICY, optimizer=OPTIMIZER, **how)

  program = jax.jit(step, out_shardings=out).lower(state, batch).compile(QUICK)
  return state, *program(state, batch)


@pytest.fixture(scope="module")
def one_device():
  return tuned()


def test_a_step_of_sft_moves_adapters_alone(one_device):
  before, after, _ = one_device
  assert_same(lora.frozen(after.params), lora.frozen(before.params))
  for path, x in boxes(after.params).items():
    for name in "ab":
      old = getattr(boxes(before.params)[path], name)
      assert not np.array_equal(getattr(x, name), old), (path, name)


def test_a_mesh_gives_the_same_and_cuts_a_as_what_goes_in_and_b_as_what_comes_out(
  one_device,
):
  _, want, figures = one_device
  mesh = mesh_of((2, 2, 2))
  with jax.set_mesh(mesh):
    _, got, there = tuned(mesh)
  np.testing.assert_allclose(there["nll"], figures["nll"], rtol=1e-5)
  np.testing.assert_allclose(there["grad_norm"], figures["grad_norm"], rtol=1e-4)
  assert_same(host(got.params), host(want.params), rtol=1e-3, atol=2e-6)
  for name, a, b in (
    ("attention/w_q", (None, ("fsdp", "expert")), (None, None, "tensor")),
    ("attention/w_dkv", (None, ("fsdp", "expert")), (None,)),
    ("attention/w_o", (None, "tensor"), (None, None, ("fsdp", "expert"))),
    ("moe/w_gate", (None, "expert", "fsdp"), (None, "expert", None, "tensor")),
  ):
    x = boxes(got.params)[f"moe_layers/{name}"]
    for leaf, want_spec in ((x.a, a), (x.b, b)):
      spec = tuple(leaf.sharding.spec)
      want_spec = want_spec + (None,) * (leaf.ndim - len(want_spec))
      assert spec + (None,) * (leaf.ndim - len(spec)) == want_spec, name


def test_ppo_adapts_its_policy_and_learns_its_value_model_whole():
  params, router = golden.weights(POLICY)
  adapt = functools.partial(lora.adapt, POLICY, config=EVERY, key=jax.random.key(0))
  both = golden.optimizer(), golden.optimizer()
  state = ppo.restart(params, router, *both, reference=True, adapt=adapt)
  assert_same(state.value.params["policy"], params)
  assert bytes_of(state.policy.opt_state) < 0.5 * bytes_of(state.value.opt_state)
  same = ("group_size", "minibatches", "micro_batches", "max_tokens")
  c = ppo.PPOConfig(
    **{name: getattr(CONFIG, name) for name in same},
    reference_refresh=4,
    objective=settings.objective(ppo_config.get_config()),
  )
  step = functools.partial(
    ppo.whole_step,
    policy=POLICY,
    optimizer=both[0],
    value_optimizer=both[1],
    reward_fn=golden.reward_fn,
    config=c,
    stop_ids=golden.STOP_IDS,
    pad_id=golden.PAD,
  )
  after, *_ = jax.eval_shape(step, state, golden.prompt_batch(), jax.random.key(7))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  kept = host(state.kept)
  assert_same(kept.on(state), state)


# -- a run -----------------------------------------------------------------------------


SECTION = types.SimpleNamespace(rank=2, alpha=6.0, targets=("attention",))
TUNING = sft.TuningConfig(
  OptimizerConfig(learning_rate=1e-2, steps=6, weight_decay=0.1),
  rows=4,
  router_bias_rate=1e-2,
)


class Killed(Exception):
  pass


def call(workdir, kill_at=None, **how):
  """What `tune` leaves, of one process: checkpoints at 2, 4 and 6."""
  workdir.mkdir(exist_ok=True)

  def save(self, step, *args):
    kept_save(self, step, *args)
    if step == kill_at:
      self.close()
      raise Killed

  parts = dict.fromkeys(field.name for field in dataclasses.fields(Run))
  this = Run(
    **parts
    | dict(
      config=types.SimpleNamespace(seed=1, lora=SECTION),
      workdir=workdir,
      mesh=mesh_of((1, 1, 1), jax.devices()[:1]),
      clock=Clock(),
      progress=types.SimpleNamespace(
        say=lambda text: None, update=lambda *args, **more: None
      ),
      metrics=MetricsFile(workdir / "metrics.jsonl"),
      policy=POLICY,
      tokenizer=types.SimpleNamespace(model=b"a tokenizer"),
    )
  )
  kept_save = Checkpoints.save
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, "save", save)
    try:
      start = golden.weights(POLICY)
      return fine_tuning.tune(this, pages, TUNING, start=start, seed=5, **how)
    except Killed:
      return None


def test_a_resumed_run_ends_as_one_that_was_not_and_keeps_adapters_alone(tmp_path):
  want = call(tmp_path / "whole")
  assert call(tmp_path / "killed", kill_at=4) is None
  assert_same(host(call(tmp_path / "killed")), host(want))
  checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints" / "sft")
  params, router = checkpoints.weights()
  checkpoints.close()
  assert_same(params, host(lora.trained(want[0])))
  assert_same(router, host(want[1]))
  assert_same(lora.frozen(want[0]), golden.weights(POLICY)[0])


@pytest.mark.parametrize("on", ["traces", "samples"])
def test_distillation_moves_adapters_alone_towards_the_teacher(on):
  state = train_state.restart(*some(), OPTIMIZER, reference=False)
  teacher = golden.weights(POLICY, seed=9)
  how = dict(divergence="reverse_kl", micro_batches=2, router_bias_rate=0.0)
  fixed = dict(student=POLICY, teacher_policy=POLICY, optimizer=OPTIMIZER)
  if on == "traces":
    config = distillation.DistillConfig(**how)
    step = functools.partial(distillation.logit_step, config=config, **fixed)
    args = jax.tree.map(jnp.asarray, pages()), teacher
  else:
    config = distillation.OnPolicyConfig(**how, group_size=2, max_tokens=4)
    fixed |= dict(stop_ids=golden.STOP_IDS, pad_id=golden.PAD)
    step = functools.partial(distillation.on_policy_step, config=config, **fixed)
    args = golden.prompt_batch(), jax.random.key(3), teacher
  program = jax.jit(step).lower(state, *args).compile(QUICK)
  now, found = state, []
  for _ in range(8):
    now, *_, metrics = program(now, *args)
    found.append(float(metrics["divergence"]))
  assert found[-1] < 0.8 * found[0]
  assert_same(lora.frozen(now.params), lora.frozen(state.params))
  for path, x in boxes(now.params).items():
    assert not np.array_equal(x.b, boxes(state.params)[path].b), path


def test_a_stage_leaves_merged_weights(tmp_path):
  params, router = some()
  save_weights(tmp_path, (params, router))
  got = load_weights(tmp_path, POLICY, mesh_of((1, 1, 1), jax.devices()[:1]))
  assert_same(got[0], lora.merged(params), rtol=1e-6, atol=1e-6)
  assert_same(got[1], router)


def test_a_run_is_loaded_merged(tmp_path):
  """Of its base's checkpoint and its adapters'."""
  config = get_config()
  with config.unlocked():
    config.lora.rank = 3
    config.model.update(width=32, layers=2, heads=2)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  tokenizer = Tokenizer.train(["1 + 2 = 3"] * 9, vocab=300, symbols=())
  tokenizer.save(tmp_path / "tokenizer.model")
  policy = Policy(settings.policy_config(config, tokenizer.vocab))
  adapted, router = some(policy, settings.lora_config(config))
  for phase, params in (
    ("pretrain", lora.frozen(adapted)),
    ("rl", lora.trained(adapted)),
  ):
    checkpoints = Checkpoints(tmp_path / "checkpoints" / phase)
    checkpoints.save(2, dict(params=params, router=router), {"version": 1})
    checkpoints.close()
  kept = trained.load(tmp_path)
  assert_same(kept.params, lora.merged(adapted), rtol=1e-6, atol=1e-6)
  assert_same(trained.load(tmp_path, base=True).params, lora.frozen(adapted))
  assert_same(trained.load(tmp_path, merged=False).params, adapted)


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
  "get, changes, words",
  [
    (get_config, {"rank": -1}, r"lora\.rank=-1 must be 0 \(off\) or more"),
    (get_config, {"alpha": 0.0}, r"lora\.alpha=0\.0 must be above 0"),
    (get_config, {"targets": ()}, r"lora\.targets=\(\) must be a tuple of names"),
    (
      get_config,
      {"targets": ("w_k", "ffn")},
      r"no matrices w_k\. It has attention, w_dq, w_uq, .*ffn, .*experts",
    ),
    (
      get_config,
      {"grpo.gather_weights": False},
      r"gather_weights=False with lora\.rank",
    ),
  ],
)
def test_a_mistake_names_what_came_and_what_to_do(get, changes, words):
  config = get()
  with config.unlocked():
    config.lora.rank = 4
    for key, value in changes.items():
      section, _, name = key.rpartition(".")
      config[section or "lora"][name] = value
  with pytest.raises(UserError, match=words):
    config_checks.check(config, 1)


@pytest.mark.parametrize(
  "get", [get_config, ppo_config.get_config, r1_config.get_config]
)
def test_adapters_pass_the_checks(get):
  config = get()
  with config.unlocked():
    config.lora.rank = 4
    config.lora.targets = ("w_uq", "ffn", "shared", "experts")
  config_checks.check(config, 1)


def test_adapters_of_another_base_are_refused():
  params, _ = some()
  other, _ = golden.weights(golden.tiny_policy(width=16))
  with pytest.raises(UserError, match=r"w_dkv is of another base: A \(1, 32, 2\)"):
    lora.joined(other, lora.trained(params), 1.0)
  with pytest.raises(UserError, match=r"no weights dense_layers/attention/w_k"):
    adapters = lora.trained(some(QWEN, LoraConfig(2, targets=("w_k",)))[0])
    lora.joined(golden.weights(POLICY)[0], adapters, 1.0)


# -- peft's files ----------------------------------------------------------------------


V3 = dict(
  num_attention_heads=4,
  num_key_value_heads=4,
  hidden_size=32,
  intermediate_size=40,
  moe_intermediate_size=12,
  num_hidden_layers=3,
  first_k_dense_replace=1,
  q_lora_rank=16,
  kv_lora_rank=8,
  qk_nope_head_dim=6,
  qk_rope_head_dim=8,
  v_head_dim=10,
  n_routed_experts=4,
  num_experts_per_tok=2,
  n_group=1,
  topk_group=1,
  max_position_embeddings=96,
)
FAMILIES = {
  "DeepseekV3": (V3, ("attention",)),
  "Qwen2": (
    {name: V3[name] for name in ("hidden_size", "intermediate_size")}
    | dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
    ("w_q", "w_v", "w_o", "ffn"),
  ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
  """(their model, ours with adapters, the folder of these)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers", minversion="5.0")
  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(1)
  said, targets = FAMILIES[request.param]
  said = getattr(transformers, f"{request.param}Config")(vocab_size=64, **said)
  how = dict(attn_implementation="eager", experts_implementation="eager")
  family = getattr(transformers, f"{request.param}ForCausalLM")
  model = family._from_config(said, **how).float().eval()
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder / "base")
  policy, params, router = hf.load(folder / "base")
  config = LoraConfig(3, alpha=6.0, targets=targets)
  whole = lora.adapt(policy, params, config, jax.random.key(0))
  rng = np.random.default_rng(4)

  def drawn(x):
    return jnp.asarray(rng.normal(size=x.shape), x.dtype)

  whole = lora.put(whole, jax.tree.map(drawn, lora.trained(whole)))
  peft.save(folder / "adapters", policy, whole, base="base")
  return model, (policy, whole, router), folder


def test_names_shapes_and_numbers_are_those_of_peft_in_transformers(exported):
  torch = pytest.importorskip("torch")
  read = pytest.importorskip("safetensors.torch").load_file
  model, (policy, whole, router), folder = exported
  said = json.loads((folder / "adapters" / "adapter_config.json").read_text())
  files = read(folder / "adapters" / "adapter_model.safetensors")
  assert (said["r"], said["lora_alpha"], said["peft_type"]) == (3, 6.0, "LORA")
  weights, seen = model.state_dict(), set()
  for name, down in files.items():
    if not name.endswith(".lora_A.weight"):
      continue
    up = files[name.replace("lora_A", "lora_B")]
    module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    (short,) = (x for x in said["target_modules"] if module.endswith(f".{x}"))
    seen.add(short)
    rank = said["rank_pattern"].get(short, said["r"])
    scale = said["alpha_pattern"].get(short, said["lora_alpha"]) / rank
    w = weights[f"{module}.weight"]
    assert down.shape == (rank, w.shape[1]) and up.shape == (w.shape[0], rank)
    w += scale * up @ down
  assert seen == set(said["target_modules"])
  if policy.config.attention == "mla":
    assert said["rank_pattern"] == {"self_attn.kv_b_proj": 6}
    assert len(seen) == 5
  else:
    assert "model.layers.1.self_attn.q_proj.lora_A.weight" in str(files.keys())
  # Every module of that name has an adapter: peft would make one.
  for module, _ in model.named_modules():
    if any(module.endswith(f".{x}") for x in seen):
      assert f"base_model.model.{module}.lora_A.weight" in files, module
  tokens = np.random.default_rng(5).integers(0, 64, (2, 9))
  with torch.no_grad():
    want = model(input_ids=torch.tensor(tokens)).logits.numpy()
  got = logits(policy, whole, router, jnp.asarray(tokens))
  np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
  assert (
    np.abs(want - np.asarray(logits(policy, lora.frozen(whole), router, tokens))).max()
    > 0.1
  )


def test_adapters_come_back_bit_for_bit(exported):
  _, (policy, whole, _), folder = exported
  again = peft.load(folder / "adapters", policy, lora.frozen(whole))
  assert_same(again, whole)


def test_files_of_another_base_or_kind_are_refused(exported, tmp_path):
  _, (policy, whole, _), folder = exported
  other = Policy(dataclasses.replace(policy.config, width=16))
  with pytest.raises(
    UserError, match=r"(?s)adapters of another base.*self_attn\.\w+: B"
  ):
    peft.load(folder / "adapters", other, {})
  with pytest.raises(UserError, match=r"holds adapter_model\.safetensors already"):
    peft.save(folder / "adapters", policy, whole)
  for path in (folder / "adapters").iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  said = json.loads((tmp_path / "adapter_config.json").read_text())
  (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"use_dora": True}))
  with pytest.raises(UserError, match="use_dora=True cannot be computed"):
    peft.load(tmp_path, policy, lora.frozen(whole))
  with pytest.raises(UserError, match="have no adapters"):
    peft.save(tmp_path / "new", policy, lora.frozen(whole))


@pytest.mark.parametrize("target", ["experts", "shared"])
def test_ffns_adapters_of_a_policy_with_experts_cannot_be_written(tmp_path, target):
  params, _ = some(config=LoraConfig(2, targets=(target,)))
  with pytest.raises(UserError, match=r"moe/.*peft takes all FFNs'.*hf\.save"):
    peft.save(tmp_path, POLICY, params)
