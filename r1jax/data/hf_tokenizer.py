"""The tokenizer of a published model: tokenizer.json of a Hugging Face folder.

It stands in the SentencePiece Tokenizer's place. What differs: tags are tokens only
where the vocabulary has them (`<answer>` nowhere, `<think>` in DeepSeek's and Qwen3's),
so rewards are read from text; and BOS may be none.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import sentencepiece

from r1jax.data.chat_template import R1, R1_ROLES, ChatTemplate
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError

MAIN = "tokenizer.json"
FILES = (
  *(MAIN, "tokenizer_config.json", "chat_template.jinja"),
  *("generation_config.json", "config.json"),
)
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Stands inside a control token that a user typed: `encode` takes the rest as plain
# text. A noncharacter: no text that is meant for others holds it.
MARK = "\ufdd0"


class HFTokenizer:
  """Text <-> ids.

  Fields:
    vocab: the model's, V. It may be greater than `size`, the tokenizer's own: the rows
      between pad the model's table. They are not masked, for sampler, ratio and KL are
      of one distribution, the model's, which gives them next to nothing. One that is
      drawn all the same has no text.
    bos_id: what this tokenizer begins a text with; None: nothing, though the model may
      have a token of that name (Qwen2.5, SmolLM2).
    eos_id, stop_ids: what ends an output; all that do.
    pad_id: EOS where the folder names none. Rows are masked by place, not by value.
    chat: the folder's chat template, or R1's for a vocabulary with its roles, or None.
  """

  def __init__(
    self, files: Mapping[str, bytes], *, vocab: int | None = None, where: str = ""
  ):
    """Args: the folder's FILES by name; the model's vocabulary, None: as config.json
    has it, or else the tokenizer's own; the folder, for errors.

    Raises:
      UserError: no tokenizer.json, a file that is broken, a vocabulary that is greater
        than the model's, no EOS.
    """
    self.files, self.where = dict(files), where or "the tokenizer's folder"
    self._hf = self._parsed()
    config = self._json("tokenizer_config.json")
    model, generation = self._json("config.json"), self._json("generation_config.json")
    names = self._hf.get_vocab(with_added_tokens=True)
    self._pieces = {i: name for name, i in names.items()}
    self.size = 1 + max(self._pieces)
    self.vocab = vocab or model.get("vocab_size") or self.size
    if self.size > self.vocab:
      raise UserError(
        f"{self.where}: the tokenizer has ids up to {self.size - 1} and the model's"
        f" vocabulary ends at {self.vocab - 1}: they are not of one model. Take both"
        " from the same folder."
      )
    if vocab:  # for `save`
      self.files["config.json"] = json.dumps(model | {"vocab_size": vocab}).encode()
    named = {n: _content(config[n]) for n in NAMES if config.get(n)}
    ids = {n: names[text] for n, text in named.items() if text in names}
    ends = _listed(generation.get("eos_token_id")) or _listed(model.get("eos_token_id"))
    ends = [*_listed(ids.get("eos_token")), *ends]
    if not ends or max(ends) >= self.vocab:
      raise UserError(
        f"{self.where}: {ends or 'nothing'} for EOS, by eos_token in"
        " tokenizer_config.json and eos_token_id in generation_config.json. Name a"
        " token there that ends an output."
      )
    self.eos_id, self.stop_ids = ends[0], tuple(dict.fromkeys(ends))
    pads = (ids.get("pad_token"), generation.get("pad_token_id"), self.eos_id)
    self.pad_id = next(i for i in pads if i is not None)
    self.bos_id = self._begins(config, ids.get("bos_token"))
    self.chat = self._chat(config, tuple(named.items()))
    silent = {self.pad_id, self.bos_id, *self.stop_ids}
    self._spoken = {i: piece for i, piece in self._pieces.items() if i not in silent}
    typed = [
      t.content
      for t in self._hf.get_added_tokens_decoder().values()
      if len(t.content) > 1 and t.content.strip()  # runs of spaces are the user's too
    ]
    self._controls = {names[t] for t in typed}
    self._typed, self._quoted = _patterns(typed)

  @classmethod
  def load(cls, folder: str | pathlib.Path, vocab: int | None = None) -> "HFTokenizer":
    """Raises UserError: as the class, or the folder cannot be read."""
    folder = pathlib.Path(folder)
    try:
      files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).exists()}
    except OSError as error:
      raise UserError(
        f"{folder} cannot be read ({error.strerror}): name a folder with {MAIN}."
      ) from error
    return cls(files, vocab=vocab, where=str(folder))

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files; `load` finds the same tokenizer in them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.files.items():
      (folder / name).write_bytes(content)

  @property
  def model(self) -> bytes:
    """What the tokenizer is made of, to compare two by; the model may be another."""
    return b"".join(name.encode() + self.files.get(name, b"") for name in FILES[:3])

  def encode(self, text: str) -> list[int]:
    """Ids without BOS or EOS. Control tokens in the text are tokens, but for those in
    what `quote` returned."""
    if MARK not in text:
      return self._plain(text)
    first, *rest = self._quoted.split(text)
    return [*self._plain(first), *(i for part in rest for i in self._continued(part))]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    if any(MARK in text for text in texts):
      return [self.encode(text) for text in texts]
    return [e.ids for e in self._hf.encode_batch(texts, add_special_tokens=False)]

  def quote(self, text: str) -> str:
    """A user's text as `encode` may read it inside a prompt: what looks like a control
    token, or a tag that is one token, has a mark inside and arrives as plain text.

    Raises:
      UserError: no plain tokens spell it.
    """
    quoted = self._typed.sub(lambda found: found[0] + MARK, text)
    injected = self._controls.intersection(self.encode(quoted))
    if injected:
      raise UserError(
        f"the text {text[:60]!r} becomes the control token"
        f" {self.piece(injected.pop())!r} of {self.where}, whatever stands around it."
        " Take it out of the problem."
      )
    return quoted

  def decode(self, ids: Sequence[int]) -> str:
    """Text; padding, BOS, EOS and ids that the tokenizer does not have vanish."""
    kept = [int(i) for i in ids if int(i) in self._spoken]
    return self._hf.decode(kept, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    """The name of a token, also where it has no text, such as `<|im_end|>`."""
    return self._pieces.get(int(token), f"<unused {int(token)}>")

  def bytes_of(self, token: int) -> bytes:
    """What a token adds to a text; nothing for padding, BOS, EOS and unused ids."""
    return self._bytes[token]

  def id(self, piece: str) -> int:
    """The id of a symbol such as `<think>`.

    Raises:
      UserError: it is no token here.
    """
    found = self._hf.token_to_id(piece)
    if found is None:
      raise UserError(
        f"{piece!r} is not one token of {self.where}, so it is not found by its id."
        " Read rewards from text, config.reward.host=True, and stop at texts,"
        " config.data.stop=('</answer>',), not config.data.stop_on_answer."
      )
    return found

  def spaces(self) -> np.ndarray:
    """[V] bool: the tokens that are white space and nothing else."""
    return np.array([text.decode(errors="replace").isspace() for text in self._bytes])

  def _parsed(self) -> Any:
    # Processes that fork, as the reward's workers do, would be warned of its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(
        f'{self.where} needs the library tokenizers. Install it: pip install -e ".[hf]"'
      ) from error
    if MAIN not in self.files:
      raise UserError(
        f"{self.where} holds no {MAIN}. Name the folder of a model with its tokenizer."
      )
    try:
      found = tokenizers.Tokenizer.from_buffer(self.files[MAIN])
    except Exception as error:  # the library raises nothing narrower
      raise UserError(
        f"{self.where}/{MAIN} is broken ({error}). Fetch it again."
      ) from error
    found.no_truncation()  # whatever the file was saved with
    found.no_padding()
    return found

  def _json(self, name: str) -> dict:
    try:
      found = json.loads(self.files.get(name, b"{}"))
    except ValueError as error:
      raise UserError(
        f"{self.where}/{name} is broken ({error}). Fetch it again."
      ) from error
    if not isinstance(found, dict):
      raise UserError(f"{self.where}/{name} is not a JSON object. Fetch it again.")
    return found

  def _begins(self, config: dict, bos: int | None) -> int | None:
    """BOS, where this tokenizer puts it before a text."""
    wanted = config.get("add_bos_token")
    if wanted is None:
      wanted = bos in self._hf.encode("", add_special_tokens=True).ids[:1]
    return bos if wanted else None

  def _chat(self, config: dict, variables: tuple) -> ChatTemplate | None:
    source, name = config.get("chat_template"), "tokenizer_config.json"
    if "chat_template.jinja" in self.files:
      name = "chat_template.jinja"
      source = self.files[name].decode(errors="replace")
    elif isinstance(source, list):  # several, by name
      source = {t["name"]: t["template"] for t in source}.get("default")
    if source is None and not {*R1_ROLES}.difference(self._pieces.values()):
      return ChatTemplate(R1, variables, "R1's chat template")
    where = f"the chat template of {self.where}/{name}"
    return None if source is None else ChatTemplate(source, variables, where)

  def _plain(self, text: str) -> list[int]:
    return self._hf.encode(text, add_special_tokens=False).ids

  def _continued(self, text: str) -> list[int]:
    """Tokens of a text that others stand before: after a line break, so that no space
    is put before it where the tokenizer does so at a text's beginning."""
    line, whole = self._plain("\n"), self._plain("\n" + text)
    n = len(line)
    return whole[n:] if whole[:n] == line else self._plain(text)

  @functools.cached_property
  def _bytes(self) -> list[bytes]:
    """Of every id of the model."""
    decoder = json.dumps(self._json(MAIN).get("decoder"))
    level, fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    if not (level or fallback):
      raise UserError(
        f"{self.where}/{MAIN} is no BPE over bytes (its decoder is {decoder[:60]}):"
        " what its tokens add to a text is not known, so neither stop strings nor"
        " rewards in the graph can read them. Leave config.data.stop empty, and set"
        " config.reward.host=True."
      )
    added = self._hf.get_added_tokens_decoder()
    texts = [b""] * self.vocab
    for token, piece in self._spoken.items():
      if token in added:
        texts[token] = piece.encode()
      elif level and all(c in BYTES for c in piece):
        texts[token] = bytes(BYTES[c] for c in piece)
      elif fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        texts[token] = bytes([int(piece[1:-1], 16)])
      else:
        texts[token] = piece.replace("\u2581", " ").encode()
    return texts


