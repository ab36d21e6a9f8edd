"""Presets of compiler flags by name: R1JAX_XLA_FLAGS=name.

A flag that the compiler does not know ends the process, so tests/pods_test.py looks for
each of them in the installed jaxlib and libtpu. Whether one pays has to be measured:
profile a few steps with and without it (config.profile_steps).

Sources: AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, for TPUs;
docs.jax.dev/en/latest/gpu_performance_tips.html and
docs.nvidia.com/jax-toolbox, "Tips for High-Performance LLMs", for GPUs.
"""

from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

from r1jax.errors import UserError


class Flags(NamedTuple):
  xla: tuple[str, ...] = ()  # XLA_FLAGS: GPUs and the CPU
  libtpu: tuple[str, ...] = ()  # LIBTPU_INIT_ARGS


# MaxText's CF_FOR_ALL_GATHER: matrix products go on while weights are gathered.
_GATHER = (
  "--xla_tpu_enable_async_collective_fusion=true",
  "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
  "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
  "--xla_tpu_overlap_compute_collective_tc=true",
  "--xla_enable_async_all_gather=true",
)
# MaxText's DATA_PARALLEL_OVERLAP: all-reduces between slices overlap with the step.
_SLICES = (
  "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
  "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)

_QUICK = ("--xla_backend_optimization_level=0",)
if [int(x) for x in metadata.version("jaxlib").split(".")[:2]] < [0, 11]:
  _QUICK += ("--xla_cpu_use_fusion_emitters=false",)  # later compilers do not know it

PRESETS = {
  "none": Flags(),
  # For tries on a CPU: compiles in half the time, runs at half the speed.
  "quick": Flags(xla=_QUICK),
  # MaxText's limits of VMEM for an operation: the rest prefetches the next one's.
  "tpu-dense": Flags(libtpu=(*_GATHER, "--xla_tpu_scoped_vmem_limit_kib=98304")),
  "tpu-moe": Flags(libtpu=(*_GATHER, "--xla_tpu_scoped_vmem_limit_kib=81920")),
  "tpu-moe-slices": Flags(
    libtpu=(*_GATHER, *_SLICES, "--xla_tpu_scoped_vmem_limit_kib=81920")
  ),
  "gpu": Flags(xla=("--xla_gpu_enable_latency_hiding_scheduler=true",)),
  # The same numbers on every run, more slowly.
  "gpu-deterministic": Flags(
    xla=(
      "--xla_gpu_deterministic_ops=true",
      "--xla_gpu_exclude_nondeterministic_ops=true",
    )
  ),
}


def variables(environ: Mapping[str, str], *, callbacks: bool = False) -> dict[str, str]:
  """What to set before a JAX backend starts; flags that are set already win.

  Several CPU devices of a process share a thread each. A device whose callback has
  come back waits in one collective while another is still in an earlier one: with no
  thread left for that, both wait for ever. NPROC gives them more, at some speed.

  Args:
    environ: R1JAX_XLA_FLAGS, XLA_FLAGS, LIBTPU_INIT_ARGS, JAX_NUM_CPU_DEVICES and NPROC
      of it are read.
    callbacks: whether programs will ask the host.

  Raises:
    UserError: no such preset.
  """
  name = environ.get("R1JAX_XLA_FLAGS", "none")
  if name not in PRESETS:
    raise UserError(
      f"R1JAX_XLA_FLAGS={name!r} is not one of {', '.join(PRESETS)}"
      " (r1jax/xla_flags.py). Flags of your own go into XLA_FLAGS, or LIBTPU_INIT_ARGS"
      " for a TPU."
    )
  found = {"XLA_FLAGS": PRESETS[name].xla, "LIBTPU_INIT_ARGS": PRESETS[name].libtpu}
  said = {
    key: " ".join([*flags, environ.get(key, "")]).strip()
    for key, flags in found.items()
    if flags
  }
  devices = environ.get("JAX_NUM_CPU_DEVICES", "1")
  if callbacks and devices.isdecimal() and int(devices) > 1 and "NPROC" not in environ:
    said["NPROC"] = str(4 * int(devices))
  return said
