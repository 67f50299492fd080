"""The page: everything about a run, in one file that needs no other."""

import collections
import datetime
import json
import re
from typing import Any

from etils import epath
import jinja2

from vjepa_jax.plots import charts
from vjepa_jax.tools.report import folders, run
from vjepa_jax.training import health
from vjepa_jax.training.telemetry import read_metrics

# Overviews of other tools whose content the page has itself.
_OVERVIEWS = ('health.png', 'report.png')
# Tasks whose metrics the health rules are made for.
_PRETRAINING = ('pretrain', 'quickstart')
_SHOWN_FAILURES = 20
_MAX_OPEN_DEPARTURES = 12


def render(workdir: epath.Path, *, encode: bool = True) -> str:
  """Renders the report of a run.

  Args:
    workdir: Directory of a run, which may be going on.
    encode: Encode a few clips, for the picture of the features.

  Returns:
    HTML.

  Raises:
    ValueError: The directory is not of a run.
  """
  content = _gather(workdir, encode)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, ''),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template('report.html').render(content)


def _gather(workdir: epath.Path, encode: bool) -> dict[str, Any]:
  """Gathers what the template shows; what is missing is None or empty."""
  values = folders.read_json(workdir / 'config.json')
  if not (isinstance(values, dict) and 'task' in values):
    values = None
  metrics = read_metrics(workdir)
  if not (values or metrics or (workdir / 'results.json').exists()):
    raise ValueError(
      f'{workdir} is not the directory of a run: it holds no config.json, '
      'metrics.jsonl or results.json; give the --workdir of main.py'
    )
  pretraining = values is None or values['task'] in _PRETRAINING
  config = run.make_config(values) if values and pretraining else None
  samples = strips = None
  if config:
    samples = run.try_to('masks and features', run.load_clips, config)
  if samples and encode:
    strips = run.try_to('features', run.draw_features, workdir, config, samples)
  departures = run.find_departures(values) if config else None
  return {
    'name': workdir.absolute().name,
    'workdir': str(workdir),
    'written': _read_time(workdir / 'metrics.jsonl'),
    'made': _format_time(datetime.datetime.now()),
    'health': _judge(metrics) if metrics and pretraining else None,
    'waiting': config is not None and not metrics,
    'sentences': _describe(config, metrics),
    'charts': charts.draw_charts(metrics),
    'other_charts': charts.draw_other_charts(metrics),
    'masks': samples and run.draw_masks(config, samples),
    'features': strips,
    'results': folders.read_section(
      workdir, 'Results', _OVERVIEWS if strips else _OVERVIEWS[:1]
    ),
    'sections': folders.read_sections(workdir),
    'quarantine': _read_quarantine(workdir),
    'departures': departures,
    'departures_open': len(departures or ()) <= _MAX_OPEN_DEPARTURES,
    'config': json.dumps(values, indent=2) if values else None,
    'format': folders.format_value,
  }


def _judge(metrics: health.Metrics) -> dict[str, Any]:
  findings = health.find(metrics)
  return {
    'verdict': health.judge(findings),
    'severity': findings[0].severity,
    'findings': findings,
    # Early on, a rule that finds nothing has seen nothing.
    'passed': []
    if findings[0].state == 'too early'
    else [
      rule.__doc__.splitlines()[0]
      for rule in health.RULES
      if rule(metrics) is None
    ],
  }


def _describe(config, metrics) -> list[str]:
  sentences = []
  if config:
    sentences += [
      run.try_to('the model', run.describe_model, config),
      run.try_to('the data', run.describe_data, config),
    ]
  if metrics:
    sentences.append(
      run.try_to('progress', run.describe_progress, config, metrics)
    )
  return [sentence for sentence in sentences if sentence]


def _read_quarantine(workdir: epath.Path) -> dict[str, Any] | None:
  """Reads which videos were replaced, on all hosts: counts and first lines."""
  failures = []
  for path in sorted(workdir.glob('quarantine*.jsonl')):
    for line in path.read_text().splitlines():
      try:
        failures.append(json.loads(line))
      except ValueError:
        continue  # half written
  if not failures:
    return None
  reasons = collections.Counter(
    # With its numbers nearly every reason would be the only one of its kind.
    re.sub(r'[\d.]*\d', '…', failure['reason'])
    for failure in failures
  )
  return {
    'count': len(failures),
    'reasons': reasons.most_common(),
    'first': failures[:_SHOWN_FAILURES],
  }


def _read_time(path: epath.Path) -> str | None:
  if not path.exists():
    return None
  return _format_time(datetime.datetime.fromtimestamp(path.stat().mtime))


def _format_time(time: datetime.datetime) -> str:
  return time.strftime('%Y-%m-%d %H:%M')
