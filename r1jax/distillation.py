"""Distillation by the teacher's distributions, beside the SFT on its texts.

Differs: R1 distils by SFT on traces alone (sft.py; arXiv 2501.12948). These are the two
objectives that people compare it with, both a divergence between the next-token
distributions of teacher and student over the whole vocabulary:

`logit_step` takes it on the teacher's traces. `on_policy_step` takes it on what the
student samples itself (GKD with lambda = 1, arXiv 2306.13649), so the student is taught
in the states that it gets into.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax import diagnostics, lora, sft, vocabulary
from r1jax.errors import UserError
from r1jax.experience import shuffled
from r1jax.grpo import ROLLOUT, SHUFFLE, key_of
from r1jax.models import moe
from r1jax.models.policy import Policy
from r1jax.models.sequence import Sequence
from r1jax.optimizer import accumulate, descend
from r1jax.prompts import PromptBatch
from r1jax.rollout import Rollout, sample
from r1jax.sft import Pages
from r1jax.train_state import TrainState

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """loss = alpha * divergence + (1 - alpha) * nll, a mean over the targets."""

  divergence: str = "forward_kl"  # one of DIVERGENCES
  beta: float = 0.5  # of "jsd": the teacher's share of the mixture
  teacher_temperature: float = 1.0  # divides the teacher's logits
  alpha: float = 1.0  # 0 is SFT
  micro_batches: int = 1  # parts of a batch whose gradients are summed
  router_bias_rate: float = 0.001  # of the aux-loss-free balance; 0 freezes the biases

  def __post_init__(self):
    """Raises UserError: what came, the rule and the remedy."""
    if self.divergence not in DIVERGENCES:
      raise UserError(
        f"config.distill.divergence={self.divergence!r} is not a divergence. Choose one"
        f" of {', '.join(DIVERGENCES)}."
      )
    if not 0 < self.beta < 1:
      raise UserError(
        f"config.distill.beta={self.beta} must lie inside 0..1; at the ends the JSD is"
        " 0 for any student. Its limits are divergence='forward_kl' and 'reverse_kl'."
      )
    if not self.teacher_temperature > 0:
      raise UserError(
        f"config.distill.teacher_temperature={self.teacher_temperature} must be above"
        " 0: it divides logits. 1 keeps the teacher as it is, less makes it surer."
      )
    if not 0 <= self.alpha <= 1:
      raise UserError(
        f"config.distill.alpha={self.alpha} must lie in 0..1: the divergence's share of"
        " the loss. 1 is the divergence alone, 0 is SFT."
      )
    if self.micro_batches < 1 or self.router_bias_rate < 0:
      raise UserError(
        "config.distill: micro_batches must be at least 1 and router_bias_rate not"
        f" negative, got {self.micro_batches} and {self.router_bias_rate}."
      )


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig(DistillConfig):
  """The same on the student's own samples, and how they are drawn."""

  divergence: str = "reverse_kl"
  group_size: int = 1  # G samples a prompt
  minibatches: int = 1  # K updates a rollout, each sample in one of them
  max_tokens: int = 32_768  # T
  temperature: float = 1.0  # of the sampling; the loss compares untempered students

  def __post_init__(self):
    super().__post_init__()
    if min(self.group_size, self.minibatches, self.max_tokens) < 1:
      raise UserError(
        "config.distill: group_size, minibatches and max_tokens must be at least 1, got"
        f" {self.group_size}, {self.minibatches} and {self.max_tokens}."
      )
    if not self.temperature > 0:
      raise UserError(
        f"config.distill.temperature={self.temperature} must be above 0: it divides the"
        " student's logits. The student's own distribution is at 1."
      )
    if self.alpha != 1:
      raise UserError(
        f"config.distill.alpha={self.alpha} must be 1 on policy: the rest would be the"
        " likelihood of the student's own samples. Mix in traces with logit_step."
      )


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
  """KL(p || q) in nats, [...]. Args: log-probabilities [..., V]."""
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def divergence(
  student: jax.Array, teacher: jax.Array, config: DistillConfig
) -> jax.Array:
  """How far the student is from the teacher at every token (GKD, section 2):

    forward_kl  KL(teacher || student): cover all that the teacher may say
    reverse_kl  KL(student || teacher): say nothing that the teacher would not
    jsd         beta KL(teacher || m) + (1 - beta) KL(student || m), Eq. 1,
                m = beta teacher + (1 - beta) student

  JSD / beta tends to the forward KL for beta -> 0, JSD / (1 - beta) to the reverse KL
  for beta -> 1.

  Args:
    student, teacher: logits [..., V] float32; no gradient flows to the teacher's.
    config: the choices.

  Returns:
    [...] float32 in nats, 0 where both agree.
  """
  c = config
  s = jax.nn.log_softmax(student, axis=-1)
  t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / c.teacher_temperature)
  if c.divergence == "forward_kl":
    return kl(t, s)
  if c.divergence == "reverse_kl":
    return kl(s, t)
  m = jnp.logaddexp(jnp.log(c.beta) + t, jnp.log1p(-c.beta) + s)
  return c.beta * kl(t, m) + (1 - c.beta) * kl(s, m)


