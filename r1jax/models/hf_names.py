"""What a parameter is called in a checkpoint of Hugging Face, and how it lies there.

One table: a row counts where a policy has its parameter. Matrices of the files are
[out, in]; ours are [in, out], with heads apart. Channels that RoPE turns lie alike on
both sides: pairs of neighbours in DeepSeek's files and latent attention, else halves.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math

from r1jax.models.config import PolicyConfig

# (tensor, our parameter, axes: ours -> the tensor's). The letters are the README's; a
# comma separates the tensor's own axes. Two parameters: joined along the second letter.
MODEL = [
  ("model.embed_tokens.weight", "embedding", "vd->v,d"),
  ("model.norm.weight", "final_norm/scale", "d->d"),
  ("lm_head.weight", "head", "dv->v,d"),
]
ATTENTION = {
  "mla": [
    ("q_proj.weight", "w_q", "dhk->hk,d"),
    ("q_a_proj.weight", "w_dq", "dq->q,d"),
    ("q_a_layernorm.weight", "q_norm/scale", "q->q"),
    ("q_b_proj.weight", "w_uq", "qhk->hk,q"),
    ("kv_a_proj_with_mqa.weight", "w_dkv", "dc->c,d"),
    ("kv_a_layernorm.weight", "kv_norm/scale", "c->c"),
    ("kv_b_proj.weight", "w_uk w_uv", "chk->hk,c"),
    ("o_proj.weight", "w_o", "hkd->d,hk"),
  ],
  "gqa": [
    ("q_proj.weight", "w_q", "dhk->hk,d"),
    ("q_proj.bias", "b_q", "hk->hk"),
    ("q_norm.weight", "q_norm/scale", "k->k"),
    ("k_proj.weight", "w_k", "dhk->hk,d"),
    ("k_proj.bias", "b_k", "hk->hk"),
    ("k_norm.weight", "k_norm/scale", "k->k"),
    ("v_proj.weight", "w_v", "dhk->hk,d"),
    ("v_proj.bias", "b_v", "hk->hk"),
    ("o_proj.weight", "w_o", "hkd->d,hk"),
  ],
}
LAYER = [
  ("input_layernorm.weight", "attention_norm/scale", "d->d"),
  ("post_attention_layernorm.weight", "ffn_norm/scale", "d->d"),
  ("mlp.gate_proj.weight", "ffn/gate", "df->f,d"),
  ("mlp.up_proj.weight", "ffn/up", "df->f,d"),
  ("mlp.down_proj.weight", "ffn/down", "fd->d,f"),
  ("mlp.gate.weight", "moe/w_router", "de->e,d"),
  ("mlp.gate.e_score_correction_bias", "moe/bias", "e->e"),  # of sigmoid scores
  # A tensor an expert; our first axis is theirs.
  ("mlp.experts.{e}.gate_proj.weight", "moe/w_gate", "df->f,d"),
  ("mlp.experts.{e}.up_proj.weight", "moe/w_up", "df->f,d"),
  ("mlp.experts.{e}.down_proj.weight", "moe/w_down", "fd->d,f"),
  ("mlp.shared_experts.gate_proj.weight", "moe/shared/gate", "df->f,d"),
  ("mlp.shared_experts.up_proj.weight", "moe/shared/up", "df->f,d"),
  ("mlp.shared_experts.down_proj.weight", "moe/shared/down", "fd->d,f"),
]
# Beside the layer's rows in that after the last, the MTP module.
MTP = [
  ("enorm.weight", "mtp_embedding_norm/scale", "d->d"),
  ("hnorm.weight", "mtp_hidden_norm/scale", "d->d"),
  ("eh_proj.weight", "mtp_projection", "id->d,i"),
  ("shared_head.norm.weight", "mtp_norm/scale", "d->d"),
]
# Float32 in any file, as transformers keeps them for DeepSeek.
WIDE = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
SCALES = "_scale_inv"  # after the name of a float8 tensor
IGNORED = ("rotary_emb.inv_freq",)  # of old files: nothing that was learnt


@dataclasses.dataclass
class Leaf:
  """One of our parameters, and the tensors that it is made of.

  Without the axes that are stacked it is a share; the share of a tensor is that tensor
  with its axes folded and reordered, or a range of its folded axis 1.
  """

  shape: tuple[int, ...]
  stacked: int  # its first so many axes: layers, experts
  order: tuple[int, ...]  # the tensor's folded axes, as axes of the share
  rows: int  # so many folded axes are the tensor's axis 0; the rest, if any, axis 1
  start: int = 0  # of the range
  joined: int = 0  # length of the folded axis 1 where shares are joined; 0: one share
  names: dict[tuple[int, ...], str] = dataclasses.field(default_factory=dict)

  @property
  def fold(self) -> tuple[int, ...]:
    share = self.shape[self.stacked :]
    fold = tuple(share[axis] for axis in self.order)
    return (fold[0], self.joined, *fold[2:]) if self.joined else fold

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    parts = self.fold[: self.rows], self.fold[self.rows :]
    return tuple(math.prod(part) for part in parts if part)


def leaves(
  config: PolicyConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Leaf]:
  """Every parameter that has tensors.

  Args:
    config: of the policy.
    shapes: {path with slashes: shape}, of parameters and router biases.
  """
  found: dict[str, Leaf] = {}
  for prefix, stack, layer, rows in _places(config):
    for tensor, parameters, axes in rows:
      paths = [stack + name for name in parameters.split()]
      if paths[0] not in shapes:
        continue
      experts = range(config.experts) if "{e}" in tensor else [None]
      for path in paths:
        if path not in found:
          stacked = len(layer) + ("{e}" in tensor)
          found[path] = _leaf(path, paths, shapes, stacked, axes)
        for e in experts:
          at = layer if e is None else (*layer, e)
          found[path].names[at] = prefix + tensor.format(e=e)
  return found


def _places(config: PolicyConfig) -> Iterator[tuple[str, str, tuple, list]]:
  """(prefix of tensors, of parameters, index into the stack of layers, rows)."""
  rows = [
    (f"self_attn.{tensor}", " ".join(f"attention/{p}" for p in ours.split()), axes)
    for tensor, ours, axes in ATTENTION[config.attention]
  ]
  biased = config.scoring == "sigmoid"
  rows += [row for row in LAYER if biased or row[1] != "moe/bias"]
  yield "", "", (), MODEL
  for i in range(config.layers):
    dense = i < config.dense_layers
    at = i if dense else i - config.dense_layers
    stack = "dense_layers/" if dense else "moe_layers/"
    yield f"model.layers.{i}.", stack, (at,), rows
  if config.mtp_depth:
    yield f"model.layers.{config.layers}.", "mtp_layer/", (), rows
    yield f"model.layers.{config.layers}.", "", (), MTP


def _leaf(
  path: str,
  paths: list[str],
  shapes: Mapping[str, tuple[int, ...]],
  stacked: int,
  axes: str,
) -> Leaf:
  ours, theirs = axes.split("->")
  order = tuple(ours.index(letter) for letter in theirs.replace(",", ""))
  leaf = Leaf(shapes[path], stacked, order, rows=len(theirs.partition(",")[0]))
  if len(paths) > 1:
    ends = [shapes[p][stacked + order[1]] for p in paths]
    leaf.start, leaf.joined = sum(ends[: paths.index(path)]), sum(ends)
  return leaf


def tensors(found: Mapping[str, Leaf]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
  """{tensor: [(path, index into its stacked axes)]} of the shares that it joins, layer
  by layer."""
  made: dict[str, list] = {}
  for path, leaf in found.items():
    for at, name in leaf.names.items():
      made.setdefault(name, []).append((path, at))

  def place(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1

  return {name: made[name] for name in sorted(made, key=place)}


def copies(config: PolicyConfig) -> dict[str, str]:
  """{tensor that files may repeat: the tensor that it equals}."""
  embedding, head = MODEL[0][0], MODEL[2][0]
  found = {}
  if config.tied_embeddings:
    found[head], head = embedding, embedding
  if config.mtp_depth:
    module = f"model.layers.{config.layers}"
    found[f"{module}.embed_tokens.weight"] = embedding
    found[f"{module}.shared_head.head.weight"] = head
  return found


def is_wide(config: PolicyConfig, name: str) -> bool:
  """Whether a tensor is float32 in any file."""
  return config.attention == "mla" and name.endswith(WIDE)
