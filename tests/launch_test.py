"""Who a process is, by its environment; and how a start that fails ends."""

import os
import socket
import subprocess
import sys
import time

import pytest

from r1jax import launch, xla_flags
from r1jax.errors import UserError
from r1jax.launch import Place

OURS = {
  "R1JAX_COORDINATOR": "10.0.0.1:9876",
  "R1JAX_PROCESSES": "4",
  "R1JAX_PROCESS_ID": "3",
}
SLURM = {
  "SLURM_JOB_ID": "17",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "3",
}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


@pytest.mark.parametrize(
  "environ, chips, place",
  [
    ({}, False, Place("alone")),
    (OURS, False, Place("variables", "10.0.0.1:9876", 4, 3)),
    ({**GKE, **SLURM, **OURS}, True, Place("variables", "10.0.0.1:9876", 4, 3)),
    ({**SLURM, **GKE}, True, Place("slurm")),
    ({**SLURM, "SLURM_NTASKS": "1"}, False, Place("alone")),
    # The script of a job, outside srun.
    ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16"}, False, Place("alone")),
    (GKE, True, Place("tpu")),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, Place("alone")),
    (
      {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
      True,
      Place("tpu"),
    ),
    ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, True, Place("tpu")),
    ({}, True, Place("tpu")),  # a TPU VM: the metadata server knows
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, Place("alone")),
  ],
)
def test_the_environment_says_who_a_process_is(environ, chips, place):
  assert launch.detect(environ, chips=chips) == place


@pytest.mark.parametrize(
  "change, words",
  [
    ({"R1JAX_PROCESS_ID": None}, ["R1JAX_PROCESS_ID=''", "all three"]),
    ({"R1JAX_PROCESSES": "four"}, ["R1JAX_PROCESSES='four'", "all three"]),
    ({"R1JAX_COORDINATOR": "10.0.0.1"}, ["10.0.0.1", "host:port"]),
    ({"R1JAX_PROCESS_ID": "4"}, ["R1JAX_PROCESS_ID='4'", "0 to 3"]),
    ({"R1JAX_PROCESSES": "0", "R1JAX_PROCESS_ID": "0"}, ["R1JAX_PROCESSES='0'"]),
  ],
)
def test_variables_that_make_no_sense_are_refused(change, words):
  environ = {k: v for k, v in {**OURS, **change}.items() if v is not None}
  with pytest.raises(UserError) as caught:
    launch.detect(environ, chips=False)
  for word in words:
    assert word in str(caught.value)


def test_chips_that_jax_may_not_use_do_not_count():
  assert not launch.has_chips({"JAX_PLATFORMS": "cpu"})


def test_flags_of_a_preset_stand_before_those_that_are_set():
  environ = {"R1JAX_XLA_FLAGS": "gpu", "XLA_FLAGS": "--mine=1"}
  assert xla_flags.variables(environ) == {
    "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true --mine=1"
  }
  assert xla_flags.variables({}) == {}
  two = {"JAX_NUM_CPU_DEVICES": "2"}
  assert xla_flags.variables(two) == {}
  assert xla_flags.variables(two, callbacks=True) == {"NPROC": "8"}
  assert xla_flags.variables({**two, "NPROC": "3"}, callbacks=True) == {}
  with pytest.raises(UserError, match="'fast' is not one of none, quick, tpu-dense"):
    xla_flags.variables({"R1JAX_XLA_FLAGS": "fast"})


@pytest.mark.parametrize(
  "place, least, most", [("alone", 10**7, 2**31), ("mine", 1, 200)]
)
def test_a_process_alone_may_sleep(monkeypatch, place, least, most):
  """Nobody waits for its heartbeat; of several, the others do."""
  asked = {}
  monkeypatch.setattr(launch.jax.distributed, "initialize", asked.update)
  monkeypatch.setattr(launch.jax.config, "update", lambda *_: None)
  monkeypatch.setenv("no_grpc_proxy", "")
  ours = Place("variables", "10.0.0.1:9876", 4, 3)
  launch._initialize(Place("alone") if place == "alone" else ours, 5)
  assert least <= asked["heartbeat_timeout_seconds"] < most


