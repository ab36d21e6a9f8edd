"""How many samples are drawn at once is what memory has room for."""

from flax import linen as nn
import jax
import pytest

from r1jax.evals import room
from r1jax.models import config as sizes
from r1jax.models.policy import Policy, boxes

POLICY = Policy(sizes.tiny_dense(64, width=32, layers=2))
PARAMS, ROUTER = nn.unbox(boxes(POLICY))
WEIGHTS = 4 * sum(x.size for x in jax.tree.leaves((PARAMS, ROUTER)))


def bytes_a_row(window, max_tokens):
  return room.bytes_a_row(POLICY, PARAMS, ROUTER, window, max_tokens)


def test_a_row_takes_its_cache_and_a_little_more():
  """Keys and values of each layer, four bytes a number, for prompt and sample."""
  c = POLICY.config
  cache = 4 * 2 * c.kv_heads * c.head_dim * c.layers
  assert cache * 1024 <= bytes_a_row(512, 512) <= (cache + 64) * 1024 + 4096


def test_rows_are_half_of_what_the_weights_leave(monkeypatch):
  each = bytes_a_row(16, 64)
  for rows in (1, 2, 8, 64, 256):
    have = WEIGHTS + each * rows / room.SHARE
    monkeypatch.setattr(room, "memory", lambda have=have: have)
    assert room.rows(POLICY, 16, 64, bytes_each=4) == rows
    monkeypatch.setattr(room, "memory", lambda have=have: have - 1)
    assert room.rows(POLICY, 16, 64, bytes_each=4) == max(rows // 2, 1)


@pytest.mark.parametrize("have, rows", [(0, 1), (1e15, room.MOST)])
def test_there_is_one_row_at_least_and_no_more_than_are_of_use(monkeypatch, have, rows):
  monkeypatch.setattr(room, "memory", lambda: have)
  assert room.rows(POLICY, 16, 64, bytes_each=4) == rows


def test_the_hosts_memory_is_what_is_available_in_the_container(tmp_path):
  assert room.available(tmp_path) > 0
  (tmp_path / "proc").mkdir()
  meminfo = "MemTotal: 9 kB\nMemAvailable: 7 kB\n"
  (tmp_path / "proc/meminfo").write_text(meminfo)
  assert room.available(tmp_path) == 7 * 1024
  bound = tmp_path / "sys/fs/cgroup/memory.max"
  bound.parent.mkdir(parents=True)
  for text, want in (("max\n", 7 * 1024), ("4096\n", 4096)):
    bound.write_text(text)
    assert room.available(tmp_path) == want
