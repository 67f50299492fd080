"""Makes the tables of scaling.md and the README from plans in docs/plans.

python docs/make_scaling.py --run  # plans what is missing, minutes each
python docs/make_scaling.py        # writes the tables into both pages
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys

_HERE = Path(__file__).parent
_PLANS = _HERE / 'plans'

# Name: config, topology, flags.
_RECIPES = {
  'l16_v5e-256': ('vjepa1.py:l16', 'v5e:16x16', []),
  'h16_v5e-256': ('vjepa1.py:h16', 'v5e:16x16', ['fsdp=16']),
  'g16_v5e-256': ('vjepa2.py:g16', 'v5e:16x16', ['fsdp=16']),
  'l16_v5e-2x256': ('vjepa1.py:l16', 'v5e:16x16', ['slices=2']),
  'l16_v5p-128': ('vjepa1.py:l16', 'v5p:4x4x8', []),
  'h16_v5p-128': ('vjepa1.py:h16', 'v5p:4x4x8', ['fsdp=8']),
  'g16_v5p-128': ('vjepa2.py:g16', 'v5p:4x4x8', ['fsdp=8']),
  'g16_256_v5p-512': (
    'vjepa2.py:variant=g16,stage=cooldown_256',
    'v5p:8x8x8',
    ['fsdp=8'],
  ),
  'g16_384_v5p-512': (
    'vjepa2.py:variant=g16,stage=cooldown_384',
    'v5p:8x8x8',
    ['fsdp=8'],
  ),
  'l16_v6e-256': ('vjepa1.py:l16', 'v6e:16x16', []),
  'h16_v6e-256': ('vjepa1.py:h16', 'v6e:16x16', ['fsdp=8']),
  'g16_v6e-256': ('vjepa2.py:g16', 'v6e:16x16', ['fsdp=8']),
  'g16_v5e-16x256': (
    'vjepa2.py:g16',
    'v5e:16x16',
    ['slices=16', 'fsdp=16', 'data.batch_size=12288'],
  ),
  'v2l16_v5e-256': ('vjepa2.py:l16', 'v5e:16x16', []),
  **{
    f'v21{variant}_{kind}-{chips}': (
      f'vjepa21.py:variant={variant},numbers=release',
      topology,
      [f'fsdp={fsdp}'] if variant != 'l16' else [],
    )
    for variant in ('l16', 'g16', 'G16')
    for kind, topology, chips, fsdp in (
      ('v5e', 'v5e:16x16', 256, 16),
      ('v5p', 'v5p:4x4x8', 128, 8),
      ('v6e', 'v6e:16x16', 256, 8),
    )
  },
  'v21G16_v5p-128_384': (
    'vjepa21.py:variant=G16,stage=cooldown',
    'v5p:4x4x8',
    ['fsdp=8'],
  ),
  'ac_v5e-64': ('action.py:droid_paper', 'v5e:8x8', ['fsdp=16']),
  'ac_v5p-32': ('action.py:droid_paper', 'v5p:2x4x4', ['fsdp=8']),
  'l16_h100-8': ('vjepa1.py:l16', 'h100:1x1x8', ['data.batch_size=192']),
}
# What V-JEPA 2.1 costs beside V-JEPA 2, on the same videos.
_COST = {
  'v2l16_v5e-256': ('vjepa2.py:l16', 'v5e:16x16', []),
  'v21l16_v5e-256_videos': (
    'vjepa21.py:variant=l16,numbers=release',
    'v5e:16x16',
    ['image.batch_size=0'],
  ),
  'v21l16_v5e-256': (
    'vjepa21.py:variant=l16,numbers=release',
    'v5e:16x16',
    [],
  ),
}
_POD = 'g16_v5e-16x256'
_TUNING = {
  'l16_v5e-256_xla': ('vjepa1.py:l16', 'v5e:16x16', ['attention=xla']),
  'l16_v5e-256_none': ('vjepa1.py:l16', 'v5e:16x16', ['remat=none']),
  'l16_v5e-256_attention': (
    'vjepa1.py:l16',
    'v5e:16x16',
    ['remat=attention'],
  ),
  'l16_v5e-64_micro': (
    'vjepa1.py:l16',
    'v5e:8x8',
    ['microbatches=4'],
  ),
}


def run_plan(name, config, topology, options):
  """Plans one variant into docs/plans; a failure is shown and left out."""
  command = [
    sys.executable,
    '-m',
    'vjepa_jax.tools.plan',
    f'--config=configs/{config}',
    f'--topology={topology}',
    f'--json={_PLANS / name}.json',
  ]
  command += [
    f'--{o}' if o.startswith('slices') else f'--config.{o}' for o in options
  ]
  print(name, flush=True)
  subprocess.run(command, cwd=_HERE.parent, check=False)


def read_plans(names):
  """Reads the plans that are there."""
  files = {name: _PLANS / f'{name}.json' for name in names}
  return {
    name: json.loads(file.read_text())
    for name, file in files.items()
    if file.exists()
  }


def format_table(header, rows):
  """Formats a Markdown table."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def format_recipes():
  """Formats the table of recipes."""
  rows = []
  for name, plan in read_plans(_RECIPES).items():
    config, topology, _ = _RECIPES[name]
    seconds = plan['estimated_seconds']
    moved = sum(c['mib'] for c in (plan['collectives'] or {}).values())
    rows.append(
      [
        f'`{config}`' + ('' if 'jax' in plan else ' *'),
        f'{plan["slices"]} x {topology}'
        if plan['slices'] > 1
        else f'{topology}',
        f'{plan["mesh"]["data"]} x {plan["mesh"]["fsdp"]}',
        f'{plan["batch_size"] / plan["devices"]:g}',
        f'{plan["hbm_gib"]:.1f} of {plan["hbm_limit_gib"]:.0f}',
        f'{plan["minimum_flops_per_clip"] / 1e9:.0f}',
        f'{plan["flops_per_clip"] / 1e9:.0f}',
        f'{moved:.0f}',
        f'{plan["estimated_mcycles"]:.0f}'
        if plan['estimated_mcycles']
        else '-',
        f'{seconds["total"]:.2f}' if seconds else '-',
        f'{plan["estimated_mfu"]:.0%}' if plan['estimated_mfu'] else '-',
      ]
    )
  header = [
    'recipe',
    'devices',
    'data x fsdp',
    'clips a device',
    'GiB',
    'least GFLOP a clip',
    'ours',
    'MiB moved',
    'Mcycles',
    'step, s',
    'MFU',
  ]
  return format_table(header, rows)


