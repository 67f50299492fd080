"""Says in words whether a run is healthy, and draws its curves.

python -m vjepa_jax.tools.health runs/quickstart
python -m vjepa_jax.tools.health --json runs/*

Reads metrics.jsonl of each workdir, of runs that go on too, prints what the
rules of vjepa_jax/training/health.py find, and draws WORKDIR/health.png. The
exit code is 0 if all runs are healthy and 3 if not.
"""

import dataclasses
import json
import sys

from absl import app, flags
from etils import epath

from vjepa_jax import mistakes
from vjepa_jax.plots import training as pictures
from vjepa_jax.training import health
from vjepa_jax.training.telemetry import read_metrics

_JSON = flags.DEFINE_bool('json', False, 'Print JSON lines, draw nothing.')


def report(workdir: epath.Path) -> bool:
  """Prints the findings of one run and draws its curves.

  Returns:
    Whether it is healthy.

  Raises:
    ValueError: The folder holds no metrics.
  """
  metrics = read_metrics(workdir)
  if not metrics:
    raise ValueError(
      f'{workdir} holds no metrics.jsonl: give the --workdir of a run'
    )
  findings = health.find(metrics)
  if _JSON.value:
    found = [dataclasses.asdict(finding) for finding in findings]
    print(json.dumps({'workdir': str(workdir), 'findings': found}))
  else:
    pictures.draw_curves(workdir / 'health.png', metrics, str(findings[0]))
    print(f'{workdir}, step {metrics[-1]["step"]}')
    print(health.format_findings(findings))
    print(f'curves: {workdir / "health.png"}')
  return findings[0].severity == 'fine'


def main(argv: list[str]) -> None:
  """Reports on every workdir of the command line."""
  if len(argv) < 2:
    raise ValueError('give at least one workdir')
  healthy = [report(epath.Path(workdir)) for workdir in argv[1:]]
  sys.exit(0 if all(healthy) else 3)


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=mistakes.parse_flags)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(mistakes.explain(error))
