"""Faults: each figure at toy size; what ends badly is not called good."""

import json
import subprocess
import sys

import pytest

from vjepa_jax.bench import faults, limits, runs
from vjepa_jax.bench.__main__ import main
from vjepa_jax.data.decode import open_video
from vjepa_jax.data.video import DecodeError


def test_each_kind_of_damage_is_one(tmp_path):
  clips = faults._make_clips(tmp_path, 24, 6)
  bad = [name for name, (_, is_bad) in clips.items() if is_bad]
  assert {name[5:-4] for name in bad} == set(faults._DAMAGE)
  for name in bad:
    with pytest.raises(DecodeError), open_video(clips[name][0]) as video:
      video.read(range(8), (0, 0, 64, 80), (32, 32))


def test_mistakes(tmp_path, monkeypatch, capsys):
  (figure,) = limits.measure_wrong_commands(tmp_path, quick=True).values()
  assert figure['tried'] == figure['good'] == 2
  monkeypatch.setattr(limits, 'WRONG_COMMANDS', ('train --list_configs',))
  (figure,) = limits.measure_wrong_commands(tmp_path, quick=True).values()
  assert figure['tried'] == 1 and figure['good'] == 0
  assert 'not one line and exit code 2: train' in capsys.readouterr().err


def test_orphans_are_seen(monkeypatch):
  monkeypatch.setattr(runs, 'ORPHAN_SECONDS', 0.5)
  script = 'import subprocess; subprocess.run(["sleep", "60"])'
  process = subprocess.Popen(
    [sys.executable, '-c', script], start_new_session=True
  )
  while len(runs.list_group(process.pid)) < 2:
    assert process.poll() is None
  assert runs.kill(process) > 0.5
  assert not runs.list_group(process.pid)


def test_runs_that_differ_are_not_equal(tmp_path, monkeypatch):
  results = {'a': ({1: 0.5, 2: 0.4}, b'x'), 'b': ({1: 0.5, 2: 0.4}, b'y')}
  results |= {'c': ({1: 0.5, 2: 0.3}, b'x'), 'd': ({1: 0.5}, b'x')}
  monkeypatch.setattr(runs, 'read_result', lambda path: results[path.name])
  (tmp_path / 'a.log').write_text('steps\nerror: no\n')
  expected = {'a': 'equal', 'b': 'the state differs'}
  expected |= {'c': 'losses differ from step 2 on', 'd': 'steps are missing'}
  for name, text in expected.items():
    assert runs.compare(tmp_path / name, 0, results['a']) == text
  assert runs.compare(tmp_path / 'a', 1, None) == 'exit code 1: error: no'


@pytest.mark.slow
def test_all_figures_at_toy_size(tmp_path):
  path = tmp_path / 'faults.json'
  assert main(['faults', '--quick', f'--json={path}']) == 0
  figures = json.loads(path.read_text())
  figures.pop('machine')
  assert len(figures) == 10
  for name, figure in figures.items():
    assert figure['tried'] == figure['good'] > 0, (name, figure)
