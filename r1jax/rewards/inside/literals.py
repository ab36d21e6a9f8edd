"""Plain values as one line of JSON, exactly, and back.

Only builtin types travel: an instance of a subclass goes as its base, and anything else
is refused, so that no method of the sender ever runs at the receiver.
"""

import json

MAX_DIGITS = 4000


def dump(value):
  """One line of ASCII. Raises TypeError for what is not plain, RecursionError."""
  return json.dumps(_pack(value))


def load(line):
  """The value that `dump` was given."""
  return _unpack(json.loads(line))


def _pack(x):
  if x is None or x is True or x is False:
    return x
  if isinstance(x, int):
    x = int.__int__(x)
    return x if x.bit_length() < 3 * MAX_DIGITS else {"int": hex(x)}
  if isinstance(x, float):
    return float.__float__(x)
  if isinstance(x, str):
    return str.__str__(x)
  if isinstance(x, complex):
    return {"complex": [x.real, x.imag]}
  if isinstance(x, (bytes, bytearray)):
    return {"bytes": bytes(x).hex()}
  if isinstance(x, list):
    return [_pack(y) for y in list.__iter__(x)]
  if isinstance(x, tuple):
    return {"tuple": [_pack(y) for y in tuple.__iter__(x)]}
  if isinstance(x, set):
    return {"set": [_pack(y) for y in set.__iter__(x)]}
  if isinstance(x, frozenset):
    return {"frozenset": [_pack(y) for y in frozenset.__iter__(x)]}
  if isinstance(x, dict):
    return {"dict": [[_pack(k), _pack(v)] for k, v in dict.items(x)]}
  raise TypeError(f"a {type(x).__name__} is not a plain value")


def _unpack(x):
  if isinstance(x, list):
    return [_unpack(y) for y in x]
  if not isinstance(x, dict):
    return x
  ((kind, body),) = x.items()
  if kind == "int":
    return int(body, 16)
  if kind == "complex":
    return complex(*body)
  if kind == "bytes":
    return bytes.fromhex(body)
  if kind == "dict":
    return {_unpack(k): _unpack(v) for k, v in body}
  make = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
  return make(_unpack(y) for y in body)
