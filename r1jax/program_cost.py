"""What a program costs: FLOPs from its jaxpr, bytes and collectives from XLA's text.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel not at all.
Here a loop counts as often as it turns, where that is known; one whose turns depend on
the data (the loop that decodes) counts once. So
does the loop over rounds of an exchange (models/dispatch.py), which takes more than one
where experts are far from balanced. Of a condition the dearest branch counts, and of a
buffer all rows, filled or not.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
from jax.extend import core
import numpy as np

COLLECTIVES = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("ragged-all-to-all", "collective-permute"),
)


# -- FLOPs -----------------------------------------------------------------------------


def flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
  """Of all matrix products, two a multiplication, on all devices together."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn) -> float:
  name, p = eqn.primitive.name, eqn.params
  if name == "dot_general":
    (contracted, _), _ = p["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * out.size * math.prod(lhs.shape[i] for i in contracted)
  if name in ("ragged_dot", "ragged_dot_general"):
    return _of_ragged(eqn)
  if name == "pallas_call":
    cost = p.get("cost_estimate")
    return float(cost.flops) if cost is not None else 0.0
  inner = list(_jaxprs(p))
  if name == "scan":
    return (1 if _is_exchange(inner[0]) else p["length"]) * flops(inner[0])
  if name == "cond":
    return max(map(flops, inner))
  if name == "shard_map":
    return p["mesh"].size * flops(inner[0])
  return sum(map(flops, inner))


def _is_exchange(jaxpr, in_condition: bool = False) -> bool:
  """Whether a loop's body exchanges tokens in a condition, outside of loops in it."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if in_condition and name == "all_to_all":
      return True
    if name not in ("scan", "while") and any(
      _is_exchange(x, in_condition or name == "cond") for x in _jaxprs(eqn.params)
    ):
      return True
  return False


def _of_ragged(eqn) -> float:
  """Every row meets one group's matrix, or every pair of rows one group's sum."""
  lhs, rhs, sizes = (v.aval for v in eqn.invars[:3])
  out = eqn.outvars[0].aval
  groups = sizes.shape[-1]
  if rhs.ndim == 3:
    return 2.0 * out.size * lhs.shape[-1]
  return 2.0 * out.size * lhs.shape[0] / groups


def _jaxprs(params: dict):
  for value in params.values():
    values = value if isinstance(value, tuple | list) else (value,)
    for x in values:
      if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
        yield x


def kernels(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> dict[tuple[str, str], float]:
  """(name, sizes of the largest operand) of its Pallas kernels -> the bytes that one
  says it moves. It may read a layer of a stack."""
  found = {}
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if eqn.primitive.name == "pallas_call":
      if cost := eqn.params.get("cost_estimate"):
        largest = max((x.aval for x in eqn.invars), key=lambda x: x.size)
        sizes = ",".join(map(str, largest.shape))
        found[eqn.params.get("name"), sizes] = float(cost.bytes_accessed)
    else:
      for inner in _jaxprs(eqn.params):
        found |= kernels(inner)
  return found


# -- bytes and collectives -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one device."""

  hbm: float  # bytes that its operations read and write
  sent: float  # bytes that collectives send
  collectives: dict[str, tuple[float, float]]  # kind -> (how many, bytes sent)

  def __sub__(self, other: "Traffic") -> "Traffic":
    kinds = {
      kind: (n - (less := other.collectives.get(kind, (0, 0)))[0], size - less[1])
      for kind, (n, size) in self.collectives.items()
    }
    kinds = {kind: value for kind, value in kinds.items() if value[0]}
    return Traffic(self.hbm - other.hbm, self.sent - other.sent, kinds)


_OP = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_SHAPE_TEXT = re.compile(r"\w+\[[\d,]*\]")
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")  # not in HBM
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
  *("conditional", "call", "after-all", "partition-id", "replica-id", "iota"),
}


