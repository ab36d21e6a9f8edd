"""How good a policy is: pass@1, pass@k and cons@N with intervals, test-time scaling.

  python -m experiments.evaluate                           # of runs/r1_zero-tiny-seed0
  python -m experiments.evaluate --base --against=EVALUATION
  python -m experiments.evaluate --from=models/smollm2_135m --task=chain \\
      --problems=64 --samples=4 --max-tokens=128
  python -m experiments.evaluate --from=models/r1 --benchmark=aime --file=aime_2024.json
  python -m experiments.evaluate --task=gym:leg_counting

--from is the folder of a run of experiments.r1_zero or experiments.ppo, or of a Hugging
Face checkpoint. A run is asked what it held out; a benchmark's file is yours to bring.
Defaults are the paper's: temperature 0.6, top-p 0.95, 32,768 tokens, and as many
samples as it draws for the benchmark; of generated problems 16, and of a run its own
window. Everything is kept in --out: the same command goes on where it was stopped. Exit
codes: 0 done, 2 a mistake in the command or a file, 3 logits that are not finite, 42
stopped by SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import rich.console
import rich.progress

from experiments import exits
from r1jax.errors import UserError
from r1jax.rewards.scorer import MATHS, Scorer, ScorerConfig


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words("the same command goes on"):
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
  add("--problems", type=int, default=0, help="at most; 0: all")
  add("--samples", type=int, default=0, help="of each problem; 0: as the benchmark has")
  add("--k", type=int, action="append", default=[], help="of pass@k; again for several")
  add("--temperature", type=float, default=0.6, help="0: the likeliest token")
  add("--top-p", type=float, default=0.95, help="1: all")
  add("--max-tokens", type=int, default=0, help="of a sample; 0: 32768, a run's window")
  add("--rows", type=int, default=256, help="samples that are drawn at once")
  add("--instruction", help="after each problem; default: the benchmark's")
  add("--prefill-think", action="store_true", help="prompts end in <think>")
  add("--stop", action="append", default=[], help="a text that ends a sample")
  add("--maths", choices=MATHS, help="default: exact for generated problems")
  add("--seed", type=int, default=0)
  add("--out", default="", help="default: evals/ in the folder of what is evaluated")
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
  from r1jax.evals.answers import Decoding

  console = rich.console.Console(stderr=options.json)
  o, source = options, pathlib.Path(options.folder)
  if bool(o.benchmark) != bool(o.file) or (o.benchmark and o.task):
    raise UserError(
      "--benchmark and --file belong together, and --task stands alone: the first two"
      " ask a file, the last generates problems; without all, a run's own are asked."
    )
  kept = trained.load(source, base=o.base)
  problems, benchmark = asked(o, kept)
  prompts, prefilled = worded(o, kept, problems, benchmark)
  window = trained.window_of(kept) if kept.config is not None else 32_768
  decoding = Decoding(
    samples=o.samples or benchmark.samples,
    temperature=o.temperature,
    top_p=o.top_p,
    max_tokens=o.max_tokens or window,
    stop=tuple(o.stop),
    seed=o.seed,
    rows=o.rows,
  )
  evaluation.check(o.k, decoding.samples)
  if o.against:
    evaluation.shares(pathlib.Path(o.against))
  what = o.benchmark or o.task or "held out"
  name = [what.replace(":", "_").replace(" ", "_"), "base" * o.base]
  folder = pathlib.Path(o.out) if o.out else source / benchmarks.folder_name(name)
  said = {"from": str(source), "base": o.base, "what": what, "file": o.file}
  said |= dataclasses.asdict(decoding) | {"instruction": o.instruction}
  maths = o.maths or ("math-verify" if o.file else "exact")
  scoring = ScorerConfig(maths=maths, prefill_think=prefilled)
  with (
    Scorer(scoring, problems) as scorer,
    rich.progress.Progress(console=console, transient=True) as bars,
  ):
    task = bars.add_task("samples", total=len(problems) * decoding.samples)
    found = evaluation.evaluate(
      kept,
      list(zip(problems, prompts, strict=True)),
      decoding,
      scorer,
      folder,
      said=said,
      ks=o.k,
      prefill_think=prefilled,
      progress=lambda done, _: bars.update(task, completed=done),
    )
  console.print(evaluation.table(found))
  if benchmark.note and not o.samples:
    console.print(f"{decoding.samples} samples a problem: {benchmark.note}.")
  if o.against:
    found["against"] = evaluation.against(folder, pathlib.Path(o.against))
    d = found["against"]
    console.print(
      f"pass@1 less that of {o.against}: {d['mean']:+.3f}"
      f" [{d['low']:+.3f}, {d['high']:+.3f}], p = {d['p']:.3g}, on {d['problems']}"
      " problems",
      highlight=False,
      soft_wrap=True,
      markup=False,
    )
  console.print(f"Files: {folder}", highlight=False, soft_wrap=True)
  return found


def asked(o: argparse.Namespace, kept) -> tuple[list, object]:
  """(problems, their Benchmark)."""
  from experiments.configs.r1_zero import get_config
  from r1jax.evals import benchmarks

  if o.problems < 0:
    raise UserError(f"--problems={o.problems} must not be negative; 0 takes all.")
  benchmark = benchmarks.GENERATED
  if o.benchmark:
    problems = benchmarks.of_file(o.benchmark, o.file)
    benchmark = benchmarks.BENCHMARKS[o.benchmark]
  elif o.task:
    config = kept.config if kept.config is not None else get_config("tiny")
    problems = benchmarks.generated(o.task, o.problems or 100, o.seed, config)
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
  think = "<think>\n" * o.prefill_think
  return [prompts.user_turn(t, kept.tokenizer) + think for t in turns], o.prefill_think


if __name__ == "__main__":
  main(sys.argv[1:])
