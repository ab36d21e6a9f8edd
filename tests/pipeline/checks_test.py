"""What is wrong with a pipeline's config is said before a file is touched."""

import jax
import pytest

from experiments.configs.r1 import get_config
from r1jax import config_checks
from r1jax.errors import UserError
from r1jax.pipeline import checks


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [None])


def changed(**values):
  c = get_config("tiny").unlock()
  for key, value in values.items():
    section, _, name = key.rpartition("__")
    into = c
    for part in filter(None, section.split("__")):
      into = into[part]
    into[name] = value
  return c


def test_the_miniature_passes_as_it_is():
  checks.check(get_config("tiny"))


def test_the_papers_record_is_told_that_it_has_no_base():
  with pytest.raises(
    UserError, match=r"pretrain\.steps=0: the stages begin with a base"
  ):
    checks.check(get_config("paper"))


@pytest.mark.parametrize(
  "change, said",
  [
    (dict(rl_2_uncapped__steps=0), "config.rl_2_uncapped.*steps=0"),
    (dict(rl_2_uncapped__steps=121), "config.rl_2_uncapped.*steps=121.*try 122"),
    (dict(rl_2__window=81), "rl_2.window=81 .*minibatches=2"),
    (dict(rl_2__changes__unknown=1), "config.rl_2.changes: a stage changes 'unknown'"),
    (dict(zero__prompts=7), "in the stage of config.zero: .*prompts=7"),
    (dict(prompts=7), "^config.prompts=7"),
    (dict(distill__on_policy_steps=0), "distill.on_policy_steps=0"),
    (dict(rejection__general_weight=float("inf")), "rejection.general_weight=inf"),
    (dict(rejection__general_weight=float("nan")), "rejection.general_weight=nan"),
    (dict(reward_models__schedule="linear"), "reward_models.schedule='linear'.*cosine"),
    (dict(report__problems=1), "report.problems=1 must lie between 2"),
    (dict(report__request_samples=6), "report.request_samples=6 .*multiple of 4"),
    (dict(sft_1__learning_rate=float("inf")), "sft_1.learning_rate=inf"),
    (dict(sft_3__learning_rate=float("nan")), "sft_3.learning_rate=nan"),
    (dict(data__prefill_think=True), "prefill_think=True"),
    (dict(pretrain__steps=0), "pretrain.steps=0"),
  ],
)
def test_what_cannot_be_is_refused_by_name(change, said):
  with pytest.raises(UserError, match=said):
    checks.check(changed(**change))


@pytest.mark.parametrize("devices, ok", [(2, True), (3, False), (8, True)])
def test_rows_divide_over_the_shards(devices, ok, monkeypatch):
  """48 pages and 24 prompts do over 3 as well."""
  monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
  size = dict(prompts=24, grpo__micro_batches=1, pretrain__micro_batches=1)
  sections = ("sft_1", "sft_3", "distill", "reward_models")
  one = {f"{name}__micro_batches": 1 for name in sections}
  c = changed(**size, **one, pretrain__rows=48, mesh__fsdp=-1)
  if ok:
    checks.check(c)
    return
  with pytest.raises(UserError, match=r"sft_1\.rows=16 .*3 data shards"):
    checks.check(c)


def test_only_the_assistant_has_requests():
  from experiments.configs import r1_zero

  c = r1_zero.get_config("tiny").unlock()
  config_checks.check(c, 1)
  c.pretrain.mix.request = 0.1
  with pytest.raises(UserError, match=r"mix\.request=0\.1: task='chain'.*'assistant'"):
    config_checks.check(c, 1)
