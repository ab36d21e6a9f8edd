"""What a trained policy says to a prompt.

  python -m experiments.generate --prompt "3+4+5"
  python -m experiments.generate --prompt "3+4+5" --samples 4 --temperature 0.7 --json
  python -m experiments.generate --prompt "<|User|>3+4" --raw --stop "</answer>"
  python -m experiments.generate --from models/smollm2_135m --temperature 0 \
      --prompt "What is the capital of France?"

--from is the folder of a run of experiments.r1_zero or experiments.ppo; its newest
checkpoint answers, or with --base the base before RL. A prompt is put into the run's
template, unless it is --raw. A stage of experiments.r1 answers likewise. Or it is the
folder of a Hugging Face checkpoint, and a prompt is a user's turn in its chat template.
Exit codes: 0 done, 2 a mistake in the command or the folder, or a device that is full,
3 logits that are not finite, 42 stopped by SIGTERM, 130 by Ctrl-C, 1 anything else.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from experiments import exits


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  smaller = "Fewer --samples, --slots or --max-tokens need less."
  with exits.in_words(memory=smaller):
    said = answers(options)
  if options.json:
    print(json.dumps(said))
    return
  for prompt, completions in said.items():
    for completion in completions:
      end = "" if completion["ended"] else " [truncated]"
      print(f"{prompt}\n{completion['text']}{end}\n")


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--prompt", action="append", required=True, help="again for several")
  add("--from", dest="folder", default="runs/r1_zero-tiny-seed0", help="of a run")
  add("--base", action="store_true", help="the base, before RL")
  add("--raw", action="store_true", help="the prompt as it is, without the template")
  add("--samples", type=int, default=1, help="of each prompt")
  add("--max-tokens", type=int, default=256, help="of a completion")
  add("--temperature", type=float, default=1.0, help="0: the likeliest token")
  add("--top-k", type=int, default=0, help="0: all")
  add("--top-p", type=float, default=1.0, help="1: all")
  add("--min-p", type=float, default=0.0, help="0: all")
  add("--stop", action="append", default=[], help="a text that ends a completion")
  add("--slots", type=int, default=0, help="completions at once; 0: all")
  add("--speculative", default="off", help="drafts by the MTP module: on, off, auto")
  add("--seed", type=int, default=0)
  add("--json", action="store_true", help="tokens and log-probabilities too")
  return parser


def answers(options: argparse.Namespace) -> dict[str, list[dict]]:
  """{prompt: its completions}.

  Raises:
    UserError: no run there, or a setting that is wrong.
  """
  from experiments import command

  command.use_compilation_cache("")
  from r1jax import prompts, rollout, trained

  kept = trained.load(pathlib.Path(options.folder), base=options.base, speaks=True)
  texts = options.prompt
  if kept.config is None and not options.raw:
    texts = [prompts.user_turn(prompt, kept.tokenizer) for prompt in texts]
  elif not options.raw:
    d = kept.config.data
    template = dict(template=d.template, prefill_think=d.prefill_think)
    template |= dict(tokenizer=kept.tokenizer, examples=d.get("examples", 0))
    texts = [prompts.render(problem=prompt, **template) for prompt in texts]
  names = ("samples", "max_tokens", "temperature", "top_k", "top_p", "min_p", "stop")
  names += ("slots", "speculative", "seed")
  said = rollout.generate(
    kept.policy,
    kept.params,
    kept.router,
    kept.tokenizer,
    texts,
    **{name: getattr(options, name) for name in names},
  )
  return {
    text: [dataclasses.asdict(completion) for completion in completions]
    for text, completions in zip(texts, said, strict=True)
  }


if __name__ == "__main__":
  main(sys.argv[1:])
