"""Checkpoints of Hugging Face, in and out, against transformers."""

import dataclasses
import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
from meshes import mesh_of
import numpy as np
import optax
import pytest
from quick import QUICK
from trees import assert_same, host

from r1jax import prompts, rollout
from r1jax.errors import UserError
from r1jax.models import config as sizes
from r1jax.models import hf, hf_config, hf_names, hf_read, moe, policy, safetensors_file
from r1jax.models.sequence import Sequence

VOCAB, T, PROMPT = 64, 72, 8

# Tiny models of each family. The original context is 16 or 24 of T = 72 tokens.

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
YARN |= dict(beta_fast=2.0, beta_slow=0.25, rope_theta=50.0)
LLAMA3 = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=24)
LLAMA3 |= dict(low_freq_factor=0.5, high_freq_factor=2.0, rope_theta=100.0)
COMMON = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=96,
  bos_token_id=None,
  eos_token_id=None,
)
HEADS = COMMON | dict(num_key_value_heads=2, num_hidden_layers=2)
LATENT = COMMON | dict(
  num_key_value_heads=4,
  first_k_dense_replace=1,
  kv_lora_rank=8,
  qk_nope_head_dim=6,
  qk_rope_head_dim=8,
  v_head_dim=10,
  n_shared_experts=1,
  n_routed_experts=8,
  num_experts_per_tok=3,
  moe_intermediate_size=12,
  routed_scaling_factor=2.5,
)
V3 = LATENT | dict(
  q_lora_rank=16,
  n_group=4,
  topk_group=2,
  rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7),
)
MODELS = {
  "v3": ("DeepseekV3", V3),
  # As Moonlight: no query latent, one group, another eps (but not of the latents).
  "moonlight": (
    "DeepseekV3",
    LATENT
    | dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2)
    | dict(rms_norm_eps=1e-2, num_nextn_predict_layers=0),
  ),
  "v2-lite": (
    "DeepseekV2",
    LATENT
    | dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)
    | dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
  ),
  "v2": (
    "DeepseekV2",
    LATENT
    | dict(q_lora_rank=16, topk_method="group_limited_greedy", n_group=4, topk_group=2),
  ),
  "qwen2": ("Qwen2", HEADS | dict(tie_word_embeddings=True)),
  "qwen2-yarn": ("Qwen2", HEADS | dict(rope_parameters=YARN)),
  "qwen3": ("Qwen3", HEADS | dict(head_dim=12)),
  "qwen3-moe": (
    "Qwen3Moe",
    HEADS
    | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
    | dict(norm_topk_prob=True, head_dim=8),
  ),
  "qwen3-moe-dense-first": (
    "Qwen3Moe",
    HEADS
    | dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
    | dict(mlp_only_layers=[0], rope_parameters=YARN),
  ),
  "llama": ("Llama", HEADS | dict(rope_parameters=LLAMA3)),
  "llama-tied": (
    "Llama",
    HEADS | dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
  ),
}


