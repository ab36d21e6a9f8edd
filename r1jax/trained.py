"""What a run has trained, read back from its folder; or a published checkpoint."""

import json
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from ml_collections import ConfigDict

from r1jax import digest, lora, settings, train_state
from r1jax.checkpoint import Checkpoints
from r1jax.data import world as worlds
from r1jax.data.hf_tokenizer import HFTokenizer, open_tokenizer
from r1jax.data.tokenizer import Tokenizer
from r1jax.errors import UserError
from r1jax.models import hf
from r1jax.models.policy import Policy, cast, init
from r1jax.optimizer import make_optimizer


class Trained(NamedTuple):
  """What a run has left that speaks, or a published checkpoint."""

  config: ConfigDict | None  # of the run
  tokenizer: Tokenizer | HFTokenizer
  policy: Policy
  params: Any
  router: Any


def load(workdir: pathlib.Path, *, base: bool = False, merged: bool = True) -> Trained:
  """The newest policy of a run of R1-Zero or PPO; or a Hugging Face checkpoint's.

  Args:
    workdir: its folder.
    base: the base, before RL.
    merged: adapters that the run has learned are part of the weights.

  Raises:
    UserError: no run there, or it has no checkpoint yet; or as models.hf.load.
  """
  said = _config_of(workdir)
  if "model_type" in said:  # Hugging Face's
    cpu = jax.default_backend() == "cpu"  # where bfloat16 takes longer
    policy, params, router = hf.load(workdir, **({"dtype": "float32"} if cpu else {}))
    tokenizer = open_tokenizer(workdir, policy.config.vocab)
    return Trained(None, tokenizer, policy, params, router)
  config = ConfigDict(said, allow_dotted_keys=True)  # of files that it names
  tokenizer = open_tokenizer(tokenizer_place(workdir, config))
  policy = Policy(settings.policy_config(config, tokenizer.vocab))
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
  return Trained(config, tokenizer, policy, params, router)


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
  """Where a run has its tokenizer. Raises UserError: there is no run."""
  return tokenizer_place(
    workdir, ConfigDict(_config_of(workdir), allow_dotted_keys=True)
  )


def tokenizer_place(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
  """Where a run keeps its tokenizer: a file, or the files of a given one."""
  return workdir / ("tokenizer" if config.model.get("folder") else "tokenizer.model")


def _config_of(workdir: pathlib.Path) -> dict:
  """Of a run, or of a Hugging Face folder. Raises UserError: it is neither."""
  path = workdir / "config.json"
  if not path.exists():
    raise UserError(
      f"{workdir} is not the folder of a run (it has no config.json). Train one: python"
      " -m experiments.r1_zero; then name its folder."
    )
  return json.loads(path.read_text())


def _newest(workdir: pathlib.Path, phase: str) -> tuple[Any, Any]:
  """(params, router) of a phase's last checkpoint; its adapters where it learns those.

  Raises:
    UserError: there is none yet.
  """
  folder = workdir / "checkpoints" / phase
  found = None
  if folder.exists():
    checkpoints = Checkpoints(folder, writes=False)
    found = checkpoints.weights()
    checkpoints.close()
  if found is None:
    other = "give --base for the policy before RL"
    if phase == "pretrain":
      other = "leave --base out"
    raise UserError(
      f"{folder} holds no checkpoint yet: the run has not come that far. Wait for it,"
      f" or {other}."
    )
  return found
