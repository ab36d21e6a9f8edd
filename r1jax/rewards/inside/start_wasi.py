"""The first lines inside WebAssembly, in place of start.py: the way to our pipes, and
the word that the limits hold.

There are no descriptors beside stdin, stdout and stderr. What the pieces read and write
goes through `_host.call`, the one function that our side lends (wasi_host.py), and they
meet it as the `os` of this file, which takes the place of their own import.
"""

import io
import sys

import _host

MOST = 1 << 15  # bytes a call


class Pipe(io.RawIOBase):
  """One of our pipes, by its name."""

  def __init__(self, name):
    self._name = name.encode()

  def readable(self):
    return True

  def writable(self):
    return True

  def readinto(self, room):
    data = _host.call(b"read %b %d" % (self._name, min(len(room), MOST)))
    room[: len(data)] = data
    return len(data)

  def write(self, data):
    data = bytes(data[:MOST])
    _host.call(b"write %b " % self._name + data)
    return len(data)


class os:
  """What the pieces use of the module, with names for descriptors."""

  @staticmethod
  def fdopen(name, mode):
    return (io.BufferedReader if mode == "rb" else io.BufferedWriter)(Pipe(name))

  @staticmethod
  def write(name, data):
    return Pipe(name).write(data)

  @staticmethod
  def close(name):
    _host.call(b"close %b " % name.encode())


def start():
  """Our options, after the status says that the limits are set ("L")."""
  options = eval(sys.argv[1])  # a dict that wasi.py wrote
  os.write(options["status"], b"L")
  return options
