"""The first lines inside: the limits, and the word that they hold."""

import os
import resource
import sys


def start():
  """Our options, after the limits are set and the status says so ("L")."""
  options = eval(sys.argv[1])  # a dict that sandbox.py wrote
  for name, value in options["limits"].items():
    hard = value + 1 if name == "CPU" else value
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
  os.write(options["status"], b"L")
  return options
