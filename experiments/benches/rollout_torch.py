"""The same rollout and the same iteration by transformers and torch, in a process of
their own: neither library's threads then wait on the other's cores.

Commands come pickled on stdin, their results go pickled to stdout. The first command is
the arguments of a Model or, if they are two, of a Published, and returns None; the
others are (name of a method, arguments).
"""

import pickle
import sys
import time

import numpy as np
import torch
import transformers


class Model:
  """A Qwen2 of transformers and its AdamW."""

  def __init__(self, threads: int, config: dict, weights: dict[str, np.ndarray]):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self.net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    weights = {name: torch.from_numpy(w) for name, w in weights.items()}
    self.net.load_state_dict(weights, strict=True)
    self.optimizer = torch.optim.AdamW(
      self.net.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
    )

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """[B, T] -> [B, T, V]."""
    with torch.no_grad():
      return self.net(torch.from_numpy(tokens).long()).logits.numpy()

  def _generate(self, prompts: np.ndarray, group: int, new: int) -> torch.Tensor:
    """[B, P] -> [B * group, P + new]."""
    tokens = torch.from_numpy(prompts).long()
    sequences = self.net.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      num_return_sequences=group,
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      min_new_tokens=new,
      max_new_tokens=new,
      use_cache=True,
    )
    if sequences.shape != (len(tokens) * group, tokens.shape[1] + new):
      raise RuntimeError(f"transformers made {tuple(sequences.shape)} tokens")
    return sequences

  def rollout(self, prompts: np.ndarray, group: int, new: int) -> float:
    """Seconds of group completions a prompt, new tokens each."""
    start = time.perf_counter()
    self._generate(prompts, group, new)
    return time.perf_counter() - start

  def iteration(
    self, prompts: np.ndarray, group: int, new: int, micro_batches: int
  ) -> tuple[float, float]:
    """Seconds of (the rollout, everything after it): a reward, advantages in groups,
    one AdamW update by the clipped loss. The old log-probabilities are the new ones
    without gradient, as this is the first update of the rollout."""
    start = time.perf_counter()
    sequences = self._generate(prompts, group, new)
    rolled = time.perf_counter()
    completions = sequences[:, -new:]
    rewards = (completions % 2 == 0).float().mean(dim=1).view(-1, group)
    gap = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = (gap / (rewards.std(dim=1, keepdim=True) + 1e-6)).view(-1, 1)
    parts = zip(*(x.chunk(micro_batches) for x in (sequences, advantages)), strict=True)
    for tokens, a in parts:
      out = self.net(tokens, use_cache=False, logits_to_keep=new + 1)
      logprobs = torch.log_softmax(out.logits[:, :-1], dim=-1)
      logprobs = logprobs.gather(2, tokens[:, -new:, None])[..., 0]
      ratio = torch.exp(logprobs - logprobs.detach())
      kept = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
      (-kept.mean(dim=1).sum() / len(sequences)).backward()
    torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad()
    return rolled - start, time.perf_counter() - rolled


class Published(Model):
  """A checkpoint of a folder."""

  def __init__(self, threads: int, folder: str):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self.net = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
    ).eval()

  def sample(
    self,
    prompts: np.ndarray,
    mask: np.ndarray,
    group: int,
    new: int,
    temperature: float,
    ends: list[int],
  ) -> tuple[float, int]:
    """(seconds, tokens) of group completions a prompt, each to one of `ends` or to
    `new` tokens. Args: prompts, mask: [B, P], padded on the left."""
    tokens = torch.from_numpy(prompts).long()
    start = time.perf_counter()
    said = self.net.generate(
      tokens,
      attention_mask=torch.from_numpy(mask).long(),
      num_return_sequences=group,
      do_sample=True,
      temperature=temperature,
      top_k=0,
      top_p=1.0,
      max_new_tokens=new,
      eos_token_id=ends,
      pad_token_id=ends[0],
      use_cache=True,
    )[:, tokens.shape[1] :]
    seconds = time.perf_counter() - start
    before = torch.isin(said, torch.tensor(ends)).cumsum(1)
    lengths = (before == 0).sum(1) + (before > 0).any(1).long()
    return seconds, int(lengths.sum())


def main() -> None:
  commands, results = sys.stdin.buffer, sys.stdout.buffer
  sys.stdout = sys.stderr  # whatever a library prints is no result
  transformers.logging.set_verbosity_error()
  model = None
  while True:
    try:
      command = pickle.load(commands)
    except EOFError:
      return
    result = None
    if model is None:
      model = (Published if len(command) == 2 else Model)(*command)
    else:
      name, *arguments = command
      result = getattr(model, name)(*arguments)
    pickle.dump(result, results)
    results.flush()


if __name__ == "__main__":
  main()
