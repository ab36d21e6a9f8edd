"""Settings: windows in whole rollouts, refusals that name key, value and remedy, and a
digest of what matters."""

import json
import re

from ml_collections import ConfigDict
import pytest

from experiments.configs import ppo
from experiments.configs.r1_zero import PRESETS, get_config
from r1jax import config_checks, presets, settings
from r1jax.errors import UserError
from r1jax.models.config import tiny
from r1jax.objective import Objective
from r1jax.ppo import PPOConfig


def changed(preset="tiny", **values):
  """A preset with some values set; `__` in a name stands for the dot."""
  config = get_config(preset)
  with config.unlocked():
    for name, value in values.items():
      *path, last = name.split("__")
      part = config
      for key in path:
        part = part[key]
      part[last] = value
  return config


def test_every_preset_is_locked_and_json_like():
  for preset in PRESETS:
    config = get_config(preset)
    json.dumps(config.to_dict())
    with pytest.raises((KeyError, AttributeError)):
      config.no_such_key = 1
  with pytest.raises(ValueError, match="tiny"):
    get_config("none")


@pytest.mark.parametrize("preset, devices", [("tiny", 1), ("tiny", 2), ("puzzle", 1)])
def test_the_miniatures_pass_the_checks_as_they_are(preset, devices):
  config_checks.check(get_config(preset), devices)


# -- windows ---------------------------------------------------------------------------


def test_the_papers_second_window_begins_with_the_next_whole_rollout():
  pairs = settings.windows(get_config("paper"), longest_page=1)
  assert pairs == [(0, 32_768), (8_208, 65_536)]  # 8,200 is half way in a rollout of 16
  assert [settings.window_at(pairs, s) for s in (0, 8_192, 8_207, 8_208, 10_384)] == [
    32_768,
    32_768,
    32_768,
    65_536,
    65_536,
  ]


@pytest.mark.parametrize("page, tokens", [(1, 2), (8, 9), (40, 45), (41, 47)])
def test_a_window_of_0_tokens_fits_the_longest_page_and_an_eighth(page, tokens):
  config = changed(windows=((0, 0), (10, 99)))
  assert settings.windows(config, page) == [(0, tokens), (10, 99)]


@pytest.mark.parametrize(
  "windows", [(), ((2, 8),), ((0, 8), (40, 9), (20, 10)), ((0, -1),)]
)
def test_windows_out_of_order_are_refused(windows):
  with pytest.raises(UserError, match=r"config\.windows=.*rising order.*update 0"):
    settings.windows(changed(windows=windows), longest_page=4)


# -- refusals --------------------------------------------------------------------------

