"""The policy against Hugging Face's DeepSeek-V3, and what it may and may not see."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sharding
from r1jax.models import config, policy
from r1jax.models.sequence import Sequence

VOCAB, T = 16, 8


def small(**changes):
  sizes = dict(
    width=32,
    heads=2,
    q_latent=12,
    kv_latent=10,
    nope_dim=6,
    rope_dim=8,
    v_dim=5,
    dense_ffn=24,
    expert_ffn=12,
    route_scale=2.5,
    rope_theta=20.0,
  )
  return config.tiny(VOCAB, **{**sizes, **changes})


BASE = policy.Policy(small(mtp_depth=1))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(network, params, router, tokens, seq):
  variables = {"params": params, "router": router}
  hidden = network.apply(variables, tokens, seq).hidden
  return network.apply(variables, hidden, method="logits")


def left_padded(rows, window, pad=0):
  tokens = np.full((len(rows), window), pad, np.int32)
  mask = np.zeros((len(rows), window), bool)
  for i, row in enumerate(rows):
    tokens[i, window - len(row) :] = row
    mask[i, window - len(row) :] = True
  positions = np.maximum(mask.cumsum(1) - 1, 0)
  seq = Sequence(
    positions=jnp.asarray(positions, jnp.int32), segments=jnp.asarray(mask, jnp.int32)
  )
  return jnp.asarray(tokens), seq, mask


# Parity.

YARN = config.Yarn(
  factor=4.0, original_length=8, beta_fast=1.0, beta_slow=0.1, mscale_all_dim=0.5
)
VARIANTS = {
  "full_rank_queries": dict(q_latent=None, renormalise=False, route_scale=1.0),
  "groups": dict(
    experts=16, active_experts=3, expert_groups=4, active_groups=2, shared_experts=2
  ),
  "yarn": dict(
    rope_dim=16,
    yarn=YARN,
    experts=8,
    active_experts=2,
    expert_groups=4,
    active_groups=2,
  ),
}


def hugging_face(c, params, router):
  """The same policy as DeepseekV3ForCausalLM, whose matrices are [out, in]."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers", minversion="5.0")
  rope = dict(rope_type="default", rope_theta=c.rope_theta)
  if c.yarn is not None:
    rope.update(
      rope_type="yarn",
      factor=c.yarn.factor,
      original_max_position_embeddings=c.yarn.original_length,
      beta_fast=c.yarn.beta_fast,
      beta_slow=c.yarn.beta_slow,
      mscale=c.yarn.mscale,
      mscale_all_dim=c.yarn.mscale_all_dim,
    )
  model = transformers.DeepseekV3ForCausalLM._from_config(
    transformers.DeepseekV3Config(
      vocab_size=c.vocab,
      hidden_size=c.width,
      intermediate_size=c.dense_ffn,
      moe_intermediate_size=c.expert_ffn,
      num_hidden_layers=c.layers,
      first_k_dense_replace=c.dense_layers,
      num_attention_heads=c.heads,
      num_key_value_heads=c.heads,
      n_shared_experts=c.shared_experts,
      n_routed_experts=c.experts,
      num_experts_per_tok=c.active_experts,
      n_group=c.expert_groups,
      topk_group=c.active_groups,
      norm_topk_prob=c.renormalise,
      routed_scaling_factor=c.route_scale,
      q_lora_rank=c.q_latent,
      kv_lora_rank=c.kv_latent,
      qk_nope_head_dim=c.nope_dim,
      qk_rope_head_dim=c.rope_dim,
      v_head_dim=c.v_dim,
      rms_norm_eps=c.norm_eps,
      max_position_embeddings=64,
      rope_parameters=rope,
      rope_interleave=True,
      attention_bias=False,
      num_nextn_predict_layers=0,
    ),
    attn_implementation="eager",
    experts_implementation="eager",
  )

  def flat(w, inputs):  # [in..., out...] -> [out, in]
    return w.reshape(int(np.prod(w.shape[:inputs])), -1).T

  def ffn(name, p):
    return {f"{name}.{m}_proj.weight": p[m].T for m in ("gate", "up", "down")}

  weights = {
    "model.embed_tokens.weight": params["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["head"].T,
  }
  for i in range(c.layers):
    stack = "dense_layers" if i < c.dense_layers else "moe_layers"
    at = i if i < c.dense_layers else i - c.dense_layers
    p = jax.tree.map(lambda w, at=at: np.asarray(w[at]), params[stack])
    name, a = f"model.layers.{i}", p["attention"]
    up = np.concatenate([a["w_uk"], a["w_uv"]], axis=-1)  # a head: k_nope, then v
    weights |= {
      f"{name}.input_layernorm.weight": p["attention_norm"]["scale"],
      f"{name}.post_attention_layernorm.weight": p["ffn_norm"]["scale"],
      f"{name}.self_attn.kv_a_proj_with_mqa.weight": a["w_dkv"].T,
      f"{name}.self_attn.kv_a_layernorm.weight": a["kv_norm"]["scale"],
      f"{name}.self_attn.kv_b_proj.weight": flat(up, 1),
      f"{name}.self_attn.o_proj.weight": flat(a["w_o"], 2),
    }
    if c.q_latent is None:
      weights[f"{name}.self_attn.q_proj.weight"] = flat(a["w_q"], 1)
    else:
      weights |= {
        f"{name}.self_attn.q_a_proj.weight": a["w_dq"].T,
        f"{name}.self_attn.q_a_layernorm.weight": a["q_norm"]["scale"],
        f"{name}.self_attn.q_b_proj.weight": flat(a["w_uq"], 1),
      }
    if i < c.dense_layers:
      weights |= ffn(f"{name}.mlp", p["ffn"])
      continue
    m = p["moe"]
    both = np.concatenate([m["w_gate"], m["w_up"]], axis=-1)  # E D 2F
    bias = router[stack]["moe"]["bias"][at]
    weights |= {
      f"{name}.mlp.gate.weight": m["w_router"].T,
      f"{name}.mlp.gate.e_score_correction_bias": bias,
      f"{name}.mlp.experts.gate_up_proj": both.swapaxes(1, 2),
      f"{name}.mlp.experts.down_proj": m["w_down"].swapaxes(1, 2),
    } | ffn(f"{name}.mlp.shared_experts", m["shared"])
  weights = {k: torch.tensor(np.array(w, order="C")) for k, w in weights.items()}
  model.load_state_dict(weights, strict=True)
  return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_face_on_left_padded_rows(variant, random_weights):
  """Router biases are positive: whether dropped groups count as 0 (old transformers) or
  as -inf cannot matter."""
  torch = pytest.importorskip("torch")
  c = small(**VARIANTS[variant])
  network = policy.Policy(c)
  params, router = random_weights(network, seed=3)
  theirs = hugging_face(c, params, router)
  rng = np.random.default_rng(0)
  window = 24  # three times YaRN's original length
  rows = [rng.integers(0, VOCAB, n) for n in (24, 17, 5)]
  tokens, seq, mask = left_padded(rows, window)
  got = logits_of(network, params, router, tokens, seq)
  with torch.no_grad():
    want = theirs(
      input_ids=torch.tensor(np.array(tokens), dtype=torch.long),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      position_ids=torch.tensor(np.array(seq.positions), dtype=torch.long),
    ).logits.numpy()
  assert np.abs(want[mask]).max() > 1.0
  np.testing.assert_allclose(np.asarray(got)[mask], want[mask], rtol=0, atol=2e-5)


# What a position sees. Distinct tokens; a row of one page, a row of two and padding.

ROWS = np.arange(2 * T, dtype=np.int32).reshape(2, T)
PAGES = np.array([[1] * T, [1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
PLACES = np.array([range(T), [0, 1, 2, 0, 1, 2, 3, 0]], np.int32)


def packed():
  return Sequence(positions=jnp.asarray(PLACES), segments=jnp.asarray(PAGES))


@pytest.fixture(scope="module")
def influence():
  """Draws weights once and keeps the derivative: see `derivatives`."""
  kept = {}

  def of(random_weights):
    if not kept:
      kept["trunk"], kept["mtp"] = derivatives(*random_weights(BASE))
    return kept

  return of


def derivatives(params, router):
  """How far hidden[b, t] moves with the embedding of the token at [b, s], in a random
  direction: two arrays [B, T, S], of the main hidden states and of the MTP module's."""
  rng = np.random.default_rng(1)
  way = jnp.asarray(rng.normal(size=params["embedding"].shape[1]), jnp.float32)

  @jax.jit
  def hidden(table):
    variables = {"params": {**params, "embedding": table}, "router": router}
    out = BASE.apply(variables, jnp.asarray(ROWS), packed())
    ahead, _ = BASE.apply(
      variables, out.hidden, jnp.asarray(ROWS), packed(), method="mtp"
    )
    return out.hidden, ahead

  table = params["embedding"]
  still = hidden(table)

  def along(token):
    return jax.tree.map(jnp.subtract, hidden(table.at[token].add(way)), still)

  trunk, mtp = np.zeros((2, 2, T, T))
  for b in range(2):
    for s in range(T):
      main, ahead = along(ROWS[b, s])
      trunk[b, :, s] = np.abs(main[b]).max(-1)
      mtp[b, :, s] = np.abs(ahead[b]).max(-1)
      # A token of one row is nothing to the other.
      assert not np.any(main[1 - b]) and not np.any(ahead[1 - b])
  return trunk, mtp


def test_hidden_states_depend_on_all_earlier_and_on_no_later_tokens(
  influence, random_weights
):
  seen = influence(random_weights)["trunk"][0] != 0
  np.testing.assert_array_equal(seen, np.tri(T, dtype=bool))


def test_packed_pages_never_see_each_other_nor_padding(influence, random_weights):
  seen = influence(random_weights)["trunk"][1] != 0
  same = PAGES[1][:, None] == PAGES[1][None]
  real = PAGES[1] > 0
  np.testing.assert_array_equal(seen[real], (same & np.tri(T, dtype=bool))[real])


def test_mtp_hidden_states_use_the_next_token_and_nothing_later(
  influence, random_weights
):
  seen = influence(random_weights)["mtp"][0] != 0
  want = np.tri(T, T, 1, dtype=bool)
  np.testing.assert_array_equal(seen, want)


def test_mtp_sees_the_next_page_at_most_where_no_target_is(influence, random_weights):
  """The last position of a page has no token i + 2 in its page to be asked about."""
  seen = influence(random_weights)["mtp"][1] != 0
  for t in range(T - 2):
    if PAGES[1, t] and PAGES[1, t] == PAGES[1, t + 1]:
      want = (PAGES[1] == PAGES[1, t]) & (np.arange(T) <= t + 1)
      np.testing.assert_array_equal(seen[t], want)


def test_changing_a_token_leaves_earlier_logits_bit_for_bit(random_weights):
  params, router = random_weights(BASE)
  seq = Sequence(
    jnp.asarray(np.tile(np.arange(T), (2, 1))), jnp.ones((2, T), jnp.int32)
  )
  before = np.asarray(logits_of(BASE, params, router, jnp.asarray(ROWS), seq))
  for s in range(1, T):
    tokens = ROWS.copy()
    tokens[:, s] = (tokens[:, s] + 3) % VOCAB
    after = np.asarray(logits_of(BASE, params, router, jnp.asarray(tokens), seq))
    np.testing.assert_array_equal(after[:, :s], before[:, :s])
    assert (after[:, s] != before[:, s]).any()


def test_logits_do_not_depend_on_the_amount_of_left_padding(random_weights):
  params, router = random_weights(BASE)
  rows = [[3, 1, 4, 1, 5], [9, 2, 6]]
  found = []
  for window in (T, T + 3):
    tokens, seq, mask = left_padded(rows, window)
    logits = np.asarray(logits_of(BASE, params, router, tokens, seq))
    found.append(logits[mask])
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_logits_do_not_depend_on_what_the_padding_says(random_weights):
  params, router = random_weights(BASE)
  rows = [[3, 1, 4, 1, 5], [9, 2, 6]]
  found = []
  for pad in (0, 7):
    tokens, seq, mask = left_padded(rows, T, pad)
    found.append(np.asarray(logits_of(BASE, params, router, tokens, seq))[mask])
  np.testing.assert_array_equal(found[0], found[1])


# One function, several programs.


def loss_and_gradient(network, params, router):
  """Of random projections of the logits and of the MTP module's logits."""
  rng = np.random.default_rng(2)
  real = jnp.asarray(PAGES > 0, jnp.float32)[..., None]
  a, b = (jnp.asarray(rng.normal(size=(2, T, VOCAB)), jnp.float32) for _ in "ab")

  def loss(params):
    variables = {"params": params, "router": router}
    tokens = jnp.asarray(ROWS)
    out = network.apply(variables, tokens, packed())
    ahead, _ = network.apply(variables, out.hidden, tokens, packed(), method="mtp")
    main = network.apply(variables, out.hidden, method="logits")
    ahead = network.apply(variables, ahead, method="logits")
    return jnp.sum((a * main + b * ahead) * real)

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain_gradient():
  kept = {}

  def of(params, router):
    if not kept:
      kept["it"] = loss_and_gradient(BASE, params, router)
    return kept["it"]

  return of


@pytest.mark.parametrize(
  "change", [dict(moe="ragged"), *(dict(remat=x) for x in config.REMAT[1:])], ids=str
)
def test_sorted_tokens_and_recomputation_change_no_loss_and_no_gradient(
  change, random_weights, plain_gradient
):
  params, router = random_weights(BASE)
  loss, grads = plain_gradient(params, router)
  network = policy.Policy(small(mtp_depth=1, **change))
  other_loss, other_grads = loss_and_gradient(network, params, router)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  for (path, g), (_, other) in zip(*map(by_path, (grads, other_grads)), strict=True):
    scale = np.abs(g).max()
    np.testing.assert_allclose(other, g, rtol=0, atol=2e-5 * scale, err_msg=path)


def by_path(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def test_every_weight_of_trunk_and_mtp_module_gets_a_gradient(
  random_weights, plain_gradient
):
  _, grads = plain_gradient(*random_weights(BASE))
  for path, g in by_path(grads):
    assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def test_mtp_gives_a_hidden_state_a_position_and_a_load_an_expert(random_weights):
  params, router = random_weights(BASE)
  variables = {"params": params, "router": router}

  def both():
    out = BASE.apply(variables, jnp.asarray(ROWS), packed())
    return out, *BASE.apply(
      variables, out.hidden, jnp.asarray(ROWS), packed(), method="mtp"
    )

  c = BASE.config
  out, ahead, load = jax.eval_shape(both)
  assert ahead.shape == out.hidden.shape == (2, T, c.width)
  assert {k: x.shape for k, x in load.items()} == {"mtp_layer": (c.experts,)}
  assert {k: x.shape for k, x in out.load.items()} == {"moe_layers": (2, c.experts)}
  assert out.cache.shape == (c.layers, 2, T, c.kv_latent + c.rope_dim)
  assert out.balance.shape == (2,)
  assert out.experts.shape == (c.moe_layers, 2, T, c.active_experts)


# Names and sizes.


def shapes_of(c):
  return jax.eval_shape(lambda: policy.init(policy.Policy(c), jax.random.key(0)))


@pytest.mark.parametrize(
  "c",
  [BASE.config, small(q_latent=None), config.v3_671b()],
  ids=["tiny", "full_rank_queries", "v3_671b"],
)
def test_every_weight_names_its_axes(c):
  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  boxes = jax.tree_util.tree_leaves_with_path(shapes_of(c), is_leaf=is_box)
  known = {*sharding.RULES["fsdp"], None}
  for path, box in boxes:
    where = jax.tree_util.keystr(path)
    assert is_box(box), where
    assert len(box.names) == box.value.ndim, where
    assert set(box.names) <= known, where
    assert (box.names[0] == "layers") == ("_layers" in where), where


def test_the_671b_preset_has_671b_parameters_of_which_37b_act_on_a_token():
  """Total: everything but the MTP module. Active on a token: A of E routed experts, and
  all else, with the embedding table and the head counted whole, as the report does."""
  c = config.v3_671b()
  params, router = nn.unbox(shapes_of(c))
  main = {k: v for k, v in params.items() if not k.startswith("mtp_")}
  total = sum(x.size for x in jax.tree.leaves(main))
  experts = main["moe_layers"]["moe"]
  routed = sum(experts[w].size for w in ("w_gate", "w_up", "w_down"))
  assert routed == 58 * 256 * 3 * 7168 * 2048
  active = total - routed + routed * c.active_experts // c.experts
  assert abs(total / 671.0e9 - 1) < 0.005
  assert 36.7e9 < active < 37.6e9
  assert router["moe_layers"]["moe"]["bias"].shape == (58, 256)
