"""The health command as a user runs it."""

import json
import pathlib
import subprocess
import sys

import cv2
import pytest

RECORDED = pathlib.Path(__file__).parents[1] / 'training' / 'recorded'


def _run(*arguments):
  command = [sys.executable, '-m', 'vjepa_jax.tools.health']
  return subprocess.run(
    [*command, *map(str, arguments)], capture_output=True, text=True
  )


@pytest.fixture
def workdir(tmp_path):
  def make(name):
    lines = (RECORDED / f'{name}.jsonl').read_text().splitlines(True)
    (tmp_path / name).mkdir()
    (tmp_path / name / 'metrics.jsonl').write_text(''.join(lines[1:]))
    return tmp_path / name

  return make


def test_verdict_picture_and_exit_code(workdir):
  good, bad = workdir('small'), workdir('no_ema')
  result = _run(good)
  assert result.returncode == 0 and 'is healthy' in result.stdout
  assert cv2.imread(str(good / 'health.png')).std() > 10
  result = _run('--json', good, bad)
  assert result.returncode == 3
  states = [
    json.loads(line)['findings'][0]['state']
    for line in result.stdout.splitlines()
  ]
  assert states == ['learning', 'rank loss']
  assert not (bad / 'health.png').exists()


def test_a_folder_without_metrics_is_one_line(tmp_path):
  result = _run(tmp_path)
  assert result.returncode == 2
  assert result.stderr.strip().splitlines()[-1].startswith('error: ')
  assert 'holds no metrics.jsonl' in result.stderr
