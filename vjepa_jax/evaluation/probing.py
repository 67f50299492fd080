"""What do frozen features know? kNN, linear and attentive probes."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np
from sklearn import linear_model, neighbors, pipeline, preprocessing

from vjepa_jax.data.features import FeatureSource
from vjepa_jax.data.records import check_label
from vjepa_jax.evaluation.batching import get_own_rows
from vjepa_jax.evaluation.probe_grid import ProbeGrid, make_probe_step
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.parallel import hosts, sharding
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.progress import make_bar
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.schedules import make_schedule
from vjepa_jax.training.state import TrainState
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
    UserError: Shards are missing, or a video has no label.
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
  return float(fit_linear(train, train_labels).score(test, test_labels))


def fit_linear(features: np.ndarray, labels: np.ndarray) -> pipeline.Pipeline:
  """Fits logistic regression to standardised features `[N, D]`."""
  classifier = pipeline.make_pipeline(
    preprocessing.StandardScaler(),
    linear_model.LogisticRegression(C=0.1, max_iter=300, tol=1e-3),
  )
  return classifier.fit(features, labels)


def score_attentive(
  train: np.ndarray,
  train_labels: np.ndarray,
  test: np.ndarray,
  test_labels: np.ndarray,
  *,
  batch_size: int = 64,
  **options: Any,
) -> float:
  """Trains an attentive probe on frozen features and scores it.

  One host does this alone, on one of its devices.

  Args:
    train, test: float32 `[N, tokens, D]` and `[M, tokens, D]`.
    train_labels, test_labels: int `[N]` and `[M]`.
    batch_size: Clips a step.
    **options: See `score_attentive_batches`.

  Returns:
    Share of test clips that are classified right.
  """
  mesh = make_mesh(devices=jax.local_devices()[:1])
  batches = (
    _split(features, labels, batch_size)
    for features, labels in ((train, train_labels), (test, test_labels))
  )
  with jax.set_mesh(mesh):
    return score_attentive_batches(*batches, mesh, **options)


class Batches(NamedTuple):
  """Features of labelled clips, in batches that are split over hosts."""

  features: np.ndarray  # float32 [batches, rows of this host, tokens, D]
  labels: np.ndarray  # int [batches, rows of all hosts], -1 for no clip


def _split(
  features: np.ndarray, labels: np.ndarray, batch_size: int
) -> Batches:
  """Splits clips in memory into batches as equal as they can be."""
  count = -(-len(labels) // batch_size)
  rows = -(-len(labels) // count)
  missing = count * rows - len(labels)
  features = np.pad(features, [(0, missing), (0, 0), (0, 0)])
  labels = np.pad(labels, (0, missing), constant_values=-1)
  return Batches(
    features.reshape(count, rows, *features.shape[1:]),
    labels.reshape(count, rows),
  )


def score_attentive_batches(
  train: Batches,
  test: Batches,
  mesh: Mesh,
  *,
  num_heads: int,
  steps: int = 500,
  learning_rate: float = 1e-3,
  weight_decay: float = 0.01,
  seed: int = 0,
) -> float:
  """Trains and scores an attentive probe, all hosts of the mesh together.

  The protocol of V-JEPA 1 (AdamW, cosine to 0 without warm-up, clipping at 1)
  without its augmentations: the features are fixed. Each feature is brought to
  mean 0 and deviation 1 over the training tokens first, as for linear probes:
  a probe would otherwise spend its few steps on finding the scale of content
  beside that of a constant.

  Args:
    train, test: Clips to train on, and to score.
    mesh: What is set; rows are split over all its devices.
    num_heads: Attention heads of the probe.
    steps: Batches to train on. Clips stay in their rows, so that none moves to
      another host; each pass over the clips has an order of its own in each.
    learning_rate: At the start.
    weight_decay: Of all but biases and norms.
    seed: Of initialisation and order.
  """
  rows = train.labels.shape[1]
  own = get_own_rows(mesh, rows)
  mean, std = _measure(train.features[train.labels[:, own] >= 0], mesh)
  num_classes = int(max(train.labels.max(), test.labels.max())) + 1
  init, step, classify = _compile_attentive(
    AttentiveProbe(num_classes, num_heads),
    train.features.shape[-1],
    (learning_rate, weight_decay),
    steps,
    mesh,
  )

  def place(features, labels):
    stream = {'features': (features - mean) / std, 'label': labels}
    return sharding.make_global(stream, sharding.shard_batch(mesh))

  state, metrics = init(jax.random.key(seed)), None
  rng = np.random.default_rng(seed)
  numbers = np.repeat(np.arange(len(train.labels))[:, None], rows, axis=1)
  order = numbers[:0]
  for _ in make_bar(range(steps), desc='attentive probe', leave=False):
    if not len(order):
      order = rng.permuted(numbers, axis=0)
    batch, order = order[0, own], order[1:]
    features = train.features[batch, np.arange(len(own))]
    stream = place(features, train.labels[batch, own])
    # Steps that are not under way yet would fill the devices.
    jax.block_until_ready(metrics)
    state, metrics = step(state, {'video': stream})
  own = get_own_rows(mesh, test.labels.shape[1])
  hits = 0
  for features, labels in zip(test.features, test.labels, strict=True):
    stream = place(features, labels[own])
    hits += int(classify(state.params['probe'], stream))
  return float(hits / np.count_nonzero(test.labels >= 0))


def _measure(features: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
  """Measures mean and deviation over tokens `[N, tokens, D]` of all hosts."""

  def average(x):
    count = np.full(1, x.shape[0] * x.shape[1], np.float32)
    sums = np.concatenate([count, x.sum(axis=(0, 1))])
    if mesh.is_multi_process:
      sums = jax.device_get(hosts.gather_rows(sums, mesh)).sum(axis=0)
    return sums[1:] / sums[0]

  mean = average(features)
  return mean, np.sqrt(average(np.square(features - mean))) + 1e-6


@functools.cache
def _compile_attentive(
  probe: AttentiveProbe,
  width: int,
  point: tuple[float, float],
  steps: int,
  mesh: Mesh,
) -> tuple[Callable[..., TrainState], TrainStep, Callable[..., jax.Array]]:
  """Makes what starts a grid of one probe, trains it, and counts its hits."""
  grid = ProbeGrid(None, probe, (point,))
  schedule = make_schedule('cosine', value=1.0, final=0.0, total_steps=steps)
  step = make_probe_step(grid, _OPTIMIZER, schedule, clip_norm=1.0)

  def count_hits(params, stream):
    shares = grid.classify(params, stream['features'][:, None])
    return (shares[:, 0].argmax(axis=-1) == stream['label']).sum()

  jit = functools.partial(jax.jit, out_shardings=sharding.replicate(mesh))
  init = jit(lambda key: grid.init(key, _OPTIMIZER, width))
  return init, jit(step, donate_argnums=0), jit(count_hits)
