"""Dense policies with grouped-query attention against Hugging Face's Qwen2, Qwen3 and
Llama, and against themselves: decoded, packed, sampled, trained, cut over a mesh."""

import functools

from flax import linen as nn
import grpo_golden as golden
import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import pytest
from trees import assert_same, host

from r1jax import experience, grpo, ops, prompts, rollout, sft, sharding, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.errors import UserError
from r1jax.levels import Level
from r1jax.models import cache as caches
from r1jax.models import config, layers, policy
from r1jax.models.sequence import Sequence
from r1jax.objective import Objective
from r1jax.optimizer import OptimizerConfig, make_optimizer

VOCAB, PAD = 16, 0


def small(**changes):
  sizes = dict(
    width=32, layers=2, heads=4, kv_heads=2, head_dim=6, dense_ffn=24, rope_theta=20.0
  )
  return config.tiny_dense(VOCAB, **{**sizes, **changes})


EVERYTHING = policy.Policy(small(qk_norm=True, tied_embeddings=True))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(network, params, tokens, seq):
  out = network.apply({"params": params}, tokens, seq)
  return network.apply({"params": params}, out.hidden, method="logits"), out.cache


# Parity.

LLAMA3 = config.Llama3(factor=4.0, low=0.2, high=0.8, original_length=8)
FAMILIES = {
  "Qwen2": dict(head_dim=8),
  "Qwen2-tied": dict(head_dim=8, tied_embeddings=True),
  "Qwen3": dict(qkv_bias=False, qk_norm=True),
  "Llama": dict(qkv_bias=False, head_dim=8, kv_heads=1, llama3=LLAMA3),
}