def traffic(
  text: str, *, turns: float = 1.0, said: dict[tuple[str, str], float] | None = None
) -> Traffic:
  """Of a compiled program.

  Args:
    text: `compiled.as_text()`.
    turns: of a loop whose turns depend on the data; 0: what is outside of it.
    said: `kernels` of its jaxpr, for a platform whose text does not repeat them.
  """
  computations, entry = _computations(text)
  devices = re.search(r"num_partitions=(\d+)", text)
  devices = int(devices[1]) if devices else 1

  def walk(name: str) -> collections.Counter:
    """("hbm" or a kind of collective, "number" or "bytes") -> of one call."""
    totals = collections.Counter()

    def add(found, times=1.0):
      for key, value in found.items():
        totals[key] += times * value

    shapes = {op.name: op.shape for op in computations[name]}
    for op in computations[name]:
      kind = op.kind.removesuffix("-start")
      if op.kind == "while":
        times = _turns(op, computations)
        if _exchanges(computations, op.called["body"]):
          times = 1.0
        add(walk(op.called["body"]), turns if times is None else times)
      elif op.kind == "conditional":
        add(max(map(walk, op.called_too), key=lambda x: x["hbm", "bytes"]))
      elif op.kind in ("call", "call-start", "async-start"):
        for called in op.called_too:
          add(walk(called))
      elif kind in COLLECTIVES:
        size = _bytes(op.shape)
        if op.kind in ("all-gather-start", "collective-permute-start"):
          size = max(map(_bytes, _SHAPE_TEXT.findall(op.shape)))
        add({(kind, "number"): 1, (kind, "bytes"): _sent(kind, size, op, devices)})
      elif op.kind == "fusion":
        # A reduce-scatter of a TPU is a fusion around an all-reduce.
        for x in op.called_too:
          for inner in computations.get(x, ()):
            if inner.kind in COLLECTIVES:
              kind = "reduce-scatter" if inner.kind == "all-reduce" else inner.kind
              sent = _sent(kind, _bytes(op.shape), inner, devices)
              add({(kind, "number"): 1, (kind, "bytes"): sent})
      if op.kind not in _FREE and not op.kind.endswith("-done"):
        size = _said(op, shapes, said or {})
        if size is None:
          size = _moved(op, shapes, computations)
        add({("hbm", "bytes"): size})
    return totals

  found = walk(entry)
  kinds = {
    kind: (found[kind, "number"], found[kind, "bytes"])
    for kind in COLLECTIVES
    if found[kind, "number"]
  }
  sent = sum(size for _, size in kinds.values())
  return Traffic(found["hbm", "bytes"], sent, kinds)


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  shape: str
  kind: str
  operands: list[str]
  called: dict[str, str]
  called_too: list[str]  # branches of a condition, what is called or fused
  rest: str


def _computations(text: str) -> tuple[dict[str, list[_Op]], str]:
  found, entry, current = {}, "", None
  for line in text.splitlines():
    head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
    if head and " = " not in line.split("(")[0]:
      current = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (match := _OP.match(line)):
      current.append(_op(match))
  return found, entry


def _op(match: re.Match) -> _Op:
  _, name, shape, kind, rest = match.groups()
  arguments = rest.split(")", 1)[0]
  called = dict(re.findall(r"(body|condition)=%?([\w.\-]+)", rest))
  branches = re.findall(r"(?:to_apply|called_computation|calls)=%?([\w.\-]+)", rest)
  for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
    branches += re.findall(r"%?([\w.\-]+)", group)
  branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
  return _Op(
    name=name,
    shape=shape,
    kind=kind,
    operands=re.findall(r"%([\w.\-]+)", arguments),
    called=called,
    called_too=branches,
    rest=rest,
  )


def _group(rest: str, devices: int) -> int:
  """Devices that take part together, as any of the forms that XLA writes says."""
  if "source_target_pairs" in rest:
    return 2
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return max(len(listed[1].split(",")), 1)
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if "replica_groups={}" in rest:
    return devices
  raise ValueError(f"replica groups of an unknown form: {rest[:200]}")


def _exchanges(computations: dict, body: str, in_condition: bool = False) -> bool:
  """As `_is_exchange`."""
  for op in computations[body]:
    if in_condition and op.kind.startswith("all-to-all"):
      return True
    if op.kind in ("conditional", "call", "fusion", "async-start") and any(
      _exchanges(computations, x, in_condition or op.kind == "conditional")
      for x in op.called_too
      if x in computations
    ):
      return True
  return False


_SLICES = ("dynamic-slice", "gather", "slice")
_WRITES = ("dynamic-update-slice", "scatter")


def _said(op: _Op, shapes: dict, kernels: dict) -> float | None:
  """Bytes of a kernel as it says itself."""
  if op.kind != "custom-call":
    return None
  if said := re.search(r'"bytes_accessed":"(\d+)"', op.rest):
    return float(said[1])
  name = re.search(r'op_name="[^"]*?(\w+)/pallas_call"', op.rest)
  largest = max((shapes.get(x, "") for x in op.operands), key=_bytes, default="")
  sizes = _SHAPE.search(largest)
  return kernels.get((name[1], sizes[2])) if name and sizes else None