def theirs(name):
  """Their model, float32, with nothing one or zero."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers", minversion="5.0")
  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(1)  # two would wait for each other
  family, settings = MODELS[name]
  said = getattr(transformers, f"{family}Config")(**settings)
  how = dict(attn_implementation="eager", experts_implementation="eager")
  model = getattr(transformers, f"{family}ForCausalLM")._from_config(said, **how)
  model = model.float().eval()
  rng = np.random.default_rng(len(name))
  for key, x in model.state_dict().items():
    if "norm" in key:
      new = rng.uniform(0.5, 1.5, x.shape)
    else:
      new = rng.normal(size=x.shape) * (0.5 if "embed" in key else 0.15)
    x.copy_(torch.tensor(new))
  return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """(name) -> (their model, its folder, what we load from it), made once."""

  @functools.cache
  def of(name):
    model, folder = theirs(name), tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return model, folder, hf.load(folder)

  return of


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def forward(network, params, router, tokens, seq):
  variables = {"params": params, "router": router}
  out = network.apply(variables, tokens, seq)
  return network.apply(variables, out.hidden, method="logits"), out


def ours_on(loaded, tokens, mask):
  seq = Sequence.of_mask(jnp.asarray(mask))
  return np.asarray(forward(*loaded, jnp.asarray(tokens, jnp.int32), seq)[0])


def theirs_on(model, tokens, mask):
  torch = pytest.importorskip("torch")
  places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  tokens, mask, places = (
    torch.tensor(np.asarray(x), dtype=torch.long) for x in (tokens, mask, places)
  )
  with torch.no_grad():
    out = model(input_ids=tokens, attention_mask=mask, position_ids=places)
  return out.logits.numpy()


def batch():
  rng = np.random.default_rng(5)
  rows = [rng.integers(0, VOCAB, n).tolist() for n in (T, 50, 9)]
  return prompts.pad_left(rows, T, 0)


def same_logits(model, loaded):
  tokens, mask = batch()
  want, got = theirs_on(model, tokens, mask), ours_on(loaded, tokens, mask)
  assert np.abs(want[mask]).max() > 1.0
  np.testing.assert_allclose(got[mask], want[mask], rtol=0, atol=2e-5)


def tensors_of(folder):
  """{name: numbers} of a folder's files, read by the public reader."""
  safetensors = pytest.importorskip("safetensors.torch")
  found = {}
  for file in folder.glob("*.safetensors"):
    found |= safetensors.load_file(file)
  return found


def their_load(folder):
  transformers = pytest.importorskip("transformers")
  how = dict(attn_implementation="eager", experts_implementation="eager")
  model, notes = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", output_loading_info=True, **how
  )
  assert not any(notes.values()), notes
  return model.eval()


# Equal to transformers.


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_padded_rows_equal_transformers(kept, name):
  model, _, loaded = kept(name)
  same_logits(model, loaded)


@pytest.mark.parametrize("name", MODELS)
def test_64_greedy_tokens_equal_transformers(kept, name):
  """Each of theirs is the most likely one to us after those before it."""
  torch = pytest.importorskip("torch")
  model, _, loaded = kept(name)
  begin = np.random.default_rng(6).integers(1, VOCAB, (3, PROMPT))
  out = model.generate(
    torch.tensor(begin),
    attention_mask=torch.ones(3, PROMPT, dtype=torch.long),
    max_new_tokens=T - PROMPT,
    do_sample=False,
    pad_token_id=0,
  ).numpy()
  assert out.shape == (3, T) and len(np.unique(out[:, PROMPT:])) > 4
  best = ours_on(loaded, out, np.ones_like(out, bool)).argmax(-1)
  np.testing.assert_array_equal(best[:, PROMPT - 1 : -1], out[:, PROMPT:])


@pytest.mark.parametrize("name", ["v2-lite", "qwen3-moe"])
def test_a_rollout_from_the_cache_draws_the_same_greedy_tokens(kept, name):
  torch = pytest.importorskip("torch")
  model, _, (network, params, router) = kept(name)
  network = policy.Policy(dataclasses.replace(network.config, moe="dense"))
  begin = [[7, 3, 9, 1, 4], [5, 60]]
  tokens, mask = prompts.pad_left(begin, 5, 0)
  answers = jnp.zeros((2, 1, 1), jnp.int32)
  ready = prompts.PromptBatch(
    jnp.asarray(tokens), jnp.asarray(mask), answers, jnp.arange(2)
  )

  @functools.partial(jax.jit, compiler_options=QUICK)
  def sample(params, router, key):
    how = dict(group_size=1, max_tokens=64, pad_id=0, temperature=0.0)
    return rollout.sample(network, params, router, ready, key, **how).tokens[:, 0]

  got = np.asarray(sample(params, router, jax.random.key(0)))
  for row, said in zip(got, begin, strict=True):
    want = model.generate(torch.tensor([said]), max_new_tokens=64, do_sample=False)
    np.testing.assert_array_equal(row, want[0, len(said) :])


# MTP.


