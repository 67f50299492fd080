"""The order of the loop, on a step that does next to nothing."""

import contextlib
import json
import logging
import os
import signal
from types import SimpleNamespace

from etils import epath
import jax
import numpy as np
import pytest

from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.training import loop
from vjepa_jax.training.feed import Quarantine
from vjepa_jax.training.goodput import Goodput
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.telemetry import Telemetry, read_metrics

MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])


def _place(array):
  return jax.device_put(array, sharding.replicate(MESH))


@jax.jit
def _step(state, batch):
  metrics = {'loss': 1.0 * state.step, 'skipped': batch}
  return state.replace(step=state.step + 1), metrics


class _Feed:
  """Batches say whether their step is to be skipped."""

  wait_seconds = 0.5

  def __init__(self, events, step, skips):
    self.progress = {'samples': 8 * step}
    self._step, self._skips = step, skips
    self.quarantine = SimpleNamespace(count=0)
    self._events = events

  def __next__(self):
    self._step += 1
    self.progress['samples'] += 8
    self.quarantine.count += 1
    self._events.append(f'batch {self._step}')
    return _place(np.float32(self._step in self._skips))


class _Checkpoints:
  """Remembers what was saved."""

  def __init__(self, events):
    self._events = events
    self.progress = None

  def is_due(self, step):
    return step == 2

  def save(self, step, state, progress):
    assert state.step == step
    self._events.append(f'save {step}')
    self.progress = json.loads(json.dumps(progress))

  def wait(self):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs the loop; returns events, what was saved, and the last state."""

  def run(start=0, progress=None, leave=None, skips=(), **cadence):
    reached = lambda self, step: step == leave  # noqa: E731
    monkeypatch.setattr(loop.Preemption, 'reached', reached)
    events = []
    checkpoints = _Checkpoints(events)

    def evaluate(state):
      events.append(f'evaluate {int(state.step)}')
      return {'score': 1.0}

    goodput = Goodput()
    goodput.resume((progress or {}).get('seconds', {}))
    telemetry = Telemetry(
      epath.Path(tmp_path),
      start_step=start,
      total_steps=4,
      clips_per_step=8,
      goodput=goodput,
    )
    state = TrainState(_place(np.int32(start)), None, None, None)
    with jax.set_mesh(MESH), contextlib.closing(telemetry):
      state = loop.train(
        state,
        _step,
        _Feed(events, start, skips),
        loop.Cadence(4, diagnose_every=0, **cadence),
        start_step=start,
        progress=progress or {},
        checkpoints=checkpoints,
        telemetry=telemetry,
        evaluate=evaluate if cadence.get('evaluate_every') else None,
      )
    return events, checkpoints.progress, state

  return run


def test_the_order_is_the_contract(run):
  events, _, state = run(evaluate_every=2)
  assert events == [
    *('evaluate 0', 'batch 1', 'batch 2', 'evaluate 2', 'save 2'),
    *('batch 3', 'batch 4', 'evaluate 4', 'save 4'),
  ]
  assert state.step == 4


@pytest.mark.parametrize('leave', [2, 4])
def test_a_preemption_saves_and_leaves_the_evaluation_for_later(run, leave):
  events, progress, state = run(evaluate_every=2, leave=leave)
  assert events[-1] == f'save {leave}' and f'evaluate {leave}' not in events
  assert state is None and progress['evaluated'] is False
  events, progress, state = run(leave, progress, evaluate_every=2)
  assert events[0] == f'evaluate {leave}' and events.count(events[0]) == 1
  assert state.step == 4 and progress['evaluated'] is True
  # What was evaluated is in the metrics.
  events, _, _ = run(4, progress, evaluate_every=2)
  assert events == ['save 4']


def test_counts_go_on_where_they_were(run, tmp_path):
  _, progress, _ = run(leave=3, skips={2, 3}, log_every=4)
  assert (progress['replaced'], progress['skipped']) == (3, 2)
  assert progress['samples'] == 24
  _, _, _ = run(3, progress, skips={4}, log_every=4)
  (line,) = read_metrics(tmp_path)
  assert line['step'] == 4 and line['loss'] == 3.0
  assert (line['replaced_videos'], line['skipped_steps']) == (4, 3)
  assert line['data_wait_seconds'] == 0.5 and 'data_wait_host' not in line


def test_a_lost_run_stops_at_the_next_line(run):
  run(skips={1, 3, 4}, max_skipped=3)
  with pytest.raises(FloatingPointError, match='steps 1 to 2: go back to an'):
    run(skips={1, 2, 4}, max_skipped=2, log_every=4)


def test_shares_of_time_are_of_all_lives(run, tmp_path):
  before = dict.fromkeys(('init', 'save', 'wait'), 1e3) | {'total': 1e4}
  _, progress, _ = run(progress={'seconds': before}, log_every=2)
  first, last = read_metrics(tmp_path)
  shares = {k: v for k, v in last.items() if k.startswith('share_')}
  assert last['goodput'] + sum(shares.values()) == pytest.approx(1.0)
  assert shares['share_save'] == pytest.approx(0.1, rel=0.01)
  assert shares['share_lost'] == 0 and shares['share_compile'] > 0
  assert progress['seconds']['wait'] == 1e3 + 4 * 0.5
  # Two steps of ten seconds each are done again.
  lines = [
    first | {'seconds_per_step': 10.0},
    last | {'seconds_per_step': 10.0},
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (tmp_path / 'metrics.jsonl').write_text(text + '{"step": 4, "lo')
  _, progress, _ = run(2, progress)
  assert progress['seconds']['lost'] == pytest.approx(20.0)
  assert [line['step'] for line in read_metrics(tmp_path)] == [2, 3, 4]


@pytest.mark.parametrize('start,leave', [(0, None), (2, None), (0, 2), (3, 3)])
def test_a_trace_may_begin_and_end_inside(
  run, monkeypatch, caplog, start, leave
):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', calls.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  with caplog.at_level(logging.INFO, logger='absl'):
    run(start, leave=leave, profile=(1, 3))
  assert len(calls) == (0 if start == 3 else 2)
  last = 3 if leave is None else 'where it was interrupted'
  said = f'trace of steps {max(start, 1)} to {last} is in'
  assert (said in caplog.text) == (start < 3)


def test_after_the_loop_the_signal_ends_the_process():
  before = signal.getsignal(signal.SIGTERM)
  try:
    with loop.Preemption() as preemption:
      os.kill(os.getpid(), signal.SIGTERM)
      assert preemption.reached(0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)


def test_a_quarantine_names_each_video_once(tmp_path):
  def fail(name):
    return json.dumps([{'name': name, 'reason': 'cut'}])

  path = tmp_path / 'quarantine.jsonl'
  Quarantine(epath.Path(tmp_path)).add([fail('a'), fail('b'), fail('a')])
  with path.open('a') as file:
    file.write('{"name": "c", "rea')  # killed in the middle
  again = Quarantine(epath.Path(tmp_path))
  again.add([fail('b'), fail('c')])
  assert again.count == 2
  names = [json.loads(line)['name'] for line in path.read_text().splitlines()]
  assert names == ['a', 'b', 'c']