# -- the command ---------------------------------------------------------------


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def begin(
  workdir, *more: str, module: str = "r1_zero", **variables
) -> subprocess.Popen:
  command = [sys.executable, "-m", f"experiments.{module}", f"--workdir={workdir}"]
  return subprocess.Popen(
    [*command, *more],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", **variables},
  )


def member(i: int, port: int, processes: int = 2) -> dict[str, str]:
  return {
    "R1JAX_COORDINATOR": f"127.0.0.1:{port}",
    "R1JAX_PROCESSES": str(processes),
    "R1JAX_PROCESS_ID": str(i),
  }


def test_a_coordinator_that_does_not_answer_asks_for_another_start(tmp_path):
  port = free_port()
  process = begin(tmp_path / "run", R1JAX_TIMEOUT="3", **member(1, port))
  _, said = process.communicate(timeout=120)
  assert process.returncode == 42, said
  assert said.startswith("error: process 1 of 2 (variables) could not start")
  assert f"127.0.0.1:{port}" in said and "within 3 s" in said
  assert "R1JAX_TIMEOUT" in said and len(said.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()


def test_processes_of_other_configs_and_folders_are_named_by_all(tmp_path):
  port = free_port()
  pair = [
    begin(tmp_path / f"run{i}", f"--config.seed={i}", **member(i, port))
    for i in range(2)
  ]
  for process in pair:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
    assert "1 of 2 processes differ" in line and "process 1 (" in line
    assert "config.seed: 0 -> 1" in line and "workdir: " in line and "run1" in line
  assert not list(tmp_path.iterdir())


SHARE = """
import pathlib, sys
from r1jax import agreement, launch
from r1jax.errors import UserError
launch.start({})
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
try:
  agreement.share_folder(folder, seconds=1)
  print("shared")
except UserError as error:
  print(error)
"""


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")])
def test_a_folder_of_each_hosts_own_is_seen(tmp_path, names):
  port = free_port()
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", SHARE, str(tmp_path / name)],
      text=True,
      stdout=subprocess.PIPE,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", **member(i, port)},
    )
    for i, name in enumerate(names)
  ]
  for process in pair:
    said, _ = process.communicate(timeout=120)
    assert ("shared" in said) == (names == ("a", "a"))
    assert "shared" in said or "process 1" in said


@pytest.mark.parametrize(
  "module, arguments, words",
  [
    ("r1", [], "experiments.r1 runs in one process"),
    ("r1_zero", ["--config.seeds=3"], "config.seeds=3 runs in one process"),
  ],
)
def test_what_one_process_does_is_refused_to_several(
  module, arguments, words, tmp_path
):
  process = begin(tmp_path / "run", *arguments, module=module, **member(0, 1))
  _, said = process.communicate(timeout=120)
  assert process.returncode == 2 and words in said
  assert not (tmp_path / "run").exists()


def test_a_proxy_does_not_stand_between_a_process_and_itself(tmp_path):
  proxy = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
  process = begin(tmp_path / "run", "--config.steps=121", R1JAX_TIMEOUT="20", **proxy)
  _, said = process.communicate(timeout=120)
  assert process.returncode == 2 and "steps=121" in said  # it had started
  assert len(said.strip().splitlines()) == 1


def test_one_that_ends_does_not_leave_the_others_waiting(tmp_path):
  """A file that only one of them cannot read: JAX's barrier at exit would hold both."""
  rules = tmp_path / "rules.py"
  rules.write_text(
    "import os\n"
    'if os.environ["R1JAX_PROCESS_ID"] == "1":\n'
    '  raise OSError("a broken disk")\n'
    "def short(completion, problem):\n"
    "  return 1.0\n"
  )
  port = free_port()
  arguments = ["--config.reward.host=True", f"--config.reward.rules={rules}:short=0.1"]
  first, second = (
    begin(tmp_path / "run", *arguments, **member(i, port)) for i in range(2)
  )
  _, said = second.communicate(timeout=120)
  assert second.returncode == 2 and "a broken disk" in said
  begun = time.monotonic()
  _, said = first.communicate(timeout=120)
  assert first.returncode in (42, -6), said  # -6: JAX's own end, as its peer is gone
  assert time.monotonic() - begun < 60
