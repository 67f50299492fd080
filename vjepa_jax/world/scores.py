"""How far off predictions are, beside baselines.

Of each clip are scored:
  prediction: what the model predicts.
  last: the last visible frame, repeated. Features are those of the clip that
    ends in a still; pixels are the frame itself, `last_decoded` what the
    decoder makes of the features.
  copy: the features of the nearest visible tubelet, of a target encoder that
    sees the visible ones alone.
  mean: the mean of visible features, or frames, over time.
  average: the mean over other clips of the features at a position.
  untrained: an untrained predictor on the trained encoder.
  actual: the features of what was there; its pixels are the decoder's ceiling.
"""

from collections.abc import Sequence

import jax
import numpy as np

from vjepa_jax.progress import make_bar
from vjepa_jax.world.baselines import (
  average_places,
  fill_pixels,
  find_nearest,
  init_predictor,
)
from vjepa_jax.world.predict import (
  MaskedPredictor,
  score_features,
  score_pixels,
  summarize,
)
from vjepa_jax.world.rollout import Render, count_frames, roll_out

TITLES = {
  'prediction': 'imagined',
  'last': 'last frame repeated',
  'last_decoded': '  the same, decoded',
  'copy': 'nearest features copied',
  'mean': 'mean over visible time',
  'average': 'average clip',
  'untrained': 'untrained predictor',
  'actual': 'decoded from the truth',
}
_METRICS = {'cosine': 'cosine', 'error': 'error', 'psnr': 'PSNR, dB'}

# By method and metric, `[B]` each.
Scores = dict[str, dict[str, np.ndarray]]
Summary = dict[str, dict[str, dict[str, float]]]


