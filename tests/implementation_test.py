"""Which implementation runs, what each refuses; a policy is the same by all of them."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from meshes import mesh_of
import numpy as np
import pytest
from quick import QUICK

from r1jax import implementation, ops
from r1jax.models import config, policy
from r1jax.models.sequence import Sequence

VOCAB = 16
ALL = ("xla", "mosaic", "triton")


@pytest.fixture
def on(monkeypatch):
  """(platform): programs are traced as if for it."""
  implementation._say.cache_clear()

  def be(platform):
    monkeypatch.setattr(implementation, "platform", lambda: platform)

  yield be
  implementation._say.cache_clear()


# Small calls of every operation, any argument of which may be changed.


def drawn(*shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def whole(*numbers):
  return jnp.asarray(numbers, jnp.int32)


def attention(width=16, v_width=16, dtype="float32", t=4, **changes):
  arrays = dict(
    q=drawn(1, t, 2, width, dtype=dtype),
    k=drawn(1, t, 2, width, dtype=dtype),
    v=drawn(1, t, 2, v_width, dtype=dtype),
    scale=0.3,
  )
  return ops.attention(**{**arrays, **changes})


GQA = ops.Layout.gqa(2, 64)


def decode(layout=GQA, slots=128, dtype="float32", function=None, **changes):
  arrays = dict(
    q=drawn(2, 3, 4, layout.key_width, dtype=dtype),
    prefix=drawn(2, 2, slots, layout.width, dtype=dtype),
    suffix=drawn(2, 2, 3, slots, layout.width, dtype=dtype),
    layer=jnp.asarray(1),
    starts=whole(0, 5),
    stops=whole(9, 7),
    lengths=whole([1, 2, 3], [0, 4, 1]),
    layout=layout,
    scale=0.3,
  )
  return (function or ops.decode_attention)(**{**arrays, **changes})


def grouped(d=32, f=48, dtype="float32", **changes):
  x, w = drawn(7, d, dtype=dtype), drawn(3, d, f, dtype=dtype)
  arrays = dict(x=x, w=w, group_sizes=whole(2, 0, 3))
  return ops.grouped_matmul(**{**arrays, **changes})


# Choosing.


@pytest.mark.parametrize(
  "platform, name, chosen",
  [
    ("cpu", "auto", "definition"),
    ("cpu", "mosaic", ("mosaic", True)),  # interpreted
    ("cpu", "triton", ("triton", True)),
    ("tpu", "auto", ("mosaic", False)),
    ("tpu", "mosaic", ("mosaic", False)),
    ("tpu", "triton", ("triton", True)),
    ("gpu", "auto", ("triton", False)),
    ("gpu", "mosaic", ("mosaic", True)),
    ("cuda", "auto", ("triton", False)),
    ("another", "auto", "definition"),
    *((platform, "xla", "definition") for platform in ("cpu", "tpu", "gpu")),
  ],
)
def test_auto_is_the_platforms_own_and_others_are_interpreted(
  on, platform, name, chosen
):
  on(platform)
  got = implementation.choose("op", name, lambda *how: how, lambda: "definition")
  assert got == chosen


@pytest.mark.parametrize("call", [attention, decode, grouped])
def test_auto_on_a_cpu_is_the_definition(call):
  auto, named = (jax.tree.leaves(call(implementation=x)) for x in ("auto", "xla"))
  assert all(np.array_equal(a, b) for a, b in zip(auto, named, strict=True))
  assert "pallas_call" not in str(jax.make_jaxpr(lambda: call())())


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("call", [attention, decode, grouped])
def test_auto_on_an_accelerator_is_a_kernel_that_is_compiled(on, call, platform):
  on(platform)
  program = str(jax.make_jaxpr(lambda: call())())  # a function traced never before
  assert "pallas_call" in program
  assert "interpret=False" in program and "interpret=True" not in program


def test_the_platform_is_that_of_the_mesh():
  assert implementation.platform() == "cpu"
  with jax.set_mesh(mesh_of((2, 2, 2))):
    assert implementation.platform() == "cpu"
  tpu = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
  mesh = AbstractMesh((8,), ("fsdp",), abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert implementation.platform() == "tpu"


@pytest.mark.parametrize(
  "platform, slots", [("cpu", 77), ("another", 77), ("tpu", 128), ("gpu", 128)]
)
def test_a_cache_is_laid_out_in_blocks_where_a_kernel_reads_it(on, platform, slots):
  on(platform)
  assert ops.cache_slots(77) == slots
  assert [ops.cache_slots(n) for n in (0, 128, 256)] == [0, 128, 256]
  assert [ops.cache_slots(77, name) for name in ALL] == [77, 128, 128]


# Falling back.

FALLBACKS = {
  "attention": (attention, dict(dtype="float16"), "bfloat16 or float32 .*float16"),
  "decode_attention": (decode, dict(slots=100), "multiple of 128 here, not 100"),
  "grouped_matmul": (grouped, dict(dtype="float16"), "bfloat16 or float32"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_auto_falls_back_to_the_definition_and_says_so_once(on, caplog, name):
  call, changes, why = FALLBACKS[name]
  want = jax.tree.leaves(call(**changes, implementation="xla"))
  on("tpu")
  with caplog.at_level(logging.INFO, "r1jax.ops"):
    for _ in range(3):
      got = jax.tree.leaves(call(**changes, implementation="auto"))
      assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
  (line,) = caplog.records
  assert line.levelno == logging.WARNING
  caplog.records.clear()
  match = pytest.raises(NotImplementedError, match=why)
  with match:
    call(**changes, implementation="mosaic")
  assert (
    line.message == f"{name}: xla instead of mosaic: {match.excinfo.value.__cause__}"
  )


def test_another_reason_is_another_line(on, caplog):
  on("tpu")
  for slots in (100, 200, 100):
    decode(slots=slots)
  assert [r.message[-3:] for r in caplog.records] == ["100", "200"]


def test_the_experts_product_falls_back_on_a_mesh(on, caplog):
  want = grouped(implementation="xla")
  on("tpu")
  with jax.set_mesh(mesh_of((2, 2, 2))):
    np.testing.assert_allclose(grouped(), want, rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="one device"):
      grouped(implementation="mosaic")
  assert [r.message.partition(":")[0] for r in caplog.records] == ["grouped_matmul"]


def test_auto_does_not_hide_a_mistake(on, caplog):
  on("tpu")
  with pytest.raises(ValueError, match="wrong"):
    implementation.choose("op", "auto", lambda *_: int("wrong"), lambda: 0)
  assert not caplog.records


# What is refused.


@pytest.mark.parametrize("call", [attention, decode, grouped])
@pytest.mark.parametrize("name", ["pallas", "XLA", "", None])
def test_an_unknown_implementation_is_named(call, name):
  with pytest.raises(ValueError, match=rf"implementation={name!r} of .*'auto', 'xla'"):
    call(implementation=name)


KEEPS_NOTHING = r"no query has a key of its own segment.*segments from 1 on"
BAD = [
  (attention, dict(q=drawn(1, 4, 32)), r"q \(1, 4, 32\).* must be \[B, T, H, d\]"),
  (attention, dict(v=drawn(1, 5, 2, 16)), r"v \(1, 5, 2, 16\) must be \[B, T, H, d\]"),
  (attention, dict(v=drawn(1, 4, 1, 16)), r"v \(1, 4, 1, 16\) must be"),
  (attention, dict(q=drawn(2, 4, 2, 16)), r"q \(2, 4, 2, 16\).*rows and widths"),
  (attention, dict(q=drawn(1, 4, 2, 32)), r"q \(1, 4, 2, 32\).*rows and widths"),
  (attention, dict(q=drawn(1, 4, 3, 16)), r"q \(1, 4, 3, 16\).*heads divide"),
  (attention, dict(q=drawn(1, 4, 1, 16)), r"q \(1, 4, 1, 16\).*heads divide"),
  (
    attention,
    dict(v=drawn(1, 4, 2, 16, dtype="bfloat16")),
    r"q is float32, k float32 and v bfloat16.*one dtype; cast",
  ),
  (attention, dict(scale=-0.3), r"scale=-0\.3 must be above 0"),
  (decode, dict(scale=0.0), r"scale=0\.0 must be above 0"),
  (attention, dict(q=drawn(1, 3, 2, 16)), r"3 queries over 4 keys.*causal=False"),
  (attention, dict(q_segments=whole([1] * 4)), r"come together or not at all"),
  (attention, dict(k_segments=whole([1] * 4)), r"come together or not at all"),
  (
    attention,
    dict(q_segments=whole([1] * 4), k_segments=whole([1] * 5)),
    r"q_segments \(1, 4\) and k_segments \(1, 5\) must be \(1, 4\) and \(1, 4\)",
  ),
  (
    attention,
    dict(q_segments=whole([1] * 4), k_segments=whole([1, -1, 1, 1])),
    r"numbered from 1, and 0 is padding; one is negative",
  ),
  (
    attention,
    dict(q_segments=whole([-2, 1, 1, 1]), k_segments=whole([1] * 4)),
    r"one is negative",
  ),
  (
    attention,
    dict.fromkeys(("q_segments", "k_segments"), jnp.ones((1, 4), bool)),
    r"\{'q_segments': 'bool', 'k_segments': 'bool'\} must be int32; cast",
  ),
  (attention, dict.fromkeys(("q_segments", "k_segments"), whole([0] * 4)), "keeps not"),
  (
    attention,
    dict(q_segments=whole([1, 1, 0, 0]), k_segments=whole([2, 0, 2, 2])),
    KEEPS_NOTHING,
  ),
  (decode, dict(q=drawn(2, 3, 4, 32)), r"q \(2, 3, 4, 32\) must be \[B, G, H, 64\]"),
  (decode, dict(q=drawn(2, 3, 3, 64)), r"q \(2, 3, 3, 64\).* H a multiple of 2"),
  (decode, dict(q=drawn(2, 4, 64)), r"q \(2, 4, 64\) must be"),
  (
    decode,
    dict(prefix=drawn(2, 2, 128, 128)),
    r"prefix \(2, 2, 128, 128\) .*with B 2, G 3 and L 256",
  ),
  (decode, dict(prefix=drawn(2, 3, 128, 256)), r"prefix \(2, 3, 128, 256\) "),
  (decode, dict(prefix=drawn(1, 2, 128, 256)), r"prefix \(1, 2, 128, 256\) "),
  (decode, dict(suffix=drawn(2, 2, 2, 128, 256)), r"suffix \(2, 2, 2, 128, 256\) "),
  (
    decode,
    dict(q=drawn(2, 3, 4, 64, dtype="bfloat16")),
    r"q is bfloat16, prefix float32 and suffix float32.*one dtype",
  ),
  (
    decode,
    dict(prefix=drawn(2, 128, 256)),
    r"prefix \(2, 128, 256\) and suffix .* must be \[N, B, P, L\]",
  ),
  (decode, dict(layer=whole()[0:1]), r"layer \[\] must be one of the caches' 2"),
  (decode, dict(layer=jnp.asarray(2)), r"layer 2 must be one of the caches' 2"),
  (decode, dict(layer=jnp.asarray(-1)), r"layer -1 must be one of the caches' 2"),
  (decode, dict(starts=jnp.zeros(2)), r"\{'starts': 'float32'\} must be int32; cast"),
  (decode, dict(starts=whole(129, 0)), r"starts \[129   0\].* must lie in 0\.\.128"),
  (decode, dict(starts=whole(0)), r"starts \(1,\).*must be \(2,\)"),
  (decode, dict(stops=whole([1, 2])), r"stops \(1, 2\).*must be \(2,\)"),
  (decode, dict(lengths=whole(1, 2)), r"lengths \(2,\).*\(2, 3\)"),
  (decode, dict(starts=whole(0, -1)), r"starts \[ 0 -1\].* must lie in 0\.\.128"),
  (decode, dict(stops=whole(0, -1)), r"stops \[ 0 -1\].* must lie in"),
  (decode, dict(stops=whole(0, 129)), r"stops \[  0 129\].* must lie in"),
  (decode, dict(lengths=whole([1, 2, 3], [-1, 4, 1])), r"lengths.*must lie in"),
  (decode, dict(lengths=whole([1, 2, 129], [0, 4, 1])), r"lengths.*must lie in"),
  (
    decode,
    dict(starts=whole(0, 5), stops=whole(0, 5), lengths=whole([0] * 3, [0] * 3)),
    r"no row sees any slot of the cache: nothing can be attended to",
  ),
  (grouped, dict(x=drawn(7, 31)), r"x \(7, 31\) and w \(3, 32, 48\) must be \[M, D\]"),
  (grouped, dict(x=drawn(32)), r"x \(32,\) and w"),
  (grouped, dict(w=drawn(32, 48)), r"w \(32, 48\) must be"),
  (
    grouped,
    dict(w=drawn(3, 32, 48, dtype="bfloat16")),
    r"x is float32 and w bfloat16.*one dtype",
  ),
  (grouped, dict(group_sizes=jnp.ones(3)), r"\{'group_sizes': 'float32'\} must be"),
  (grouped, dict(group_sizes=whole(2, 3)), r"group_sizes \(2,\) must be \(3,\)"),
  (grouped, dict(group_sizes=whole(2, -1, 3)), r"group_sizes \[ 2 -1  3\].* 0 or more"),
  (grouped, dict(group_sizes=whole(2, 3, 3)), r"group_sizes \[2 3 3\].*at most 7, the"),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("call, changes, said", BAD)
def test_arrays_that_do_not_belong_together_are_refused(call, changes, said, name):
  with pytest.raises(ValueError, match=r"(?s)" + said):
    call(**changes, implementation=name)


def test_numbers_at_the_ends_of_their_range_are_taken():
  lengths = whole([128, 0, 1], [0] * 3)
  out = decode(starts=whole(0, 128), stops=whole(128, 0), lengths=lengths)
  assert not np.asarray(out[1]).any() and np.asarray(out[0]).all()
  assert np.asarray(grouped(group_sizes=whole(7, 0, 0))).all()
  assert not np.asarray(grouped(group_sizes=whole(0, 0, 0))).any()


def test_a_group_without_any_prompt_sees_itself():
  q, none = drawn(1, 2, 4, 2, 16), drawn(1, 3, 2, 16)
  segments, padding = jnp.ones((1, 2, 4), jnp.int32), whole([0] * 3)
  got = ops.group_attention(q, q, q, segments, none, none, padding, scale=0.3)
  want, _ = ops.attention(*[q[0]] * 3, segments[0], segments[0], scale=0.3)
  np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-6)
  with pytest.raises(ValueError, match=KEEPS_NOTHING):
    ops.group_attention(q, q, q, 0 * segments, none, none, padding, scale=0.3)


MLA_TINY, MLA_ODD = ops.Layout.mla(32, 16), ops.Layout.mla(24, 8)
CANNOT = [
  (attention, "mosaic", dict(width=264), r"at most 256 wide here, not 264 and 16"),
  (attention, "mosaic", dict(v_width=136), r"128 wide or a multiple of it.* 136"),
  (attention, "triton", dict(width=24), r"widths are multiples of 16 here, not 24"),
  (attention, "triton", dict(v_width=8), r"widths are multiples of 16 here, not 8"),
  (attention, "triton", dict(width=272), r"at most 256 wide here, not 272"),
  (decode, "mosaic", dict(slots=100), r"slots are a multiple of 128 here, not 100"),
  (decode, "mosaic", dict(layout=MLA_TINY), r"entry is a multiple of 128.* not 48"),
  (decode, "mosaic", dict(layout=ops.Layout.gqa(4, 16)), r"128 wide together.* 32"),
  (decode, "triton", dict(slots=100), r"slots are a multiple of 16 here, not 100"),
  (decode, "triton", dict(layout=MLA_ODD), r"widths are multiples of 16 here, not 24"),
  (grouped, "triton", dict(d=24), r"widths are multiples of 16 here, not 24"),
  (grouped, "triton", dict(f=40), r"widths are multiples of 16 here, not 40"),
  *(
    (call, name, empty, r"at least one each")
    for call, empty in (
      (decode, dict(prefix=drawn(2, 2, 0, 256), starts=whole(0, 0), stops=whole(0, 0))),
      (grouped, dict(x=drawn(0, 32), group_sizes=whole(0, 0, 0))),
    )
    for name in ("mosaic", "triton")
  ),
  *(
    (call, name, dict(dtype="float16"), r"bfloat16 or float32 here, not float16")
    for call in (attention, decode, grouped)
    for name in ("mosaic", "triton")
  ),
]


@pytest.mark.parametrize("call, name, changes, said", CANNOT)
def test_a_kernel_says_what_it_cannot_serve(call, name, changes, said):
  with pytest.raises(NotImplementedError, match=said):
    call(**changes, implementation=name)


# Numbers that are not known while a program is traced.


@pytest.mark.parametrize("name", ALL)
def test_bad_lengths_in_a_traced_program_never_give_nan(name):
  f = jax.jit(
    ops.decode_attention,
    static_argnames=("layout", "scale", "implementation"),
    compiler_options=QUICK,
  )
  for starts, stops, lengths in [
    ((-50, 0), (300, 128), ([128, 1, 500], [-1, 1, 0])),
    ((200, 129), (128, 500), ([0, 0, -200], [0, 0, 0])),
    ((0, 0), (-5, -300), ([0, 0, 0], [0, 0, 0])),
  ]:
    numbers = dict(starts=whole(*starts), stops=whole(*stops), lengths=whole(*lengths))
    out = decode(function=f, **numbers, implementation=name)
    assert np.isfinite(out).all()
  assert not out.any()  # nothing is seen


@pytest.mark.parametrize("name", ALL)
def test_a_mask_that_keeps_nothing_in_a_traced_program_gives_zeros(name):
  @functools.partial(jax.jit, compiler_options=QUICK)
  def f(q, segments):
    def of(q):
      how = dict(scale=0.3, implementation=name)
      return ops.attention(q, q, q, segments, segments, **how)

    (out, lse), backward = jax.vjp(of, q)
    return out, lse, backward((jnp.ones_like(out), jnp.ones_like(lse)))[0]

  out, lse, gradient = f(drawn(1, 4, 2, 16), whole([0] * 4))
  assert not out.any() and np.isneginf(lse).all() and not gradient.any()


# A whole policy.

POLICIES = {
  "MLA": config.tiny(
    VOCAB,
    **dict(width=32, heads=2, q_latent=16, v_dim=32),  # widths that Triton takes
    **dict(layers=1, dense_layers=0, expert_ffn=32, moe="ragged"),
  ),
  "GQA": config.tiny_dense(VOCAB, width=32, layers=2, head_dim=16, dense_ffn=48),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_the_same_by_any_implementation(name, random_weights):
  sizes = POLICIES[name].__dict__
  params, router = random_weights(policy.Policy(POLICIES[name]))
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.integers(1, VOCAB, (2, 9)), jnp.int32)
  weights = jnp.asarray(rng.normal(size=(2, 9, VOCAB)), jnp.float32)
  segments = whole([1] * 4 + [2] * 3 + [0] * 2, [0] * 3 + [1] * 6)
  positions = whole([*range(4), *range(3), 0, 0], [0] * 3 + [*range(6)])
  seq = Sequence(positions=positions, segments=segments)

  def run(how):
    network = policy.Policy(config.PolicyConfig(**{**sizes, "implementation": how}))

    def both(params):
      def loss(params):
        variables = {"params": params, "router": router}
        hidden = network.apply(variables, tokens, seq).hidden
        logits = network.apply(variables, hidden, method="logits")
        return (logits * weights * (segments > 0)[:, :, None]).sum(), logits

      (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
      return jnp.where((segments > 0)[:, :, None], logits, 0), gradients

    assert ("pallas_call" in str(jax.make_jaxpr(both)(params))) == (how != "xla")
    both = jax.jit(both, compiler_options=QUICK)
    return jax.tree_util.tree_leaves_with_path(both(params))

  want = run("xla")
  for how in ("mosaic", "triton"):
    for (path, x), (_, y) in zip(run(how), want, strict=True):
      atol = 1e-4 * np.abs(y).max()
      assert atol > 0, jax.tree_util.keystr(path)
      where = f"{how} {jax.tree_util.keystr(path)}"
      np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=where)