def format_hardware():
  """Formats the README's table: which recipe for which hardware."""
  rows = []
  for name, plan in read_plans([*_RECIPES, 'l16_v5e-64_micro']).items():
    config, topology, options = (_RECIPES | _TUNING)[name]
    flags = [f'`--config.{o}`' for o in options if not o.startswith('slices')]
    seconds = plan['estimated_seconds']
    rows.append(
      [
        f'{plan["devices"]} ({topology}'
        + (f', {plan["slices"]} slices)' if plan['slices'] > 1 else ')'),
        f'`configs/{config}`',
        ' '.join(flags),
        plan['remat'],
        f'{plan["hbm_gib"]:.1f} of {plan["hbm_limit_gib"]:.0f}',
        f'{seconds["total"]:.2f}' if seconds else 'not estimated',
      ]
    )
  header = ['chips', 'recipe', 'set', 'remat', 'GiB a chip', 'step, s']
  return format_table(header, rows)


def format_cost():
  """Formats the table of V-JEPA 2.1 beside V-JEPA 2."""
  rows, first = [], None
  for name, plan in read_plans(_COST).items():
    config, _, options = _COST[name]
    first = first or plan
    rows.append(
      [
        ' '.join([f'`{config}`', *(f'`--config.{o}`' for o in options)]),
        f'{plan["hbm_gib"]:.1f}',
      ]
    )
    for key, scale in (
      ('minimum_flops_per_clip', 1e9),
      ('flops_per_clip', 1e9),
    ):
      rows[-1].append(f'{plan[key] / scale:.0f} ({plan[key] / first[key]:.2f})')
    seconds, base = (p['estimated_seconds']['total'] for p in (plan, first))
    rows[-1].append(f'{seconds:.2f} ({seconds / base:.2f})')
  header = ['recipe', 'GiB', 'least GFLOP a clip', 'ours', 'step, s']
  return format_table(header, rows)


def format_pod():
  """Formats the collectives of a step on the largest machine."""
  (plan,) = read_plans([_POD]).values()
  rows = [
    [kind, f'{found["count"]}', f'{found["mib"]:.0f}']
    for kind, found in plan['collectives'].items()
    if found['mib'] >= 0.5
  ]
  return format_table(['collective', 'a step', 'MiB a chip'], rows)


def format_history():
  """Formats the table of what changed one recipe, commit by commit."""
  rows = [
    [
      change['change'],
      f'`{change["commit"]}`',
      f'{change["hbm_gib"]:.2f}',
      f'{change["estimated_mcycles"]:.0f}',
      f'{change["all_reduce_mib"]:.0f}',
    ]
    for change in json.loads((_PLANS / 'history.json').read_text())
  ]
  header = ['change', 'commit', 'GiB', 'Mcycles', 'MiB reduced']
  return format_table(header, rows)


def format_tuning():
  """Formats the table of variants of one recipe."""
  rows = []
  for name, plan in read_plans(['l16_v5e-256', *_TUNING]).items():
    options = _TUNING.get(name, (None, None, ['as it is']))[2]
    seconds = plan['estimated_seconds']
    fits = f'{plan["hbm_gib"]:.1f}' + ('' if plan['fits'] else ': too much')
    rows.append(
      [
        ', '.join(options),
        f'{plan["devices"]}',
        fits,
        f'{plan["estimated_mcycles"]:.0f}' if seconds else '-',
        f'{seconds["kernels"]:.2f}' if seconds else '-',
        f'{seconds["total"]:.2f}' if seconds else '-',
      ]
    )
  header = ['variant', 'devices', 'GiB', 'Mcycles', 'kernels, s', 'step, s']
  return format_table(header, rows)


def main():
  """Runs plans or writes the tables between their markers."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--run', action='store_true')
  if parser.parse_args().run:
    for name, arguments in (_RECIPES | _COST | _TUNING).items():
      if not (_PLANS / f'{name}.json').exists():
        run_plan(name, *arguments)
  for page, marker, table in (
    (_HERE / 'scaling.md', 'recipes', format_recipes()),
    (_HERE / 'scaling.md', 'cost', format_cost()),
    (_HERE / 'scaling.md', 'pod', format_pod()),
    (_HERE / 'scaling.md', 'history', format_history()),
    (_HERE / 'scaling.md', 'tuning', format_tuning()),
    (_HERE.parent / 'README.md', 'hardware', format_hardware()),
  ):
    start, end = f'<!-- {marker} -->', f'<!-- end {marker} -->'
    before, rest = page.read_text().split(start)
    _, after = rest.split(end)
    page.write_text(f'{before}{start}\n{table}\n{end}{after}')


if __name__ == '__main__':
  main()
