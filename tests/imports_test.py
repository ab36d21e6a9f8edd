"""Who may import whom: a file imports its own room and rooms of a lower rank."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RANKS = [
  names.split()
  for names in (
    "r1jax.errors r1jax.events r1jax.digest",
    "r1jax.xla_flags r1jax.lock r1jax.preemption r1jax.sinks",
    "r1jax.kernels r1jax.sharding r1jax.data.tokenizer r1jax.data.problem"
    " r1jax.data.chat_template",
    "r1jax.implementation r1jax.ops_checks r1jax.ahead_of_time r1jax.support"
    " r1jax.program_cost"
    " r1jax.levels r1jax.stopping r1jax.data.hf_tokenizer"
    " r1jax.rewards",
    "r1jax.ops r1jax.vocabulary",
    "r1jax.models r1jax.sampling",
    "r1jax.lora",
    "r1jax.peft",
    "r1jax.objective r1jax.train_state r1jax.optimizer r1jax.slots r1jax.packing",
    "r1jax.step_config r1jax.speculative",
    "r1jax.prompts r1jax.prefill r1jax.rollout r1jax.dynamic_sampling r1jax.experience"
    " r1jax.advantages",
    "r1jax.policy_loss r1jax.moe_losses r1jax.diagnostics",
    "r1jax.grpo r1jax.segments r1jax.ppo r1jax.sft r1jax.presets r1jax.host_reward"
    " r1jax.reward_model",
    "r1jax.distillation",
    "r1jax.data r1jax.settings r1jax.checkpoint r1jax.metrics r1jax.report"
    " r1jax.progress r1jax.token_report r1jax.goodput r1jax.profiling r1jax.doctor",
    "r1jax.trained r1jax.agreement r1jax.attempts r1jax.watchdog r1jax.html_report",
    "r1jax.stragglers r1jax.config_checks",
    "r1jax.evals r1jax.run r1jax.launch",
    "r1jax.evaluator r1jax.plan r1jax.evals.answers",
    "r1jax.plan_search r1jax.evals.evaluation",
    "r1jax.fine_tuning r1jax.reinforcement",
    "r1jax.loop",
    "r1jax.pipeline",
    "experiments",
  )
]
# The spine: within these ranks a file may also import the ones before it.
ORDERED = [
  *("r1jax.prompts", "r1jax.prefill"),
  *("r1jax.rollout", "r1jax.dynamic_sampling", "r1jax.advantages"),
  "r1jax.experience",
  *("r1jax.grpo", "r1jax.ppo", "r1jax.segments"),
]
PLACES = ("r1jax/**/*.py", "kernels/*.py", "experiments/**/*.py")
FILES = sorted(path for place in PLACES for path in ROOT.glob(place))


def room(module: str) -> str:
  """The longest entry of RANKS that holds the module."""
  names = [n for rank in RANKS for n in rank]
  held = [n for n in names if module == n or module.startswith(n + ".")]
  assert held, f"{module} has no rank: put it into tests/imports_test.py"
  return max(held, key=len)


def rank(name: str) -> int:
  return next(i for i, names in enumerate(RANKS) if name in names)


def imported(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        file = ROOT / whole.replace(".", "/")
        is_module = file.is_dir() or file.with_suffix(".py").exists()
        found.add(whole if is_module else node.module)
  return found


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  if parts[0] == "kernels":  # the folder is the package r1jax.kernels
    parts = ("r1jax", *parts)
  return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_lower_ranks(path):
  name = module_name(path)
  if name == "r1jax":
    return
  own = room(name)
  for other in imported(path):
    if other.partition(".")[0] not in ("r1jax", "experiments") or other == "r1jax":
      continue
    theirs = room(other)
    lower = rank(theirs) < rank(own) or theirs == own
    spine = own in ORDERED and theirs in ORDERED
    spine = spine and ORDERED.index(theirs) < ORDERED.index(own)
    assert lower or spine, f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_host_rules_import_no_jax_and_kernels_have_one_door(path):
  name, names = module_name(path), imported(path)
  if name.startswith("r1jax.rewards") and name != "r1jax.rewards.in_graph":
    assert not any(n.partition(".")[0] in ("jax", "flax") for n in names)
  doors = ("r1jax.ops", "r1jax.kernels", "experiments.benches.kernel")
  if not name.startswith(doors):
    assert not any(n.startswith("r1jax.kernels") for n in names)
