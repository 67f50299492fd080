"""Makes the second table of learning.md: do tokens tell of their own place?

python docs/make_dense.py --run  # V-JEPA and V-JEPA 2.1, three seeds each
python docs/make_dense.py        # from docs/learning/dense.json

configs/small.py shortened, the same steps on the same clips for both. A run
took ten minutes on two busy CPU cores; --workdir keeps it, so that an
interrupted one goes on. What else is given goes to main.py.
"""

import argparse
import json
from pathlib import Path
import shutil

from make_learning import RESULTS, format_cell, insert_table, run

_SEEDS = (0, 1, 2)
_STEPS = 400
_BUDGET = (
  f'--config.total_steps={_STEPS}',
  '--config.data.batch_size=32',
  '--config.motion.max_clips=800',
  '--config.probe.every_steps=0',
  '--config.probe.attentive_steps=200',
)
# The context loss rises from 11 to 22 % of the run, as published.
_LEVELS = (
  '--config.objective.kind=vjepa21',
  '--config.encoder.levels=True',
  f'--config.objective.vjepa21.context_warmup_steps=({_STEPS // 9}, '
  f'{2 * _STEPS // 9})',
)
_ARMS = {'vjepa': (), 'vjepa21': _LEVELS}
_TITLES = {
  'vjepa': 'V-JEPA',
  'vjepa21': 'V-JEPA 2.1',
  'random_init': 'random init',
  'pixels': 'raw pixels',
  'position': 'position alone',
}
_COLUMNS = {
  'dense_own': 'own half',
  'dense_other': 'other half',
  'attentive_few_top1': '160 labels: attentive',
  'linear_few_top1': 'linear',
  'knn_few_top1': 'kNN',
  'attentive_top1': '800 labels: attentive',
  'linear_top1': 'linear',
  'knn_top1': 'kNN',
}


def compare(workdir: Path, options: list[str]) -> None:
  """Trains all arms, seed by seed."""
  for seed in _SEEDS:
    for arm, flags in _ARMS.items():
      folder = workdir / f'dense_{arm}_{seed}'
      first = workdir / f'dense_vjepa_{seed}' / 'baselines.json'
      if first.exists() and not folder.exists():
        # Before training they are the same encoder.
        folder.mkdir()
        shutil.copy(first, folder)
      run('random', seed, folder, [*_BUDGET, *flags, *options])
    collect(workdir)


def collect(workdir: Path) -> None:
  """Writes what the table needs of the runs that are finished."""
  found = {}
  for arm in _ARMS:
    for path in sorted(workdir.glob(f'dense_{arm}_*/results.json')):
      scores = json.loads((path.parent / 'baselines.json').read_text())
      results = json.loads(path.read_text())
      scores[arm] = {m: results[m]['pretrained'] for m in _COLUMNS}
      for name in filter(scores.get, _TITLES):
        seed = path.parent.name.rpartition('_')[2]
        found.setdefault(name, {})[seed] = {
          m: round(scores[name][m], 4) for m in _COLUMNS if m in scores[name]
        }
  (RESULTS / 'dense.json').write_text(json.dumps(found, indent=1) + '\n')


def make_table() -> str:
  """Formats shares and accuracies, mean and spread over seeds."""
  found = json.loads((RESULTS / 'dense.json').read_text())
  lines = [
    '| held-out accuracy | ' + ' | '.join(_COLUMNS.values()) + ' |',
    '|---' * (len(_COLUMNS) + 1) + '|',
  ]
  for name, title in _TITLES.items():
    seeds = found[name].values()
    cells = [format_cell([x[m] for x in seeds if m in x]) for m in _COLUMNS]
    lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
  lines += [
    '',
    f'Mean over {len(found["vjepa"])} seeds ± standard deviation; {_STEPS} '
    'steps of 32 clips.',
  ]
  return '\n'.join(lines)


def main() -> None:
  """Runs what is asked for, then writes the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--run', action='store_true')
  parser.add_argument('--workdir', type=Path, default=Path('runs'))
  arguments, options = parser.parse_known_args()
  if arguments.run:
    compare(arguments.workdir.absolute(), options)
  insert_table('dense', make_table())


if __name__ == '__main__':
  main()
