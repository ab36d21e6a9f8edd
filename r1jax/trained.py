"""What a run or a stage has trained, read back; or a published checkpoint."""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from ml_collections import ConfigDict

from r1jax import digest, lora, settings, train_state
from r1jax.checkpoint import DIGESTS, Checkpoints
from r1jax.data import world as worlds
from r1jax.data.hf_tokenizer import HFTokenizer, open_tokenizer
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.metrics import MetricsFile
from r1jax.models import hf
from r1jax.models.policy import Policy, cast, init
from r1jax.optimizer import make_optimizer

STAGE = "weights.json"  # what a pipeline's stage leaves beside its weights
LAST = "rl_2"  # the stage whose policy is R1
TAUGHT = ("sft_1", "sft_3", "distill")  # stages that learn R1's own format from traces


class Trained(NamedTuple):
  """What a run has left that speaks, or a published checkpoint."""

  config: ConfigDict | None  # of the run
  tokenizer: Tokenizer | HFTokenizer
  policy: Policy
  params: Any  # None: not loaded
  router: Any


def opened(workdir: pathlib.Path, *, base: bool = False) -> Trained:
  """What `load` gives, without the weights. Args and errors: as there."""
  workdir = _place(workdir)
  said = _config_of(workdir)
  if base and (_is_published(said) or _is_stage(workdir)):
    raise UserError(
      f"--base: {workdir} is no run, and has no base in it. Leave --base out, or name"
      " the base's folder itself."
    )
  if _is_published(said):
    policy = Policy(hf.policy_config(workdir, **_computed()))
    tokenizer = open_tokenizer(workdir, policy.config.vocab)
    return Trained(None, tokenizer, policy, None, None)
  config = _config(said)
  tokenizer = open_tokenizer(tokenizer_of(workdir))
  policy = Policy(settings.policy_config(config, tokenizer.vocab))
  return Trained(config, tokenizer, policy, None, None)


def load(
  workdir: pathlib.Path,
  *,
  base: bool = False,
  merged: bool = True,
  speaks: bool = False,
) -> Trained:
  """The newest policy of a run of R1-Zero or PPO; or that of a pipeline's stage, or of
  a Hugging Face checkpoint.

  Args:
    workdir: its folder; a pipeline's stands for R1, its last policy.
    base: the base, before RL.
    merged: adapters that the run has learned are part of the weights.
    speaks: it only samples: on an accelerator a checkpoint's weights are bfloat16.

  Raises:
    UserError: nothing of these is there, or not yet, or it has no base; or as
      models.hf.load.
  """
  workdir = _place(workdir)
  kept = opened(workdir, base=base)
  config, policy = kept.config, kept.policy
  if config is None:
    half = speaks and jax.default_backend() != "cpu"
    dtype = "bfloat16" if half else "float32"
    _, params, router = hf.load(workdir, params_dtype=dtype, **_computed())
    return kept._replace(params=params, router=router)
  if _is_stage(workdir):
    params, router = _weights(workdir / "weights")
    return kept._replace(params=params, router=router)
  adapters = settings.lora_config(config)
  if not base:
    params, router = _newest(workdir, "rl")
  if base and config.model.folder:
    _, params, router = hf.load(config.model.folder, **settings.computed(config))
  elif base and config.get("init_from"):
    params, router = load(pathlib.Path(config.init_from))[-2:]
  elif base:
    params, router = _newest(workdir, "pretrain")
  elif adapters:
    frozen = load(workdir, base=True).params
    params = lora.joined(cast(policy, frozen), params, adapters.scale)
    params = jax.jit(lora.merged)(params) if merged else params
  return kept._replace(params=params, router=router)


def identity(workdir: pathlib.Path, *, base: bool = False) -> str:
  """What tells the weights that `load` gives from others, without reading them: a run's
  step and the digest that was saved with it; of a checkpoint a hash of its small files
  and of the names, sizes and times of the large ones. Args and errors: as `load`."""
  workdir = _place(workdir)
  said = _config_of(workdir)
  if _is_published(said):
    return _files(workdir)
  if _is_stage(workdir):
    return f"{workdir.name} {_json(workdir / STAGE)['sha256'][:16]}"
  config = _config(said)
  if base and config.model.folder:
    return _files(pathlib.Path(config.model.folder))
  if base and config.get("init_from"):
    return identity(pathlib.Path(config.init_from))
  if base:
    return _step(workdir, "pretrain")
  found = _step(workdir, "rl")
  if settings.lora_config(config):
    found += f" on {identity(workdir, base=True)}"
  return found


def longest(workdir: pathlib.Path, policy: Policy) -> int | None:
  """Tokens of a text that a Hugging Face checkpoint is made for; None: it says none."""
  said, yarn = _config_of(workdir), policy.config.yarn
  stretched = int(yarn.factor * yarn.original_length) if yarn else 0
  return max(said.get("max_position_embeddings") or 0, stretched) or None


def stop(config: ConfigDict) -> tuple[str, ...]:
  """The strings that end a run's outputs, also where it stops at a token."""
  answered = ("</answer>",) if config.data.stop_on_answer else ()
  return (*config.data.stop, *answered)


