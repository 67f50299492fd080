"""Pictures of masks, features and curves."""

from collections.abc import Iterable, Mapping, Sequence
import textwrap
from typing import Any

from etils import epath
from matplotlib import figure
import numpy as np

from vjepa_jax.plots.figures import choose_steps, save, show_heat, show_rows

Grid = tuple[int, int, int]


def paint_mask(
  video: np.ndarray, context: np.ndarray, target: np.ndarray, grid: Grid
) -> np.ndarray:
  """Paints a mask over a clip: targets orange, unused tokens dark.

  Args:
    video: uint8 `[frames, height, width, 3]`.
    context: Context ids `[Kc]`, raster order over (t, h, w).
    target: Target ids `[Kt]`.
    grid: Tubelet grid (T, H, W).

  Returns:
    float `[frames, height, width, 3]`, 0..1.
  """
  role = np.zeros(grid)
  role.flat[context], role.flat[target] = 1, 2
  role = np.kron(role, np.ones(np.floor_divide(video.shape[:3], grid)))
  pixels = video / 255.0
  orange = 0.25 * pixels + 0.75 * np.array([0.95, 0.55, 0.15])
  role = role[..., None]
  return np.where(role == 1, pixels, np.where(role == 2, orange, 0.2 * pixels))


def project_features(features: np.ndarray, grid: Grid) -> np.ndarray:
  """Projects features of clips to three colours by their principal components.

  Args:
    features: `[B, N, D]`; components are those of all tokens together.
    grid: Tubelet grid (T, H, W), N tokens in raster order.

  Returns:
    float `[B, T, H, W, 3]`, 0..1.
  """
  tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
  tokens -= tokens.mean(axis=0)
  _, axes = np.linalg.eigh(tokens.T @ tokens)
  colours = tokens @ axes[:, :-4:-1]
  low, high = np.percentile(colours, [2, 98], axis=0)
  colours = np.clip((colours - low) / np.maximum(high - low, 1e-9), 0, 1)
  return colours.reshape(len(features), *grid, 3)


def find_curves(
  metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, list[tuple[float, float]]]:
  """Finds steps and values by label, without copies of other curves.

  Args:
    metrics: Lines of metrics.jsonl.
    names: Labels of the metrics, some of which may be missing.
  """
  curves = {}
  for name, label in names.items():
    points = [(line['step'], line[name]) for line in metrics if name in line]
    if points and points not in curves.values():
      curves[label] = points
  return curves


_MAX_DEPTH = 48
# Titles of charts, and the labels of the metrics in each.
CURVES = (
  (
    'loss',
    {
      'loss': 'loss',
      'loss_prediction': 'its prediction term',
      'image/loss_prediction': 'the same of images',
      'loss_teacher_forcing': 'of the next frame',
      'loss_rollout': 'of imagined frames',
      'loss_copy': 'of the frame before',
      'held_out_loss_teacher_forcing': 'of the next frame, held out',
    },
  ),
  (
    'standard deviation of targets',
    {
      'target_std': 'all tokens',
      'content_std': 'over clips at a place',
      'position_std': 'over places of the mean clip',
    },
  ),
  (
    'effective rank of targets',
    {'effective_rank': 'tokens', 'effective_rank_clips': 'clip means'},
  ),
  (
    'online probe, accuracy',
    {
      'probe_attentive': 'attentive',
      'probe_knn': 'kNN',
      'probe_linear': 'linear',
    },
  ),
  (
    'gradient norm',
    {
      'gradient_norm_encoder': 'encoder',
      'gradient_norm_predictor': 'predictor',
    },
  ),
  ('learning rate', {'learning_rate': 'learning rate'}),
  ('EMA momentum', {'ema': 'momentum'}),
  (
    'seconds',
    {'seconds_per_step': 'a step', 'data_wait_seconds': 'waiting for data'},
  ),
  ('loss by stream', {'video/loss': 'videos', 'image/loss': 'images'}),
  *(
    (
      f'loss by level, {stream}',
      {f'{prefix}loss_level_{i}': f'block {i}' for i in range(_MAX_DEPTH)},
    )
    for stream, prefix in (('videos', ''), ('images', 'image/'))
  ),
)


def _plot_all(
  axes: Iterable[Any], metrics: Sequence[Mapping[str, Any]]
) -> None:
  """Plots the first of `CURVES`, one a place."""
  for axis, (title, names) in zip(axes, CURVES, strict=False):
    axis.set_title(title, fontsize=10)
    for label, points in find_curves(metrics, names).items():
      axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
    if axis.lines:
      axis.legend(fontsize=8)