class Scorer:
  """Scores the prediction of hidden tokens and its baselines, by clip.

  Clips are uint8 `[B, frames, h, w, 3]`.
  """

  def __init__(
    self,
    predictor: MaskedPredictor,
    render: Render | None = None,
    average: bool = True,
  ):
    """Compiles nothing yet.

    Args:
      predictor: The model and its mask.
      render: Of `make_render`, for scores of pixels.
      average: Whether the average of the space is of other clips.
    """
    self._predictor, self._render = predictor, render
    self._average = average
    world = predictor.world
    self._untrained = world.params | {
      'predictor': init_predictor(world, jax.random.key(0))
    }

  def score(self, video: np.ndarray) -> Scores:
    """Scores clips.

    Returns:
      For each method of `TITLES` that applies: 'cosine' and 'error' of its
      features, 'psnr' of its pixels in dB, each `[B]`.
    """
    predictor = self._predictor
    masks, grid = predictor.masks, predictor.grid
    prediction = predictor.predict(video)
    truth = predictor.encode_hidden(video)
    visible = np.asarray(prediction.visible)
    frames = self._fill(video)
    still = np.round(frames['last']).astype(np.uint8)
    features = {
      'prediction': prediction.predicted,
      'last': predictor.encode_hidden(still),
      'copy': visible[:, find_nearest(masks, grid)],
      'mean': average_places(visible, masks, grid),
      'untrained': predictor.predict(video, self._untrained).predicted,
    }
    if self._average:
      average = predictor.space.average[masks[1]]
      features['average'] = np.broadcast_to(average, truth.shape)
    if self._render is not None:
      for name, x in (features | {'actual': truth}).items():
        if name != 'mean':
          name = 'last_decoded' if name == 'last' else name
          frames[name] = self._render(video, prediction.visible, x)
    frames = frames if self._render else {}
    return self._compare(features, truth, frames, video)

  def score_rollout(
    self, video: np.ndarray, windows: int, through: str
  ) -> list[Scores]:
    """Scores what is predicted window after window, each by its own truth.

    Args:
      video: Clips, longer by the hidden frames of so many further windows.
      windows: How many.
      through: See `roll_out`.

    Returns:
      For each window the scores of 'prediction', and of the pixels of 'last'
      and 'mean': of the frames that were visible at the very start.
    """
    predictor = self._predictor
    stride = count_frames(predictor, predictor.hidden)
    length = video.shape[1] - windows * stride
    first = video[:, :length]
    frames, scores = self._fill(first), []
    for k, window in enumerate(
      roll_out(predictor, first, windows, through, self._render)
    ):
      actual = video[:, k * stride : k * stride + length]
      if self._render is not None:
        frames['prediction'] = window.render(self._render)
      features = {'prediction': window.prediction.predicted}
      truth = predictor.encode_hidden(actual)
      scores.append(self._compare(features, truth, frames, actual))
    return scores

  def score_all(
    self, videos: np.ndarray, batch_size: int, windows: int, through: str
  ) -> tuple[Summary, list[Summary]]:
    """Scores many clips, by their first window and by each of a rollout.

    Args:
      videos: See `score_rollout`.
      batch_size: Clips at a time.
      windows: Further windows; 0 for no rollout.
      through: See `roll_out`.

    Returns:
      What `score` returns and what `score_rollout` does, mean and standard
      error over clips.
    """
    predictor, count = self._predictor, len(videos)
    length = videos.shape[1] - windows * count_frames(
      predictor, predictor.hidden
    )
    parts = []
    for i in make_bar(
      range(0, count, batch_size), desc='predicting', unit='batch', leave=False
    ):
      video = videos[i : i + batch_size]
      real = len(video)
      if count > batch_size:
        # One shape, one program.
        rows = [(0, batch_size - real)] + [(0, 0)] * 4
        video = np.pad(video, rows, mode='edge')
      part = [self.score(video[:, :length])]
      if windows:
        part += self.score_rollout(video, windows, through)
      parts.append([_cut(scores, real) for scores in part])
    first, *rollout = map(join_scores, zip(*parts, strict=True))
    return first, rollout

  def _fill(self, video: np.ndarray) -> dict[str, np.ndarray]:
    """Makes the baselines of pixels, float32 0..255."""
    masks, tubelet = self._predictor.masks, self._predictor.world.tubelet
    return {
      how: fill_pixels(video, masks, tubelet, how) for how in ('last', 'mean')
    }

  def _compare(self, features, truth, frames, video) -> Scores:
    """Compares features `[B, H, D]` and clips, by name, with what was there."""
    scores = {
      name: {k: v.mean(axis=1) for k, v in score_features(x, truth).items()}
      for name, x in features.items()
    }
    for name, pixels in frames.items():
      scores.setdefault(name, {})['psnr'] = score_pixels(
        pixels, video, self._predictor.hidden, self._predictor.world.tubelet
      )
    return scores


def _cut(scores: Scores, count: int) -> Scores:
  """Keeps the scores of the first `count` clips."""
  return {
    name: {metric: x[:count] for metric, x in values.items()}
    for name, values in scores.items()
  }


def join_scores(parts: Sequence[Scores]) -> Summary:
  """Joins scores of batches: mean and standard error over all clips."""
  return {
    name: {
      metric: summarize(np.concatenate([part[name][metric] for part in parts]))
      for metric in values
    }
    for name, values in parts[0].items()
  }


def format_scores(summary: Summary) -> str:
  """Formats what `join_scores` returned as a table; one clip has no errors."""
  single = not any(
    cell['standard_error'] for x in summary.values() for cell in x.values()
  )
  width = 11 if single else 17
  columns = {
    metric: title
    for metric, title in _METRICS.items()
    if any(metric in values for values in summary.values())
  }
  lines = [' ' * 26 + ''.join(f'{c:>{width}}' for c in columns.values())]
  for name, title in TITLES.items():
    if name in summary:
      cells = [_format_cell(summary[name].get(m), single) for m in columns]
      lines.append(title.ljust(26) + ''.join(c.rjust(width) for c in cells))
  return '\n'.join(lines)


def _format_cell(cell: dict[str, float] | None, single: bool) -> str:
  if cell is None:
    return ''
  mean, error = cell['mean'], cell['standard_error']
  if single:
    return f'{mean:.3f}'
  digits = 2 if abs(mean) >= 5 else 3
  return f'{mean:.{digits}f} ± {error:.{digits}f}'
