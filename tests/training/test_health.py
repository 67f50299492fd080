"""The health rules on recorded runs, and at their thresholds."""

import json
import pathlib

import pytest

from vjepa_jax.training import health

RUNS = pathlib.Path(__file__).parent / 'runs'


def _read(name):
  lines = (RUNS / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines[1:]]


def _states(metrics):
  return [finding.state for finding in health.find(metrics)]


@pytest.mark.parametrize('name', ['small', 'layer_norm'])
def test_runs_that_work_are_called_healthy_all_the_way(name):
  metrics = _read(name)
  for end in range(1, len(metrics) + 1):
    findings = health.find(metrics[:end])
    assert [f.severity for f in findings] == ['fine'], (end, findings)
  assert _states(metrics) == ['learning']
  assert 'healthy' in health.format_findings(findings)


@pytest.mark.parametrize(
  'name,states',
  [
    ('published', {'rank loss', 'collapse', 'position only'}),
    ('no_ema', {'rank loss', 'collapse', 'position only'}),
    ('low_ema', {'rank loss', 'collapse', 'position only'}),
    ('high_rate', {'divergence', 'collapse', 'rank loss'}),
    ('low_rate', {'stall'}),
    ('starved', {'starved'}),
  ],
)
def test_runs_made_to_fail_are_found_out(name, states):
  metrics = _read(name)
  findings = health.find(metrics)
  assert findings[0].severity != 'fine'
  assert findings[0].state in states, findings
  assert findings[0].remedy
