"""What every entry point shares: flags, exit codes, the compilation cache, seeds."""

from collections.abc import Callable
import errno
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import traceback
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from r1jax.errors import NumericalError, TransientError, UserError


def run(main: Callable[[ConfigDict, str], None], config_file: str) -> None:
  """Parses --config and --workdir, calls main(config, workdir).

  Exit codes: 2 a user's mistake, 3 a number that is not finite, 42 start me again, 130
  Ctrl-C, 1 anything else.

  Args:
    main: the experiment.
    config_file: default of --config, as FILE.py:preset.
  """
  try:
    config, workdir = parse(sys.argv, config_file)
    main(config, workdir)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    _leave(2)
  except NumericalError as error:
    print(f"error: {error}", file=sys.stderr)
    _leave(3)
  except TransientError as error:
    print(f"error: {error}", file=sys.stderr)
    _leave(42, at_once=True)
  except KeyboardInterrupt:
    print(
      "stopped; the same command continues from the last checkpoint", file=sys.stderr
    )
    _leave(130)
  except Exception as error:
    if room := no_room(error):
      code, text = room
      print(f"error: {text}", file=sys.stderr)
      _leave(code)
    if not _several():
      raise
    traceback.print_exc()
    _leave(42 if is_transient(error) else 1)


_SMALLER = (
  "More config.grpo.micro_batches and config.pretrain.micro_batches, fewer"
  " config.grpo.slots, shorter config.windows, config.model.remat=nothing or a larger"
  " mesh need less of one; python -m experiments.plan says how much each part takes."
  " Another --workdir, or keys that a run may be continued with."
)


def no_room(error: Exception, remedy: str = "") -> tuple[int, str] | None:
  """(exit code, sentence) of an error of a full disk or of a full device. Args: remedy:
  what needs less of a device's memory; "": that of a run."""
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    return 42, (
      f"the disk is full ({error.filename or 'of the workdir'}). Make room; the same"
      " command continues from the last checkpoint."
    )
  if _of_jax(error) and "RESOURCE_EXHAUSTED" in str(error):
    first = " ".join(str(error).split())[:200]
    return 2, f"a device has not the memory for this ({first}). {remedy or _SMALLER}"
  return None


def _of_jax(error: Exception) -> bool:
  return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")


def is_transient(error: Exception) -> bool:
  """Whether it speaks of a peer that is gone, so that all have to start again."""
  words = "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Gloo|heartbeat"
  found = _of_jax(error) and re.search(words, str(error))
  return bool(found or re.search(r"Gloo \w+ failed", str(error)))  # a ValueError too


def _several() -> bool:
  agreement = sys.modules.get("r1jax.agreement")  # not imported: it has met nobody
  return agreement is not None and agreement.several()


def _leave(code: int, *, at_once: bool = False) -> NoReturn:
  """Ends the process. One of several does not wait at JAX's exit for the others, who
  wait for it: they are told by its end.

  Args:
    code: the exit code.
    at_once: a thread of JAX is waiting that cannot be broken off.
  """
  if not at_once and _several():
    import jax

    if jax.process_index() == 0:
      time.sleep(1)  # with it the others end, who may have something to say too
    at_once = True
  if at_once:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def parse(argv: list[str], config_file: str) -> tuple[ConfigDict, str]:
  """(config, workdir). The errors of absl and ml_collections become UserErrors."""
  asked = any(a in ("-h", "--help", "-help", "--helpfull") for a in argv[1:])
  plain = [a for a in argv if a not in ("-h", "--help", "-help", "--helpfull")]
  try:
    # The flag reads sys.argv as soon as it is defined.
    config_flags.DEFINE_config_file("config", config_file, "FILE.py:preset")
    flags.DEFINE_string("workdir", "", "the run's folder; default: under runs/")
    rest = flags.FLAGS(plain)
    config = flags.FLAGS.config
    config.to_dict()  # a file that failed to load says so only when it is read
  except (AttributeError, KeyError) as error:
    hint = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
    key = hint[2] if hint else str(error).strip("'\"").splitlines()[0]
    guess = f" Did you mean {hint[1]!r}?" if hint else ""
    raise UserError(
      f"there is no config key {key!r}.{guess} --help lists all keys."
    ) from error
  except OSError as error:
    raise UserError(f"--config: {' '.join(str(error).split())}") from error
  except (flags.Error, ValueError, TypeError) as error:
    raise UserError(f"{_last_line(error)}. --help lists all flags.") from error
  if asked:
    print(sys.modules["__main__"].__doc__)
    print(f"--workdir=FOLDER\n--config={config_file}, and its keys:\n")
    for key, value in _leaves(config):
      said = repr(value) if value is not None else "None (as its preset has it)"
      print(f"  --config.{key}={said}")
    print("\nPresets of the objective: python -m r1jax.presets, docs/algorithms.md")
    sys.exit(0)
  if len(rest) > 1:
    raise UserError(f"{rest[1]!r} is not a flag; a flag looks like --config.seed=1.")
  return config, flags.FLAGS.workdir


def _last_line(error: Exception) -> str:
  """The message itself, where a library put a whole traceback into it."""
  lines = [line for line in str(error).splitlines() if re.match(r"\w*Error: ", line)]
  return (lines[-1].partition(": ")[2] if lines else str(error)).strip().rstrip(".")


def _leaves(config: ConfigDict, prefix: str = "") -> list[tuple[str, object]]:
  found = []
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      found += _leaves(value, f"{prefix}{key}.")
    else:
      found.append((prefix + key, value))
  return found


