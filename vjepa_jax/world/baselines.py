"""How far off predictions are, beside what needs no model of the world.

Baselines see what the prediction sees, the visible pixels, and nothing else:
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

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.world import predict as imagination
from vjepa_jax.world.decoding import LoadedDecoder
from vjepa_jax.world.predict import Imagination
from vjepa_jax.world.rollout import Render, make_render, roll

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

Scores = dict[str, dict[str, np.ndarray]]


class Scorer:
  """Scores the prediction of hidden tokens and its baselines, by clip."""

  def __init__(
    self,
    future: Imagination,
    loaded: LoadedDecoder | None = None,
    average: bool = True,
  ):
    """Compiles nothing yet.

    Args:
      future: The model and its mask.
      loaded: A decoder, for scores of pixels.
      average: Whether the average of `space` is of other clips.
    """
    self._future, self._average = future, average
    world = future.world
    self._render: Render | None = None
    if loaded is not None:
      self._render = make_render(future, loaded)
    ids = jnp.zeros((1, 1), jnp.int32)
    untrained = jax.jit(world.predictor.init, static_argnums=4)(
      jax.random.key(0),
      jnp.zeros((1, 1, world.encoder.width)),
      ids,
      ids,
      (1, 1, 2),
    )['params']
    self._untrained = world.params | {'predictor': untrained}

  def __call__(self, video: np.ndarray) -> Scores:
    """Scores clips, uint8 `[B, frames, h, w, 3]`.

    Returns:
      For each method of `TITLES` that applies: 'cosine' and 'error' of its
      features, 'psnr' of its pixels in dB, each `[B]`.
    """
    future = self._future
    world, grid = future.world, future.grid
    masks = future.visible, future.hidden
    imagined = future.imagine(video)
    truth = future.reveal(video)
    seen = np.asarray(imagined.seen)
    frames = {
      how: imagination.fill_pixels(video, *masks, world.tubelet, how)
      for how in ('last', 'mean')
    }
    still = np.round(frames['last']).astype(np.uint8)
    features = {
      'prediction': imagined.predicted,
      'last': future.reveal(still),
      'copy': seen[:, imagination.find_nearest(*masks, grid)],
      'mean': imagination.average_places(seen, *masks, grid),
      'untrained': future.imagine(video, self._untrained).predicted,
    }
    if self._average:
      average = future.space.average[future.hidden]
      features['average'] = np.broadcast_to(average, truth.shape)
    scores = {
      name: {
        metric: values.mean(axis=1)
        for metric, values in imagination.score_features(x, truth).items()
      }
      for name, x in features.items()
    }
    if self._render is None:
      return scores
    rendered = {
      'last_decoded' if name == 'last' else name: x
      for name, x in features.items()
      if name != 'mean'
    }
    for name, x in (rendered | {'actual': truth}).items():
      frames[name] = self._render(video, imagined.seen, x)
    for name, pixels in frames.items():
      scores.setdefault(name, {})['psnr'] = imagination.score_pixels(
        pixels, video, future.hidden, world.tubelet
      )
    return scores


def score_rolling(
  future: Imagination,
  video: np.ndarray,
  frames: int,
  windows: int,
  through: str,
  render: Render | None,
) -> list[Scores]:
  """Scores what is imagined window after window, each against its own truth.

  Args:
    future: The model and its mask.
    video: uint8 `[B, L, h, w, 3]`, long enough for all windows.
    frames: Frames of a window.
    windows: Further windows.
    through: See `roll`.
    render: Of `make_render`, for scores of pixels.

  Returns:
    For each window the scores of 'prediction', and of the pixels of 'last' and
    'mean': of the frames that were visible at the very start.
  """
  world, masks = future.world, (future.visible, future.hidden)
  first = video[:, :frames]
  grid = future.grid
  stills = {
    how: imagination.fill_pixels(first, *masks, world.tubelet, how)
    for how in ('last', 'mean')
  }
  stride = len(future.hidden) // (grid[1] * grid[2]) * world.tubelet[0]
  scores = []
  for k, window in enumerate(roll(future, first, windows, through, render)):
    actual = video[:, k * stride : k * stride + frames]
    predicted = window.imagined.predicted
    values = {
      'prediction': {
        metric: x.mean(axis=1)
        for metric, x in imagination.score_features(
          predicted, future.reveal(actual)
        ).items()
      }
    }
    pixels = dict(stills)
    if render is not None:
      pixels['prediction'] = render(
        window.clip, window.imagined.seen, predicted
      )
    for name, x in pixels.items():
      values.setdefault(name, {})['psnr'] = imagination.score_pixels(
        x, actual, future.hidden, world.tubelet
      )
    scores.append(values)
  return scores


def summarize_scores(scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
  """Summarises scores by mean and standard error over clips."""
  return {
    name: {m: imagination.summarize(x) for m, x in values.items()}
    for name, values in scores.items()
  }


def join_scores(parts: list[Scores]) -> Scores:
  """Joins the scores of several batches of clips."""
  return {
    name: {
      metric: np.concatenate([part[name][metric] for part in parts])
      for metric in parts[0][name]
    }
    for name in parts[0]
  }


def format_scores(summary: dict[str, dict[str, dict[str, float]]]) -> str:
  """Formats what `summarize_scores` returned as a table."""
  columns = {'cosine': 'cosine', 'error': 'error', 'psnr': 'PSNR, dB'}
  if not any('psnr' in values for values in summary.values()):
    del columns['psnr']
  lines = [' ' * 26 + ''.join(f'{c:>17}' for c in columns.values())]
  for name, title in TITLES.items():
    if name in summary:
      cells = (summary[name].get(metric) for metric in columns)
      lines.append(title.ljust(26) + ''.join(map(_format_cell, cells)))
  return '\n'.join(lines)


def _format_cell(cell: dict[str, float] | None) -> str:
  if cell is None:
    return ' ' * 17
  digits = 2 if abs(cell['mean']) >= 5 else 3
  mean, error = cell['mean'], cell['standard_error']
  return f'{mean:.{digits}f} ± {error:.{digits}f}'.rjust(17)
