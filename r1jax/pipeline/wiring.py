"""Which stage of R1 reads which, and of which part of the config each depends."""

from collections.abc import Callable
from typing import Any

from r1jax import settings
from r1jax.pipeline import judging, scoreboard
from r1jax.pipeline.graph import Graph, Stage
from r1jax.pipeline.project import Project
from r1jax.pipeline.stages import Stages
from r1jax.rewards.rules import file_digests

# Keys of the config that every stage depends on; those of the corpus and of shapes
# that are fitted to it; and those of RL.
WORLD = ("seed", "task", "chain", "assistant", "counts", "data", "model")
CORPUS = ("pretrain", "windows")
RL = ("steps", "prompts", "segment_tokens", "grpo", "objective", "optimizer")
RL += ("reward", "eval", "lora")
WEIGHTS = ("weights.json",)  # what names the arrays beside it (project.py)
JUDGED_RL = (*WEIGHTS, "metrics.jsonl")  # whose curves the report draws
TRACES = ("traces.jsonl", "card.json")
JUDGED = tuple(
  f"{side}_{kind}.jsonl" for side in judging.SIDES for kind in ("pairs", "labels")
)


def graph(project: Project) -> Graph:
  """The stages of the project's config."""
  c, bound = project.config, Stages(project)
  plain = settings.plain(c)

  def of(
    name: str,
    about: str,
    inputs: tuple[str, ...],
    keys: tuple[str, ...],
    artefacts: tuple[str, ...] = WEIGHTS,
    *,
    files: tuple[str, ...] = (),
    run: Callable | None = None,
  ) -> Stage:
    """Args: keys: dotted ones beside WORLD and CORPUS; files: what they name."""
    config = {key: _at(plain, key) for key in (*WORLD, *CORPUS, *keys)}
    named = file_digests(*files)
    function = run or getattr(bound, name)
    config |= named
    return Stage(name, inputs, config, function, artefacts, about, late=tuple(named))

  teacher = () if c.distill.mode == "sft" else ("rl_2",)
  student = ("student.model", "distill", "lora")
  stages = [
    of("world", "tokenizer and problems", (), (), ("tokenizer.model",)),
    of("base", "pre-training on the task's pages", ("world",), ()),
    of("zero", "R1-Zero: RL from the base", ("base",), ("zero", *RL)),
    of(
      "cold_start",
      "Zero's thinking, filtered and rewritten",
      ("zero",),
      ("cold_start",),
      TRACES,
      files=(c.cold_start.rewriter,),
    ),
    of("sft_1", "Dev1: SFT from the base", ("base", "cold_start"), ("sft_1", "lora")),
    of("rl_1", "Dev2: RL, rules and language", ("sft_1",), ("rl_1", *RL)),
    of(
      "rejection",
      "Dev2's correct and readable traces, and non-reasoning data",
      ("rl_1",),
      ("rejection",),
      TRACES,
      files=(c.rejection.judge, c.rejection.general_data),
    ),
    of("sft_3", "Dev3: SFT from the base", ("base", "rejection"), ("sft_3", "lora")),
    of(
      "judging",
      "judged pairs and safety labels",
      ("base", "sft_3"),
      ("judging",),
      JUDGED,
      files=(c.judging.judge,),
    ),
    of(
      "reward_models",
      "the two reward models",
      ("judging", "sft_3"),
      ("reward_models",),
      ("helpful/weights.json", "safety/weights.json"),
    ),
    of(
      "rl_2",
      "R1: RL, all scenarios",
      ("sft_3", "reward_models"),
      ("rl_2", *RL),
      JUDGED_RL,
    ),
    of(
      "student_base", "a dense base", ("world",), ("student.model", "student.pretrain")
    ),
    of(
      "distill",
      "the student, by distillation",
      ("student_base", "rejection", *teacher),
      student if not teacher else (*student, *RL),
      run=bound.distilled,
    ),
    of(
      "student_rl",
      "the student, by RL on as many sampled tokens",
      ("student_base", "rejection"),
      ("student.model", "student.rl", *RL),
    ),
    of("ppo", "PPO from the base", ("base",), ("ppo_baseline", *RL)),
  ]
  if c.ablations:
    stages += [
      of(
        "rl_1_no_language",
        "RL stage 1 without the language reward",
        ("sft_1",),
        ("rl_1", *RL),
      ),
      of(
        "rl_2_uncapped",
        "RL stage 2 with preference rewards all along",
        ("sft_3", "reward_models"),
        ("rl_2", "rl_2_uncapped", *RL),
        JUDGED_RL,
      ),
    ]
  made = tuple(stage for stage, _ in scoreboard.columns(c).values())
  left = ("report.json", "report.md", "report.png", "hacking.png")
  about = "the table, the directions, the plots"
  stages.append(of("report", about, made, ("report", "student.model"), left))
  return Graph(stages)


def _at(plain: dict, key: str) -> Any:
  for part in key.split("."):
    plain = plain[part]
  return plain
