"""The health command as a user runs it."""

import json

from commands import make_workdir, run_command
import cv2

from vjepa_jax.tools import health


def test_verdict_picture_and_exit_code(tmp_path, capsys):
  good = make_workdir(tmp_path / 'good', 'small')
  bad = make_workdir(tmp_path / 'bad', 'no_ema')
  assert run_command(health, str(good)) == 0
  assert 'is healthy' in capsys.readouterr().out
  assert cv2.imread(str(good / 'health.png')).std() > 10
  assert run_command(health, '--json', str(good), str(bad)) == 3
  states = [
    json.loads(line)['findings'][0]['state']
    for line in capsys.readouterr().out.splitlines()
  ]
  assert states == ['learning', 'rank loss']
  assert not (bad / 'health.png').exists()
