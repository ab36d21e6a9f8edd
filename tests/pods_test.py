"""The launch files: they parse, and what they start is a run that could begin."""

import mmap
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from experiments.configs.r1_zero import get_config
from r1jax import config_checks, settings, xla_flags

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "pods"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
STARTED = "exec python -u -m experiments.r1_zero"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
  done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_restart_what_a_restart_mends(path):
  jobset = yaml.safe_load(path.read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert spec["completions"] == spec["parallelism"] and spec["backoffLimit"] == 0
  (rule,) = spec["podFailurePolicy"]["rules"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["onExitCodes"]["values"] == [1, 2, 3] and rule["action"] == "FailJob"
  shell, flag, command = container["command"]
  assert (shell, flag) == ("bash", "-c") and command.startswith(STARTED)
  names = {v["name"] for v in pod["volumes"]}
  assert {m["name"] for m in container["volumeMounts"]} == names


def test_the_gpu_manifest_says_who_a_pod_is():
  jobset = yaml.safe_load((FOLDER / "jobset_gpu.yaml").read_text())
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  variables = {v["name"]: v for v in container["env"]}
  assert variables["R1JAX_PROCESSES"]["value"] == str(spec["completions"])
  name = jobset["metadata"]["name"]
  host = f"{name}-{job['name']}-0-0.{name}:"
  assert variables["R1JAX_COORDINATOR"]["value"].startswith(host)
  source = variables["R1JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert "job-completion-index" in source


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda p: p.name)
def test_what_is_started_fits_its_devices(path):
  """Every flag names a key of the config, and the run passes its checks."""
  text = re.sub(r"\s*\\\n\s*", " ", path.read_text())
  assert STARTED in " ".join(text.split())
  devices = int(re.search(r"devices: (\d+)", text)[1])
  (preset,) = re.findall(r"--config=experiments/configs/r1_zero.py:(\w+)", text)
  config = get_config(preset)
  found = re.findall(r"--config\.([\w.]+)=([^\s'\"]+)", text)
  assert len(found) >= 4
  for key, value in found:
    *parents, leaf = key.split(".")
    section = settings.config_get(config, ".".join(parents)) if parents else config
    assert leaf in section, f"{path.name}: --config.{key}"
    section[leaf] = type(section[leaf])(value)
  config_checks.check(config, devices)
  for name in re.findall(r"R1JAX_XLA_FLAGS(?:=|\n\s+value: )\"?([\w-]+)", text):
    assert name in xla_flags.PRESETS, name


def test_the_readme_names_every_file_variable_and_preset():
  text = (FOLDER / "README.md").read_text()
  for path in FOLDER.iterdir():
    if path.name not in ("README.md", "__pycache__"):
      assert f"`{path.name}`" in text
  source = (FOLDER.parents[1] / "r1jax" / "launch.py").read_text()
  for name in set(re.findall(r"R1JAX_[A-Z_]*[A-Z]", source)):
    assert name in text, name
  for name in xla_flags.PRESETS:
    assert f"`{name}`" in text, name
  assert shlex.split(re.search(r'RUN="(.*)"', text)[1])[:3] == ["python", "-u", "-m"]


def test_xla_knows_the_flags_of_every_preset():
  flags = [flag for preset in xla_flags.PRESETS.values() for flag in preset.xla]
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  done = subprocess.run(
    command,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.tpu
def test_libtpu_knows_the_flags_of_every_preset():
  libtpu = pytest.importorskip("libtpu")
  flags = {flag for preset in xla_flags.PRESETS.values() for flag in preset.libtpu}
  with (
    open(libtpu.get_library_path(), "rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as known,
  ):
    for flag in flags:
      name = flag.removeprefix("--").partition("=")[0]
      assert known.find(name.encode()) >= 0, flag
