"""What a training step needs on hardware that is not attached."""

import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from vjepa_jax.compilation import flops, hlo
from vjepa_jax.compilation.topology import Chip

_GIB = 2**30
# Share of its peak that an attention kernel reaches: what the TPU compiler's
# schedule of attend_lanes needs, 60 to 74 %.
_KERNEL_EFFICIENCY = 0.65
# What only a finished program tells.
_UNKNOWN = (
  *('scatters', 'collectives', 'parts'),
  *('estimated_mcycles', 'estimated_seconds', 'estimated_mfu'),
)


def plan_step(
  program: Any, batch: Any, minimum: float, mesh: Mesh, chip: Chip
) -> dict[str, Any]:
  """Compiles a training step and says what it needs.

  Args:
    program: A step, its abstract state and shardings, see
      tasks/program.py.
    batch: Shapes of a batch.
    minimum: FLOPs of a batch that a step cannot do without.
    mesh: Of devices that need not be attached.
    chip: What is known of them.

  Returns:
    Memory in GiB a device, FLOPs, collectives and estimates. Where the step
    does not fit, `fits` is False and what only a finished program tells is
    None.
  """
  with jax.set_mesh(mesh):
    traced = program.train_step.trace(program.abstract, batch)
    start = time.perf_counter()
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      compiled, needed = None, _read_needed_gib(error)
    seconds = time.perf_counter() - start
  dots, kernels = flops.count_flops(traced.jaxpr)
  clips = batch['video']['pixels'].shape[0]
  plan = dict.fromkeys(_UNKNOWN) | {
    'hbm_limit_gib': chip.hbm,
    'state_gib': _measure_state(program),
    'flops_per_clip': (dots + kernels) / clips,
    'kernel_flops_per_clip': kernels / clips,
    'minimum_flops_per_clip': minimum / clips,
    'compile_seconds': round(seconds, 1),
    'fits': compiled is not None,
  }
  if compiled is None:
    return plan | {'hbm_gib': needed}
  plan |= _read_program(compiled)
  if plan['parts'] and chip.clock:
    plan |= _estimate(plan, chip, kernels / mesh.size, minimum / mesh.size)
  return plan


def _measure_state(program) -> dict[str, float]:
  """Sums the bytes of each part of the state on one device, in GiB."""
  sizes = {}
  fields = {'parameters': 'params', 'moments': 'opt_state'}
  fields |= {'target': 'target', 'frozen': 'frozen'}
  for name, field in fields.items():
    leaves = jax.tree.leaves(getattr(program.abstract, field))
    shardings = jax.tree.leaves(getattr(program.shardings, field))
    if leaves:
      sizes[name] = sum(
        leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape)) / _GIB
        for leaf, sharding in zip(leaves, shardings, strict=True)
      )
  return sizes


def _read_needed_gib(error: Exception) -> float:
  """Reads how much memory a program that does not fit would need."""
  match = re.search(r'\(([\d.]+)([GMT])\) exceeds available', str(error))
  if 'RESOURCE_EXHAUSTED' not in str(error) or not match:
    raise error
  return float(match[1]) * {'M': 2**-10, 'G': 1, 'T': 2**10}[match[2]]


def _read_program(compiled) -> dict[str, Any]:
  """Reads memory, collectives and cycles from a compiled program."""
  memory, text = compiled.memory_analysis(), compiled.as_text()
  peak = max(
    memory.peak_memory_in_bytes,
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  )
  parts = hlo.estimate_cycles(text)
  return {
    'hbm_gib': peak / _GIB,
    'activations_gib': memory.temp_size_in_bytes / _GIB,
    'program_gib': memory.generated_code_size_in_bytes / _GIB,
    'donated_gib': memory.alias_size_in_bytes / _GIB,
    'collectives': hlo.count_collectives(text),
    'scatters': hlo.count_scatters(text),
    'parts': {name: cycles / 1e6 for name, cycles in parts.items()} or None,
  }


def _estimate(plan, chip, kernels: float, minimum: float) -> dict[str, Any]:
  """Estimates seconds and MFU from cycles, and from the FLOPs of a device."""
  mcycles = sum(plan['parts'].values())
  moved = sum(c['mib'] for c in plan['collectives'].values()) * 2**20
  seconds = {
    'xla': mcycles * 1e6 / chip.clock,
    'kernels': kernels / chip.flops / _KERNEL_EFFICIENCY,
    'communication': moved / chip.bandwidth,
  }
  total = sum(seconds.values())
  return {
    'estimated_mcycles': mcycles,
    'estimated_seconds': seconds | {'total': total},
    'estimated_mfu': minimum / chip.flops / total,
  }


def format_plan(plan: dict[str, Any]) -> str:
  """Formats a plan: whether it fits, and a line for all that is known."""
  fits = 'fits' if plan['fits'] else 'DOES NOT FIT'
  lines = [
    f'{plan["hbm_gib"]:.2f} of {plan["hbm_limit_gib"]:.2f} GiB a device: {fits}'
  ]

  def add(values, indent):
    for name, value in values.items():
      if isinstance(value, dict):
        lines.append(f'{indent}{name}')
        add(value, f'{indent}  ')
      elif value is not None:
        text = f'{value:.4g}' if isinstance(value, float) else value
        lines.append(f'{indent + name:<28}{text}')

  add(plan, '')
  return '\n'.join([*lines, 'Estimates rank variants, nothing was measured.'])


def choose_plan(plans: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Chooses the fastest plan that leaves a tenth of the memory free."""
  fitting = [
    p for p in plans if p['fits'] and p['hbm_gib'] <= 0.9 * p['hbm_limit_gib']
  ]

  def rank(plan):
    seconds = plan['estimated_seconds']
    return (seconds['total'] if seconds else 0.0, plan['hbm_gib'])

  return min(fitting, key=rank, default=None)