def with_mtp(folder, to):
  """A copy of the checkpoint "v3" with an MTP module of its own."""
  rng, files = np.random.default_rng(8), safetensors_file.read_folder(folder)
  whole = {name: x.array() for name, x in files.items()}
  for name in list(whole):
    if name.startswith("model.layers.2."):
      new = rng.uniform(0.5, 1.5, whole[name].shape) * np.sign(whole[name])
      whole[name.replace("layers.2.", "layers.3.")] = np.float32(0.2 * new)
  for name in ("enorm", "hnorm", "shared_head.norm"):
    x = rng.uniform(0.5, 1.5, 32).astype(np.float32)
    whole[f"model.layers.3.{name}.weight"] = x
  project = 0.2 * rng.normal(size=(32, 64))
  whole["model.layers.3.eh_proj.weight"] = np.float32(project)
  whole["model.layers.3.embed_tokens.weight"] = whole["model.embed_tokens.weight"]
  whole["model.layers.3.shared_head.head.weight"] = whole["lm_head.weight"]
  write(to, whole, json.loads((folder / "config.json").read_text()))


def write(folder, tensors, said, max_bytes=1e9):
  folder.mkdir(exist_ok=True)
  layout = {name: (x.shape, x.dtype) for name, x in tensors.items()}
  safetensors_file.write_folder(folder, layout, iter(tensors.values()), max_bytes)
  (folder / "config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def mtp(kept, tmp_path_factory):
  folder = tmp_path_factory.mktemp("mtp")
  with_mtp(kept("v3")[1], folder)
  return folder, hf.load(folder)


def test_mtp_module_equals_transformers(kept, mtp, monkeypatch):
  torch = pytest.importorskip("torch")
  layers = pytest.importorskip("transformers.modeling_layers")
  model, (folder, (network, params, router)) = kept("v3")[0], mtp
  assert network.config.mtp_depth == 1
  # Theirs looks for the module of the released model alone.
  pattern = [r"model\.layers\.3.*"]
  monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", pattern, False)
  monkeypatch.setattr(model.config, "name_or_path", str(folder))
  monkeypatch.setattr(model.config, "dtype", torch.float32)
  module = layers.MtpModel.from_pretrained(model).eval()
  tokens = np.random.default_rng(9).integers(0, VOCAB, (2, T))
  seq = Sequence.of_mask(jnp.ones((2, T), bool))
  _, out = forward(network, params, router, jnp.asarray(tokens), seq)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def ahead(params, router, states):
    variables = {"params": params, "router": router}
    hidden, _ = network.apply(variables, states, jnp.asarray(tokens), seq, method="mtp")
    return network.apply(variables, hidden, method="logits")

  # From their own states to their own logits, as their `generate` has them.
  with torch.no_grad():
    states = model.model(torch.tensor(tokens)).last_hidden_state
    want = module.forward_layer(
      0,
      states[:, :-1],
      torch.arange(T - 1)[None],
      None,
      input_ids=torch.tensor(tokens[:, 1:]),
    )
    want = model.lm_head(want).numpy()
  got = np.asarray(ahead(params, router, out.hidden))[:, :-1]
  assert np.abs(want).max() > 1.0
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_mtp_module_goes_round_and_can_be_left_out(kept, mtp, tmp_path):
  folder, loaded = mtp
  hf.save(tmp_path / "out", *loaded, dtype="float32")
  before, after = tensors_of(folder), tensors_of(tmp_path / "out")
  assert before.keys() == after.keys()
  assert all(before[name].equal(after[name]) for name in before)
  # config.json of "v3" announces a module that its files lack.
  _, plain, (network, *weights) = kept("v3")
  assert json.loads((plain / "config.json").read_text())["num_nextn_predict_layers"]
  assert network.config.mtp_depth == 0
  network, *without = hf.load(folder, mtp_depth=0)
  assert network.config.mtp_depth == 0
  assert_same(without, weights)
  with pytest.raises(UserError, match=r"model\.layers\.3\.enorm\.weight +missing"):
    hf.load(plain, mtp_depth=1)


# Out again.


@pytest.mark.parametrize("name", MODELS)
def test_every_bit_comes_back(kept, name, tmp_path):
  model, folder, loaded = kept(name)
  hf.save(tmp_path, *loaded, dtype="float32", max_shard_bytes=20_000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  before, after = tensors_of(folder), tensors_of(tmp_path)
  assert before.keys() == after.keys()
  assert all(before[key].equal(after[key]) for key in before)
  again = their_load(tmp_path)
  want, got = model.state_dict(), again.state_dict()
  assert want.keys() == got.keys() and all(want[k].equal(got[k]) for k in want)
  tokens, mask = batch()
  assert np.array_equal(theirs_on(again, tokens, mask), theirs_on(model, tokens, mask))
  assert hf_config.from_hf(json.loads((tmp_path / "config.json").read_text())) == (
    loaded[0].config
  )


def test_every_bit_of_bfloat16_comes_back(kept, tmp_path):
  torch = pytest.importorskip("torch")
  model = theirs("v3").to(torch.bfloat16)
  model.save_pretrained(tmp_path / "theirs")
  loaded = hf.load(tmp_path / "theirs")
  assert loaded[0].config.dtype == "bfloat16"
  assert {x.dtype.name for x in jax.tree.leaves(loaded[1])} == {"float32"}
  hf.save(tmp_path / "ours", *loaded)
  before, after = (tensors_of(tmp_path / x) for x in ("theirs", "ours"))
  assert before.keys() == after.keys()
  for name, x in before.items():
    wide = name.endswith(hf_names.WIDE)
    assert after[name].dtype == (torch.float32 if wide else torch.bfloat16)
    assert x.float().equal(after[name].float()), name
  _, narrow, biases = hf.load(tmp_path / "theirs", params_dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(narrow)} == {"bfloat16"}
  assert {x.dtype.name for x in jax.tree.leaves(biases)} == {"float32"}
  assert_same(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), loaded[1])


def test_a_trained_policy_says_the_same_in_transformers(kept, tmp_path):
  _, _, (network, params, router) = kept("v3")
  tokens, mask = batch()
  tokens, seq = jnp.asarray(tokens), Sequence.of_mask(jnp.asarray(mask))
  optimizer = optax.adam(1e-2)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(params, router, state):
    def loss(params):
      variables = {"params": params, "router": router}
      out = network.apply(variables, tokens, seq)
      logprobs, _ = network.apply(
        variables, out.hidden[:, :-1], tokens[:, 1:], method="token_statistics"
      )
      return -logprobs.mean(), out.load

    grads, load = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), moe.balance(router, load, 0.1), state

  new = params, router, optimizer.init(params)
  for _ in range(3):
    new = step(*new)
  params_after, router_after, _ = new
  moved = jax.tree.map(lambda a, b: bool((a != b).all()), params, params_after)
  assert jax.tree.leaves(moved).count(False) <= 1  # experts that nothing chose
  assert not np.array_equal(*(x["moe_layers"]["moe"]["bias"] for x in (router, new[1])))
  after = network, params_after, router_after
  hf.save(tmp_path / "f32", *after, dtype="float32", config={"eos_token_id": 3})
  model = their_load(tmp_path / "f32")
  assert model.config.eos_token_id == 3
  same_logits(model, after)
  hf.save(tmp_path / "bf16", *after)
  model = their_load(tmp_path / "bf16").float()
  same_logits(model, (network, *hf.load(tmp_path / "bf16")[1:]))


