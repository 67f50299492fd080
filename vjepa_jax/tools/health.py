"""Says in words whether a run is healthy, and draws its curves.

python -m vjepa_jax.tools.health runs/quickstart
python -m vjepa_jax.tools.health --json runs/*

Reads metrics.jsonl of each workdir, of runs that go on too, prints what the
rules of vjepa_jax/training/health.py find, and draws WORKDIR/health.png. The
exit code is 0 if all runs are healthy and 3 if not.
"""

import dataclasses
import json
from types import SimpleNamespace

from etils import epath

from vjepa_jax.errors import UserError
from vjepa_jax.plots.training import draw_curves
from vjepa_jax.tools import command
from vjepa_jax.training import health
from vjepa_jax.training.telemetry import read_metrics


def report(workdir: epath.Path, as_json: bool) -> bool:
  """Prints findings of a run, draws curves, says whether it is healthy."""
  metrics = read_metrics(workdir)
  if not metrics:
    raise UserError(
      f'{workdir} holds no metrics.jsonl: give the --workdir of a run'
    )
  findings = health.find(metrics)
  if as_json:
    found = [dataclasses.asdict(finding) for finding in findings]
    print(json.dumps({'workdir': str(workdir), 'findings': found}))
  else:
    draw_curves(workdir / 'health.png', metrics, str(findings[0]))
    print(f'{workdir}, step {metrics[-1]["step"]}')
    print(health.format_findings(findings))
    print(f'curves: {workdir / "health.png"}')
  return findings[0].severity == 'fine'


def define_flags(define: SimpleNamespace) -> None:
  """Defines the flags."""
  define.bool('json', 'Print JSON lines, draw nothing.', False)


def main(options: SimpleNamespace, workdir: str, *more: str) -> int:
  """Reports on workdirs; the exit code says whether all are healthy."""
  healthy = [report(epath.Path(w), options.json) for w in (workdir, *more)]
  return 0 if all(healthy) else 3


if __name__ == '__main__':
  command.run(main, define_flags)