def open_tokenizer(
  path: str | pathlib.Path, vocab: int | None = None
) -> Tokenizer | HFTokenizer:
  """The tokenizer of a folder, or of a file: tokenizer.json, or else tokenizer.model
  (SentencePiece, ours or Llama 2's).

  Args:
    path: the folder or the file.
    vocab: of the model; None: as the folder has it.

  Raises:
    UserError: there is none, it is broken, or its vocabulary is not the model's.
  """
  path = pathlib.Path(path)
  if path.name == MAIN or (path / MAIN).exists():
    return HFTokenizer.load(path if path.is_dir() else path.parent, vocab)
  file = path / "tokenizer.model" if path.is_dir() else path
  if not file.is_file():
    raise UserError(
      f"{path} holds neither {MAIN} nor tokenizer.model. Name the folder of a model"
      " with its tokenizer."
    )
  try:
    tokenizer = Tokenizer.load(file)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  except (OSError, RuntimeError) as error:
    raise UserError(
      f"{file} is no SentencePiece model ({error}). Fetch it again."
    ) from error
  if vocab is not None and tokenizer.vocab > vocab:
    raise UserError(
      f"{file} has {tokenizer.vocab} pieces and the model's vocabulary {vocab}: they"
      " are not of one model. Take both from the same folder."
    )
  # Llama 2 counts <unk> <s> </s> and has no padding: <unk>, which has no text either.
  tokenizer.unk_id, tokenizer.eos_id = pieces.unk_id(), pieces.eos_id()
  tokenizer.bos_id = pieces.bos_id() if pieces.bos_id() >= 0 else None
  tokenizer.pad_id = pieces.pad_id() if pieces.pad_id() >= 0 else pieces.unk_id()
  return tokenizer


def _content(token: Any) -> str:
  """Of `"<s>"` or `{"content": "<s>", ...}`."""
  return token["content"] if isinstance(token, dict) else token


def _listed(value: Any) -> list[int]:
  """Of a number, a list of them, or none."""
  return [] if value is None else list(value) if isinstance(value, list) else [value]


def _patterns(controls: list[str]) -> tuple[re.Pattern, re.Pattern]:
  """(The first character of each control token in a text; the mark after it. A mark
  that the user typed there is kept: one is put in and one is taken out.)"""
  first, after = [], []
  for control in controls:
    head, tail = re.escape(control[0]), re.escape(control[1:])
    first.append(f"{head}(?={MARK}*{tail})")
    after.append(f"(?<={head}){MARK}(?={MARK}*{tail})")
  nothing = ["(?!)"]
  return (re.compile("|".join(part or nothing)) for part in (first, after))


def _byte_letters() -> dict[str, int]:
  """GPT-2's letters for bytes: printable ones for themselves, the rest from 256 on."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _byte_letters()
