"""Makes the table and the pictures of learning.md.

python docs/make_learning.py --run  # three seeds of configs/small.py and one of
                                    # its variant `future` first
python docs/make_learning.py        # from docs/learning/*.json

A run takes a quarter of an hour on two CPU cores; --workdir keeps it, so that
an interrupted one goes on.
"""

import argparse
import json
from pathlib import Path
import statistics
import subprocess
import sys

from matplotlib import figure

_HERE = Path(__file__).parent
RESULTS = _HERE / 'learning'
_RECORDED = _HERE.parent / 'tests' / 'training' / 'recorded'
_RUNS = (('random', 0), ('random', 1), ('random', 2), ('future', 0))
_ROWS = {
  'pretrained': 'pretrained',
  'random_init': 'random init',
  'pixels': 'raw pixels',
  'differences': 'frame differences',
}
_COLUMNS = {
  'attentive_few_top1': '160 labels: attentive',
  'linear_few_top1': 'linear',
  'knn_few_top1': 'kNN',
  'attentive_top1': '1600 labels: attentive',
  'linear_top1': 'linear',
  'knn_top1': 'kNN',
}
_CURVES = {
  'loss': 'prediction loss',
  'content_std': 'std over clips at a place',
  'effective_rank': 'effective rank of tokens',
  'probe_attentive': 'attentive probe, 160 labels',
}


def run(variant: str, seed: int, workdir: Path, options: list[str]) -> None:
  """Pretrains one seed."""
  command = [
    sys.executable,
    'main.py',
    f'--config=configs/small.py:{variant}',
    f'--config.seed={seed}',
    f'--workdir={workdir}',
    *options,
  ]
  subprocess.run(command, cwd=_HERE.parent, check=True)


def collect(variant: str, seed: int, workdir: Path) -> None:
  """Writes what the page needs of a run to docs/learning."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  kept = []
  for line in map(json.loads, lines):
    if 'effective_rank' in line or 'probe_attentive' in line:
      kept.append(
        {
          name: float(f'{line[name]:.4g}')
          for name in (
            'step',
            *_CURVES,
            'probe_linear',
            'probe_knn',
            'effective_rank_clips',
          )
          if name in line
        }
      )
  RESULTS.mkdir(exist_ok=True)
  record = {
    'results': json.loads((workdir / 'results.json').read_text()),
    'baselines': json.loads((workdir / 'baselines.json').read_text()),
    'curves': kept,
  }
  path = RESULTS / f'{variant}_{seed}.json'
  path.write_text(json.dumps(record) + '\n')


def draw_seeds(records: dict[int, dict]) -> None:
  """Draws the curves of the seeds."""
  fig = figure.Figure(figsize=(14, 3.4), layout='constrained')
  for axis, (name, title) in zip(
    fig.subplots(1, len(_CURVES)), _CURVES.items(), strict=True
  ):
    for seed, record in records.items():
      points = [(m['step'], m[name]) for m in record['curves'] if name in m]
      axis.plot(*zip(*points, strict=True), label=f'seed {seed}', linewidth=1)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  fig.savefig(RESULTS / 'seeds.png', dpi=90)


def draw_recorded() -> None:
  """Draws the runs that the health rules are tested against."""
  fig = figure.Figure(figsize=(14, 4), layout='constrained')
  axes = fig.subplots(1, 3)
  for path in sorted(_RECORDED.glob('*.jsonl')):
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    for axis, name in zip(axes, list(_CURVES)[:3], strict=True):
      points = [(m['step'], m[name]) for m in lines if 'effective_rank' in m]
      axis.plot(*zip(*points, strict=True), label=path.stem, linewidth=1)
      axis.set_title(_CURVES[name], fontsize=10)
      axis.set_xlabel('step')
      axis.grid(alpha=0.3)
  axes[0].set_ylim(0, 1.2)  # the diverged run leaves
  axes[2].legend(fontsize=8)
  fig.savefig(RESULTS / 'recorded.png', dpi=90)


def make_table(records: dict[int, dict], future: dict) -> str:
  """Formats accuracies, mean and spread over seeds; one of `future`."""
  lines = [
    '| held-out accuracy | ' + ' | '.join(_COLUMNS.values()) + ' |',
    '|---' * (len(_COLUMNS) + 1) + '|',
  ]
  for row, title in _ROWS.items():
    cells = []
    for column in _COLUMNS:
      values = []
      for record in records.values():
        if row == 'pretrained':
          values.append(record['results'][column][row])
        elif column in record['baselines'].get(row, ()):
          values.append(record['baselines'][row][column])
      cells.append(format_cell(values))
    if any(cells):
      lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
  cells = [format_cell([future['results'][c]['pretrained']]) for c in _COLUMNS]
  lines.append('| the future hidden, seed 0 | ' + ' | '.join(cells) + ' |')
  lines += [
    '',
    f'Mean over {len(records)} seeds ± standard deviation; with 160 labels '
    'each of them is itself the mean over four draws of the labelled clips.',
  ]
  return '\n'.join(lines)


def format_cell(values: list[float]) -> str:
  """Formats the mean over seeds and its deviation; '' of nothing."""
  if not values:
    return ''
  if len(values) == 1:
    return f'{values[0]:.3f}'
  return f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}'


def insert_table(name: str, table: str) -> None:
  """Puts a table between its marks in learning.md."""
  page = _HERE / 'learning.md'
  before, rest = page.read_text().split(f'<!-- {name} -->\n', 1)
  _, after = rest.split(f'<!-- end of {name} -->', 1)
  page.write_text(
    f'{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->{after}'
  )


def main() -> None:
  """Runs what is asked for, then writes pictures and table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--run', action='store_true')
  parser.add_argument('--workdir', type=Path, default=Path('runs'))
  arguments, options = parser.parse_known_args()
  if arguments.run:
    for variant, seed in _RUNS:
      workdir = arguments.workdir.absolute() / f'{variant}_{seed}'
      run(variant, seed, workdir, options)
      collect(variant, seed, workdir)
  found = {
    key: json.loads((RESULTS / '{}_{}.json'.format(*key)).read_text())
    for key in _RUNS
  }
  records = {seed: found[variant, seed] for variant, seed in _RUNS[:-1]}
  draw_seeds(records)
  draw_recorded()
  insert_table('table', make_table(records, found[_RUNS[-1]]))


if __name__ == '__main__':
  main()
