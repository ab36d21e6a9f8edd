"""How good a policy is: pass@1, pass@k and cons@N with intervals, test-time scaling.

  python -m experiments.evaluate                           # of runs/r1_zero-tiny-seed0
  python -m experiments.evaluate --base --against=EVALUATION
  python -m experiments.evaluate --from=models/smollm2_135m --task=chain \\
      --problems=64 --samples=4 --max-tokens=128
  python -m experiments.evaluate --from=models/r1 --benchmark=aime --file=aime_2024.json
  python -m experiments.evaluate --task=gym:leg_counting
  python -m experiments.evaluate --from=runs/r1-tiny-seed0/rl_1

--from is the folder of a run of experiments.r1_zero or experiments.ppo, of a stage of
experiments.r1 (the folder of all stages stands for R1), or of a Hugging Face
checkpoint. A run is asked what it held out; a benchmark's file is yours to bring.
Defaults are the paper's: temperature 0.6, top-p 0.95, 32,768 tokens, and as many
samples as it draws for the benchmark; of generated problems 16. A run has its own
window, stop strings and rules of judging. Everything is kept in --out: the same command
goes on where it was stopped. Exit codes: 0 done, 2 a mistake in the command or a file,
or a device that is full, 3 logits that are not finite, 42 stopped by SIGTERM or a full
disk, 130 by Ctrl-C, 1 anything else.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import pathlib
import sys

import rich.console
import rich.progress

from experiments import exits
from r1jax.errors import UserError
from r1jax.evals.interval import METHODS
from r1jax.rewards.scorer import MATHS, SANDBOXES, Scorer, ScorerConfig

PAPERS = 32_768  # tokens of a sample
GENERATED = 100  # problems of --task
# Samples are drawn in this many parts or more, so that progress shows and a stop loses
# little, but not in parts of fewer than FEW.
PARTS, FEW = 8, 16
SMALLER = "Fewer --rows or --max-tokens need less."


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with (
    exits.in_words("the same command goes on", memory=SMALLER),
    exits.flags_for("sandbox", "maths"),
  ):
    found = evaluate(options)
  if options.json:
    print(json.dumps(found))


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--from", dest="folder", default="runs/r1_zero-tiny-seed0", help="of a run")
  add("--base", action="store_true", help="the base, before RL")
  add("--benchmark", default="", help="aime, math500, gpqa, livecodebench, gsm8k, ...")
  add("--file", default="", help="of the benchmark")
  add("--task", default="", help="generated problems: chain, puzzle, gym:NAME")
  add("--problems", type=int, default=0, help="at most; 0: all, or 100 of --task")
  add("--samples", type=int, default=0, help="of each problem; 0: as the benchmark has")
  add("--k", type=int, action="append", default=[], help="of pass@k; again for several")
  add("--temperature", type=float, default=0.6, help="0: the likeliest token")
  add("--top-p", type=float, default=0.95, help="1: all")
  add("--max-tokens", type=int, default=0, help="of a sample; 0: 32768, a run's window")
  add("--rows", type=int, default=0, help="drawn at once; 0: as memory allows")
  add("--instruction", help="after each problem; default: the benchmark's")
  add("--prefill-think", action="store_true", help="prompts end in <think>")
  add("--stop", action="append", help="a text that ends a sample; default: a run's own")
  add("--maths", choices=MATHS, help="default: a run's own; exact for generated ones")
  add("--sandbox", choices=SANDBOXES, help="of programs; default: a run's own")
  add("--seed", type=int, default=0)
  add("--out", default="", help="default: evals/ in the folder of what is evaluated")
  add("--interval", choices=METHODS, default="bootstrap", help="of shares")
  add("--against", default="", help="the folder of another evaluation: a paired test")
  add("--json", action="store_true", help="print the result as JSON in the last line")
  return parser


def evaluate(options: argparse.Namespace) -> dict:
  """Evaluates, prints the table, returns what evaluation.json holds.

  Raises:
    UserError: a mistake in the command or a file.
  """
  from experiments import command

  command.use_compilation_cache("")
  from r1jax import trained
  from r1jax.evals import benchmarks, evaluation

  console = rich.console.Console(stderr=options.json)

  def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)

  o, source = options, pathlib.Path(options.folder)
  plausible(o)
  kept = trained.opened(source, base=o.base)
  problems, benchmark = asked(o, kept)
  if o.against:
    evaluation.shares(pathlib.Path(o.against))
  prompts, prefilled = worded(o, kept, problems, benchmark)
  pairs = list(zip(problems, prompts, strict=True))
  what = o.benchmark or o.task or "held out"
  name = [what.replace(":", "_").replace(" ", "_"), "base" * o.base]
  folder = pathlib.Path(o.out) if o.out else source / benchmarks.folder_name(name)
  decoding = decoded(o, kept, prompts, benchmark, evaluation.begun(folder), say)
  evaluation.check(o.k, decoding.samples)
  scoring = judged(o, kept, prefilled)
  form = None if kept.config is None else scoring.format_style
  weights = trained.identity(source, base=o.base)
  said = {"from": str(source), "base": o.base, "weights": weights, "what": what}
  said |= {"file": o.file, "problems": len(pairs), "asked": evaluation.digest(pairs)}
  said |= dataclasses.asdict(decoding) | {"instruction": o.instruction}
  said |= {"prefill_think": prefilled, "maths": scoring.maths, "format": form}

  def load() -> trained.Trained:
    found = trained.load(source, base=o.base, speaks=True)
    if trained.identity(source, base=o.base) != weights:
      raise UserError(f"{source} has gone on meanwhile. Give the command again.")
    return found

  found = evaluation.finished(folder, said, o.k, o.interval)
  if found is None:
    with (
      Scorer(scoring, problems) as scorer,
      rich.progress.Progress(console=console, transient=True) as bars,
    ):
      for note in scorer.notes:
        say(note)
      task = bars.add_task("samples", total=len(pairs) * decoding.samples)
      found = evaluation.evaluate(
        load,
        pairs,
        decoding,
        scorer,
        folder,
        said=said,
        ks=o.k,
        form=form,
        method=o.interval,
        progress=lambda done, _: bars.update(task, completed=done),
      )
  console.print(evaluation.table(found))
  if benchmark.note and not o.samples:
    say(f"{decoding.samples} samples a problem: {benchmark.note}.")
  if o.against:
    d = found["against"] = evaluation.against(folder, pathlib.Path(o.against))
    say(
      f"pass@1 less that of {o.against}: {d['mean']:+.3f}"
      f" {evaluation.shown(d, '+.3f')}, p = {d['p']:.3g}, on {d['problems']} problems"
    )
  say(f"Files: {folder}")
  return found


def plausible(o: argparse.Namespace) -> None:
  """Raises UserError: flags that cannot be, whatever the policy."""
  if bool(o.benchmark) != bool(o.file) or (o.benchmark and o.task):
    raise UserError(
      "--benchmark and --file belong together, and --task stands alone: the first two"
      " ask a file, the last generates problems; without all, a run's own are asked."
    )
  if o.problems < 0:
    raise UserError(
      f"--problems={o.problems} must not be negative; 0 takes all that there are, or"
      f" {GENERATED} of --task."
    )


def decoded(
  o: argparse.Namespace,
  kept,
  prompts: list[str],
  benchmark,
  begun: dict,
  say: Callable[[str], None],
):
  """The Decoding of the flags. What they leave open is as in the evaluation that was
  begun, or as the policy, the benchmark and the machine have it.

  Raises:
    UserError: a value that cannot be, or a text that the checkpoint is not made for.
  """
  import jax

  from r1jax import trained
  from r1jax.evals import answers, room
  from r1jax.stopping import StopStrings

  config = kept.config
  tokens = tokens_of(o, kept, answers.longest(kept.tokenizer, prompts), say)
  decoding = answers.Decoding(
    samples=o.samples or benchmark.samples,
    temperature=o.temperature,
    top_p=o.top_p,
    max_tokens=tokens,
    stop=tuple(o.stop or (() if config is None else trained.stop(config))),
    seed=o.seed,
    rows=o.rows or begun.get("rows", 1),
  )
  StopStrings.of(decoding.stop, kept.tokenizer)
  if o.rows or "rows" in begun:
    return decoding
  window = answers.window(kept.tokenizer, prompts)
  half = config is None and jax.default_backend() != "cpu"
  fit = room.rows(kept.policy, window, tokens, bytes_each=2 if half else 4)
  total = len(prompts) * decoding.samples
  part = max(-(-total // PARTS), FEW)
  return dataclasses.replace(decoding, rows=min(fit, total, part))


def tokens_of(
  o: argparse.Namespace, kept, longest: int, say: Callable[[str], None]
) -> int:
  """How long a sample may be. Args: longest: tokens of the longest prompt.

  Raises:
    UserError: prompt and sample are longer than the checkpoint is made for.
  """
  from r1jax import trained

  if kept.config is not None:
    return o.max_tokens or trained.window_of(kept)
  tokens = o.max_tokens or PAPERS
  most = trained.longest(pathlib.Path(o.folder), kept.policy)
  if most is None or tokens <= most - longest:
    return tokens
  if o.max_tokens or most <= longest:
    raise UserError(
      f"--max-tokens={tokens}: with prompts of up to {longest} tokens that is more than"
      f" the {most} that {o.folder} is made for. Give {max(most - longest, 0)} or less,"
      " or leave longer problems out."
    )
  say(
    f"--max-tokens={most - longest} in place of {PAPERS}: {o.folder} is made for {most}"
    f" tokens, and prompts have up to {longest}."
  )
  return most - longest


def judged(o: argparse.Namespace, kept, prefilled: bool) -> ScorerConfig:
  """By which rules: a run's own, where the flags do not say otherwise."""
  from r1jax import settings

  config = kept.config
  found = ScorerConfig() if config is None else settings.scorer_config(config)
  # A run whose rewards are read in the graph knows no algebra.
  algebra = o.file or (config is not None and config.reward.host)
  return dataclasses.replace(
    found,
    maths=o.maths or (found.maths if algebra else "exact"),
    sandbox=o.sandbox or found.sandbox,
    prefill_think=prefilled,
  )


