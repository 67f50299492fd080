"""What do frozen features know? kNN, linear and attentive probes."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np
from sklearn import linear_model, neighbors, pipeline, preprocessing

from vjepa_jax.data.features import FeatureSource
from vjepa_jax.data.records import check_label
from vjepa_jax.evaluation.probe_grid import ProbeGrid, make_probe_step
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.progress import make_bar
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.step import TrainStep

_OPTIMIZER = make_optimizer()


def load_features(paths: str) -> tuple[np.ndarray, np.ndarray]:
  """Reads what `vjepa_jax.tools.extract` wrote of labelled videos.

  Args:
    paths: A folder of shards, a glob, or one shard.

  Returns:
    Features float32 `[N, segments * tokens, D]`, so that probes attend across
    the segments of a video, or `[N, segments * D]` if they were pooled; labels
    int64 `[N]`.

  Raises:
    FileNotFoundError: There are no such shards.
    ValueError: Shards are missing, or a video has no label.
  """
  source = FeatureSource(paths)
  features, labels = [], []
  for video in make_bar(source, desc='reading features', leave=False):
    check_label(video, 10**6)
    pooled = video.features.ndim == 2
    shape = (-1,) if pooled else (-1, video.features.shape[-1])
    features.append(video.features.astype(np.float32).reshape(shape))
    labels.append(video.label)
  return np.stack(features), np.array(labels)


def score_knn(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  neighbours: int = 10,
) -> float:
  """Scores a nearest-neighbour classifier by cosine on features `[N, D]`."""
  # Centred, because a common component would make all cosines alike.
  mean = train.mean(axis=0)
  knn = neighbors.KNeighborsClassifier(
    min(neighbours, len(train)), metric='cosine', weights='distance'
  )
  knn.fit(train - mean, train_labels)
  return float(knn.score(test - mean, test_labels))


def score_linear(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
) -> float:
  """Scores logistic regression on standardised features `[N, D]`."""
  classifier = pipeline.make_pipeline(
    preprocessing.StandardScaler(),
    linear_model.LogisticRegression(C=0.1, max_iter=300, tol=1e-3),
  )
  classifier.fit(train, train_labels)
  return float(classifier.score(test, test_labels))


def score_attentive(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  *,
  num_heads: int,
  steps: int = 500,
  batch_size: int = 64,
  learning_rate: float = 1e-3,
  weight_decay: float = 0.01,
  seed: int = 0,
) -> float:
  """Trains an attentive probe on frozen features and scores it.

  The protocol of V-JEPA 1 (AdamW, cosine to 0 without warm-up, clipping at 1)
  without its augmentations: the features are fixed. Each feature is brought to
  mean 0 and deviation 1 over the training tokens first, as for linear probes:
  a probe would otherwise spend its few steps on finding the scale of content
  beside that of a constant.

  Args:
    train, test: float32 `[N, tokens, D]` and `[M, tokens, D]`.
    train_labels, test_labels: int `[N]` and `[M]`.
    num_heads: Attention heads of the probe.
    steps: Batches to train on; each pass over the clips has an order of its
      own.
    batch_size: Clips a step.
    learning_rate: At the start.
    weight_decay: Of all but biases and norms.
    seed: Of initialisation and order.

  Returns:
    Share of test clips that are classified right.
  """
  mean, std = train.mean(axis=(0, 1)), train.std(axis=(0, 1)) + 1e-6
  train, test = (train - mean) / std, (test - mean) / std
  num_classes = int(max(train_labels.max(), test_labels.max())) + 1
  grid, step, classify = _compile_attentive(
    AttentiveProbe(num_classes, num_heads), learning_rate, weight_decay, steps
  )
  batch_size = min(batch_size, len(train))
  rng = np.random.default_rng(seed)
  order = np.zeros(0, np.int64)
  # One host may do this alone, inside of a mesh of all of them.
  with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
    state = grid.init(jax.random.key(seed), _OPTIMIZER, width=train.shape[-1])
    for _ in make_bar(range(steps), desc='attentive probe', leave=False):
      if len(order) < batch_size:
        order = rng.permutation(len(train))
      rows, order = np.split(order, [batch_size])
      stream = {'features': train[rows], 'label': train_labels[rows]}
      state, _ = step(state, {'video': stream})
    predicted = [
      classify(state.params['probe'], test[start : start + batch_size, None])
      for start in range(0, len(test), batch_size)
    ]
  predicted = np.concatenate(predicted)[:, 0].argmax(axis=-1)
  return float(np.mean(predicted == test_labels))


@functools.cache
def _compile_attentive(
  probe: AttentiveProbe, learning_rate: float, weight_decay: float, steps: int
) -> tuple[ProbeGrid, TrainStep, Callable[[Any, np.ndarray], jax.Array]]:
  """Makes a grid of one probe, its step and what classifies by it."""
  grid = ProbeGrid(None, probe, ((learning_rate, weight_decay),))
  schedule = make_schedule('cosine', value=1.0, final=0.0, total_steps=steps)
  step = make_probe_step(grid, _OPTIMIZER, schedule, clip_norm=1.0)
  return grid, jax.jit(step), jax.jit(grid.classify)
