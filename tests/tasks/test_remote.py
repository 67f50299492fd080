"""The whole way on remote storage: only programs and caches are local."""

import json
import signal
import subprocess
import sys
import time

import chex
from etils import epath
import jax
import numpy as np
from processes import ROOT, finish, finish_all, read_losses
import pytest
import tiny

from vjepa_jax.data import sources, storage
from vjepa_jax.interop.load import read_weights
from vjepa_jax.tasks.pretrain import pretrain
from vjepa_jax.tools.prepare import prepare
from vjepa_jax.tools.report import make_report
from vjepa_jax.training.telemetry import read_metrics


def _run_tool(name, *arguments):
  command = [sys.executable, '-m', f'vjepa_jax.tools.{name}', *arguments]
  subprocess.run(command, cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_run_on_remote_storage(gcs, toy_videos):
  shards, workdir = 'gs://bucket/toy', epath.Path('gs://bucket/run')
  source = sources.open_source(str(toy_videos))
  prepare(source, shards, None, shard_size=10, num_workers=0)
  config = tiny.get_config(shards)
  config.learning_rate.warmup_steps = 1
  config.total_steps = 2
  state = pretrain(config, workdir)
  restored = pretrain(config, workdir)
  chex.assert_trees_all_equal(*map(jax.device_get, (restored, state)))
  metrics = read_metrics(workdir)
  assert [line['step'] for line in metrics] == [1, 2]
  assert all(np.isfinite(line['loss']) for line in metrics)
  page = make_report(workdir, encode=False)
  assert 'mask short' in page and 'gs://bucket/run' in page
  params = read_weights(workdir, with_predictor=False).encoder_params
  chex.assert_trees_all_equal(params, jax.device_get(state.target))


@pytest.mark.slow
def test_everything_is_on_remote_storage(gcs, launcher, toy_videos):
  shards = 'gs://bucket/shards'
  _run_tool(
    'prepare',
    *(f'--input={toy_videos}', f'--output={shards}', '--short_side=32'),
    *('--shard_size=10', '--num_workers=0'),
  )
  config = f'tests/tasks/tiny.py:{shards}'
  finish(launcher.start('gs://bucket/whole', config=config))
  expected = read_losses(gcs.bucket / 'whole')
  assert list(expected) == list(range(1, 13))

  workers = '--config.data.num_workers=1'
  killed = launcher.start('gs://bucket/killed', workers, config=config)
  saved = gcs.bucket / 'killed' / 'checkpoints' / '4' / 'commit_success.txt'
  deadline = time.monotonic() + 200
  while not saved.exists():
    assert time.monotonic() < deadline, 'no checkpoint came'
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  # Storage that is away for a while is waited for.
  gcs.kill()
  resumed = launcher.start(
    *('gs://bucket/killed', workers, '--profile_steps=10:12'), config=config
  )
  time.sleep(10)
  gcs.start()
  assert 'resumed from step' in finish(resumed)
  assert read_losses(gcs.bucket / 'killed') == expected
  written = {
    path.relative_to(gcs.bucket / 'killed').parts[0]
    for path in (gcs.bucket / 'killed').rglob('*')
  }
  assert written >= {
    *('config.json', 'metrics.jsonl', 'tensorboard', 'profile'),
    *('checkpoints',),
  }
  assert list((gcs.bucket / 'killed' / 'profile').rglob('*.xplane.pb'))

  finish(
    launcher.start(
      'gs://bucket/probe',
      *(f'--config.data.train={shards}', f'--config.data.test={shards}'),
      *('--config.data.batch_size=8', '--config.data.num_workers=0'),
      '--config.total_epochs=1',
      config='configs/probe.py:folder,backbone=gs://bucket/killed,probe=linear',
    )
  )
  results = json.loads((gcs.bucket / 'probe' / 'results.json').read_text())
  assert results['test_videos'] == 24
  assert (gcs.bucket / 'probe' / 'confusion.png').read_bytes()[1:4] == b'PNG'
  _run_tool('report', 'gs://bucket/killed')
  page = (gcs.bucket / 'killed' / 'report.html').read_text()
  assert '<h2' in page and 'mask short' in page


@pytest.mark.slow
def test_two_processes_share_a_remote_workdir(gcs, launcher, toy_videos):
  storage.upload_folder(toy_videos.parent, 'gs://bucket/videos')
  config = f'tests/tasks/tiny.py:gs://bucket/videos/{toy_videos.name}'
  finish_all(launcher.start_two('gs://bucket/two', config=config))
  losses = read_losses(gcs.bucket / 'two')
  assert list(losses) == list(range(1, 13))
  output = finish(
    launcher.start('gs://bucket/two', '--config.total_steps=13', config=config)
  )
  assert 'resumed from step 12' in output
