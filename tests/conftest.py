"""CPU with eight devices, no silent rank promotion, and two processes of tests.

JAX_PLATFORMS=cuda runs the tests of kernels on a GPU, where they are not interpreted.
"""

import gc
import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import FLAGS

from r1jax.models import policy

# Before a first compilation; processes that tests start have it too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] != "cpu":  # matrix units round float32
  jax.config.update("jax_default_matmul_precision", "highest")


# Groups of minutes begin first: the last to begin should not keep one process alone.
LONG = (
  *("two_processes", "loop", "chaos", "bench_rollout", "sharding", "whole_groups"),
  *("ahead_of_time", "speculative", "given_base"),
)
# A slot of the sandbox has a user of its own, whom two test processes must not share.
SANDBOXED = ("code", "hostile", "host_reward", "sandbox", "score", "scorer", "wasi")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """A file's tests run in one process: they share what they compile."""
  names = {item: item.path.name.removesuffix("_test.py") for item in items}
  items.sort(key=lambda x: (*LONG, names[x]).index(names[x]))
  for item, name in names.items():
    group = "sandbox" if name in SANDBOXED else str(item.path)
    item.add_marker(pytest.mark.xdist_group(group))


# A shell's job in the background ignores Ctrl-C, and so would all that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# Every compiled program takes memory maps, of which Linux gives a process 65,530; the
# compiler crashes without. A file's programs are mostly its own.
MAPS, MOST = pathlib.Path("/proc/self/maps"), 30_000


@pytest.fixture(autouse=True, scope="module")
def maps():
  yield
  gc.freeze()  # compiled programs: looking through them takes seconds each time
  if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST:
    jax.clear_caches()


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def random_weights():
  """(network) -> (params, router) drawn in NumPy: nothing is one or zero, and nothing
  compiles. Router biases are positive."""

  def draw(network, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
      name = path[-1].key
      if name == "scale":
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
      if name == "bias":
        return jnp.asarray(rng.uniform(0.0, 0.3, x.shape), jnp.float32)
      std = 0.5 if name == "embedding" else 0.2
      return jnp.asarray(std * rng.normal(size=x.shape), jnp.float32)

    boxed = jax.eval_shape(lambda: policy.init(network, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))

  return draw
