"""One process among several: who it is, and how it meets the others.

`start` calls jax.distributed.initialize in every run, so that one process and a
thousand run the same code. Who this process is, `detect` decides, in this order:

  variables  R1JAX_COORDINATOR=host:port, R1JAX_PROCESSES=n, R1JAX_PROCESS_ID=0..n-1
  slurm      one of several tasks of srun
  tpu        a host with TPUs: JAX asks GKE's variables or the metadata server
  alone      all else: one process, on a free port of this machine

R1JAX_TIMEOUT: seconds to wait for the others, 600 by default.
"""

from collections import Counter
from collections.abc import Mapping
import dataclasses
import glob
import importlib.util
import os
import socket
import threading

import jax

from r1jax import xla_flags
from r1jax.agreement import agree, code_digest, several
from r1jax.errors import TransientError, UserError

NAMES = ("R1JAX_COORDINATOR", "R1JAX_PROCESSES", "R1JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Place:
  """Who a process is."""

  how: str  # variables, slurm, tpu or alone
  # None: JAX finds out.
  coordinator: str | None = None  # host:port
  processes: int | None = None
  process: int | None = None


def detect(environ: Mapping[str, str], *, chips: bool) -> Place:
  """What the environment says.

  Args:
    environ: the environment variables.
    chips: the host has TPUs, and JAX may use them.

  Raises:
    UserError: R1JAX_ variables that do not make sense.
  """
  if any(name in environ for name in NAMES):
    return _variables(environ)
  # Slurm's own variables are in the job's script, too; those of a step only under srun.
  if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
    return Place("slurm")
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if hosts:  # GKE
    several = "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return Place("tpu" if several else "alone")
  return Place("tpu" if chips and "TPU_SKIP_MDS_QUERY" not in environ else "alone")


def _variables(environ: Mapping[str, str]) -> Place:
  said = ", ".join(f"{name}={environ.get(name, '')!r}" for name in NAMES)
  address, *numbers = (environ.get(name, "") for name in NAMES)
  host, _, port = address.rpartition(":")
  if not (host and all(n.isdecimal() for n in (port, *numbers))):
    raise UserError(
      f"{said}: set all three (host:port of process 0, how many, which one) or none."
    )
  processes, process = map(int, numbers)
  if not process < processes:
    raise UserError(
      f"{said}: the ids of {processes} processes are 0 to {processes - 1}."
    )
  return Place("variables", address, processes, process)


def has_chips(environ: Mapping[str, str]) -> bool:
  """Whether this host has TPUs that JAX may use."""
  allowed = environ.get("JAX_PLATFORMS") or "tpu"
  found = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return (
    "tpu" in allowed and bool(found) and importlib.util.find_spec("libtpu") is not None
  )


def start(facts: Mapping, *, callbacks: bool = False) -> Place:
  """Meets the other processes, before anything has asked JAX for a device.

  Args:
    facts: JSON-like; what all processes must have in common, such as the config.
    callbacks: whether programs will ask the host, as for rewards.

  Raises:
    UserError: variables that do not make sense; processes that differ.
    TransientError: the others cannot be reached in time.
  """
  os.environ.update(xla_flags.variables(os.environ, callbacks=callbacks))
  place = detect(os.environ, chips=has_chips(os.environ))
  text = os.environ.get("R1JAX_TIMEOUT", "600")
  if not text.isdecimal() or not int(text):
    raise UserError(f"R1JAX_TIMEOUT={text!r} must be whole seconds, such as 600.")
  _initialize(place, int(text))
  counts = Counter(d.process_index for d in jax.devices())
  if len(set(counts.values())) > 1:
    raise UserError(
      "the processes see different numbers of devices: "
      + ", ".join(f"process {i} has {n}" for i, n in sorted(counts.items()))
      + ". Give every process the same number."
    )
  if several():
    agree({**facts, "code": code_digest(), "jax": jax.__version__})
    print(
      f"process {jax.process_index()} of {jax.process_count()} on"
      f" {socket.gethostname()}: {jax.local_device_count()} of"
      f" {jax.device_count()} devices ({place.how})",
      flush=True,
    )
  return place


YEAR = 365 * 24 * 3600  # seconds


def _initialize(place: Place, seconds: int) -> None:
  how: dict = dict(shutdown_timeout_seconds=60, heartbeat_timeout_seconds=100)
  address = place.coordinator
  if place.how == "alone":
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    place = dataclasses.replace(place, processes=1, process=0)
    how.update(coordinator_bind_address=address)
    # It has no peers to lose, and a laptop sleeps, or its user stops it for a while.
    how.update(heartbeat_timeout_seconds=YEAR)
  # Between CPU devices of one process gloo is slower than none, and rounds otherwise.
  gloo = None if place.processes == 1 else "gloo"
  jax.config.update("jax_cpu_collectives_implementation", gloo)
  if address:  # the coordinator is never behind a proxy
    key = "no_grpc_proxy"  # in small letters only
    kept = os.environ.get(key) or os.environ.get("no_proxy")
    names = [address.rpartition(":")[0], *filter(None, [kept])]
    os.environ[key] = ",".join(names)
    jax.config.update("jax_check_proxy_envs", False)
    how.update(coordinator_address=address, num_processes=place.processes)
    how.update(process_id=place.process, cluster_detection_method="deactivate")
  # It catches SIGTERM, for loops that ask preemption.py; alone, Python does.
  jax.config.update("jax_enable_preemption_service", place.processes != 1)
  failed: list[BaseException] = []

  def connect() -> None:
    try:
      # Past its own limit JAX aborts the process; ours comes first, with a sentence.
      jax.distributed.initialize(initialization_timeout=seconds + 60, **how)
    except BaseException as error:
      failed.append(error)

  # A thread, since a call that waits inside JAX cannot be broken off.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(seconds)
  if not failed and not thread.is_alive():
    return
  where = address or "the coordinator that JAX found"
  why = f"no answer within {seconds} s" if thread.is_alive() else failed[0]
  raise TransientError(
    f"process {'?' if place.process is None else place.process} of"
    f" {place.processes or '?'} ({place.how}) could not start at {where}:"
    f" {' '.join(str(why).split())}. Are all of them running, and is the port free on"
    " the first host and open to the others? R1JAX_TIMEOUT=seconds waits longer;"
    " R1JAX_COORDINATOR=127.0.0.1:9876 R1JAX_PROCESSES=1 R1JAX_PROCESS_ID=0 starts one"
    " process by itself, whatever was found."
  ) from (failed[0] if failed else None)
