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
import dataclasses

import jax
import numpy as np

from vjepa_jax.progress import make_bar
from vjepa_jax.world import baselines
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


@dataclasses.dataclass(eq=False)
class Scorer:
  """Scores the prediction of hidden tokens and its baselines, by clip.

  Clips are uint8 `[B, frames, h, w, 3]`.
  """

  predictor: MaskedPredictor
  render: Render | None = None  # of `make_render`, for scores of pixels
  average: bool = True  # whether the average of the space is of other clips

  def __post_init__(self):
    """Initialises what has not been trained."""
    world = self.predictor.world
    untrained = baselines.init_predictor(world, jax.random.key(0))
    self._untrained = world.params | {'predictor': untrained}

  def score(self, video: np.ndarray) -> Scores:
    """Scores clips by each method of `TITLES` that applies.

    Of its features 'cosine' and 'error', of its pixels 'psnr' in dB, all `[B]`.
    """
    predictor = self.predictor
    masks, grid = predictor.masks, predictor.grid
    prediction = predictor.predict(video)
    truth = predictor.encode_hidden(video)
    visible = np.asarray(prediction.visible)
    frames = self._fill(video)
    still = np.round(frames['last']).astype(np.uint8)
    features = {
      'prediction': prediction.predicted,
      'last': predictor.encode_hidden(still),
      'copy': visible[:, baselines.find_nearest(masks, grid)],
      'mean': baselines.average_places(visible, masks, grid),
      'untrained': predictor.predict(video, self._untrained).predicted,
    }
    if self.average:
      average = predictor.space.average[masks[1]]
      features['average'] = np.broadcast_to(average, truth.shape)
    if self.render is None:
      return self._compare(features, truth, {}, video)
    for name, x in (features | {'actual': truth}).items():
      if name != 'mean':
        name = 'last_decoded' if name == 'last' else name
        frames[name] = self.render(video, prediction.visible, x)
    return self._compare(features, truth, frames, video)

  def score_rollout(
    self, video: np.ndarray, windows: int, through: str
  ) -> list[Scores]:
    """Scores what is predicted window after window, each by its own truth.

    Clips are longer by the hidden frames of so many further `windows`; see
    `roll_out`.

    Returns:
      For each window the scores of 'prediction', and of the pixels of 'last'
      and 'mean': of the frames that were visible at the very start.
    """
    predictor = self.predictor
    stride = count_frames(predictor, predictor.hidden)
    length = video.shape[1] - windows * stride
    first = video[:, :length]
    frames, scores = self._fill(first), []
    for k, window in enumerate(
      roll_out(predictor, first, windows, through, self.render)
    ):
      actual = video[:, k * stride : k * stride + length]
      if self.render is not None:
        frames['prediction'] = window.render(self.render)
      features = {'prediction': window.prediction.predicted}
      truth = predictor.encode_hidden(actual)
      scores.append(self._compare(features, truth, frames, actual))
    return scores

  def score_all(
    self, videos: np.ndarray, batch_size: int, windows: int, through: str
  ) -> tuple[Summary, list[Summary]]:
    """Scores many clips, by their first window and by each of a rollout.

    Returns:
      What `score` and `score_rollout` return (nothing for 0 windows), mean and
      standard error over clips.
    """
    count = len(videos)
    stride = count_frames(self.predictor, self.predictor.hidden)
    length = videos.shape[1] - windows * stride
    size, parts = min(batch_size, count), []
    for first in make_bar(
      range(0, count, size), desc='predicting', unit='batch', leave=False
    ):
      # One shape, one program: the last batch is filled up with its last clip.
      video = videos[np.minimum(np.arange(first, first + size), count - 1)]
      part = [self.score(video[:, :length])]
      if windows:
        part += self.score_rollout(video, windows, through)
      parts.append(part)
    first, *rollout = (
      join_scores(part, count) for part in zip(*parts, strict=True)
    )
    return first, rollout

  def _fill(self, video: np.ndarray) -> dict[str, np.ndarray]:
    """Makes the baselines of pixels, float32 0..255."""
    masks, tubelet = self.predictor.masks, self.predictor.world.tubelet
    return {
      how: baselines.fill_pixels(video, masks, tubelet, how)
      for how in ('last', 'mean')
    }

  def _compare(self, features, truth, frames, video) -> Scores:
    """Compares features `[B, H, D]` and clips, by name, with what was there."""
    scores = {
      name: {k: v.mean(axis=1) for k, v in score_features(x, truth).items()}
      for name, x in features.items()
    }
    for name, pixels in frames.items():
      scores.setdefault(name, {})['psnr'] = score_pixels(
        pixels, video, self.predictor.hidden, self.predictor.world.tubelet
      )
    return scores


def join_scores(parts: Sequence[Scores], count: int | None = None) -> Summary:
  """Joins scores of batches: mean and standard error over `count` clips."""
  return {
    name: {
      metric: summarize(
        np.concatenate([x[name][metric] for x in parts])[:count]
      )
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
  columns = [m for m in _METRICS if any(m in x for x in summary.values())]

  def format_cell(mean, standard_error):
    if single:
      return f'{mean:.3f}'
    digits = 2 if abs(mean) >= 5 else 3
    return f'{mean:.{digits}f} ± {standard_error:.{digits}f}'

  rows = {'': [_METRICS[metric] for metric in columns]}
  for name in filter(summary.get, TITLES):
    cells = [summary[name].get(metric) for metric in columns]
    rows[TITLES[name]] = [format_cell(**x) if x else '' for x in cells]
  return '\n'.join(
    title.ljust(26) + ''.join(cell.rjust(width) for cell in cells)
    for title, cells in rows.items()
  )