# Float8.


def test_float8_equals_its_definition_with_ragged_blocks(kept, tmp_path):
  """W[i, j] = q[i, j] * s[i // 8, j // 8]; 12 rows of 8 are two blocks."""
  _, folder, _ = kept("v3")
  said = json.loads((folder / "config.json").read_text())
  rng, plain, quantised, ragged = np.random.default_rng(3), {}, {}, 0
  for name, tensor in safetensors_file.read_folder(folder).items():
    x = tensor.array()
    plain[name] = quantised[name] = x
    if x.ndim != 2 or "embed" in name or "lm_head" in name or "gate.weight" in name:
      continue
    q = x.astype(jnp.float8_e4m3fn)
    scales = rng.uniform(0.5, 2.0, [-(-n // 8) for n in x.shape]).astype(np.float32)
    plain[name] = np.zeros_like(x)
    for i, j in np.ndindex(*x.shape):
      plain[name][i, j] = np.float32(q[i, j]) * scales[i // 8, j // 8]
    quantised[name], quantised[f"{name}_scale_inv"] = q, scales
    ragged += any(n % 8 for n in x.shape)
  assert ragged > 10
  write(tmp_path / "plain", plain, said)
  how = dict(quant_method="fp8", weight_block_size=[8, 8], fmt="e4m3")
  write(tmp_path / "fp8", quantised, said | {"quantization_config": how})
  _, *want = hf.load(tmp_path / "plain")
  _, *got = hf.load(tmp_path / "fp8")
  assert_same(host(got), host(want))


# Into shards, and how much memory that takes.


def test_arrays_lie_on_the_mesh_as_the_policy_wants_them(kept):
  _, folder, (_, *want) = kept("v3")
  mesh = mesh_of((2, 2, 2))
  network, *got = hf.load(folder, mesh)
  assert_same(host(got), host(want))
  experts = got[0]["moe_layers"]["moe"]["w_gate"]
  assert experts.shape == (2, 8, 32, 12)
  assert experts.addressable_shards[0].data.shape == (2, 4, 16, 6)
  assert network.config == hf.load(folder)[0].config


@pytest.mark.parametrize("path", ["attention/w_uv", "moe/w_down"])
def test_a_part_filled_box_by_box_is_the_part(kept, path, monkeypatch):
  _, folder, (network, params, _) = kept("v3")
  want = params["moe_layers"]
  for key in path.split("/"):
    want = want[key]
  leaf = hf_names.leaves(network.config, hf.shapes(network))[f"moe_layers/{path}"]
  files = safetensors_file.read_folder(folder)
  mesh = mesh_of((1, 2, 1), jax.devices()[:2])
  cut = jax.NamedSharding(mesh, jax.P(None, ("fsdp", "expert")))
  monkeypatch.setattr(hf_read, "BOX", 70)
  monkeypatch.setattr(hf_read, "PIECE", 20)
  for place in (None, cut):
    with jax.set_mesh(mesh):  # as a caller may have it
      got = hf_read.array(
        want.shape,
        jnp.float32,
        place,
        hf_read.file_order(leaf),
        lambda box: hf_read.read(leaf, box, files, None),
      )
    assert place is None or got.sharding == place
    assert np.array_equal(got, want)


def test_boxes_cover_an_array_once():
  for largest in (1, 5, 12, 100):
    seen = np.zeros((3, 4, 5), int)
    for box in hf_read.boxes(seen.shape, (0, 2, 1), largest):
      seen[box] += 1
      assert seen[box].size <= largest
    assert (seen == 1).all()


def test_an_import_needs_little_beside_its_arrays(tmp_path, monkeypatch):
  network = policy.Policy(sizes.tiny_dense(60_000, layers=1, width=64, head_dim=16))
  layout = {
    name: (leaf.tensor_shape, np.dtype(jnp.bfloat16))
    for leaf in hf_names.leaves(network.config, hf.shapes(network)).values()
    for name in leaf.names.values()
  }
  zeros = (np.zeros(shape, dtype) for shape, dtype in layout.values())
  safetensors_file.write_folder(tmp_path, layout, zeros, 1e9)
  said = hf_config.to_hf(network.config, "bfloat16")
  (tmp_path / "config.json").write_text(json.dumps(said))
  monkeypatch.setattr(hf_read, "BOX", 2**18)
  tracemalloc.start()
  try:
    hf.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 0.5 * 60_000 * 64 * 4  # of the embedding