def _moved(op: _Op, shapes: dict, computations: dict) -> float:
  """Bytes of its operands and results. Of an array that is sliced, or written in part
  where it lies, that part."""
  sizes = [_hbm(shapes.get(x, "")) for x in op.operands]
  result = _hbm(op.shape)
  if op.kind.endswith("-start"):  # its shape holds the operand, and more, again
    return max(map(_bytes, _SHAPE_TEXT.findall(op.shape)), default=0.0)
  if op.kind in _SLICES:
    return 2 * result + sum(sizes[1:])
  if op.kind in _WRITES:
    return 2 * sum(sizes[1:])
  inner = [x for x in op.called_too if x in computations]
  if op.kind != "fusion" or not inner:
    return result + sum(sizes)
  body = computations[inner[0]]
  inside = {x.name: x.shape for x in body}
  for x in body:
    if x.kind == "parameter" and (number := _number(x)) < len(sizes):
      sizes[number] = min(sizes[number], _read(x, body, computations))
  written = [x for x in body if x.kind in _WRITES and _bytes(x.shape) == result]
  if written:
    result = sum(_bytes(inside.get(y, "")) for x in written for y in x.operands[1:])
  return result + sum(sizes)


def _hbm(shape: str) -> float:
  """As `_bytes`, of what is not in a TPU's own memory."""
  return _bytes(_ON_CHIP.sub("", shape))


def _number(parameter: _Op) -> int:
  return int(parameter.rest.split(")")[0])


def _read(value: _Op, body: list[_Op], computations: dict) -> float:
  """Bytes of a value that a fusion's body, and fusions in it, read."""
  total, shapes = 0.0, {x.name: x.shape for x in body}
  for user in body:
    for at, operand in enumerate(user.operands):
      if operand != value.name:
        continue
      if at == 0 and user.kind in _SLICES:
        total += _bytes(user.shape)
      elif at == 0 and user.kind in _WRITES:
        total += sum(_bytes(shapes.get(x, "")) for x in user.operands[1:])
      elif user.kind == "bitcast":
        total += _read(user, body, computations)
      elif user.kind == "fusion" and user.called_too[0] in computations:
        inner = computations[user.called_too[0]]
        parameters = {_number(x): x for x in inner if x.kind == "parameter"}
        total += _read(parameters[at], inner, computations)
      else:
        return _bytes(value.shape)
  # Of a value that nobody uses, all: a fusion's operand is there for something.
  return min(total or _bytes(value.shape), _bytes(value.shape))


def _turns(loop: _Op, computations: dict) -> float | None:
  """What XLA says of it, or the constant that it counts to; None without."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return float(known[1])
  condition = loop.called["condition"]
  constants = [
    int(value[1])
    for op in computations.get(condition, ())
    if op.kind == "constant" and re.match(r"[su]32\[\]", op.shape)
    if (value := re.match(r"(\d+)\)", op.rest))
  ]
  # A condition that joins several depends on the data too.
  joined = any(op.kind == "and" for op in computations.get(condition, ()))
  return None if joined or not constants else float(max(constants))


def _bytes(shape: str) -> float:
  total = 0.0
  for dtype, sizes in _SHAPE.findall(shape):
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype[:3]) or 0)
    if dtype.startswith("f8"):
      bits = 8
    total += math.prod(int(s) for s in sizes.split(",") if s) * bits / 8
  return total


def _sent(kind: str, size: float, op: _Op, devices: int) -> float:
  """Bytes that a device sends, by a ring where there is one. size: the result's."""
  group = _group(op.rest, devices)
  share = (group - 1) / group
  if kind == "all-reduce":
    return 2 * size * share
  if kind == "reduce-scatter":
    return size * (group - 1)
  return size if kind == "collective-permute" else size * share


# -- arrays ----------------------------------------------------------------------------


def bytes_a_device(tree: Any) -> int:
  """Of arrays or ShapeDtypeStructs with shardings."""

  def one(x):
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return int(np.prod(shape)) * 8
    return int(np.prod(shape)) * x.dtype.itemsize

  return sum(map(one, jax.tree.leaves(tree)))
