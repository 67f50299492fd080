r"""Plans a run, pretraining or actions, on TPUs or GPUs that are not there.

python -m vjepa_jax.tools.plan --config=configs/vjepa2.py:g16 \
  --config.fsdp=16 --topology=v5e:16x16
python -m vjepa_jax.tools.plan --config=configs/vjepa1.py:l16 \
  --topology=v5e:16x16 --slices=2 --json=plan.json --fit
python -m vjepa_jax.tools.plan --config=configs/action.py:droid_paper \
  --config.fsdp=16 --topology=v5e:8x8

Compiles the very step that main.py runs, with its shardings, and prints what it
needs. Seconds and MFU are estimates that rank variants of a program; nothing
is run, and attached accelerators are left alone.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from vjepa_jax.compilation import flops, topology
from vjepa_jax.compilation.plan import choose_plan, format_plan, plan_step
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.parallel.replicas import measure_readers
from vjepa_jax.progress import make_bar
from vjepa_jax.tasks import action
from vjepa_jax.tasks.program import (
  Program,
  build_program,
  get_steps,
  make_abstract_batch,
)
from vjepa_jax.tools import command, recipes
from vjepa_jax.training.objectives.base import Batch
from vjepa_jax.training.step import differentiate

# Where a schedule is given in epochs; for any number the program is the same.
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
  program, batch = _build(config, mesh)
  # The least is without recomputation and padding.
  least = config_dict.ConfigDict(config.to_dict())
  least.update(remat='none', attention='xla')
  step = functools.partial(differentiate, _build(least, mesh)[0].objective)
  traced = jax.jit(step).trace(program.abstract, batch)
  minimum = sum(flops.count_flops(traced.jaxpr))
  return {
    'jax': jax.__version__,
    'topology': name,
    'slices': num_slices,
    'devices': len(devices),
    'mesh': dict(mesh.shape),
    'remat': config.remat,
    'attention': program.objective.encoder.attention,
    'microbatches': config.microbatches,
    'batch_size': config.data.batch_size,
    'restore': measure_readers(
      program.abstract.replace(frozen=None),
      program.shardings.replace(frozen=None),
      mesh,
    ),
    **plan_step(program, batch, minimum, mesh, chip),
  }


def _build(config: config_dict.ConfigDict, mesh: Mesh) -> tuple[Program, Batch]:
  """Builds the program of a config, and the shapes of its batches."""
  steps = get_steps(config, 'total', _STEPS_PER_EPOCH)
  if config.task == 'action':
    return action.build_abstract(config, mesh, steps, _STEPS_PER_EPOCH)
  program = build_program(config, mesh, steps, _STEPS_PER_EPOCH)
  return program, make_abstract_batch(config)


def advise(plan: dict[str, Any]) -> str:
  """Says what would make a step fit that does not."""
  changes = ['--config.remat=full'] * (plan['remat'] != 'full')
  changes += ['--config.fsdp=16'] * (plan['mesh']['fsdp'] < 16)
  changes += [f'--config.microbatches={2 * plan["microbatches"]}']
  return (
    f'{plan["hbm_gib"]:.1f} GiB do not fit into {plan["hbm_limit_gib"]:.2f}; '
    f'try {", ".join(changes)}, more devices, or --fit'
  )


def list_variants(
  config: config_dict.ConfigDict, num_devices: int
) -> list[config_dict.ConfigDict]:
  """Lists the meshes and remat policies that --fit tries."""
  return [
    config_dict.ConfigDict(config.to_dict() | {'fsdp': fsdp, 'remat': remat})
    for fsdp in (1, 8, 16)
    for remat in ('none', 'attention', 'full')
    if num_devices % fsdp == 0
  ]


def fit(
  config: config_dict.ConfigDict, name: str, num_slices: int
) -> dict[str, Any]:
  """Plans all variants, prints a line each and the recommendation."""
  devices = topology.get_devices(name, num_slices)
  plans = []
  for variant in make_bar(list_variants(config, len(devices)), unit='plan'):
    plan = make_plan(variant, name, num_slices)
    plans.append(plan)
    outcome = '' if plan['fits'] else 'does not fit'
    if plan['estimated_seconds']:
      outcome = f'{plan["estimated_seconds"]["total"]:.3f} s'
    print(
      f'fsdp {variant.fsdp:<3} remat {variant.remat:<10}'
      f'{plan["hbm_gib"]:7.2f} GiB  {outcome}'
    )
  best = choose_plan(plans)
  if best is None:
    print(f'nothing fits: {advise(plans[-1])}')
  else:
    fsdp, remat = best['mesh']['fsdp'], best['remat']
    print(f'recommended: --config.fsdp={fsdp} --config.remat={remat}')
  return {'plans': plans, 'recommended': best}


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  recipes.define_config(define.values)
  flags.mark_flag_as_required('config', define.values)
  define.string(
    'topology',
    f'KIND:SHAPE, KIND one of {", ".join(topology.CHIPS)}, as v5e:16x16.',
    required=True,
  )
  define.integer('slices', 'TPU slices.', 1, least=1)
  define.string('json', 'File to write.')
  define.bool('fit', 'Try meshes and remat policies, name the best.', False)


def main(options: SimpleNamespace) -> int:
  """Plans, prints, and writes JSON; exit code 1 if nothing fits."""
  arguments = options.config, options.topology, options.slices
  if options.fit:
    result = fit(*arguments)
    fits = result['recommended'] is not None
  else:
    result = make_plan(*arguments)
    fits = result['fits']
    print(format_plan(result) + ('' if fits else f'\n{advise(result)}'))
  if options.json:
    Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  return 0 if fits else 1


if __name__ == '__main__':
  command.run(main, define_flags)
