"""The quickstart from videos to table and picture, at toy size."""

import json

import cv2
import pytest

from configs import quickstart as recipe
from vjepa_jax.evaluation import dense
from vjepa_jax.evaluation.baselines import METHODS
from vjepa_jax.sets.toy import write_toy_videos
from vjepa_jax.tasks import quickstart as task
from vjepa_jax.training.telemetry import read_metrics


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('quickstart')
  write_toy_videos(folder / 'videos', 6, size=(128, 160), frames=16)
  config = recipe.get_config()
  config.encoder.size = 'nano'
  config.predictor.update(width=48, depth=1, num_heads=2)
  config.motion.update(
    folder=str(folder / 'motion'),
    videos=str(folder / 'videos'),
    # Batches of all and of few labels have one shape, and one program.
    num_train=128,
    num_test=64,
    max_clips=128,
    few_clips=64,
  )
  # The attentive probe on the way is for test_hosts.
  config.probe.update(every_steps=2, attentive_steps=10, attentive_labels=0)
  config.total_steps = 2
  config.learning_rate.warmup_steps = 1
  return config, folder / 'run', task.quickstart(config, folder / 'run')


def test_results_are_complete(finished):
  _, workdir, results = finished
  assert json.loads((workdir / 'results.json').read_text()) == results
  for method in METHODS:
    assert set(results[method]) == {'random_init', 'pretrained', 'pixels'}
    assert all(0 <= v <= 1 for v in results[method].values())
  for share in dense.METHODS:
    rows = {'random_init', 'pretrained', 'pixels', 'position'}
    assert set(results[share]) == rows
    assert all(0 <= v <= 1 for v in results[share].values())
  assert set(results['seconds']) == {'data', 'train', 'total'}
  assert results['target_std'] > 0 and results['effective_rank'] >= 1
  picture = cv2.imread(str(workdir / 'report.png'))
  assert picture.shape[0] > 500 and picture.std() > 10
  # Accuracy is known over time.
  lines = [m for m in read_metrics(workdir) if 'probe_linear' in m]
  assert [line['step'] for line in lines] == [0, 2]
  assert all(0 <= line['probe_linear'] <= 1 for line in lines)


def test_running_again_gives_the_same_results(finished):
  config, workdir, results = finished
  again = task.quickstart(config, workdir)
  for name in set(results) - {'seconds'}:
    assert again[name] == results[name]
