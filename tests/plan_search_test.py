"""The search for the smallest slice: which it leaves out, which it takes, what it says.
Plans are not made here; `plan_test.py` makes them."""

import pytest

from experiments.configs.r1_zero import get_config
from r1jax import plan, plan_search
from r1jax.errors import UserError

GIB = 2**30


@pytest.fixture
def planned(monkeypatch):
  """Topologies that were planned; a slice fits from 512 chips on."""
  seen = []

  def fake(config, topology, say):
    seen.append((topology, dict(config.mesh), config.grpo.slots))
    free = 0.05 if len(seen) == 1 else 0.2
    return {"free_hbm_fraction": free, "fullest": "update", "chips": 512}

  monkeypatch.setattr(plan, "plan", fake)
  return seen


def test_slices_that_cannot_hold_the_state_are_not_compiled(planned):
  """671 B parameters with their gradient, moments and reference, 20 bytes each, are
  13.6 TB: 128 chips of 95.73 GiB cannot hold them, 256 might."""
  tried = plan_search.smallest(get_config("paper"), "v5p")
  assert [x["topology"] for x in tried[-2:]] == ["v5p:4x8x8", "v5p:8x8x8"]
  assert [x[0] for x in planned] == ["v5p:4x8x8", "v5p:8x8x8"]
  assert not tried[-2]["fits"] and tried[-1]["fits"]
  assert tried[-1]["why"] == "20% free during update"
  small = next(x for x in tried if x["chips"] == 128)
  assert "GiB at the least, most for optimizer" in small["why"]


def test_every_choice_is_a_mesh_of_the_slice_whose_rows_divide():
  config = get_config("paper")
  found = list(plan_search.choices(config, "v5p", 256))
  assert len(found) > 2
  for choice in found:
    mesh, g = choice.config.mesh, choice.config.grpo
    shards = mesh.fsdp * mesh.expert
    assert shards * mesh.tensor == 256
    assert 512 % (g.micro_batches * shards) == 0
    assert g.slots % shards == 0 and 8192 % g.slots == 0
    assert choice.bytes["cache"] <= plan_search.CACHE * plan.CHIPS["v5p"].memory
    assert choice.bytes["parameters"] == pytest.approx(4 * 682.6e9 / 256, rel=0.01)


def test_bfloat16_moments_count_half():
  config = get_config("paper")
  wide = next(plan_search.choices(config, "v5p", 256)).bytes["optimizer"]
  with config.unlocked():
    config.optimizer.moments = "bfloat16"
  assert next(plan_search.choices(config, "v5p", 256)).bytes["optimizer"] * 2 == wide


def test_where_nothing_is_large_enough_it_says_what_is_short(planned):
  with pytest.raises(UserError) as error:
    plan_search.smallest(get_config("paper"), "v5e")
  assert not planned
  for word in ("no slice of v5e", "16x16", "GiB at the least", "moments=bfloat16"):
    assert word in str(error.value)


def test_an_unknown_family_is_refused():
  with pytest.raises(UserError, match=r"--smallest='v9'.*v5p"):
    plan_search.smallest(get_config("paper"), "v9")
