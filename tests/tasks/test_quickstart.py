"""The quickstart from videos to table and picture, at toy size."""

import json

import cv2
import numpy as np
import pytest

from configs import quickstart as recipe
from vjepa_jax.evaluation import probing
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
    num_train=48,
    num_test=16,
    max_clips=40,
    few_clips=16,
    supervised_steps=2,
  )
  config.probe.update(every_steps=2, attentive_steps=10)
  config.total_steps = 2
  config.learning_rate.warmup_steps = 1
  return config, folder / 'run', task.quickstart(config, folder / 'run')


def test_results_are_complete(finished):
  _, workdir, results = finished
  assert json.loads((workdir / 'results.json').read_text()) == results
  for method in task.METHODS:
    assert set(results[method]) == {'random_init', 'pretrained', 'pixels'}
    assert all(0 <= v <= 1 for v in results[method].values())
  assert set(results['seconds']) == {'data', 'train', 'total'}
  assert results['target_std'] > 0 and results['effective_rank'] >= 1
  picture = cv2.imread(str(workdir / 'report.png'))
  assert picture.shape[0] > 500 and picture.std() > 10


def test_accuracy_is_known_over_time(finished):
  _, workdir, _ = finished
  lines = [m for m in read_metrics(workdir) if 'probe_attentive' in m]
  assert [line['step'] for line in lines] == [0, 2]
  assert all(0 <= line['probe_attentive'] <= 1 for line in lines)


def test_running_again_gives_the_same_results(finished):
  config, workdir, results = finished
  again = task.quickstart(config, workdir)
  for name in set(results) - {'seconds'}:
    assert again[name] == results[name]


def test_probes_learn_what_is_there_and_nothing_else():
  def attentive(*arguments):
    return probing.score_attentive(
      *arguments, num_heads=2, steps=120, learning_rate=5e-3
    )

  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 400)
  signal = np.eye(4)[labels][:, None] * 3  # in every token
  known = rng.normal(size=(400, 5, 16))
  known[..., :4] += signal
  unknown = rng.normal(size=(400, 5, 16))
  for features, low, high in ((known, 0.75, 1.0), (unknown, 0.1, 0.4)):
    features = features.astype(np.float32)
    pooled = features.mean(axis=1)
    scores = [
      score(x[:300], labels[:300], x[300:], labels[300:])
      for score, x in (
        (probing.score_knn, pooled),
        (probing.score_linear, pooled),
        (attentive, features),
      )
    ]
    assert all(low <= score <= high for score in scores), scores


def test_labelled_clips_are_a_fair_subset(toy_videos):
  from vjepa_jax.data.pipeline import ClipOptions
  from vjepa_jax.data.sources import open_source

  options = ClipOptions(frames=4, resolution=32, frame_step=2)
  source = open_source(str(toy_videos))
  clips = probing.load_labelled_clips(source, options, limit=12)
  assert clips.videos.shape == (12, 4, 32, 32, 3)
  # Labels take turns; an even stride would see half of them.
  assert len(set(clips.labels.tolist())) == 4
  folder = open_source(str(toy_videos.parent))
  with pytest.raises(ValueError, match='has no label'):
    probing.load_labelled_clips(folder, options)