def hugging_face(family, c, params):
  """The same policy as theirs, whose matrices are [out, in]."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers", minversion="5.0")
  rope = dict(rope_type="default", rope_theta=c.rope_theta)
  if c.llama3 is not None:
    rope.update(
      rope_type="llama3",
      factor=c.llama3.factor,
      low_freq_factor=c.llama3.low,
      high_freq_factor=c.llama3.high,
      original_max_position_embeddings=c.llama3.original_length,
    )
  name = family.partition("-")[0]
  model = getattr(transformers, f"{name}ForCausalLM")._from_config(
    getattr(transformers, f"{name}Config")(
      vocab_size=c.vocab,
      hidden_size=c.width,
      intermediate_size=c.dense_ffn,
      num_hidden_layers=c.layers,
      num_attention_heads=c.heads,
      num_key_value_heads=c.kv_heads,
      head_dim=c.head_dim,
      rms_norm_eps=c.norm_eps,
      max_position_embeddings=64,
      rope_parameters=rope,
      tie_word_embeddings=c.tied_embeddings,
      pad_token_id=None,
    ),
    attn_implementation="eager",
  )

  def flat(w, inputs):  # [in..., out...] -> [out, in]
    return w.reshape(int(np.prod(w.shape[:inputs])), -1).T

  head = params["embedding"] if c.tied_embeddings else params["head"].T
  weights = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": head,
  }
  for i in range(c.layers):
    p = jax.tree.map(lambda w, i=i: np.asarray(w[i]), params["dense_layers"])
    name, a = f"model.layers.{i}", p["attention"]
    weights |= {
      f"{name}.input_layernorm.weight": p["attention_norm"]["scale"],
      f"{name}.post_attention_layernorm.weight": p["ffn_norm"]["scale"],
      f"{name}.self_attn.o_proj.weight": flat(a["w_o"], 2),
    }
    for part in "qkv":
      weights[f"{name}.self_attn.{part}_proj.weight"] = flat(a[f"w_{part}"], 1)
      if c.qkv_bias:
        weights[f"{name}.self_attn.{part}_proj.bias"] = a[f"b_{part}"].reshape(-1)
    for part in "qk" if c.qk_norm else "":
      weights[f"{name}.self_attn.{part}_norm.weight"] = a[f"{part}_norm"]["scale"]
    for part in ("gate", "up", "down"):
      weights[f"{name}.mlp.{part}_proj.weight"] = p["ffn"][part].T
  weights = {k: torch.tensor(np.array(w, order="C")) for k, w in weights.items()}
  model.load_state_dict(weights, strict=True)
  return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face_on_left_padded_rows(family, random_weights):
  torch = pytest.importorskip("torch")
  network = policy.Policy(small(**FAMILIES[family]))
  params, _ = random_weights(network, seed=3)
  theirs = hugging_face(family, network.config, params)
  rng = np.random.default_rng(0)
  # Three times the Llama's original length.
  rows = [rng.integers(0, VOCAB, n).tolist() for n in (24, 17, 5)]
  tokens, mask = prompts.pad_left(rows, 24, PAD)
  seq = Sequence.of_mask(jnp.asarray(mask))
  got, _ = logits_of(network, params, jnp.asarray(tokens), seq)
  with torch.no_grad():
    want = theirs(
      input_ids=torch.tensor(tokens, dtype=torch.long),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      position_ids=torch.tensor(np.array(seq.positions), dtype=torch.long),
    ).logits.numpy()
  assert np.abs(want[mask]).max() > 1.0
  np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=0, atol=1e-5)


def test_llama3_frequencies_are_those_of_the_published_rule():
  """transformers' rule, pair by pair: wavelengths above 8192 are slowed by 8, those
  under 2048 stay, and between them a blend."""
  got = layers.rope_frequencies(128, 500_000.0, config.Llama3())
  kinds = set()
  for j, f in enumerate(np.asarray(got, np.float64)):
    plain = 500_000.0 ** (-2 * j / 128)
    wave = 2 * np.pi / plain
    smooth = (8192 / wave - 1) / 3
    blend = (1 - smooth) * plain / 8 + smooth * plain
    want = plain / 8 if wave > 8192 else plain if wave < 2048 else blend
    kinds.add(0 if wave > 8192 else 1 if wave < 2048 else 2)
    assert f == pytest.approx(want, rel=2e-5)
  assert kinds == {0, 1, 2}


# One function, several programs.


def test_query_heads_share_the_key_head_of_their_group():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 5, 6, 4)), rng.normal(size=(2, 7, 3, 4))
  v = rng.normal(size=(2, 7, 3, 2))
  q_segments, k_segments = rng.integers(1, 3, (2, 5)), rng.integers(0, 3, (2, 7))
  k_segments[:, :2] = 1, 2
  mask = q_segments[:, :, None] == k_segments[:, None]
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  segments = jnp.asarray(q_segments), jnp.asarray(k_segments)
  got, _ = ops.attention(q, k, v, *segments, scale=0.3, causal=False)
  for h in range(6):
    scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, h // 2]) * 0.3
    p = np.where(mask, np.exp(scores), 0.0)
    p /= p.sum(-1, keepdims=True)
    want = np.einsum("bts,bsd->btd", p, v[:, :, h // 2])
    np.testing.assert_allclose(got[:, :, h], want, rtol=0, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def decode(network, params, tokens, at, cache):
  variables = {"params": params}
  layers = policy.layers_of(variables) if cache.split else None
  out = network.apply(variables, tokens, at, cache, layers, method="decode")
  assert out.experts is None
  return network.apply(variables, out.hidden, method="logits"), out.cache


def entries_of(own, split):
  """[N, S, length, L], of levels whose seats are the rows."""
  if not split:
    return np.concatenate([np.asarray(level) for level in own], axis=2)
  layers = []
  for levels in own:
    keys = np.concatenate([k.transpose(0, 3, 1, 2) for k, _ in levels], axis=1)
    values = np.concatenate([v.swapaxes(1, 2) for _, v in levels], axis=1)
    both = np.concatenate([keys, values], axis=-1)  # S length Hk 2 K
    layers.append(both.reshape(*both.shape[:2], -1))
  return np.stack(layers)


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "any rows"])
@pytest.mark.parametrize("split", [True, False], ids=["split", "stacked"])
def test_decoding_on_a_shared_prefix_equals_the_full_pass(
  split, grouped, random_weights
):
  """One token, one, then two at once; the third crosses into the second level."""
  network = (
    EVERYTHING
    if split
    else policy.Policy(small(qk_norm=True, tied_embeddings=True, implementation="xla"))
  )
  params, _ = random_weights(EVERYTHING)
  c, group, length = network.config, 2, 4
  own = np.random.default_rng(2).integers(1, VOCAB, (3, group, length))
  tokens, mask = prompts.pad_left([[7, 2], [1, 8, 4, 6], [11, 12, 13]], 5, PAD)
  _, prefix = logits_of(
    EVERYTHING, params, jnp.asarray(tokens), Sequence.of_mask(jnp.asarray(mask))
  )
  assert prefix.shape == (c.layers, 3, 5, c.cache.width) == (2, 3, 5, 2 * 2 * 6)
  rows = np.arange(3 * group)
  if not grouped:
    rows = np.random.default_rng(3).permutation(rows)
  levels = Level(0, 3, 6), Level(3, 2, 6)
  cache = caches.empty(prefix, levels, c.cache, split)
  # What is not written yet must not count.
  cache = cache.replace(own=jax.tree.map(lambda x: x + 1e3, cache.own))
  window, got, t = cache.window, [], 0
  for n in (1, 1, 2):
    places = np.repeat(mask.sum(1) + t, group)[rows, None] + np.arange(n)
    at = caches.DecodeStep(
      positions=jnp.asarray(places, jnp.int32),
      lengths=jnp.full(6, t, jnp.int32),
      writes=jnp.ones(6, bool),
      prompts=jnp.asarray(rows // group, jnp.int32),
      prompt_starts=jnp.asarray(window - mask.sum(1), jnp.int32),
      seats=(None, None),
      levels=levels,
      grouped=grouped,
    )
    new = jnp.asarray(own.reshape(6, length)[rows, t : t + n])
    logits, cache = decode(network, params, new, at, cache)
    got.append(logits)
    t += n

  def whole(prompt, completion):  # one a sample, [3 * group, ...]
    both = [np.repeat(prompt, group, axis=0), completion.reshape(3 * group, length)]
    return jnp.asarray(np.concatenate(both, axis=1))

  seq = Sequence.of_mask(whole(mask, np.ones_like(own, bool)))
  want, entries = logits_of(EVERYTHING, params, whole(tokens, own), seq)
  got = np.concatenate(got, axis=1)
  np.testing.assert_allclose(got, want[rows, 5:], rtol=0, atol=1e-5)
  held = entries_of(cache.own, split)
  np.testing.assert_allclose(
    held[:, :, :length], entries[:, rows, 5:], rtol=0, atol=1e-5
  )
  assert (held[:, :, length] == 1e3).all()


def test_packed_pages_give_the_logits_of_separate_rows(random_weights):
  params, _ = random_weights(EVERYTHING)
  pages = [[3, 1, 4, 1], [9, 2, 6], [5]]
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 3, 0]])
  tokens = jnp.asarray([[3, 1, 4, 1, 9, 2, 6, 5, PAD]])
  packed = Sequence(positions=sft.positions(segments), segments=segments)
  together, _ = logits_of(EVERYTHING, params, tokens, packed)
  alone, mask = prompts.pad_left(pages, 5, PAD)
  apart, _ = logits_of(
    EVERYTHING, params, jnp.asarray(alone), Sequence.of_mask(jnp.asarray(mask))
  )
  np.testing.assert_allclose(
    together[0, :8], np.asarray(apart)[mask], rtol=0, atol=1e-5
  )


def test_sampler_and_trainer_agree_on_logprobs(random_weights, key):
  params, router = random_weights(EVERYTHING)
  assert router == {}
  batch = golden.prompt_batch()

  @jax.jit
  def both(params):
    drawn = rollout.sample(
      EVERYTHING,
      params,
      router,
      batch,
      key,
      group_size=2,
      max_tokens=7,
      temperature=0.7,
      stop_ids=golden.STOP_IDS,
      pad_id=PAD,
    )
    rows = experience.rows_of(batch, drawn)
    again, _ = experience.completion_logprobs(EVERYTHING, params, router, rows, 0.7)
    return drawn, again.reshape(drawn.logprobs.shape)

  drawn, again = both(params)
  mask = np.asarray(drawn.mask)
  assert mask.sum() > 20 and not mask.all()
  np.testing.assert_allclose(drawn.logprobs[mask], again[mask], rtol=0, atol=1e-5)


# Steps. A large eps, as in sharding_test.py.

STUDENT = policy.Policy(config.tiny_dense(VOCAB))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, steps=100, eps=1e-2))


def sft_step(shape, devices):
  """(state before, state after, metrics) of one step on a mesh."""
  rng = np.random.default_rng(4)
  tokens = jnp.asarray(rng.integers(1, VOCAB, (8, 12)), jnp.int32)
  segments = jnp.asarray([[1] * 7 + [2] * 4 + [0]] * 8, jnp.int32)
  pages = sft.Pages(tokens, segments, jnp.ones((8, 12), bool))
  mesh = mesh_of(shape, devices)
  with jax.set_mesh(mesh):
    state = train_state.restart(*golden.weights(STUDENT), OPTIMIZER, reference=False)
    shardings = train_state.shardings(STUDENT, OPTIMIZER, mesh, reference=False)
    step = functools.partial(
      sft.step,
      policy=STUDENT,
      optimizer=OPTIMIZER,
      router_bias_rate=1e-3,
      micro_batches=2,
    )
    after, metrics = jax.jit(step, out_shardings=(shardings, None))(
      jax.device_put(state, shardings),
      jax.device_put(pages, sharding.batch_sharding(mesh)),
    )
  return state, after, metrics


@pytest.fixture(scope="module")
def on_one():
  return sft_step((1, 1, 1), jax.devices()[:1])


def all_moved(before, after):
  before, after = (jax.tree_util.tree_leaves_with_path(x) for x in (before, after))
  for (path, a), (_, b) in zip(before, after, strict=True):
    assert np.isfinite(b).all() and not np.array_equal(a, b), jax.tree_util.keystr(path)


def test_an_sft_step_moves_every_weight(on_one):
  before, after, metrics = on_one
  all_moved(before.params, after.params)
  assert after.router == {} and float(metrics["nll"]) > 0


def test_an_sft_step_is_invariant_to_the_mesh(on_one):
  _, want, want_metrics = on_one
  _, got, metrics = sft_step((2, 2, 2), jax.devices())
  for name in want_metrics:
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5)
  assert_same(host(got.params), host(want.params), rtol=1e-3, atol=1e-5)
  attention = got.params["dense_layers"]["attention"]
  shapes = {n: w.addressable_shards[0].data.shape for n, w in attention.items()}
  assert shapes["w_q"] == (3, 20, 2, 20) and shapes["b_q"] == (3, 2, 20)
  assert shapes["w_k"] == (3, 20, 1, 20) and shapes["w_o"] == (3, 2, 20, 20)


def test_a_whole_step_of_grpo_moves_every_weight():
  plain = grpo.GRPOConfig(
    group_size=4, minibatches=2, max_tokens=6, objective=Objective(kl_coef=0.0)
  )
  step = jax.jit(golden.make_step(STUDENT, plain))
  before = golden.new_state(STUDENT, reference=False)
  after, drawn, metrics, _ = step(before, golden.prompt_batch(), jax.random.key(7))
  all_moved(before.params, after.params)
  assert int(after.step) == 2 and after.router == {}
  assert float(metrics["sampler_gap_max"]) < 1e-4
  assert float(metrics["load_imbalance"]) == 1.0
  assert drawn.experts is None and "balance_loss" not in metrics


def test_a_state_without_router_biases_survives_a_checkpoint(tmp_path, on_one):
  _, state, _ = on_one
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, {"step": 1})
  shapes = jax.eval_shape(lambda: state)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  assert_same(host(checkpoints.restore(shapes, shardings).state), host(state))
  checkpoints.close()


# Names and sizes.


def shapes_of(c):
  return jax.eval_shape(lambda: policy.init(policy.Policy(c), jax.random.key(0)))


@pytest.mark.parametrize(
  "preset, changes, published",
  [
    ("qwen2_5_1_5b", {}, 1_777_088_000),
    ("qwen2_5_1_5b_base", {}, 1_543_714_304),
    ("qwen3_0_6b", {}, 596_049_920),
    ("qwen2_5_7b", {}, 7_615_616_512),
    ("qwen2_5_14b", {}, 14_770_033_664),
    ("qwen2_5_32b", {}, 32_763_876_352),
    ("llama_8b", {}, 8_030_261_248),
    ("llama_70b", {}, 70_553_706_496),
  ],
)
def test_presets_have_as_many_parameters_as_the_published_models(
  preset, changes, published
):
  params, router = shapes_of(config.PRESETS[preset](**changes))
  assert sum(x.size for x in jax.tree.leaves(nn.unbox(params))) == published
  assert router == {}


@pytest.mark.parametrize(
  "c", [STUDENT.config, EVERYTHING.config, config.llama_70b()], ids=lambda c: c.width
)
def test_every_weight_names_its_axes(c):
  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  known = {*sharding.RULES["fsdp"], None}
  for path, box in jax.tree_util.tree_leaves_with_path(shapes_of(c), is_leaf=is_box):
    where = jax.tree_util.keystr(path)
    assert is_box(box) and len(box.names) == box.value.ndim, where
    assert set(box.names) <= known, where


def test_more_layers_of_a_dense_preset_are_dense_too():
  assert config.tiny_dense(VOCAB, layers=5).moe_layers == 0
  c = config.tiny_dense(
    VOCAB, dense_layers=1, experts=4, active_experts=2, expert_ffn=8
  )
  assert c.moe_layers == 2


@pytest.mark.parametrize(
  "preset, changes, said",
  [
    ("tiny_dense", dict(kv_heads=0), "kv_heads=0 must be 1 or more"),
    ("tiny_dense", dict(kv_heads=3), "heads=4 must divide into kv_heads=3"),
    ("tiny_dense", dict(head_dim=7), "head_dim=7 must be even"),
    ("tiny_dense", dict(attention="mqa"), "attention='mqa' must be 'mla' or 'gqa'"),
    ("tiny_dense", dict(kv_latent=16), "kv_latent=16 is of attention='mla'.*leave it"),
    (
      *("tiny_dense", dict(yarn=config.Yarn(), llama3=config.Llama3())),
      "yarn and llama3 exclude each other",
    ),
    ("tiny", dict(scoring="relu"), "scoring='relu' must be one of"),
    ("tiny_dense", dict(dense_layers=2), "expert_ffn=0 .*dense_layers=layers"),
    ("tiny_dense", dict(mtp_depth=1), "expert_ffn=0 .*mtp_depth=0"),
    ("tiny", dict(kv_heads=2), "kv_heads=2 is of attention='gqa'.*leave it out"),
    ("tiny", dict(qkv_bias=True), "qkv_bias=True is of attention='gqa'"),
    ("tiny", dict(v_dim=0), "v_dim=0 must be 1 or more"),
  ],
)
def test_a_config_that_cannot_work_is_refused(preset, changes, said):
  with pytest.raises(UserError, match=rf"config\.model: .*{said}"):
    config.PRESETS[preset](VOCAB, **changes)