def draw_curves(
  path: epath.PathLike, metrics: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Draws the curves of a run to a PNG, under a title."""
  fig = figure.Figure(figsize=(14, 6.4), layout='constrained')
  fig.suptitle('\n'.join(textwrap.wrap(title, 150)), fontsize=10)
  _plot_all(fig.subplots(2, 4).flat, metrics)
  save(fig, path)


def draw_report(
  path: epath.PathLike,
  *,
  videos: np.ndarray,
  masks: Mapping[str, tuple[np.ndarray, np.ndarray]],
  features: Mapping[str, np.ndarray],
  grid: Grid,
  metrics: Sequence[Mapping[str, Any]],
) -> None:
  """Draws masks over frames, feature PCA over frames, and the curves.

  Args:
    path: PNG to write.
    videos: Clips to show side by side, uint8 `[n, frames, height, width, 3]`.
    masks: Context and target ids by mask name, painted over each clip.
    features: Features `[B, N, D]` by encoder name, of clips of which the first
      n are `videos`.
    grid: Tubelet grid (T, H, W).
    metrics: Lines of metrics.jsonl.
  """
  rows = {'clip': videos / 255.0}
  for name, ids in masks.items():
    rows[f'mask {name}'] = np.stack([paint_mask(v, *ids, grid) for v in videos])
  # One frame a time step; of features there are no more.
  stride = videos.shape[1] // grid[0]
  rows = {name: clips[:, ::stride] for name, clips in rows.items()}
  for name, values in features.items():
    rows[f'PCA {name}'] = project_features(values, grid)[: len(videos)]

  height = 1.4 * len(rows) + 0.4
  fig = figure.Figure(figsize=(14, height + 3.4), layout='constrained')
  top, bottom = fig.subfigures(2, 1, height_ratios=[height, 3.4])
  top.suptitle(
    'Context as it is, targets orange, unused tokens dark; three principal '
    'components of the features as colours',
    fontsize=10,
  )
  show_rows(top, ((k, np.concatenate(x)) for k, x in rows.items()))
  _plot_all(bottom.subplots(1, 4), metrics)
  save(fig, path)


def draw_confusion(
  path: epath.PathLike,
  labels: np.ndarray,
  predicted: np.ndarray,
  num_classes: int,
) -> None:
  """Draws which classes are taken for which, and the accuracy of each.

  Args:
    path: PNG to write.
    labels, predicted: Classes, int `[N]`.
    num_classes: How many there are; of many only some get a tick.
  """
  matrix = np.zeros((num_classes, num_classes))
  np.add.at(matrix, (labels, predicted), 1)
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  fig = figure.Figure(figsize=(11, 5.4), layout='constrained')
  left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
  image = left.imshow(shares, cmap='magma', vmin=0, vmax=1)
  fig.colorbar(image, ax=left, label='share of a class')
  ticks = choose_steps(num_classes, 16)
  left.set(xlabel='predicted class', ylabel='class', xticks=ticks, yticks=ticks)
  if num_classes <= 12:
    for (row, column), share in np.ndenumerate(shares):
      colour = 'black' if share > 0.6 else 'white'
      left.text(
        column, row, f'{100 * share:.0f}', ha='center', va='center', c=colour
      )
  # Worst first; a class without test videos has no accuracy.
  present = np.flatnonzero(matrix.sum(axis=1))
  accuracy = np.diag(shares)[present]
  order = np.argsort(accuracy, kind='stable')
  right.bar(np.arange(len(order)), accuracy[order], width=0.9)
  right.axhline(accuracy.mean(), color='black', linewidth=1)
  right.set_title(f'accuracy by class, mean {accuracy.mean():.3f}', fontsize=10)
  right.set_ylim(0, 1)
  ticks = choose_steps(len(order), 24)
  right.set_xticks(ticks, present[order][ticks], fontsize=8)
  right.set_xlabel('class, worst first')
  right.grid(alpha=0.3, axis='y')
  save(fig, path)


def draw_attention(
  path: epath.PathLike,
  videos: np.ndarray,
  attention: np.ndarray,
  titles: Sequence[str],
) -> None:
  """Draws where a probe looks, over the frames of clips.

  Args:
    path: PNG to write.
    videos: uint8 `[n, frames, h, w, 3]`.
    attention: float `[n, T, H, W]`; each clip has its own scale.
    titles: One a clip.
  """
  count, steps = attention.shape[:2]
  shown = choose_steps(steps, 8)
  stride = videos.shape[1] // steps
  frames = shown * stride + stride // 2
  size = 1 + 1.4 * len(shown), 1.5 * count
  fig = figure.Figure(figsize=size, layout='constrained')
  rows = zip(titles, videos[:, frames], strict=True)
  axes = show_rows(fig, rows, [[f'frame {frame}' for frame in frames]])
  for (i, k), axis in np.ndenumerate(axes):
    show_heat(axis, attention[i, shown[k]], attention[i].max())
  save(fig, path)
