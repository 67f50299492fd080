"""What a step needs on hardware that is not attached."""

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


def plan_step(
  program: Any, batch: Any, mesh: Mesh, chip: Chip
) -> dict[str, Any]:
  """Compiles a training step and says what it needs.

  Args:
    program: A step with its objective, abstract state and shardings, see
      tasks/program.py.
    batch: Shapes of a batch.
    mesh: Of devices that need not be attached.
    chip: What is known of them.

  Returns:
    Memory in GiB, FLOPs, collectives and estimates; `fits` is False where the
    step does not fit, and what only a finished program tells is None.
  """
  plan = {'hbm_limit_gib': chip.hbm, 'state_gib': _measure_state(program)}
  with jax.set_mesh(mesh):
    traced = program.train_step.trace(program.abstract, batch)
    dots, kernels = flops.count_flops(traced.jaxpr)
    minimum = flops.count_minimum(program.objective, batch)
    start = time.perf_counter()
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      compiled, needed = None, _read_needed_gib(error)
    seconds = time.perf_counter() - start
  clips = batch['video']['pixels'].shape[0]
  plan |= {
    'flops_per_clip': (dots + kernels) / clips,
    'kernel_flops_per_clip': kernels / clips,
    'minimum_flops_per_clip': minimum / clips,
    'compile_seconds': round(seconds, 1),
  }
  if compiled is None:
    nothing = dict.fromkeys(
      ('estimated_mcycles', 'estimated_seconds', 'estimated_mfu'), None
    )
    nothing |= dict.fromkeys(('scatters', 'collectives', 'parts'), None)
    return plan | nothing | {'fits': False, 'hbm_gib': needed}
  return plan | _read_program(compiled, chip, mesh.size, kernels, minimum)


def _measure_state(program) -> dict[str, float]:
  """Sums the bytes of each part of the state on one device, in GiB."""

  def measure(tree, shardings):
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(
      leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
      for leaf, sharding in leaves
    )

  abstract, shardings = program.abstract, program.shardings
  return {
    name: measure(getattr(abstract, field), getattr(shardings, field)) / _GIB
    for name, field in (
      ('parameters', 'params'),
      ('moments', 'opt_state'),
      ('target', 'target'),
      ('teacher', 'teacher'),
    )
    if getattr(abstract, field) is not None
  }


def _read_needed_gib(error: Exception) -> float:
  """Reads how much memory a program that does not fit would need."""
  match = re.search(r'\(([\d.]+)([GMT])\) exceeds available', str(error))
  if 'RESOURCE_EXHAUSTED' not in str(error) or not match:
    raise error
  return float(match[1]) * {'M': 2**-10, 'G': 1, 'T': 2**10}[match[2]]


def _read_program(compiled, chip, num_devices, kernels, minimum):
  """Reads memory, collectives and estimates from a compiled program."""
  memory, text = compiled.memory_analysis(), compiled.as_text()
  parts = hlo.estimate_cycles(text)
  collectives = hlo.count_collectives(text)
  plan = {
    'fits': True,
    'hbm_gib': _measure_peak(memory) / _GIB,
    'activations_gib': memory.temp_size_in_bytes / _GIB,
    'program_gib': memory.generated_code_size_in_bytes / _GIB,
    'donated_gib': memory.alias_size_in_bytes / _GIB,
    'collectives': collectives,
    'scatters': hlo.count_scatters(text),
    'parts': {name: cycles / 1e6 for name, cycles in parts.items()} or None,
    'estimated_mcycles': None,
    'estimated_seconds': None,
    'estimated_mfu': None,
  }
  if not (parts and chip.clock):
    return plan
  cycles = sum(parts.values())
  seconds = {
    'xla': cycles / chip.clock,
    'kernels': kernels / num_devices / chip.flops / _KERNEL_EFFICIENCY,
    'communication': sum(c['mib'] for c in collectives.values())
    * 2**20
    / chip.bandwidth,
  }
  total = sum(seconds.values())
  return plan | {
    'estimated_mcycles': cycles / 1e6,
    'estimated_seconds': seconds | {'total': total},
    'estimated_mfu': minimum / num_devices / chip.flops / total,
  }


def _measure_peak(memory) -> int:
  """Returns the bytes that a program holds at most."""
  return max(
    memory.peak_memory_in_bytes,
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  )


def format_plan(plan: dict[str, Any]) -> str:
  """Formats a plan as a table."""
  mesh, state = plan['mesh'], plan['state_gib']
  rows = [
    (
      'devices',
      f'{plan["devices"]} x {plan["topology"].partition(":")[0]}, mesh data '
      f'{mesh["data"]} x fsdp {mesh["fsdp"]}, remat {plan["remat"]}, attention '
      f'{plan["attention"]}',
    ),
    (
      'batch',
      f'{plan["batch_size"]} clips, '
      f'{plan["batch_size"] / plan["devices"]:g} a device in '
      f'{plan["microbatches"]} parts',
    ),
    (
      'memory',
      f'{plan["hbm_gib"]:.2f} of {plan["hbm_limit_gib"]:.2f} GiB a device: '
      + ('fits' if plan['fits'] else 'DOES NOT FIT'),
    ),
    *((f'  {name}', f'{gib:.2f} GiB') for name, gib in state.items()),
  ]
  if plan['fits']:
    rows += [
      ('  activations, gradients', f'{plan["activations_gib"]:.2f} GiB'),
      ('  program', f'{plan["program_gib"]:.2f} GiB'),
      ('  donated', f'{plan["donated_gib"]:.2f} GiB of the state'),
    ]
  rows += [
    ('compilation', f'{plan["compile_seconds"]:.0f} s'),
    (
      'matmuls',
      f'{plan["flops_per_clip"] / 1e9:.0f} GFLOP a clip, '
      f'{plan["kernel_flops_per_clip"] / 1e9:.0f} of them in kernels; the '
      f'least is {plan["minimum_flops_per_clip"] / 1e9:.0f}',
    ),
  ]
  if plan['fits']:
    rows += [('scatters', str(plan['scatters']))]
    rows += [
      (f'  {kind}', f'{c["count"]} of {c["mib"]:.1f} MiB in all')
      for kind, c in plan['collectives'].items()
    ]
  if plan['estimated_mcycles']:
    seconds = plan['estimated_seconds']
    rows += [
      ('estimated Mcycles', f'{plan["estimated_mcycles"]:.0f} without kernels'),
      *((f'  {name}', f'{n:.1f}') for name, n in plan['parts'].items()),
      (
        'estimated step',
        f'{seconds["total"]:.3f} s: XLA {seconds["xla"]:.3f}, kernels '
        f'{seconds["kernels"]:.3f}, communication '
        f'{seconds["communication"]:.3f} if none of it overlaps',
      ),
      (
        'estimated MFU',
        f'{plan["estimated_mfu"]:.0%} (an estimate that ranks variants, not a '
        'measurement)',
      ),
    ]
  return '\n'.join(f'{name:<26}{text}' for name, text in rows)


def choose_plan(plans: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Chooses the fastest plan that leaves a tenth of the memory free."""
  fitting = [
    p for p in plans if p['fits'] and p['hbm_gib'] <= 0.9 * p['hbm_limit_gib']
  ]

  def rank(plan):
    seconds = plan['estimated_seconds']
    return (seconds['total'] if seconds else 0.0, plan['hbm_gib'])

  return min(fitting, key=rank, default=None)
