"""Configs of published models, and checkpoints that are refused: each message."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same, host

from r1jax.errors import UserError
from r1jax.models import config, hf, hf_config, policy, safetensors_file

# Published configs, as their config.json has them.

YARN = dict(type="yarn", factor=40, original_max_position_embeddings=4096)
YARN |= dict(beta_fast=32, beta_slow=1)
R1 = dict(
  model_type="deepseek_v3",
  attention_bias=False,
  first_k_dense_replace=3,
  hidden_act="silu",
  hidden_size=7168,
  intermediate_size=18432,
  kv_lora_rank=512,
  max_position_embeddings=163840,
  moe_intermediate_size=2048,
  moe_layer_freq=1,
  n_group=8,
  n_routed_experts=256,
  n_shared_experts=1,
  norm_topk_prob=True,
  num_attention_heads=128,
  num_experts_per_tok=8,
  num_hidden_layers=61,
  num_key_value_heads=128,
  num_nextn_predict_layers=1,
  q_lora_rank=1536,
  qk_nope_head_dim=128,
  qk_rope_head_dim=64,
  quantization_config=dict(
    activation_scheme="dynamic",
    fmt="e4m3",
    quant_method="fp8",
    weight_block_size=[128, 128],
  ),
  rms_norm_eps=1e-06,
  rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
  rope_theta=10000,
  routed_scaling_factor=2.5,
  scoring_func="sigmoid",
  tie_word_embeddings=False,
  topk_group=4,
  topk_method="noaux_tc",
  torch_dtype="bfloat16",
  v_head_dim=128,
  vocab_size=129280,
)
SMALL = dict(
  first_k_dense_replace=1,
  hidden_size=2048,
  moe_intermediate_size=1408,
  n_group=1,
  topk_group=1,
  n_routed_experts=64,
  n_shared_experts=2,
  num_attention_heads=16,
  num_key_value_heads=16,
  num_experts_per_tok=6,
  num_hidden_layers=27,
  q_lora_rank=None,
)
SMALL = {k: v for k, v in R1.items() if k != "quantization_config"} | SMALL
MOONLIGHT = SMALL | dict(
  intermediate_size=11264,
  num_nextn_predict_layers=0,
  rms_norm_eps=1e-5,
  rope_scaling=None,
  rope_theta=50000.0,
  routed_scaling_factor=2.446,
  vocab_size=163840,
)
V2_LITE = SMALL | dict(
  model_type="deepseek_v2",
  intermediate_size=10944,
  norm_topk_prob=False,
  rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
  routed_scaling_factor=1.0,
  scoring_func="softmax",
  topk_method="greedy",
  vocab_size=102400,
)
QWEN = dict(
  model_type="qwen2",
  hidden_act="silu",
  hidden_size=1536,
  intermediate_size=8960,
  max_position_embeddings=131072,
  max_window_layers=21,
  num_attention_heads=12,
  num_hidden_layers=28,
  num_key_value_heads=2,
  rms_norm_eps=1e-06,
  rope_theta=10000,
  sliding_window=4096,
  tie_word_embeddings=False,
  torch_dtype="bfloat16",
  use_mrope=False,
  use_sliding_window=False,
  vocab_size=151936,
)
LLAMA = dict(
  model_type="llama",
  attention_bias=False,
  hidden_act="silu",
  hidden_size=4096,
  intermediate_size=14336,
  max_position_embeddings=131072,
  mlp_bias=False,
  num_attention_heads=32,
  num_hidden_layers=32,
  num_key_value_heads=8,
  rms_norm_eps=1e-05,
  rope_scaling=dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
  ),
  rope_theta=500000.0,
  torch_dtype="bfloat16",
  vocab_size=128256,
)
QWEN3_MOE = dict(
  model_type="qwen3_moe",
  attention_bias=False,
  decoder_sparse_step=1,
  head_dim=128,
  hidden_act="silu",
  hidden_size=2048,
  intermediate_size=6144,
  max_position_embeddings=40960,
  mlp_only_layers=[],
  moe_intermediate_size=768,
  norm_topk_prob=True,
  num_attention_heads=32,
  num_experts=128,
  num_experts_per_tok=8,
  num_hidden_layers=48,
  num_key_value_heads=4,
  rms_norm_eps=1e-06,
  rope_scaling=None,
  rope_theta=1000000.0,
  sliding_window=None,
  torch_dtype="bfloat16",
  use_sliding_window=False,
  vocab_size=151936,
)


@pytest.mark.parametrize(
  "said, preset",
  [
    (R1, config.v3_671b(init_std=None)),
    (MOONLIGHT, config.moonlight_16b(init_std=None)),
    (QWEN, config.qwen2_5_1_5b(init_std=None, moe="ragged")),
    (LLAMA, config.llama_8b(init_std=None, moe="ragged")),
  ],
  ids=["r1", "moonlight", "distill-qwen", "distill-llama"],
)
def test_published_configs_are_the_presets(said, preset):
  assert hf_config.from_hf(said) == preset


@pytest.mark.parametrize(
  "said, parameters",
  [
    (V2_LITE, 15_706_484_224),
    (QWEN3_MOE, 30_532_122_624),
    # Without the MTP module: its 11.5 B come on top.
    (R1 | {"num_nextn_predict_layers": 0}, 671_026_404_352),
  ],
  ids=["v2-lite", "qwen3-30b-a3b", "v3"],
)
def test_published_models_have_as_many_parameters(said, parameters):
  network = policy.Policy(hf_config.from_hf(said))
  params, _ = jax.eval_shape(lambda: policy.init(network, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("said", [R1, MOONLIGHT, V2_LITE, QWEN, LLAMA, QWEN3_MOE])
def test_a_config_goes_out_and_comes_back(said):
  c = hf_config.from_hf(said)
  again = hf_config.to_hf(c, "bfloat16")
  assert again["model_type"] == said["model_type"]
  assert hf_config.from_hf(again) == c


def test_both_generations_of_keys_say_the_same():
  rope = {"rope_type": "yarn", "rope_theta": 10000} | R1["rope_scaling"]
  new = R1 | {"rope_parameters": rope, "dtype": "bfloat16"}
  for key in ("rope_scaling", "rope_theta", "torch_dtype"):
    del new[key]
  assert hf_config.from_hf(new) == hf_config.from_hf(R1)


@pytest.mark.parametrize(
  "rope, mscale",
  [
    (dict(), 1.0),  # Qwen2.5's: cos and sin grow by 0.1 ln 4 + 1
    (dict(attention_factor=1.0), 0.0),
    (dict(mscale=0.5, mscale_all_dim=0.25), 0.5),
  ],
)
def test_yarn_of_grouped_queries(rope, mscale):
  rope |= dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)
  yarn = hf_config.from_hf(QWEN | {"rope_scaling": rope}).yarn
  assert yarn == config.Yarn(
    4.0, 32768, mscale=mscale, mscale_all_dim=rope.get("mscale_all_dim", 0.0)
  )
  again = hf_config.to_hf(hf_config.from_hf(QWEN | {"rope_scaling": rope}), "float32")
  assert hf_config.from_hf(again).yarn == yarn


# Configs that are refused.


@pytest.mark.parametrize(
  "said, changes, message",
  [
    (R1, dict(model_type="mistral"), "model_type='mistral' is none of deepseek_v3,"),
    (R1, dict(model_type=None), "model_type=None is none of"),
    (R1, dict(attention_bias=True), "attention_bias=True of a deepseek_v3 cannot"),
    (R1, dict(rope_interleave=False), "rope_interleave=False .* must be True"),
    (R1, dict(scoring_func="softmax"), "scoring_func='softmax' .* must be 'sigmoid'"),
    (R1, dict(topk_method="greedy"), "topk_method='greedy' .* must be 'noaux_tc'"),
    (R1, dict(moe_layer_freq=2), "moe_layer_freq=2 .* must be 1"),
    (R1, dict(num_nextn_predict_layers=2), "mtp_depth=2 must be 0 or 1"),
    (R1, dict(hidden_size="7168"), "has hidden_size='7168', which is no number"),
    (R1, dict(n_group=3), "experts=256 must divide into expert_groups=3"),
    (R1, dict(torch_dtype="int8"), "dtype='int8' must be float32, bfloat16"),
    (V2_LITE, dict(norm_topk_prob=True), "norm_topk_prob=True .* must be False"),
    (QWEN, dict(use_sliding_window=True), "use_sliding_window=True .* must be False"),
    (QWEN, dict(use_mrope=True), "use_mrope=True of a qwen2 cannot"),
    (QWEN, dict(hidden_act="gelu"), "hidden_act='gelu' .* must be 'silu'"),
    (
      *(QWEN, dict(layer_types=["full_attention", "sliding_attention"])),
      "layer_types has full_attention, sliding_attention; full_attention alone",
    ),
    (LLAMA, dict(mlp_bias=True), "mlp_bias=True of a llama cannot"),
    (LLAMA, dict(num_key_value_heads=5), "heads=32 must divide into kv_heads=5"),
    (LLAMA, dict(rope_scaling=dict(type="linear")), "rope_type='linear' cannot"),
    (
      *(LLAMA, dict(rope_scaling=dict(rope_type="llama3", factor=8))),
      "rope_type='llama3' needs the number low_freq_factor",
    ),
    (
      *(LLAMA, dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0)))),
      r"RoPE for each of \['full_attention'\] cannot",
    ),
    (LLAMA, dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 of RoPE"),
    (
      *(QWEN, dict(rope_scaling=YARN | dict(truncate=False))),
      "truncate=False of RoPE cannot be expressed; it must be True",
    ),
    (R1, dict(rope_scaling=LLAMA["rope_scaling"]), "llama3=.* is of attention='gqa'"),
    (
      *(QWEN3_MOE, dict(decoder_sparse_step=2)),
      "decoder_sparse_step=2 and mlp_only_layers=.* can only come first",
    ),
  ],
)
def test_what_cannot_be_expressed_is_refused_by_name(said, changes, message):
  with pytest.raises(UserError, match=rf"^some/config\.json.*{message}"):
    hf_config.from_hf(said | changes, "some/config.json")


def test_a_size_that_is_left_out_is_named():
  said = {key: value for key, value in R1.items() if key != "kv_lora_rank"}
  with pytest.raises(UserError, match=r"config\.json lacks kv_lora_rank"):
    hf_config.from_hf(said)


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(quant_method="gptq"), "quant_method='gptq' with weight_block_size=None"),
    (dict(quant_method="fp8"), "weight_block_size=None cannot be read"),
  ],
)
def test_other_quantisations_are_refused(how, message):
  with pytest.raises(UserError, match=message):
    hf_config.float8_block({"quantization_config": how}, "config.json")
  assert hf_config.float8_block(R1, "config.json") == (128, 128)


# Folders that are refused.


@pytest.fixture(scope="module")
def network():
  return policy.Policy(
    config.tiny(
      16, layers=2, width=16, heads=2, q_latent=None, kv_latent=8, dense_ffn=16
    )
  )


@pytest.fixture
def made(tmp_path, network, random_weights):
  """(folder of a checkpoint, its tensors, its config)."""
  weights = random_weights(network)
  hf.save(tmp_path / "good", network, *weights, dtype="float32")
  files = safetensors_file.read_folder(tmp_path / "good")
  said = json.loads((tmp_path / "good/config.json").read_text())
  return tmp_path / "good", {name: x.array() for name, x in files.items()}, said


def write(folder, tensors, said, max_bytes=1e9):
  folder.mkdir()
  layout = {name: (x.shape, x.dtype) for name, x in tensors.items()}
  safetensors_file.write_folder(folder, layout, iter(tensors.values()), max_bytes)
  (folder / "config.json").write_text(json.dumps(said))
  return folder


def test_what_is_written_is_read(made, network, random_weights):
  folder, _, _ = made
  again, *weights = hf.load(folder, moe="dense", remat="all", init_std=None)
  assert again == network
  assert_same(host(weights), host(list(random_weights(network))))


def test_all_tensors_that_do_not_fit_are_in_one_table(made, tmp_path):
  _, tensors, said = made
  name = "model.layers.1.mlp.experts.2.up_proj.weight"
  del tensors[name], tensors["lm_head.weight"]
  tensors["model.norm.weight"] = np.ones(15, np.float32)
  tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((16, 16), np.int32)
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
  with pytest.raises(UserError) as raised:
    hf.load(write(tmp_path / "bad", tensors, said))
  said = str(raised.value)
  assert said.startswith(f"{tmp_path}/bad: 5 tensors do not fit config.json.")
  for line in (
    f"{re.escape(name)} +missing, of shape \\(64, 16\\)",
    r"lm_head\.weight +missing, .*config\.json says tie_word_embeddings=false",
    r"model\.norm\.weight +is \(15,\), must be \(16,\)",
    r"model\.layers\.0\.mlp\.up_proj\.weight +is int32, must be one of float32,",
    r"model\.layers\.0\.self_attn\.q_proj\.bias +is not part of this policy \(64,\)",
  ):
    assert re.search(line, said), line


def test_a_long_table_is_cut(made, tmp_path):
  _, tensors, said = made
  tensors |= {f"extra.{i}": np.ones(1, np.float32) for i in range(150)}
  with pytest.raises(UserError, match=r"150 tensors do not fit[^z]*\n  and 50 more$"):
    hf.load(write(tmp_path / "bad", tensors, said))


def test_a_head_where_the_embedding_serves_must_repeat_it(made, tmp_path):
  _, tensors, said = made
  said["tie_word_embeddings"] = True
  message = r"lm_head\.weight +differs from model\.embed_tokens\.weight, which it must"
  with pytest.raises(UserError, match=message):
    hf.load(write(tmp_path / "bad", tensors, said))
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  assert hf.load(write(tmp_path / "good2", tensors, said))[0].config.tied_embeddings


@pytest.mark.parametrize(
  "scales, block, message",
  [
    (None, [8, 8], r"o_proj\.weight +is float8 and has no scales .*weight_scale_inv"),
    (
      (2, 5),
      [8, 8],
      r"o_proj\.weight_scale_inv +is \(2, 5\) float32, must be \(2, 6\)",
    ),
    ((2, 6), None, r"o_proj\.weight +is float8, and config\.json has no quanti"),
  ],
)
def test_float8_needs_its_scales(made, tmp_path, scales, block, message):
  _, tensors, said = made
  name = "model.layers.0.self_attn.o_proj.weight"
  tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
  assert tensors[name].shape == (16, 48)
  if scales:
    tensors[f"{name}_scale_inv"] = np.ones(scales, np.float32)
  if block:
    said["quantization_config"] = dict(quant_method="fp8", weight_block_size=block)
  with pytest.raises(UserError, match=message):
    hf.load(write(tmp_path / "bad", tensors, said))


def test_files_that_are_broken_are_named(made, tmp_path):
  folder, *_ = made
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  length = int.from_bytes(whole[:8], "little")
  for content, message in (
    (whole[:-1], rf"ends early: it has {len(whole) - 1} bytes, and its tensors need"),
    (whole[: length // 2], "ends early: .* and its header needs"),
    (b"", "ends early: it has 0 bytes"),
    (whole[:8] + b"x" * (len(whole) - 8), "its header is broken"),
    (whole.replace(b'"F32"', b'"F33"', 1), "a tensor of F33; these can be read:"),
    (whole.replace(b"[0,", b"[1,", 1), "its header is broken .*does not add up"),
  ):
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file} .*{message}|^{file}: .*{message}"):
      hf.load(folder)
  file.unlink()
  with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\."):
    hf.load(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json is no JSON"):
    hf.load(folder)
  with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
    hf.load(tmp_path / "nowhere")


def test_shards_that_are_missing_are_named(made, tmp_path):
  _, tensors, said = made
  folder = write(tmp_path / "shards", tensors, said, max_bytes=9_000)
  files = sorted(folder.glob("*.safetensors"))
  assert len(files) > 4
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"]) == set(tensors)
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
  biggest = max(x.nbytes for x in tensors.values())
  assert max(file.stat().st_size for file in files) < max(9_000, biggest) + 4_000
  hf.load(folder)
  last = next(k for k, v in index["weight_map"].items() if v == files[-1].name)
  swapped = index["weight_map"] | {last: files[0].name}
  for where, message in (
    (swapped, rf"{files[0]} lacks the tensor {re.escape(last)}, which"),
    ({}, "has no weight_map"),
  ):
    text = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
      hf.load(folder)
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  files[1].unlink()
  files[3].unlink()
  names = f"{files[1].name}, {files[3].name}"
  with pytest.raises(UserError, match=f"lacks 2 of the {len(files)} files.*{names}"):
    hf.load(folder)


def test_wrong_calls_are_refused(made, network):
  folder, _, _ = made
  with pytest.raises(UserError, match=r"\['depth'\] are no keys of a PolicyConfig"):
    hf.load(folder, depth=3)
  with pytest.raises(UserError, match="params_dtype='int8' must be one of"):
    hf.load(folder, params_dtype="int8")
  _, params, router = hf.load(folder)
  with pytest.raises(UserError, match=r"holds a checkpoint already \(model\.safet"):
    hf.save(folder, network, params, router)
  with pytest.raises(UserError, match="dtype='float16' of an export must be one of"):
    hf.save(folder, network, params, router, dtype="float16")
  with pytest.raises(UserError, match="params and router are not of this policy"):
    hf.save(folder, network, params, {})


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(latent_eps=1e-5), "nearest is deepseek_v3.*latent_eps=1e-05 .*be 1e-06"),
    (dict(scoring="softmax"), "nearest is deepseek_v3.*scoring='softmax' .*'sigmoid'"),
  ],
)
def test_policies_that_no_family_computes_are_not_exported(changes, message):
  with pytest.raises(UserError, match=message):
    hf_config.to_hf(config.tiny(8, **changes), "float32")


def test_biases_that_a_family_lacks_are_not_dropped(tmp_path, random_weights):
  changes = dict(qkv_bias=False, qk_norm=True, scoring="softmax", dense_layers=0)
  changes |= dict(experts=4, active_experts=2, expert_ffn=8)
  network = policy.Policy(config.tiny_dense(8, **changes))
  params, router = random_weights(network)
  with pytest.raises(UserError, match=r"moe_layers/moe/bias is not 0 .*qwen3_moe has"):
    hf.save(tmp_path / "out", network, params, router)
  zeros = jax.tree.map(jnp.zeros_like, router)
  hf.save(tmp_path / "out", network, params, zeros)
  assert_same(host(hf.load(tmp_path / "out")[2]), host(zeros))