REFUSED = [
  # (changes, devices, what the message must hold: key and value, then the remedy)
  (dict(steps=0), 1, ["steps=0", "at least 1"]),
  (dict(sinks=("tensorbord",)), 1, ["tensorbord", "tensorboard, wandb, trackio"]),
  (dict(steps=121), 1, ["steps=121", "minibatches=2", "try 122"]),
  (dict(mesh__fsdp=3), 8, ["fsdp=3", "8 devices", "fsdp=-1"]),
  (dict(prompts=6), 4, ["prompts=6", "4 data shards", "try 8"]),
  (
    dict(prompts=2, grpo__group_size=3),
    1,
    [
      "prompts=2",
      "grpo.group_size=3",
      "minibatches",
      "micro_batches",
      "multiple of 32",
    ],
  ),
  (
    dict(grpo__whole_groups=True),
    1,
    ["grpo.whole_groups=True", "prompts=16 groups", "2 x 16", "multiple of 32"],
  ),
  (dict(pretrain__rows=50), 1, ["pretrain.rows=50", "pretrain.micro_batches=8"]),
  (dict(eval__problems=0), 1, ["eval.problems=0", "at least 1"]),
  (dict(eval__samples=1), 1, ["eval.samples=1", "at least 2"]),
  (dict(eval__every=5), 1, ["eval.every=5", "minibatches=2"]),
  (dict(eval__every=0), 1, ["eval.every=0", "positive"]),
  (dict(checkpoint_every=7), 1, ["checkpoint_every=7", "minibatches=2"]),
  (dict(data__held_out=1.0), 1, ["data.held_out=1.0", "between 0 and 1"]),
  (dict(data__held_out=0.0), 1, ["data.held_out=0.0", "between 0 and 1"]),
  (dict(grpo__group_size=1), 1, ["grpo.group_size=1", "at least 2"]),
  (dict(grpo__reference_refresh=41), 1, ["reference_refresh=41", "minibatches=2"]),
  (dict(grpo__temperature=0.0), 1, ["grpo.temperature=0.0", "above 0"]),
  (dict(grpo__micro_batches=0), 1, ["micro_batches", "at least 1"]),
  (dict(model__preset="large"), 1, ["model.preset='large'", "tiny", "v3_671b"]),
  (dict(windows=((4, 9),)), 1, ["windows=((4, 9),)", "update 0"]),
  (dict(objective__preset="grpo"), 1, ["objective.preset='grpo'", "deepseekmath"]),
  (dict(objective__advantage="vine"), 1, ["objective.advantage='vine'", "rloo"]),
  (dict(objective__dual_clip=0.5), 1, ["dual_clip=0.5", "above 1", "0 turns it off"]),
  (dict(objective__ratio_cap=5.0), 1, ["ratio_cap=5.0", "above 1 + clip_high = 11.0"]),
  (dict(objective__kl="k1-in-loss"), 1, ["k1-in-loss", "k2", "force_k1_in_loss"]),
  (
    dict(objective__off_policy="token-truncate"),
    1,
    ["off_policy='token-truncate'", "old_logprobs='trainer'"],
  ),
  (dict(objective__advantage="gae"), 1, ["'gae'", "experiments.ppo"]),
  (dict(objective__std_ddof=16), 1, ["std_ddof=16", "group_size - 1 = 15"]),
  (dict(objective__pool=0), 1, ["pool=0", "1 turns dynamic sampling off"]),
  (dict(objective__filter_on="luck"), 1, ["filter_on='luck'", "accuracy, format"]),
  (
    dict(objective__filter_on="luck", objective__pool=2),
    1,
    ["filter_on='luck'", "accuracy, format"],
  ),
  (
    dict(grpo__top_p=0.9, grpo__keep_sampling_mask=False),
    1,
    ["keep_sampling_mask=False", "top_p=0.9"],
  ),
  (dict(grpo__top_k=1), 1, ["top_k=1", "greedy"]),
  (
    dict(objective__preset="dapo", reward__accuracy_weight=0.0),
    1,
    ["filter_on='accuracy'", "reward.accuracy_weight"],
  ),
  (dict(grpo__mtp_coef=0.3), 1, ["grpo.mtp_coef=0.3", "model.mtp_depth=1"]),
  (
    dict(grpo__routing_replay=True, grpo__record_experts=False),
    1,
    ["record_experts=False keeps none", "Set record_experts=True"],
  ),
  (
    dict(grpo__routing_replay=True, model__dense_layers=3),
    1,
    ["routing_replay=True", "experts"],
  ),
  (dict(grpo__traced_groups=17), 1, ["traced_groups=17", "prompts=16"]),
  *(
    (dict(profile_steps=steps), 1, [f"profile_steps={steps}", "(0, 0)", "steps=160"])
    for steps in ((3,), (4, 3), (0, 3), (161, 161), (-1, 2))
  ),
]


@pytest.mark.parametrize(
  "changes, devices, words", REFUSED, ids=["-".join(c) for c, _, _ in REFUSED]
)
def test_a_refusal_names_key_value_and_remedy(changes, devices, words):
  with pytest.raises(UserError) as error:
    config_checks.check(changed(**changes), devices)
  text = str(error.value)
  assert text.startswith("config.")
  for word in words:
    assert word in text


@pytest.mark.parametrize("key", ["grpo__minibatches", "pretrain__micro_batches"])
def test_a_divisor_of_zero_is_refused_in_words(key):
  with pytest.raises(UserError, match=key.replace("__", ".")):
    config_checks.check(changed(**{key: 0}), 1)


def test_the_papers_preset_passes_on_the_devices_that_it_names():
  config_checks.check(get_config("paper"), 2048)


def test_the_remedies_work():
  config_checks.check(changed(steps=122), 1)
  config_checks.check(changed(prompts=8, pretrain__micro_batches=1), 4)


