"""How an entry point ends when the machine has no room."""

import errno

from ml_collections import ConfigDict
import pytest

from experiments import command


class JaxRuntimeError(RuntimeError):
  """By the name of JAX's own."""


MEMORY = JaxRuntimeError(
  "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."
)


@pytest.mark.parametrize(
  "error, code, words",
  [
    (OSError(errno.ENOSPC, "No space left", "m.jsonl"), 42, ["m.jsonl", "Make room"]),
    (MEMORY, 2, ["123456789", "micro_batches", "experiments.plan"]),
  ],
)
def test_no_room_is_one_line_and_a_code(error, code, words, monkeypatch, capsys):
  def main(config, workdir):
    raise error

  monkeypatch.setattr(command, "parse", lambda *_: (ConfigDict(), ""))
  with pytest.raises(SystemExit) as end:
    command.run(main, "a config")
  said = capsys.readouterr().err
  assert end.value.code == code and len(said.splitlines()) == 1
  assert all(word in said for word in words)


def test_other_errors_keep_their_traceback(monkeypatch):
  def main(config, workdir):
    raise OSError(errno.EIO, "broken")

  monkeypatch.setattr(command, "parse", lambda *_: (ConfigDict(), ""))
  with pytest.raises(OSError):
    command.run(main, "a config")


def test_an_address_is_no_workdir():
  with pytest.raises(command.UserError, match=r"gs://bucket/run.*Mount"):
    command.folder_of("r1_zero", None, ConfigDict(), "gs://bucket/run")
