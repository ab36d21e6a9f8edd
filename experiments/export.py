"""What a run has trained, as a Hugging Face checkpoint that transformers and vLLM load.

  python -m experiments.export --from runs/r1_zero-smollm2_135m-seed0 --to out
  python -m experiments.export --from runs/mine --to out --dtype float32
  python -m experiments.export --from runs/mine --to adapter --adapters

--from is the folder of a run of experiments.r1_zero or experiments.ppo: its newest
checkpoint is written, or with --base the base before RL; adapters that it has learned
are merged into the weights, or with --adapters are all that is written, in peft's
layout. --to gets config.json, safetensors and the tokenizer's files. Exit codes: 0
done, 2 a mistake in the command or the folder, 42 stopped by SIGTERM, 130 by Ctrl-C, 1
anything else.
"""

import argparse
import json
import pathlib
import sys

from experiments import exits


def main(argv: list[str]) -> None:
  options = flags().parse_args(argv)
  with exits.in_words("remove what is in --to before the next try"):
    export(options)
  names = sorted(path.name for path in pathlib.Path(options.to).iterdir())
  print(f"{options.to}: {', '.join(names)}")


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--from", dest="folder", default="runs/r1_zero-tiny-seed0", help="of a run")
  add("--to", required=True, help="a new folder")
  add("--base", action="store_true", help="the base, before RL")
  add("--dtype", default="bfloat16", help="of the tensors, or float32")
  add("--adapters", action="store_true", help="the run's adapters alone")
  return parser


def export(options: argparse.Namespace) -> None:
  """Writes the folder.

  Raises:
    UserError: no run there, nothing that Hugging Face has a family for, or a folder
      that holds a checkpoint.
  """
  from r1jax import peft, trained
  from r1jax.data.hf_tokenizer import HFTokenizer
  from r1jax.models import hf

  folder, to = pathlib.Path(options.folder), pathlib.Path(options.to)
  kept = trained.load(folder, base=options.base, merged=not options.adapters)
  if options.adapters:
    base = kept.config.model.folder if kept.config else ""
    peft.save(to, kept.policy, kept.params, base=base)
    return
  tokenizer = kept.tokenizer
  said = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
  said["eos_token_id"] = list(tokenizer.stop_ids)
  files = {"tokenizer.model": tokenizer.model}
  if isinstance(tokenizer, HFTokenizer):
    files = dict(tokenizer.files)
    given = json.loads(files.pop("config.json", "{}"))  # the one it was trained from
    if "max_position_embeddings" in given:
      said["max_position_embeddings"] = given["max_position_embeddings"]
  weights = kept.policy, kept.params, kept.router
  hf.save(to, *weights, dtype=options.dtype, config=said)
  for name, content in files.items():
    (to / name).write_bytes(content)


if __name__ == "__main__":
  main(sys.argv[1:])