# -- digest and differences ------------------------------------------------------------


def test_the_digest_changes_with_a_value_and_not_with_what_is_free():
  base = settings.sha256(get_config())
  assert base == settings.sha256(get_config())
  assert re.fullmatch("[0-9a-f]{64}", base)
  for name, value in [
    ("seed", 1),
    ("steps", 122),
    ("objective__kl_coef", 0.002),
    ("windows", ((0, 8),)),
    ("data__template", "r1_zero"),
  ]:
    assert settings.sha256(changed(**{name: value})) != base, name
  free = [("seeds", 5), ("compilation_cache", "off"), ("profile_steps", (3, 4))]
  free += [("watchdog_minutes", 5.0), ("sinks", ("tensorboard",))]
  for name, value in free:
    assert settings.sha256(changed(**{name: value})) == base, name


def test_plain_survives_json_and_leaves_the_free_keys_out():
  values = settings.plain(get_config())
  assert json.loads(json.dumps(values)) == values
  assert not set(settings.FREE) & set(values)
  assert values["mesh"]["fsdp"] == -1 and values["windows"] == [[0, 0]]


def test_differences_name_every_leaf_that_differs():
  old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "gone": 0}
  new = {"a": 1, "b": {"c": 3, "d": [1, 3]}, "new": 4}
  assert settings.differences(old, new) == [
    "b.c: 2 -> 3",
    "b.d: [1, 2] -> [1, 3]",
    "gone: 0 -> None",
    "new: None -> 4",
  ]
  assert settings.differences(old, old) == []


# -- dataclasses -----------------------------------------------------------------------


def test_rooms_get_the_configs_values():
  config = changed(objective__clip_high=0.3, optimizer__learning_rate=5e-5, steps=40)
  g = settings.step_config(config, max_tokens=17)
  assert (g.max_tokens, g.objective.clip_high, g.group_size) == (17, 0.3, 16)
  o = settings.optimizer_config(config)
  assert (o.learning_rate, o.steps) == (5e-5, 40)
  p = settings.pretrain_config(config).optimizer
  assert (p.steps, p.learning_rate) == (config.pretrain.steps, 4e-3)
  assert settings.policy_config(config, vocab=300) == tiny(300)


def test_a_config_from_a_file_of_json_gives_the_same_rooms():
  config = get_config()
  again = ConfigDict(json.loads(json.dumps(config.to_dict())))
  assert settings.step_config(again, 9) == settings.step_config(config, 9)
  assert settings.windows(again, 8) == settings.windows(config, 8)


# -- the objective ---------------------------------------------------------------------


def test_the_objective_is_its_preset_with_what_was_set():
  assert settings.objective(get_config()) == Objective()
  config = changed(objective__preset="dapo", objective__clip_high=0.5)
  o = settings.objective(config)
  assert (o.clip_low, o.clip_high, o.aggregation, o.pool) == (0.2, 0.5, "token-mean", 3)


def test_a_choice_without_effect_is_reported_and_a_presets_own_is_not():
  assert settings.idle(get_config()) == []
  for preset in presets.PRESETS:
    assert settings.idle(changed(objective__preset=preset)) == [], preset
  config = changed(
    objective__preset="dr_grpo", objective__std_eps=1e-4, objective__kl="k2"
  )
  said = sorted(settings.idle(config))
  assert len(said) == 2
  assert "kl=k2 has no effect" in said[0] and "kl_coef=0" in said[0]
  assert "std_eps=0.0001 has no effect" in said[1] and "'dr_grpo'" in said[1]


def test_switches_of_the_sampler_without_effect_are_reported():
  said = settings.idle(changed(grpo__keep_sampling_mask=False))
  assert len(said) == 1 and "keep_sampling_mask" in said[0]


def test_ppo_has_its_own_config_and_refuses_segments():
  config = ppo.get_config()
  config_checks.check(config, 1)
  step = settings.step_config(config, 9)
  assert isinstance(step, PPOConfig) and step.objective.advantage == "gae"
  assert settings.value_optimizer_config(config).learning_rate == 1e-3
  with config.unlocked():
    config.segment_tokens = 8
  with pytest.raises(UserError, match="segment_tokens=8"):
    config_checks.check(config, 1)
