"""R1: every stage of the paper, from a base to a distilled student.

Paper: DeepSeek-R1, arXiv 2501.12948v2, section 3 and supplement B.

  python -m experiments.r1                             # :tiny

tiny   a CPU core, 16 to 18 minutes; with the ablations 21 to 24 (docs/results.md). The
       task `assistant`: sums asked in two languages, instructions, requests that reward
       models judge.
paper  R1's stages as published: a record of the numbers and their sources.

A stage that differs from the config above it says only what it changes: `zero`, `rl_1`,
`rl_2.changes`, `student.rl` and `ppo_baseline` hold keys of the config itself.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from experiments.configs import r1_zero

PRESETS = ("tiny", "paper")


def get_config(preset: str = "tiny") -> ConfigDict:
  if preset not in PRESETS:
    raise ValueError(f"preset {preset!r} is not one of {PRESETS}")
  config = tiny()
  if preset == "paper":
    paper(config)
  return config.lock()


def tiny() -> ConfigDict:
  c = r1_zero.tiny()
  c.preset = "tiny"
  c.ablations = False  # also RL without the language reward, and RL stage 2 uncapped

  # -- the world and the base
  c.task = "assistant"
  c.counts.held_out = 640  # sums; the table asks 512 of those with more than a step
  c.pretrain.steps = 1200  # two languages, requests: more to learn than sums alone
  c.pretrain.vocab = 500  # the words of two languages are pieces
  c.pretrain.mix.update(facts=0.20, bare=0.05, guess=0.36, checked=0.18, request=0.20)
  c.steps = 60  # updates of every RL stage that does not say otherwise
  c.eval.every = 20  # updates
  c.eval.samples = 8  # of each held-out sum
  c.checkpoint_every = 10
  c.grpo.traced_groups = 0  # no report of tokens
  c.reward.alarm.hacking = 0.05  # few requests are examined

  # -- R1-Zero
  c.zero = changes()  # rules alone: accuracy, and the format of its template

  # -- cold start (B.3.2)
  c.cold_start = ConfigDict()
  c.cold_start.prompts = 256  # training sums
  c.cold_start.samples = 4  # a prompt; "several" in the paper
  c.cold_start.temperature = 1.0  # B.3.2
  c.cold_start.instructed = 0.5  # share of them with an instruction
  c.cold_start.most_repetition = 0.2  # share of windows of 8 words seen before
  c.cold_start.least_consistency = 0.0  # of the language; the rewriter translates
  c.cold_start.keep = 1  # traces of a prompt
  c.cold_start.most = 64  # traces in all; "thousands" in the paper
  c.cold_start.rewriter = (
    "assistant"  # "none", or FILE.py:function(completion, problem)
  )
  c.sft_1 = sft()
  c.sft_1.epochs = 4  # 2 or 3 in the paper; 64 traces are few
  c.sft_1.rows = 16  # packed rows an update

  # -- RL stage 1 (3.2.1): rules and language
  c.rl_1 = changes()
  c.rl_1.reward = ConfigDict()
  c.rl_1.reward.format_style = "chat"  # thinking, then a reply in any form
  c.rl_1.reward.format_weight = 1.0  # Eq. 4: the same weight
  c.rl_1.reward.language_weight = 1.0  # Eq. 7: added directly

  # -- rejection sampling (B.3.3)
  c.rejection = ConfigDict()
  c.rejection.prompts = 600  # training sums
  c.rejection.samples = 4  # a prompt; not stated in the paper
  c.rejection.temperature = 1.0  # not stated
  c.rejection.instructed = 0.3  # share of them with an instruction
  c.rejection.least_consistency = 1.0  # B.3.3: no mixed languages
  c.rejection.most_paragraph = 400  # characters; B.3.3: no long paragraphs
  c.rejection.most_repetition = 0.2  # share of windows of 8 words seen before
  c.rejection.keep = 2  # traces of a prompt; 1.0 to 1.1 in the paper (Table 5)
  c.rejection.judge = "none"  # or FILE.py:function(completion, problem) -> bool
  c.rejection.general_weight = 1 / 3  # 200k to 600k
  c.rejection.general_data = ""  # a file of traces; "": the task's own pool
  c.sft_3 = sft()
  c.sft_3.epochs = 3  # B.4.2: 2 or 3

  # -- preference data (B.2)
  c.judging = ConfigDict()
  c.judging.samples = 16  # replies of each writer, the base and Dev3, to a request
  c.judging.temperature = 1.0  # not stated
  c.judging.pairs_a_prompt = 200  # 66,000 pairs in the paper
  c.judging.judgments = 4  # B.2, half of them with A and B swapped
  c.judging.balance_length = True  # B.2
  c.judging.judge = "arena"  # or FILE.py:function(prompt, first, second) -> grade
  c.judging.judge_noise = 0.1  # of the miniature's judge
  c.judging.judge_first_bias = 0.1  # what it adds for the reply it reads first
  c.judging.judge_flattery = 0.5  # and for every thanks: what RL can hack

  # -- reward models (3.1, B.2)
  c.reward_models = ConfigDict()
  c.reward_models.rows = 64  # pairs or labels an update; 256 in the paper
  c.reward_models.micro_batches = 16  # a few rows at a time stay in a core's cache
  c.reward_models.epochs = 3  # of the helpful model; 1 in the paper
  c.reward_models.safety_epochs = 1  # of the safety model; 1 in the paper
  c.reward_models.learning_rate = 2e-3  # 6e-6 in the paper
  c.reward_models.schedule = "cosine"  # to a tenth; not stated
  c.reward_models.warmup_steps = 5  # not stated
  c.reward_models.weight_decay = 0.1  # not stated

  # -- RL stage 2 (3.2.2): all scenarios
  c.rl_2 = ConfigDict()
  c.rl_2.window = 20  # last updates with requests; 400 of 1,700 in the paper
  c.rl_2.general_share = 0.5  # of the prompts in that window
  c.rl_2.model_weight = 1.0  # Eq. 10
  c.rl_2.squash = "none"  # of the reward models' scores; or "sigmoid"
  c.rl_2.changes = changes()
  c.rl_2.changes.steps = 80  # 1,700 in the paper
  c.rl_2.changes.grpo = ConfigDict()
  c.rl_2.changes.grpo.temperature = 0.7  # 3.2.2
  c.rl_2.changes.optimizer = ConfigDict()
  c.rl_2.changes.optimizer.schedule = "constant"  # the window comes last
  c.rl_2.changes.reward = ConfigDict()
  c.rl_2.changes.reward.format_style = "chat"  # as in stage 1
  c.rl_2.changes.reward.format_weight = 1.0  # Eq. 10
  c.rl_2.changes.reward.language_weight = 1.0  # Eq. 8
  c.rl_2.changes.eval = ConfigDict()
  c.rl_2.changes.eval.temperature = 1.0  # as the table's

  c.rl_2_uncapped = ConfigDict()
  c.rl_2_uncapped.steps = 200  # of the ablation: updates, all of them with requests

  # -- the student
  c.student = ConfigDict()
  c.student.model = r1_zero.model_options("tiny_dense")  # takes the place of `model`
  c.student.pretrain = changes()  # of `pretrain`
  c.student.rl = changes()  # as R1-Zero, from the student's base
  c.student.rl.steps = 400  # ends earlier, with the tokens of rejection sampling
  c.student.rl.optimizer = ConfigDict()
  c.student.rl.optimizer.schedule = "constant"  # its end is not known before
  c.distill = sft()
  c.distill.epochs = 3  # B.4.3: 2 or 3
  c.distill.learning_rate = placeholder(float)  # None: the paper's for that student
  c.distill.mode = "sft"  # "logits" and "on_policy" ask the teacher, R1, itself
  c.distill.divergence = "forward_kl"  # or reverse_kl, jsd
  c.distill.alpha = 1.0  # of the divergence, against the traces' cross-entropy
  c.distill.beta = 0.5  # of jsd: the teacher's share of the mixture
  c.distill.teacher_temperature = 1.0  # divides the teacher's logits
  c.distill.temperature = 1.0  # on_policy: of the student's samples
  c.distill.group_size = 4  # on_policy: samples a prompt
  c.distill.on_policy_steps = 60  # rollouts, an update each

  # -- the baseline
  c.ppo_baseline = changes()
  c.ppo_baseline.segment_tokens = 0  # PPO's step is one program
  c.ppo_baseline.objective = ConfigDict()
  c.ppo_baseline.objective.preset = "ppo"  # lambda 1, KL in the reward
  c.ppo_baseline.ppo = ConfigDict()
  c.ppo_baseline.ppo.value_learning_rate = 1e-3  # as in configs/ppo.py, all three
  c.ppo_baseline.ppo.value_clip = 0.2  # of values around the old ones; 0: free
  c.ppo_baseline.ppo.whiten = True  # advantages over the rollout's tokens

  # -- the table
  c.report = ConfigDict()
  c.report.problems = 512  # held-out sums
  c.report.samples = 4  # of a sum
  c.report.request_samples = 16  # of a request; there are few of them
  c.report.temperature = 1.0  # 0.6 in the paper (D.1): there nearly all is right
  c.report.top_p = 1.0  # 0.95 in the paper (D.1)
  return c


def changes() -> ConfigDict:
  """Nothing yet."""
  return ConfigDict()


def sft() -> ConfigDict:
  """How a stage is fine-tuned (B.4.2)."""
  c = ConfigDict()
  c.epochs = 2  # 2 or 3
  c.learning_rate = 1e-3  # 5e-5 in the paper
  c.final_fraction = 0.1  # of the rate at the end: 5e-5 to 5e-6 in the paper
  c.warmup_steps = 5  # not stated
  c.rows = 32  # packed rows an update; 128 in the paper
  c.micro_batches = 4  # parts of a batch, one after another
  c.width = 0  # tokens a row; 0: the longest page of the corpus; 32,768 in the paper
  c.b2 = 0.95  # not stated
  c.weight_decay = 0.01  # not stated
  return c


def paper(c: ConfigDict) -> None:
  """R1's numbers; what the paper does not state keeps the miniature's."""
  r1_zero.paper(c)
  c.preset = "paper"
  c.zero = changes()
  c.cold_start.most = 5000  # B.3.2: thousands
  c.rejection.most_paragraph = 2000  # not stated
  for section in (c.sft_1, c.sft_3):
    section.epochs = 2  # B.4.2: 2 or 3
    section.learning_rate = 5e-5
    section.rows = 128
    section.width = 32_768
  c.rl_1.windows = ((0, 32_768),)  # 3.2.1
  c.rl_1.objective = ConfigDict()
  c.rl_1.objective.clip_low = 10.0  # 3.2.1
  c.rl_1.objective.clip_high = 10.0
  c.reward_models.epochs = 1  # B.2
  c.reward_models.safety_epochs = 1
  c.reward_models.rows = 256  # B.2
  c.reward_models.learning_rate = 6e-6  # B.2
  c.rl_2.window = 400  # 3.2.2
  c.rl_2.changes.steps = 1696  # 1,700 in the paper: whole rollouts of 16 updates
  c.rl_2.changes.windows = ((0, 32_768),)
  c.student.rl.steps = 10_000  # B.4.1: more than 10K
  c.student.rl.windows = ((0, 32_768),)  # B.4.1
  c.student.rl.optimizer.learning_rate = 2e-6  # B.4.1
  c.student.model.preset = "qwen2_5_7b"  # and the others of pipeline/distill.py
  c.distill.rows = 64  # B.4.3
  c.report.temperature = 0.6  # D.1
  c.report.top_p = 0.95  # D.1
  c.distill.width = 32_768
