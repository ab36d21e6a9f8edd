"""Distillation of a stage: rates, modes, and whose tokens a student learns."""

import pytest

from experiments.configs import r1
from r1jax.errors import UserError
from r1jax.models.config import PRESETS
from r1jax.pipeline import distill
from r1jax.pipeline.project import with_changes


def test_a_student_has_its_teachers_tokenizer(tmp_path):
  for name, content in (("a", b"one"), ("b", b"one"), ("c", b"another")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.model").write_bytes(content)
  distill.same_tokenizer(tmp_path / "a", tmp_path / "b")
  with pytest.raises(UserError, match=r"c/tokenizer\.model is not the teacher's.*text"):
    distill.same_tokenizer(tmp_path / "c", tmp_path / "a")
  with pytest.raises(UserError, match=r"d/tokenizer\.model does not exist"):
    distill.same_tokenizer(tmp_path / "d", tmp_path / "a")


def test_every_student_of_the_paper_has_its_rate_and_its_sizes():
  rates = [1e-4, 8e-5, 7e-5, 6e-5, 5e-5, 2e-5]  # B.4.3, from 1.5 B to 70 B
  assert list(distill.RATES.values())[1:] == rates
  assert distill.RATES.keys() <= PRESETS.keys()
  for preset, rate in distill.RATES.items():
    c = with_changes(r1.get_config(), {"student": {"model": {"preset": preset}}})
    assert distill.with_rate(c).learning_rate == rate
  mine = with_changes(c, {"distill": {"learning_rate": 3e-4}})
  assert distill.with_rate(mine).learning_rate == 3e-4
  other = with_changes(c, {"student": {"model": {"preset": "tiny"}}})
  with pytest.raises(UserError, match=r"'tiny' there is no rate.*Set it"):
    distill.with_rate(other)


def test_modes_and_their_choices():
  for mode in ("sft", "logits", "on_policy"):
    distill.check_mode(mode)
  with pytest.raises(UserError, match="'magic' is not one of sft, logits, on_policy"):
    distill.check_mode("magic")
  section = distill.with_rate(r1.get_config())
  assert distill.logit_config(section).divergence == "forward_kl"
  assert distill.on_policy_config(section, 17).max_tokens == 17
