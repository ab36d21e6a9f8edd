"""The search for the smallest slice: which it leaves out, which it takes, what it says.
Plans are not made here; `plan_test.py` makes them."""

import math

import pytest

from experiments.configs.r1_zero import get_config
from r1jax import plan, plan_search
from r1jax.errors import UserError

V5P = plan.CHIPS["v5p"]


@pytest.fixture
def planned(monkeypatch):
  """Topologies that were planned; a slice fits from 512 chips on."""
  seen = []

  def fake(config, topology, say):
    seen.append((topology, dict(config.mesh)))
    free = 0.2 if topology == "v5p:8x8x8" else 0.05
    return {"free_hbm_fraction": free, "fullest": "update"}

  monkeypatch.setattr(plan, "plan", fake)
  return seen


def test_slices_that_cannot_hold_the_state_are_not_compiled(planned):
  """671 B parameters with their gradient, moments and reference, 20 bytes each, are
  13.6 TB: 128 chips of 95.73 GiB cannot hold them, 256 might."""
  tried = plan_search.smallest(get_config("paper"), "v5p")
  compiled = ["v5p:4x8x8"] * plan_search.MESHES + ["v5p:8x8x8"]
  assert [x[0] for x in planned] == compiled
  assert [x["topology"] for x in tried[-3:]] == compiled
  assert [x["fits"] for x in tried[-3:]] == [False, False, True]
  assert tried[-1]["why"] == "20% free during update"
  small = next(x for x in tried if x["chips"] == 128)
  assert "GiB at the least, most for optimizer" in small["why"]


def test_another_mesh_of_a_slice_is_tried_before_a_larger_slice(planned, monkeypatch):
  first = []

  def second_fits(config, topology, say):
    first.append(dict(config.mesh))
    return {"free_hbm_fraction": 0.1 * len(first) - 0.05, "fullest": "update"}

  monkeypatch.setattr(plan, "plan", second_fits)
  tried = plan_search.smallest(get_config("paper"), "v5p")
  assert tried[-1]["topology"] == tried[-2]["topology"] == "v5p:4x8x8"
  assert tried[-1]["fits"] and tried[-1]["mesh"] != tried[-2]["mesh"]
  assert first[0] != first[1]


def test_every_choice_is_a_mesh_of_the_slice_whose_rows_divide():
  config = get_config("paper")
  found = plan_search.choices(config, V5P, 256, "v5p:4x8x8")
  assert len(found) > 2
  for choice in found:
    mesh, g = choice.config.mesh, choice.config.grpo
    shards = mesh.fsdp * mesh.expert
    assert shards * mesh.tensor == 256
    assert 512 % (g.micro_batches * shards) == 0
    assert g.slots % shards == 0 and 8192 % g.slots == 0
    assert choice.bytes["cache"] <= plan_search.CACHE * V5P.memory
    assert choice.bytes["parameters"] == pytest.approx(4 * 682.6e9 / 256, rel=0.01)


def test_bfloat16_moments_count_half():
  config = get_config("paper")
  wide = plan_search.choices(config, V5P, 256, "v5p:4x8x8")[0].bytes["optimizer"]
  with config.unlocked():
    config.optimizer.moments = "bfloat16"
  assert (
    plan_search.choices(config, V5P, 256, "v5p:4x8x8")[0].bytes["optimizer"] * 2 == wide
  )


def test_where_nothing_is_large_enough_it_says_what_is_short(planned):
  with pytest.raises(UserError) as error:
    plan_search.smallest(get_config("paper"), "v5e")
  assert not planned
  for word in ("no slice of v5e", "16x16", "GiB at the least", "moments=bfloat16"):
    assert word in str(error.value)


def test_an_unknown_family_is_refused():
  with pytest.raises(UserError, match=r"--smallest='v9'.*v5p"):
    plan_search.smallest(get_config("paper"), "v9")


def test_of_the_same_chips_the_mesh_with_most_room_is_named():
  said = plan_search.nearest(get_config("paper"), V5P, 256, "v5p:4x8x8")
  assert said.startswith("Of 256 chips this promises most room: --config.mesh.")
  sizes = [int(x.split("=")[1]) for x in said.split() if "config.mesh" in x]
  assert math.prod(sizes) == 256
  said = plan_search.nearest(get_config("paper"), V5P, 64, "v5p:4x4x4")
  assert "No mesh of 64 chips holds it" in said and "2.6 times as many" in said
