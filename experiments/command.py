"""What every entry point shares: flags, exit codes, the compilation cache, seeds."""

from collections.abc import Callable
import difflib
import json
import os
import pathlib
import re
import subprocess
import sys

from absl import flags
from ml_collections import ConfigDict

from r1jax.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls main; a UserError is one line and exit code 2."""
  try:
    parse(sys.argv)
    main()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
    sys.exit(130)


def parse(argv: list[str]) -> None:
  """absl's flags, with its and ml_collections' errors as UserErrors."""
  wanted = [a for a in argv[1:] if a.lstrip("-") in ("help", "helpfull", "h", "?")]
  if wanted:
    print(sys.modules["__main__"].__doc__)
    print(flags.FLAGS.main_module_help())
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(f"{error}. See --help.") from error
  except (AttributeError, KeyError) as error:
    raise UserError(_unknown_key(argv, str(error))) from error
  except (ValueError, TypeError, OSError) as error:
    raise UserError(f"{error}. See --help.") from error
  if len(rest) > 1:
    raise UserError(f"{rest[1]!r} is not a flag; flags look like --config.seed=1.")


def _unknown_key(argv: list[str], text: str) -> str:
  return text


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


def over_seeds(module: str, config: ConfigDict, workdir: pathlib.Path) -> None:
  raise NotImplementedError