def initial(
  config: ConfigDict, policy: Policy, mesh: jax.sharding.Mesh
) -> tuple[Any, Any]:
  """(params, router) of the last policy of the run that `config.init_from` names, on
  the mesh.

  Raises:
    UserError: it is of other sizes; or as `load`.
  """
  other = pathlib.Path(config.init_from)
  kept = load(other)
  optimizer = make_optimizer(settings.optimizer_config(config))
  layout = train_state.shardings(policy, optimizer, mesh, reference=False)
  shapes = nn.unbox(jax.eval_shape(lambda: init(policy, jax.random.key(0))))
  here, there = (
    {digest.name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (
      dict(zip(("params", "router"), pair, strict=True)) for pair in (shapes, kept[-2:])
    )
  )
  if here != there:
    wrong = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
    raise UserError(
      f"config.init_from={str(other)!r} has another policy: {len(wrong)} arrays differ,"
      f" as {wrong[0]} ({there.get(wrong[0])}, here {here.get(wrong[0])}). Give this"
      " run that run's config.model."
    )
  return jax.device_put((kept.params, kept.router), (layout.params, layout.router))


def window_of(model: Trained) -> int:
  """Output tokens of a run's longest window, which may be fitted to its pages."""
  c = model.config
  texts = []
  if not c.model.folder:
    pages = worlds.pages(c, worlds.of_config(c), count=5000)
    texts = [page for _, page in pages]
  longest = max(map(len, model.tokenizer.encode_batch(texts)), default=0)
  return max(tokens for _, tokens in settings.windows(c, 1 + longest))


def tokenizer_of(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run or a stage has its tokenizer. Raises UserError: there is none."""
  workdir = _place(workdir)
  if _is_stage(workdir):
    return workdir.parent / "world" / "tokenizer.model"
  return tokenizer_place(workdir, _config(_config_of(workdir)))


def tokenizer_place(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
  """Where a run keeps its tokenizer: a file, or the files of a given one."""
  return workdir / ("tokenizer" if config.model.get("folder") else "tokenizer.model")


def _place(workdir: pathlib.Path) -> pathlib.Path:
  """The folder itself; of a pipeline that of its last policy."""
  return workdir / LAST if (workdir / LAST / STAGE).exists() else workdir


def _is_stage(workdir: pathlib.Path) -> bool:
  return (workdir / STAGE).exists()


def _config_of(workdir: pathlib.Path) -> dict:
  """Of a run, a stage or a Hugging Face folder. Raises UserError: it is none."""
  if _is_stage(workdir):
    return _config_of_stage(workdir)
  path = workdir / "config.json"
  if not path.exists():
    done = sorted(found.parent.name for found in workdir.glob(f"*/{STAGE}"))
    raise UserError(
      f"{workdir} is not the folder of a run (it has no config.json)"
      + (f"; stages of a pipeline that are done in it: {', '.join(done)}" * bool(done))
      + ". Train one: python -m experiments.r1_zero; then name its folder."
    )
  return _json(path)


def _config_of_stage(workdir: pathlib.Path) -> dict:
  """Of a run that would have left this policy: the stage's part of the pipeline's
  config, and for the rest of RL that of R1-Zero, which comes before them all."""
  zero = workdir.parent / "zero" / "begun.json"
  if not zero.exists():
    raise UserError(
      f"{workdir} has no stage 'zero' beside it, whose config says how it is judged."
      f" Run it: python -m experiments.r1 --workdir={workdir.parent} --stage=zero."
    )
  own = _json(workdir / "begun.json")["config"]
  said = _json(zero)["config"] | own
  said["model"] = own.get("student.model", said["model"])
  if workdir.name in TAUGHT:
    said["reward"] = said["reward"] | {"format_style": "chat"}
  for section in own.values():  # what the stage changes of the config above it
    if isinstance(section, dict):
      changes = section.get("changes", section)
      said["reward"] = said["reward"] | changes.get("reward", {})
  return said


def _json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text())


def _is_published(said: dict) -> bool:
  """Whether a config.json is Hugging Face's."""
  return "model_type" in said


def _config(said: dict) -> ConfigDict:
  return ConfigDict(said, allow_dotted_keys=True)  # of files that it names


def _computed() -> dict:
  """How a checkpoint's policy is computed here."""
  cpu = jax.default_backend() == "cpu"  # where bfloat16 takes longer
  return {"dtype": "float32"} if cpu else {}


def _newest(workdir: pathlib.Path, phase: str) -> tuple[Any, Any]:
  """(params, router) of a phase's last checkpoint; its adapters where it learns those.

  Raises:
    UserError: there is none yet.
  """
  folder = workdir / "checkpoints" / phase
  found = _weights(folder) if folder.exists() else None
  if found is None:
    raise _too_early(folder)
  return found


def _weights(folder: pathlib.Path) -> tuple[Any, Any] | None:
  checkpoints = Checkpoints(folder, writes=False)
  found = checkpoints.weights()
  checkpoints.close()
  return found


def _step(workdir: pathlib.Path, phase: str) -> str:
  """The last step that a phase has saved, and its digest where one was noted.

  Raises:
    UserError: there is none yet.
  """
  folder = workdir / "checkpoints" / phase
  steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
  if not steps:
    raise _too_early(folder)
  noted = MetricsFile.rows_of(folder.parent / f"{phase}{DIGESTS}")
  digests = {row["step"]: f" {row['digest']}" for row in noted}
  return f"{phase} {max(steps)}{digests.get(max(steps), '')}"


def _too_early(folder: pathlib.Path) -> UserError:
  other = "give --base for the policy before RL"
  if folder.name == "pretrain":
    other = "leave --base out"
  return UserError(
    f"{folder} holds no checkpoint yet: the run has not come that far. Wait for it, or"
    f" {other}."
  )


def _files(folder: pathlib.Path) -> str:
  """Of a checkpoint's files, 16 hexadecimal digits."""
  found = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    if path.suffix == ".json":
      found.update(path.name.encode() + path.read_bytes())
    elif path.suffix == ".safetensors":
      stat = path.stat()
      found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
  return found.hexdigest()[:16]