def asked(o: argparse.Namespace, kept) -> tuple[list, object]:
  """(problems, their Benchmark)."""
  from experiments.configs.r1_zero import get_config
  from r1jax.evals import benchmarks

  benchmark = benchmarks.GENERATED
  if o.benchmark:
    problems = benchmarks.of_file(o.benchmark, o.file)
    benchmark = benchmarks.BENCHMARKS[o.benchmark]
  elif o.task:
    config = kept.config if kept.config is not None else get_config("tiny")
    problems = benchmarks.generated(o.task, o.problems or GENERATED, o.seed, config)
  elif kept.config is None:
    raise UserError(
      f"{o.folder} is a checkpoint and no run: say what to ask it, --benchmark=NAME"
      " --file=FILE or --task=NAME."
    )
  else:
    problems = benchmarks.held_out(kept.config)
  return problems[: o.problems or None], benchmark


def worded(o: argparse.Namespace, kept, problems: list, benchmark) -> tuple[list, bool]:
  """(prompts, whether they end in <think>): a run's in its template, a checkpoint's as
  turns of a user."""
  from r1jax import prompts

  if kept.config is not None:
    d = kept.config.data
    how = dict(template=d.template, prefill_think=d.prefill_think or o.prefill_think)
    how |= dict(tokenizer=kept.tokenizer, examples=d.get("examples", 0))
    texts = [f"{p.problem} {o.instruction or ''}".strip() for p in problems]
    rendered = [prompts.render(problem=text, **how) for text in texts]
    return rendered, how["prefill_think"]
  instruction = benchmark.instruction if o.instruction is None else o.instruction
  turns = [f"{p.problem}\n\n{instruction}".strip() for p in problems]
  how = dict(tokenizer=kept.tokenizer, prefill_think=o.prefill_think)
  rendered = [prompts.user_turn(turn, **how) for turn in turns]
  return rendered, all(map(prompts.opened, rendered))


if __name__ == "__main__":
  main(sys.argv[1:])
