r"""Plans a pretraining run on TPUs or GPUs that are not attached.

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import config_dict

from vjepa_jax.compilation import flops, topology
from vjepa_jax.compilation.plan import choose_plan, format_plan, plan_step
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks.program import (
  build_program,
  get_steps,
  make_abstract_batch,
)
from vjepa_jax.tools import command, recipes

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
    What --json writes, see `plan_step`.
  """
  chip = topology.get_chip(name)
  devices = topology.get_devices(name, num_slices)
  mesh = make_mesh(config.fsdp, devices)
  program = build_program(
    config, mesh, get_steps(config, 'total', _STEPS_PER_EPOCH), _STEPS_PER_EPOCH
  )
  plan = {
    'topology': name,
    'slices': num_slices,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
    'remat': config.remat,
    'attention': program.objective.encoder.attention,
    'microbatches': config.microbatches,
    'batch_size': config.data.batch_size,
  }
  batch = make_abstract_batch(config)
  minimum = flops.count_minimum(program.objective, batch)
  return plan | plan_step(program, batch, minimum, mesh, chip)


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


def fit(
  config: config_dict.ConfigDict, name: str, num_slices: int
) -> dict[str, Any]:
  """Plans all variants, prints a line each and the recommendation."""
  devices = topology.get_devices(name, num_slices)
  plans = []
  for variant in make_bar(list_variants(config, len(devices)), unit='plan'):
    plan = make_plan(variant, name, num_slices)
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


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  recipes.define_config(define.values)
  flags.mark_flag_as_required('config', define.values)
  define.string(
    'topology',
    None,
    f'KIND:SHAPE, KIND one of {", ".join(topology.CHIPS)}: v5e:16x16, '
    'v5p:4x4x8, h100:1x1x8.',
    required=True,
  )
  define.integer('slices', 1, 'TPU slices.', lower_bound=1)
  define.string('json', None, 'File to write.')
  define.bool(
    'fit', False, 'Try fsdp groups and remat policies, name the best.'
  )


def main(options: SimpleNamespace) -> int:
  """Plans, prints, and writes JSON; exit code 1 if nothing fits."""
  arguments = options.config, options.topology, options.slices
  if options.fit:
    result = fit(*arguments)
    fits = result['recommended'] is not None
  else:
    result = make_plan(*arguments)
    fits = result['fits']
    print(format_plan(result))
    if not fits:
      print(advise(result))
  if options.json:
    Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  return 0 if fits else 1


if __name__ == '__main__':
  command.run(main, define_flags)
