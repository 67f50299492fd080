"""Probes know what is in features, by whatever way the features came."""

import numpy as np
import pytest

from vjepa_jax.data.clip import ClipOptions, load_clips
from vjepa_jax.data.sources import open_source
from vjepa_jax.evaluation import probing


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
  options = ClipOptions(frames=4, resolution=32, frame_step=2)
  source = open_source(str(toy_videos))
  clips = load_clips(source, options, limit=12, labelled=True)
  assert clips.videos.shape == (12, 4, 32, 32, 3)
  # Labels take turns; an even stride would see half of them.
  assert len(set(clips.labels.tolist())) == 4
  folder = open_source(str(toy_videos.parent))
  with pytest.raises(ValueError, match='has no label'):
    load_clips(folder, options, labelled=True)