def next_hidden(
  policy: Policy, params: Any, router: Any, pages: Pages
) -> tuple[jax.Array, dict]:
  """([B, W - 1, D] what tells the tokens 1..W-1, load by stack)."""
  variables = {"params": params, "router": router}
  seq = Sequence(positions=sft.positions(pages.segments), segments=pages.segments)
  out = policy.apply(variables, pages.tokens, seq)
  return out.hidden[:, :-1], out.load


def loss_fn(
  student: Policy,
  params: Any,
  router: Any,
  pages: Pages,
  *,
  teacher: tuple[Any, Any],
  teacher_policy: Policy,
  count: jax.Array,
  config: DistillConfig,
) -> tuple[jax.Array, tuple[dict, dict]]:
  """alpha * divergence + (1 - alpha) * nll, means over the targets.

  Args:
    student, params, router: the network that learns.
    pages: a batch or a part of it.
    teacher: (params, router) of the frozen one.
    teacher_policy: its network.
    count: [] the whole batch's targets, the means' divisor.
    config: the choices.

  Returns:
    (loss, (metrics, load by stack)). On the student's own samples `teacher_nll` - `nll`
    estimates the reverse KL by the sampled tokens alone.
  """
  with jax.named_scope("teacher"):
    theirs, _ = next_hidden(teacher_policy, *teacher, pages)
    theirs = jax.lax.stop_gradient(theirs)
  mine, load = next_hidden(student, params, router, pages)
  targets, tokens = sft.targets_ahead(pages, 1), pages.tokens[:, 1:]
  variables = {"params": params, "router": router}
  of_teacher = dict(zip(("params", "router"), teacher, strict=True))

  def compared(x):
    mine, theirs, tokens = x
    logits = student.apply(variables, mine, method="logits")
    wanted = teacher_policy.apply(of_teacher, theirs, method="logits")
    wanted = jax.lax.stop_gradient(wanted)
    return {
      "divergence": divergence(logits, wanted, config),
      "nll": -vocabulary.token_logprobs(logits, tokens),
      "teacher_nll": -vocabulary.token_logprobs(wanted, tokens),
    }

  chunk = vocabulary.positions_at_a_time(*tokens.shape, 2 * student.config.vocab)
  found = vocabulary.over_chunks(compared, (mine, theirs, tokens), chunk)
  metrics = {
    name: jnp.where(targets, x, 0.0).sum() / jnp.maximum(count, 1)
    for name, x in found.items()
  }
  a = config.alpha
  loss = a * metrics["divergence"] + (1 - a) * metrics["nll"]
  return loss, ({"loss": loss, **metrics}, load)


def logit_step(
  state: TrainState,
  pages: Pages,
  teacher: tuple[Any, Any],
  *,
  student: Policy,
  teacher_policy: Policy,
  optimizer: optax.GradientTransformation,
  config: DistillConfig,
) -> tuple[TrainState, dict]:
  """One update of parameters, or of their adapters, on packed traces; a batch without
  targets changes no weight and no bias.

  The teacher reads a micro-batch just before the student does, so no more of its logits
  than that are ever held: [B / micro_batches, W - 1, V], or less (vocabulary.py).

  Args:
    state: the student's.
    pages: the traces.
    teacher: (params, router); an argument of the program, not a constant in it.
    student, teacher_policy, optimizer, config: static.

  Returns:
    (state, metrics as float32 scalars).

  Raises:
    UserError: vocabularies of different sizes.
  """
  _check_vocab(student, teacher_policy)
  c, count = config, sft.targets_ahead(pages, 1).sum()

  weights, whole = lora.split(student, state.params)

  def loss(weights, part):
    value, aux = loss_fn(
      student,
      whole(weights),
      state.router,
      part,
      teacher=teacher,
      teacher_policy=teacher_policy,
      count=count,
      config=c,
    )
    return value, (*aux, ())

  grads, metrics, load, _ = accumulate(loss, weights, pages, c.micro_batches)
  learnt = count > 0
  params, opt_state, finite = descend(
    optimizer, grads, lora.trained(state.params), state.opt_state, learnt=learnt
  )
  rate = jnp.where(learnt & finite, c.router_bias_rate, 0.0)
  state = state.replace(
    step=state.step + 1,
    params=lora.put(state.params, params),
    router=moe.balance(state.router, load, rate),
    opt_state=opt_state,
  )
  norm = optax.tree.norm(grads)
  return state, {**metrics, "grad_norm": norm, "skipped": 1.0 - finite}


