"""Plans a pretraining run on TPUs or GPUs that are not attached.

python -m vjepa_jax.tools.plan --config=configs/vjepa2.py:g16 \
  --config.fsdp=16 --topology=v5e:16x16
python -m vjepa_jax.tools.plan --config=configs/vjepa1.py:l16 \
  --topology=v5e:16x16 --slices=2 --json=plan.json
python -m vjepa_jax.tools.plan --config=configs/vjepa1.py:h16 \
  --topology=v6e:8x8 --fit

Compiles the very step that main.py runs, with its shardings, and prints what it
needs. Seconds and MFU are estimates that rank variants of a program; nothing
is run, and attached accelerators are left alone.
"""

import json
import math
from pathlib import Path
import re
import sys
import time
from typing import Any

from absl import app, flags
import jax
from ml_collections import config_dict, config_flags

from vjepa_jax.compilation import flops, hlo, topology
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.program import (
  build_program,
  get_steps,
  make_abstract_batch,
)

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe.')
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  f'KIND:SHAPE, KIND one of {", ".join(topology.CHIPS)}: v5e:16x16, v5p:4x4x8, '
  'h100:1x1x8.',
)
_SLICES = flags.DEFINE_integer('slices', 1, 'TPU slices.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'File to write.')
_FIT = flags.DEFINE_bool(
  'fit', False, 'Try fsdp groups and remat policies, recommend one.'
)

_GIB = 2**30
# Share of its peak that an attention kernel reaches: what the TPU compiler's
# schedule of attend_lanes needs, 60 to 74 %.
_KERNEL_EFFICIENCY = 0.65
# Steps of an epoch where a schedule is given in epochs; the program is the same
# for any number.
_STEPS_PER_EPOCH = 1000


def make_plan(
  config: config_dict.ConfigDict, name: str, num_slices: int = 1
) -> dict[str, Any]:
  """Compiles a config's step for a topology and says what it needs.

  Args:
    config: See `configs/base.py`.
    name: Topology, see `topology.get_devices`.
    num_slices: TPU slices.

  Returns:
    What --json writes. Where the step does not fit, `fits` is False and what
    only a finished program tells is None.
  """
  chip = topology.get_chip(name)
  devices = topology.get_devices(name, num_slices)
  mesh = mesh_lib.make_mesh(config.fsdp, devices)
  program = build_program(
    config, mesh, get_steps(config, 'total', _STEPS_PER_EPOCH), _STEPS_PER_EPOCH
  )
  batch = make_abstract_batch(config)
  plan = {
    'topology': name,
    'slices': num_slices,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
    'remat': config.remat,
    'attention': program.objective.encoder.attention,
    'microbatches': config.microbatches,
    'batch_size': config.data.batch_size,
    'hbm_limit_gib': chip.hbm,
    'state_gib': _measure_state(program),
  }
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
  clips = config.data.batch_size
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
  return plan | _read_program(compiled, chip, len(devices), kernels, minimum)


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
  """Formats a plan as the table that the tool prints."""
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


def advise(plan: dict[str, Any]) -> str:
  """Says what would make a step fit that does not."""
  changes = []
  if plan['remat'] != 'full':
    changes.append('--config.remat=full')
  if plan['mesh']['fsdp'] < 16:
    changes.append('--config.fsdp=16')
  changes.append(f'--config.microbatches={2 * plan["microbatches"]}')
  return (
    f'{plan["hbm_gib"]:.1f} GiB do not fit into {plan["hbm_limit_gib"]:.2f}; '
    f'try {", ".join(changes)}, more devices, or --fit'
  )


def list_variants(
  config: config_dict.ConfigDict, num_devices: int
) -> list[config_dict.ConfigDict]:
  """Lists the meshes and remat policies that --fit tries."""
  variants = []
  for fsdp in (1, 8, 16):
    for remat in ('none', 'attention', 'full'):
      if num_devices % fsdp:
        continue
      variant = config_dict.ConfigDict(config.to_dict())
      variant.update(fsdp=fsdp, remat=remat)
      variants.append(variant)
  return variants


def choose_plan(plans: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Chooses the fastest plan that leaves a tenth of the memory free."""
  fitting = [
    p for p in plans if p['fits'] and p['hbm_gib'] <= 0.9 * p['hbm_limit_gib']
  ]

  def rank(plan):
    seconds = plan['estimated_seconds']
    return (seconds['total'] if seconds else 0.0, plan['hbm_gib'])

  return min(fitting, key=rank, default=None)


def _fit(config):
  """Plans all variants, prints a line each and the recommendation."""
  devices = topology.get_devices(_TOPOLOGY.value, _SLICES.value)
  plans = []
  for variant in make_bar(list_variants(config, len(devices)), unit='plan'):
    plan = make_plan(variant, _TOPOLOGY.value, _SLICES.value)
    plans.append(plan)
    seconds = plan['estimated_seconds']
    print(
      f'fsdp {variant.fsdp:<3} remat {variant.remat:<10}'
      f'{plan["hbm_gib"]:7.2f} GiB  '
      + ('does not fit' if not plan['fits'] else '')
      + (f'{seconds["total"]:.3f} s' if seconds else '')
    )
  best = choose_plan(plans)
  if best is None:
    print(f'nothing fits: {advise(plans[-1])}')
  else:
    print(
      f'recommended: --config.fsdp={best["mesh"]["fsdp"]} '
      f'--config.remat={best["remat"]}'
    )
  return {'plans': plans, 'recommended': best}


def main(argv):
  """Plans, prints, and writes JSON; exit code 1 if nothing fits."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  try:
    if _FIT.value:
      result = _fit(_CONFIG.value)
      fits = result['recommended'] is not None
    else:
      result = make_plan(_CONFIG.value, _TOPOLOGY.value, _SLICES.value)
      fits = result['fits']
      print(format_plan(result))
      if not fits:
        print(advise(result))
  except (RuntimeError, ValueError) as error:
    sys.exit(f'plan: {error}')
  if _JSON.value:
    Path(_JSON.value).write_text(json.dumps(result, indent=2) + '\n')
  return 0 if fits else 1


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main)
