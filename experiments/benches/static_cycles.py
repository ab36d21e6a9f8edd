"""One case compiled for a TPU, in a process of its own: what its compiler says of it.

  python -m experiments.benches.static_cycles CASE TOPOLOGY

The last line is JSON: {"seconds", "temp_bytes", "flops", "cycles": {op: cycles}}. The
flag for cycles must be set before the compiler is loaded; on some copies it ends the
process.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import time

from experiments.benches import kernel_cases
from r1jax import ahead_of_time

FLAG = "--xla_jf_dump_static_llo_profile_to="
ENTRY = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')


def main(name: str, topology: str) -> None:
  case = next(c for c in kernel_cases.CASES if c.name == name)
  with tempfile.TemporaryDirectory() as folder:
    if not case.no_cycles:  # it takes a minute, and tens where nothing comes of it
      os.environ["LIBTPU_INIT_ARGS"] = FLAG + folder
    start = time.monotonic()
    compiled = ahead_of_time.compile_for(topology, case.function, *case.specs)
    seconds = time.monotonic() - start
    cycles = {}
    for path in pathlib.Path(folder).iterdir():
      cycles |= {op: int(n) for op, n in ENTRY.findall(path.read_text(errors="ignore"))}
  memory = compiled.memory_analysis()
  print(
    json.dumps(
      {
        "seconds": seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis().get("flops"),  # none with the flag
        "cycles": cycles,
      }
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
