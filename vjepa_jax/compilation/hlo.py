"""Reads a compiled program: collectives, scatters and estimated cycles.

XLA counts the body of a loop once and leaves custom calls out, so its own
`cost_analysis` says little of a scanned transformer. Here every instruction is
weighed by the trip counts of the loops around it.
"""

from collections import Counter
from collections.abc import Iterator
import math
import re
from typing import NamedTuple

_HEADER = re.compile(r'^(?:ENTRY )?%([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%(\S+) = (.*)$')
_OPCODE = re.compile(r'\s([a-z][\w\-]*)\(')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SHAPE = re.compile(r'\b(pred|[a-z]{1,2}\d+\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|condition|body)=%([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r' = s32\[\]\S* constant\((\d+)\)')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_OPERAND = re.compile(r'\(%([\w.\-]+)')

_COLLECTIVES = (
  *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all'),
  *('collective-permute', 'send', 'recv'),
)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  opcode: str  # such as 'fusion' or 'all-reduce-start'
  shape: str  # text of its result's type
  operand: str  # the same of its first operand, where that is known
  scope: str  # path of named scopes it comes from; empty where XLA lost it
  cycles: int  # XLA's estimate, 0 where it has none
  channel: str  # of a collective: its parts have the same
  computation: str  # name of the one that it is a line of
  trips: int  # how often a step runs it
  fused: bool  # part of a fusion, whose cycles cover it


def walk(text: str) -> Iterator[Instruction]:
  """Yields every instruction that one run of a compiled program executes.

  Args:
    text: `compiled.as_text()`.

  Yields:
    The instructions of the entry and of what it calls, once for each call.
    Reducers and comparators, which have no cost of their own, are left out.
  """
  computations, entry = _split(text)

  def visit(name, trips, fused):
    for instruction, line in computations[name]:
      opcode = instruction.opcode
      yield instruction._replace(trips=trips, fused=fused)
      called = _CALLED.findall(line)
      if opcode == 'while':
        condition, body = called
        if found := _KNOWN_TRIPS.search(line):
          count = int(found[1])
        else:
          count = _get_trip_count(computations[condition])
        yield from visit(body, trips * count, fused)
      elif opcode == 'conditional':
        for branch in _BRANCHES.findall(line)[0].split(','):
          yield from visit(branch.strip(' %'), trips, fused)
      elif opcode == 'fusion':
        yield from visit(called[0], trips, True)
      elif opcode in ('call', 'async-start', 'custom-call') and called:
        yield from visit(called[0], trips, fused)

  return visit(entry, 1, False)


def _split(text):
  """Splits a module into computations of (instruction, line)."""
  computations, entry = {}, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name, lines, shapes = header[1], [], {}
      computations[name] = lines
      entry = name if line.startswith('ENTRY') else entry
    elif match := _INSTRUCTION.match(line):
      instruction = _parse(match[1], match[2], name, shapes)
      shapes[match[1]] = instruction.shape
      lines.append((instruction, line))
  return computations, entry


def _parse(
  name: str, line: str, computation: str, shapes: dict[str, str]
) -> Instruction:
  opcode = _OPCODE.search(' ' + line)
  start = opcode.start() if opcode else len(line)
  operand = _OPERAND.search(line, start)
  scope = re.search(r'op_name="([^"]*)"', line)
  cycles, channel = _CYCLES.search(line), _CHANNEL.search(line)
  return Instruction(
    name,
    opcode[1] if opcode else '',
    line[:start],
    shapes.get(operand[1], '') if operand else '',
    scope[1] if scope else '',
    int(cycles[1]) if cycles else 0,
    channel[1] if channel else '',
    computation,
    trips=1,
    fused=False,
  )


def _get_trip_count(condition) -> int:
  """Finds the bound that a loop's counter is compared with."""
  bounds = (_CONSTANT.search(line) for _, line in condition)
  return max((int(bound[1]) for bound in bounds if bound), default=1)


def count_scatters(text: str) -> int:
  """Counts the scatters of a compiled program, in fusions too."""
  return sum(i.opcode == 'scatter' for i in walk(text))


def count_collectives(text: str) -> dict[str, dict[str, float]]:
  """Sums the collectives of one step, as one device runs them.

  Returns:
    For each 'kind:dtype', 'count' and 'mib' of results, for reduce-scatter of
    what is reduced. The two halves of an asynchronous collective count as one,
    and so do XLA:TPU's, which are a fusion each, with more of them in between
    that compute something else while the data move.
  """
  counts, sizes, fused = Counter(), Counter(), set()
  for instruction in walk(text):
    opcode = instruction.opcode.removesuffix('-start')
    if opcode not in _COLLECTIVES:
      continue
    if instruction.fused and instruction.channel:
      if instruction.channel in fused:
        continue
      fused.add(instruction.channel)
    shapes = _SHAPE.findall(instruction.shape)
    if opcode == 'reduce-scatter' and instruction.operand:
      shapes = _SHAPE.findall(instruction.operand)
    elif instruction.computation.startswith('all-reduce-scatter'):
      # XLA:TPU's form: a sum, of which a device makes its slice alone.
      opcode = 'reduce-scatter'
    elif instruction.shape.lstrip().startswith('((') or (
      instruction.opcode.endswith('-start') and opcode != 'all-reduce'
    ):
      # The result of a first half holds the operands, results and counters.
      shapes = [s for s in shapes if s != ('u32', '')]
      shapes = shapes[len(shapes) // 2 :]
    by_dtype = Counter()
    for dtype, dims in shapes:
      by_dtype[dtype] += _count_bytes(dtype, dims)
    for dtype, num_bytes in by_dtype.items():
      counts[f'{opcode}:{dtype}'] += instruction.trips
      sizes[f'{opcode}:{dtype}'] += instruction.trips * num_bytes
  return {
    key: {'count': counts[key], 'mib': round(sizes[key] / 2**20, 2)}
    for key in sorted(counts)
  }


def _count_bytes(dtype: str, dims: str) -> int:
  bits = re.search(r'\d+', dtype)
  size = math.prod(int(d) for d in dims.split(',') if d)
  return size * max(8, int(bits[0]) if bits else 8) // 8


# Innermost first: the first that a scope holds decides.
_PARTS = (
  *('target_encoder', 'context_encoder', 'predictor'),
  *('optimizer', 'ema', 'loss'),
)


def get_part(scope: str) -> str:
  """Names the part of the step that a scope belongs to.

  Returns:
    One of the named scopes of the step, with '_backward' for what
    differentiation made, recomputation included; 'other' for the rest.
  """
  for part in _PARTS:
    if re.search(rf'[/(]{part}[/)]', scope):
      return f'{part}_backward' if f'transpose(jvp({part}' in scope else part
  return 'other'


def estimate_cycles(text: str) -> dict[str, int]:
  """Sums XLA's estimated cycles by part of the step.

  The estimates rank variants of a program; they are no measurement. Custom
  calls (Pallas kernels) and collectives have none.
  """
  cycles = Counter()
  for instruction in walk(text):
    if not instruction.fused:
      cycles[get_part(instruction.scope)] += (
        instruction.cycles * instruction.trips
      )
  return {part: count for part, count in cycles.most_common() if count}
