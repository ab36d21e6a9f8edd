"""Compiling for devices that this machine does not have.

A TPU's compiler is the libtpu wheel (`pip install "jax[tpu]"`, Linux x86-64), a GPU's
is in JAX's CUDA plugin (`pip install "jax[cuda13]"`); neither needs the device.
"""

from collections.abc import Callable
import os
from typing import Any

import jax
from jax.experimental import topologies

from r1jax import sharding
from r1jax.errors import UserError

# What XLA asks of a GPU (tensorflow's and JAX's GpuTargetConfigProto). The two differ
# in their memory: (its bytes a second, its bytes, the name).
GPUS = {
  "h100": (3_352_320_000_000, 84_978_434_048, "NVIDIA H100 80GB HBM3"),
  "h200": (4_800_000_000_000, 150_109_880_320, "NVIDIA H200"),
}
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: %d l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: %d cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "%s"
"""


def platform(topology: str) -> str:
  """Its platform as JAX names it: cpu, cuda or tpu."""
  kind = topology.partition(":")[0]
  return "cuda" if kind in GPUS else "cpu" if kind == "cpu" else "tpu"


def devices(topology: str) -> list[jax.Device]:
  """Devices of a TPU topology such as "v5p:2x2x1" (the least), of GPUs ("h100", one;
  "h200:16", two hosts of eight), or "cpu:8": the first of this machine's.

  Raises:
    UserError: the compiler for it is not installed, or there is no such topology.
  """
  kind, _, count = topology.partition(":")
  if kind == "cpu":
    here = jax.devices("cpu")
    if not count.isdigit() or not 0 < int(count) <= len(here):
      raise UserError(
        f"topology={topology!r} must be cpu:N with N from 1 to the {len(here)} CPU"
        " devices of this process (JAX_NUM_CPU_DEVICES=N in front)."
      )
    return here[: int(count)]
  try:
    if kind in GPUS:
      number = int(count or 1)
      hosts, left = divmod(number, 8)
      if number > 8 and left:
        raise ValueError("GPUs come by hosts of 8.")
      found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        target_config=HOPPER % GPUS[kind],
        topology=f"1x{max(hosts, 1)}x{min(number, 8)}",
      )
    else:
      # No metadata server is asked, and several processes may compile.
      os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
      os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
      os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
      found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # the plugins raise whatever they like
    raise UserError(
      f"topology={topology!r} cannot be compiled for here: {str(error)[:300]} A TPU's"
      ' needs pip install "jax[tpu]", and is named as in v5p:2x2x1; a GPU\'s needs'
      ' "jax[cuda13]", and is named as in h100 or h200:8.'
    ) from error
  return list(found.devices)


def compile_for(
  topology: str, function: Callable, *specs: Any, **options: Any
) -> jax.stages.Compiled:
  """The program for one device of a topology.

  Args:
    topology: see `devices`.
    function: of arrays.
    specs: trees of jax.ShapeDtypeStruct, its arguments.
    options: of jax.jit.
  """
  mesh = sharding.make_mesh(devices(topology)[:1])
  here = sharding.replicated(mesh)
  specs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), specs
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(function, **options).trace(*specs)
    return traced.lower(lowering_platforms=(platform(topology),)).compile()