def use_compilation_cache(folder: str) -> None:
  """Lets a second run start fast. "": under the user's cache folder; "off": none."""
  import jax

  if folder == "off":
    return
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  jax.config.update(
    "jax_compilation_cache_dir", folder or str(pathlib.Path(cache) / "r1jax" / "xla")
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def launch(
  name: str,
  get_config: Callable[[str], ConfigDict],
  config: ConfigDict,
  workdir: str,
  started: float,
) -> None:
  """One run, or config.seeds of them; a changed config gets a folder of its own.

  Args:
    name: of the module in experiments/, which names the folder.
    get_config: its presets.
    config: as parsed.
    workdir: the run's folder; "": under runs/.
    started: `time.monotonic()` of the process's first line.
  """
  path = folder_of(name, get_config, config, workdir)
  if config.seeds > 1:
    one_process(f"config.seeds={config.seeds}", "Start a run for every seed.")
    folders = over_seeds(f"experiments.{name}", config, path)
    texts = [(folder / "summary.json").read_text() for folder in folders]
    table = seeds_table([json.loads(text) for text in texts])
    (path / "seeds.md").write_text(table)
    print(table)
    return
  from r1jax import loop, settings
  from r1jax.launch import start
  from r1jax.progress import Clock

  use_compilation_cache(config.compilation_cache)
  facts = {"config": settings.plain(config), "workdir": str(path)}
  start(facts, callbacks=config.reward.host)
  loop.run(config, path, Clock(started))


def one_process(what: str, remedy: str) -> None:
  """Refuses what several processes cannot do together, by the environment alone.

  Args:
    what: it.
    remedy: a sentence.

  Raises:
    UserError: this is one of several processes.
  """
  from r1jax import launch

  place = launch.detect(os.environ, chips=False)
  if place.how != "alone" and place.processes != 1:
    raise UserError(
      f"{what} runs in one process, and this is one of several ({place.how}). {remedy}"
    )


def start_alone(what: str) -> None:
  """Starts JAX for what one process does.

  Raises:
    UserError: this is one of several processes.
  """
  from r1jax import agreement, launch

  remedy = "Start it on one host; r1_zero and ppo run on several."
  one_process(what, remedy)
  launch.start({})
  if agreement.several():
    raise UserError(f"{what} runs in one process, and this is one of several. {remedy}")


def folder_of(
  name: str,
  get_config: Callable[[str], ConfigDict],
  config: ConfigDict,
  workdir: str,
) -> pathlib.Path:
  """The workdir that was given, or one under runs/ that tells configs and seeds apart.

  Arguments as `launch`.

  Raises:
    UserError: it is an address.
  """
  from r1jax import settings

  if "://" in workdir:
    raise UserError(
      f"--workdir={workdir} is no folder: a run writes to a file system. Mount the"
      " bucket (gcsfuse) and give its folder."
    )
  preset = get_config(config.preset)
  changed = settings.differences(settings.plain(preset), settings.plain(config))
  kind = settings.sha256(config)[:8] if any("seed:" not in c for c in changed) else ""
  end = "seeds" if config.seeds > 1 else f"seed{config.seed}"
  folder = "-".join(filter(None, [name, config.preset, kind, end]))
  return pathlib.Path(workdir or f"runs/{folder}").resolve()


def over_seeds(
  module: str, config: ConfigDict, workdir: pathlib.Path
) -> list[pathlib.Path]:
  """Runs config.seeds consecutive seeds, one process each, and returns their folders.

  A stopped sweep goes on where it was: a run that has ended only shows its result, and
  refuses another config.
  """
  arguments = [
    a for a in sys.argv[1:] if not re.match(r"--?(config\.seeds?|workdir)=", a)
  ]
  folders = []
  for seed in range(config.seed, config.seed + config.seeds):
    folder = workdir / f"seed_{seed}"
    command = [sys.executable, "-m", module, *arguments]
    command += [f"--config.seed={seed}", "--config.seeds=1", f"--workdir={folder}"]
    code = subprocess.run(command).returncode
    if code:
      print(f"seed {seed} ended with exit code {code}", file=sys.stderr)
      sys.exit(code if code > 0 else 1)
    folders.append(folder)
  return folders


def seeds_table(summaries: list[dict]) -> str:
  """Markdown: a row a seed, base -> half way -> final, and a row of means."""
  cons = next(k for k in summaries[0]["base"] if k.startswith("cons_at_"))
  columns = [("pass_at_1", 2), (cons, 2), ("mean_length", 1), ("reflection_rate", 2)]
  stages = ("base", "half_way", "final")

  def row(
    first: str, pick: Callable[[str, str], float], seconds: str, memory: str
  ) -> str:
    cells = [
      " → ".join(f"{pick(stage, name):.{digits}f}" for stage in stages)
      for name, digits in columns
    ]
    return "| " + " | ".join([first, *cells, seconds, memory]) + " |"

  head = [
    "seed",
    "pass@1",
    cons.replace("_at_", "@"),
    "length",
    "re-checks",
    "s",
    "GiB",
  ]
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for s in summaries:
    seconds, memory = s["seconds"]["total"], s["peak_rss_gib"]
    lines.append(
      row(str(s["seed"]), lambda a, b, s=s: s[a][b], f"{seconds:.0f}", f"{memory:.1f}")
    )
  mean = statistics.fmean
  lines.append(
    row(
      "mean",
      lambda a, b: mean(s[a][b] for s in summaries),
      f"{mean(s['seconds']['total'] for s in summaries):.0f}",
      f"{max(s['peak_rss_gib'] for s in summaries):.1f} max",
    )
  )
  return "\n".join(lines) + "\n"
