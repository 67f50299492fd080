"""The health rules on recorded runs, and at their thresholds."""

import json
import pathlib

import pytest

from vjepa_jax.training import health

RUNS = pathlib.Path(__file__).parent / 'recorded'


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
  assert [f.state for f in findings] == ['learning']
  assert 'healthy' in health.format_findings(findings)


@pytest.mark.parametrize(
  'name,state',
  [
    ('published', 'rank loss'),
    ('no_ema', 'rank loss'),
    ('collapsed', 'collapse'),
    ('low_ema', 'rank loss'),
    ('high_rate', 'rank loss'),
    ('diverged', 'divergence'),
    ('low_rate', 'stall'),
    ('starved', 'starved'),
  ],
)
def test_runs_made_to_fail_are_found_out(name, state):
  metrics = _read(name)
  findings = health.find(metrics)
  assert findings[0].state == state, findings
  assert findings[0].severity != 'fine' and findings[0].remedy
  assert 'healthy' not in health.format_findings(findings)


def _repeat(count, **metrics):
  return [
    {
      'step': 10 * i + 1,
      'loss': 0.5 - 0.01 * i,
      'content_std': 0.7,
      'position_std': 0.2,
      'effective_rank': 40.0,
      'learning_rate': 1e-3,
    }
    | {k: v(i) if callable(v) else v for k, v in metrics.items()}
    for i in range(count)
  ]


def _fall(i):
  return 0.5 if i == 0 else 0.3


@pytest.mark.parametrize(
  'state,metrics',
  [
    ('collapse', {'content_std': 0.05, 'position_std': 0.02}),
    ('position only', {'content_std': 0.05, 'position_std': 0.5}),
    ('rank loss', {'effective_rank': lambda i: 40.0 / (1 + i)}),
    ('divergence', {'loss': lambda i: 0.5 if i < 8 else float('nan')}),
    ('divergence', {'skipped': lambda i: float(i == 9)}),
    ('divergence', {'gradient_norm_encoder': lambda i: 0.1 * 10.0 ** (i / 2)}),
    ('stall', {'loss': 0.5}),
    ('starved', {'data_wait_seconds': 0.4, 'seconds_per_step': 1.0}),
    (
      'videos replaced',
      {
        'replaced_videos': lambda i: 5 * i,
        'clips_per_second': 8.0,
        'seconds_per_step': 1.0,
      },
    ),
    ('probes below their start', {'probe_knn': _fall, 'probe_linear': _fall}),
    ('probes below their start', {'probe_attentive': _fall}),
  ],
)
def test_each_state_by_itself(state, metrics):
  assert _states(_repeat(20)) == ['learning']
  assert _states(_repeat(20, **metrics))[0] == state


def test_the_attentive_probe_outranks_the_others():
  falling = {'probe_knn': _fall, 'probe_linear': _fall}
  rising = {'probe_attentive': lambda i: 0.3 if i == 0 else 0.5}
  assert _states(_repeat(20, **falling, **rising)) == ['learning']


def test_a_rising_loss_with_rich_targets_is_explained():
  (finding,) = health.find(_repeat(20, loss=lambda i: 0.5 + 0.01 * i))
  assert finding.state == 'learning' and 'no harm' in finding.evidence
  # A weight that rises is no divergence, as long as predictions are not worse.
  rising = {'loss': lambda i: 0.5 + 0.1 * i, 'gradient_norm_encoder': 0.1}
  falling = {'loss_prediction': lambda i: 0.5 - 0.01 * i, 'loss_context': 1.0}
  (finding,) = health.find(_repeat(20, **rising, **falling))
  assert finding.state == 'learning' and 'no harm' not in finding.evidence
  images = {'image/loss_prediction': rising['loss']}
  assert _states(_repeat(20, **rising, **falling, **images)) == ['divergence']
  # Terms of other objectives count.
  assert _states(_repeat(20, loss_prediction=0.5, **rising)) == ['divergence']
  assert _states(_repeat(2)) == ['too early']


@pytest.mark.parametrize('prefix', ['', 'held_out_'])
def test_predictions_are_measured_by_the_frame_before(prefix):
  def make(share, count):
    names = f'{prefix}loss_copy', f'{prefix}loss_teacher_forcing'
    line = dict(zip(names, (0.5, 0.5 * share), strict=True))
    return [{'step': step, 'loss': 1.0, **line} for step in range(count)]

  assert _states(make(0.5, 40)) == ['predicting']
  assert '0.50 of the error' in str(health.find(make(0.5, 40))[0])
  assert _states(make(1.2, 8)) == ['too early']
  (finding,) = health.find(make(1.2, 40))
  assert (finding.state, finding.severity) == ('copying would do', 'warning')
