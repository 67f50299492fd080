"""What probes reach on features, and on pixels without any features."""

from collections.abc import Sequence
import functools
import statistics

import numpy as np

from vjepa_jax.data.clip import Clips
from vjepa_jax.evaluation import probing
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.positions import make_sincos_table
from vjepa_jax.models.tubelets import compute_grid, patchify

Scores = dict[str, float]

# Columns and rows of the table: accuracies with all labels and with few, and
# what they are of.
METHODS = {
  'attentive_top1': 'attentive',
  'linear_top1': 'linear',
  'knn_top1': 'kNN',
  'attentive_few_top1': 'attentive',
  'linear_few_top1': 'linear',
  'knn_few_top1': 'kNN',
}
_ENCODERS = {
  'random_init': 'random init',
  'pretrained': 'pretrained',
  'pixels': 'raw pixels',
  'differences': 'frame differences',
  'position': 'position alone',
}
# Which few clips have labels moves an accuracy by .03 to .05.
_DRAWS = 4


def score_features(
  labels: Sequence[np.ndarray],
  few: int,
  features: Sequence[np.ndarray],
  **options: int,
) -> Scores:
  """Scores frozen features by all probes; linear and kNN see their mean.

  Args:
    labels: int `[N]` of training clips, `[M]` of test clips.
    few: The same once more with only so many labelled clips, the mean over
      four draws.
    features: float32 `[N, tokens, D]` and `[M, tokens, D]`.
    **options: num_heads and steps of the attentive probe.

  Returns:
    Accuracies `attentive_top1`, `linear_top1`, `knn_top1`, and
    `attentive_few_top1` and so on.
  """
  vectors = [x.mean(axis=1) for x in features]
  return _score(labels, few, vectors, features, **options)


def score_pixels(
  train: Clips, test: Clips, encoder: Encoder, few: int, **options: int
) -> Scores:
  """Scores raw pixels by the probes that score features.

  The attentive probe sees the tubelets, reduced to the encoder's width by PCA,
  with their positions; linear and kNN see all frames at 8 x 8 cells.
  """
  tokens, positions = embed_pixels(train.videos, test.videos, encoder)
  tokens = [x + positions for x in tokens]
  vectors = [
    _shrink(x.videos).reshape(len(x.videos), -1) for x in (train, test)
  ]
  return _score((train.labels, test.labels), few, vectors, tokens, **options)


def embed_pixels(
  train: np.ndarray, test: np.ndarray, encoder: Encoder
) -> tuple[list[np.ndarray], np.ndarray]:
  """Reduces tubelets to the encoder's width, by PCA of those of `train`.

  Clips are uint8 `[N, frames, h, w, 3]`.

  Returns:
    Tokens of both, float32 `[N, K, D]`, and the table of positions `[K, D]`.
  """
  tokens = [
    np.asarray(patchify(videos, encoder.tubelet), np.float32) / 255
    for videos in (train, test)
  ]
  mean = tokens[0].mean(axis=(0, 1))
  flat = (tokens[0] - mean).reshape(-1, tokens[0].shape[-1])
  variances, axes = np.linalg.eigh(flat.T @ flat / len(flat))
  axes = axes[:, ::-1][:, : encoder.width]
  scale = variances[-1] ** -0.5
  grid = compute_grid(train.shape, encoder.tubelet)
  table = make_sincos_table(grid, axes.shape[1])
  return [(x - mean) @ axes * scale for x in tokens], table


def score_differences(train: Clips, test: Clips, few: int) -> Scores:
  """Scores differences of consecutive frames, which show motion directly."""
  vectors = [
    np.diff(_shrink(x.videos), axis=1).reshape(len(x.videos), -1)
    for x in (train, test)
  ]
  return _score((train.labels, test.labels), few, vectors)


def format_table(
  scores: dict[str, dict[str, float]], labels: int, few: int
) -> str:
  """Formats accuracies on held-out clips, encoders by methods."""
  counts = [f'{count} labelled clips'.center(30) for count in (labels, few)]
  rows = [
    ('', []),
    ('accuracy on held-out clips', counts),
    ('', [f'{name:>10}' for name in METHODS.values()]),
  ]
  for encoder, title in _ENCODERS.items():
    found = scores.get(encoder, {})
    if set(METHODS) & set(found):
      cells = [f'{found[m]:10.3f}' if m in found else '' for m in METHODS]
      rows.append((title, [cell.rjust(10) for cell in cells]))
  lines = [f'{title:28}{"".join(cells)}'.rstrip() for title, cells in rows]
  return '\n'.join(lines) + '\n'


def format_places(scores: dict[str, dict[str, float]]) -> str:
  """Formats what `dense.score_places` returned of the rows of the table."""
  lines = ['which way a single place moves    own half  other half']
  for encoder, title in _ENCODERS.items():
    found = scores.get(encoder, {})
    if 'dense_own' in found:
      cells = found['dense_own'], found['dense_other']
      lines.append(f'{title:34}{cells[0]:8.3f}{cells[1]:12.3f}')
  return '\n'.join(lines) + '\n'


def _shrink(videos: np.ndarray) -> np.ndarray:
  """Averages frames to 8 x 8 cells: float `[N, frames, 8, 8, 3]`, 0..1."""
  n, frames, size = videos.shape[:3]
  cells = videos.reshape(n, frames, 8, size // 8, 8, size // 8, 3)
  return cells.mean(axis=(3, 5)) / 255


def _score(labels, few, vectors, tokens=None, **options) -> Scores:
  """Scores pairs (train, test) with all labels, and the mean over few ones."""
  probes = {
    'linear': (probing.score_linear, *vectors),
    'knn': (probing.score_knn, *vectors),
  }
  if tokens is not None:
    attentive = functools.partial(probing.score_attentive, **options)
    probes['attentive'] = (attentive, *tokens)
  count = len(labels[0])
  starts = range(0, min(_DRAWS * few, count - few + 1), few)
  draws = {
    '': [slice(None)],
    '_few': [slice(start, start + few) for start in starts],
  }
  return {
    f'{name}{suffix}_top1': statistics.mean(
      score(train[part], labels[0][part], test, labels[1]) for part in parts
    )
    for suffix, parts in draws.items()
    for name, (score, train, test) in probes.items()
  }