def pages_of(prompts: PromptBatch, rollout: Rollout) -> Pages:
  """The rollout's B * G samples, a page a row [B * G, P + T], in their order: prompts
  between padding on both sides, and the completions' tokens for targets."""
  group = rollout.tokens.shape[1]

  def rows(of_prompts, of_samples):
    samples = of_samples.reshape(-1, of_samples.shape[-1])
    return jnp.concatenate([jnp.repeat(of_prompts, group, axis=0), samples], axis=1)

  return Pages(
    tokens=rows(prompts.tokens, rollout.tokens),
    segments=rows(prompts.mask, rollout.mask).astype(jnp.int32),
    targets=rows(jnp.zeros_like(prompts.mask), rollout.mask),
  )


def on_policy_step(
  state: TrainState,
  prompts: PromptBatch,
  key: jax.Array,
  teacher: tuple[Any, Any],
  *,
  student: Policy,
  teacher_policy: Policy,
  optimizer: optax.GradientTransformation,
  config: OnPolicyConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> tuple[TrainState, Rollout, dict]:
  """The student samples, the teacher says at every token what it would have said, and
  K updates follow; pure, and meant for one `jax.jit`.

  The samples are data: no gradient flows through their drawing (GKD, section 3). With
  K > 1 the later updates learn on samples of a slightly older student, uncorrected.

  Args:
    state: the student's.
    prompts: B problems.
    key: the run's key; the draw of a step depends on it and on `state.step` alone.
    teacher: (params, router); an argument of the program, not a constant in it.
    student, teacher_policy, optimizer, config, stop_ids, pad_id: static.

  Returns:
    (state after K updates, the rollout, metrics as float32 scalars).

  Raises:
    UserError: vocabularies of different sizes; samples that do not divide.
  """
  _check_vocab(student, teacher_policy)
  c, count = config, prompts.tokens.shape[0] * config.group_size
  if count % (c.minibatches * c.micro_batches):
    raise UserError(
      f"{prompts.tokens.shape[0]} prompts of config.distill.group_size={c.group_size}"
      f" samples do not divide into minibatches={c.minibatches} of micro_batches="
      f"{c.micro_batches} equal parts; use divisors of {count}."
    )
  rollout = sample(
    student,
    state.params,
    state.router,
    prompts,
    key_of(key, state.step, ROLLOUT),
    group_size=c.group_size,
    max_tokens=c.max_tokens,
    temperature=c.temperature,
    stop_ids=stop_ids,
    pad_id=pad_id,
  )
  order = key_of(key, state.step, SHUFFLE)
  pages = shuffled(pages_of(prompts, rollout), order, c.minibatches)

  def one(state, part):
    return logit_step(
      state,
      part,
      teacher,
      student=student,
      teacher_policy=teacher_policy,
      optimizer=optimizer,
      config=c,
    )

  state, per_update = jax.lax.scan(one, state, pages)
  metrics = {
    **diagnostics.over_updates(per_update),
    "length": rollout.lengths.mean(dtype=jnp.float32),
    "entropy": rollout.entropy.sum() / rollout.mask.sum(),
    "truncated": 1.0 - rollout.ended.mean(dtype=jnp.float32),
  }
  return state, rollout.spoken(), metrics


def _check_vocab(student: Policy, teacher: Policy) -> None:
  ours, theirs = student.config.vocab, teacher.config.vocab
  if ours != theirs:
    raise UserError(
      f"the student's vocabulary has {ours} tokens and the teacher's {theirs}, but the"
      " distributions are compared token by token. Use two models of one tokenizer, or"
      " distil by SFT on the teacher's texts."
    )
