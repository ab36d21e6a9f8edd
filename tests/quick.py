"""What makes XLA's CPU compiler quick, for tests, whose time is mostly its own. For
another platform (JAX_PLATFORMS) programs are compiled as ever."""

import os

import jax

QUICK = {}
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
  QUICK["xla_backend_optimization_level"] = 0
  if jax.__version_info__ < (0, 11):  # later versions do not know it
    QUICK["xla_cpu_use_fusion_emitters"] = False
# The same for all that a process compiles.
FLAGS = " ".join(f"--{key}={str(value).lower()}" for key, value in QUICK.items())
