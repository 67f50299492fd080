"""Surprise: how far off the prediction of what comes next is.

The protocol of Garrido et al. (arXiv 2502.11831): a window slides over a film;
of each window the first frames are the context, the features of the rest are
predicted, and the mean absolute error against the features of the target
encoder, which sees the whole window, is the surprise. Of two films that differ
by a violation of physics the impossible one should surprise more.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models.tubelets import normalize_clips
from vjepa_jax.progress import make_bar
from vjepa_jax.training.normalization import normalize_features
from vjepa_jax.world.model import WorldModel, encode_target
from vjepa_jax.world.predict import choose_mask_token

Films = Sequence[np.ndarray]
Measure = Callable[[Films], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows that slide over a film.

  Attributes:
    frames: Frames of a window.
    context_frames: The first of them, which are seen; the rest is predicted.
    stride: Frames from one window to the next.
  """

  frames: int
  context_frames: int
  stride: int = 2

  def __post_init__(self):
    if not 0 < self.context_frames < self.frames:
      raise ValueError(
        f'{self.context_frames} context frames of a window of {self.frames} '
        'leave nothing to see or nothing to predict'
      )
    if self.stride < 1:
      raise ValueError(f'the stride of windows, {self.stride}, is under 1')

  def place(self, num_frames: int) -> np.ndarray:
    """Returns the first frame of each window of a film, int `[W]`.

    Raises:
      ValueError: The film is shorter than a window.
    """
    if num_frames < self.frames:
      raise ValueError(
        f'a film of {num_frames} frames is shorter than the window of '
        f'{self.frames}: use a smaller window or frame step'
      )
    return np.arange(0, num_frames - self.frames + 1, self.stride)

  def centre(self, num_frames: int) -> np.ndarray:
    """Returns the middle of what each window predicts, frames, float `[W]`."""
    middle = (self.context_frames + self.frames - 1) / 2
    return self.place(num_frames) + middle

  def check(self, tubelet: tuple[int, int, int]) -> None:
    """Raises ValueError unless both parts are made of whole tubelets."""
    for name, count in (
      ('a window', self.frames),
      ('its context', self.context_frames),
    ):
      if count % tubelet[0]:
        raise ValueError(
          f'{name} of {count} frames is not made of whole tubelets of '
          f'{tubelet[0]} frames'
        )


def predict_features(
  model: WorldModel,
  params: Mapping[str, Any],
  seen: jax.Array,
  frames: int,
  mask_token: int = 0,
) -> jax.Array:
  """Predicts the features of the rest of a window from its first frames.

  The rest is no argument. Pixels normalised by clip are so by the statistics
  of the frames that are seen; training takes those of the whole clip.

  Args:
    model: Its modules are used.
    params: Its `params`, an argument so that it is not compiled in.
    seen: uint8 `[B, context_frames, H, W, 3]`.
    frames: Frames of the window.
    mask_token: See `imagination.choose_mask_token`.

  Returns:
    float32 `[B, Kt, D]`, tokens in raster order over (t, h, w).
  """
  steps, height, width = model.get_grid(seen.shape)
  grid = (frames // model.tubelet[0], height, width)
  if model.encoder.pixel_norm == 'clip':
    seen = normalize_clips(seen)
  # The position of a token does not depend on the length of the clip.
  context = model.encoder.apply({'params': params['encoder']}, seen)
  split = steps * height * width
  ids = jnp.arange(grid[0] * height * width)
  ids = jnp.broadcast_to(ids, (len(seen), len(ids)))
  predicted = model.predictor.apply(
    {'params': params['predictor']},
    context,
    ids[:, :split],
    ids[:, split:],
    grid,
    mask_token,
  )
  if model.predictor.predict_context:
    predicted = predicted[0]
  return predicted.astype(jnp.float32)


def encode_rest(
  model: WorldModel,
  params: Mapping[str, Any],
  video: jax.Array,
  context_frames: int,
) -> jax.Array:
  """Computes the features that are to be predicted, not yet normalised.

  Args:
    model: Its modules are used.
    params: Its `params`.
    video: Windows, uint8 `[B, T, H, W, 3]`.
    context_frames: Those that are not predicted.

  Returns:
    float32 `[B, Kt, D]`.
  """
  steps, height, width = model.get_grid(video.shape)
  first = context_frames // model.tubelet[0] * height * width
  if model.target_view == 'targets':
    ids = jnp.arange(first, steps * height * width)
    features = encode_target(model, params, video, ids)
  else:
    features = encode_target(model, params, video)[:, first:]
  return features.astype(jnp.float32)


def make_measure(
  model: WorldModel,
  windows: Windows,
  reference: Films = (),
  *,
  batch_size: int = 64,
) -> Measure:
  """Makes the function that measures the surprise of films.

  Targets are normalised as in the objective. The 'position' norm is over the
  clips of a batch there, which a film by itself has not: here mean and
  deviation of each feature at each place are those of all windows of
  `reference`, possible films.

  Args:
    model: The model.
    windows: The windows.
    reference: Films uint8 `[T, H, W, 3]`, for the 'position' norm alone.
    batch_size: Windows at a time.

  Returns:
    The function from films, uint8 `[T, H, W, 3]` each, to the surprise of their
    windows, float32 `[W]` each.

  Raises:
    ValueError: The windows are not made of whole tubelets, or there are no
      reference films where they are needed.
  """
  windows.check(model.tubelet)
  seen = windows.context_frames

  def encode(params, video):
    return encode_rest(model, params, video, seen)

  normalize = normalize_features
  if model.norm == 'none':

    def normalize(features):
      return features

  elif model.norm == 'position':
    if not len(reference):
      raise ValueError(
        "targets normalised by 'position' need possible films as a reference"
      )
    mean, deviation = _measure_moments(
      jax.jit(encode), model.params, reference, windows, batch_size
    )

    def normalize(features):
      return (features - mean) / (deviation + 0.05)

  token = choose_mask_token(model, 'future')

  @jax.jit
  def surprise(params, video):
    predicted = predict_features(
      model, params, video[:, :seen], windows.frames, token
    )
    error = jnp.abs(predicted - normalize(encode(params, video)))
    return error.mean(axis=(1, 2))

  def measure(films):
    values = [
      np.asarray(surprise(model.params, batch))[:count]
      for batch, count in _iterate(films, windows, batch_size, 'surprise')
    ]
    ends = np.cumsum([len(windows.place(len(film))) for film in films])
    return np.split(np.concatenate(values), ends[:-1])

  return measure


def measure_pixels(films: Films, windows: Windows) -> list[np.ndarray]:
  """Measures the surprise of whoever expects the last seen frame to stay.

  Returns:
    Mean absolute error of the pixels, 0..1, float32 `[W]` a film.
  """
  curves = []
  for film in films:
    curve = []
    for start in windows.place(len(film)):
      first = start + windows.context_frames
      rest = film[first : start + windows.frames].astype(np.float32)
      curve.append(np.abs(rest - film[first - 1]).mean() / 255)
    curves.append(np.array(curve, np.float32))
  return curves


def _measure_moments(
  encode: Callable[..., jax.Array],
  params: Any,
  films: Films,
  windows: Windows,
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of features over windows, float32 `[Kt, D]` each."""
  total = squares = count = 0
  for batch, size in _iterate(films, windows, batch_size, 'reference'):
    features = np.asarray(encode(params, batch), np.float64)[:size]
    total = total + features.sum(axis=0)
    squares = squares + np.square(features).sum(axis=0)
    count += size
  mean = total / count
  deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return mean.astype(np.float32), deviation.astype(np.float32)


def _iterate(films, windows, batch_size, description):
  """Yields windows `[batch_size, T, H, W, 3]` and how many of them count."""
  places = [
    (film, start) for film in films for start in windows.place(len(film))
  ]
  with make_bar(
    total=len(places), desc=description, unit='window', leave=False
  ) as bar:
    for first in range(0, len(places), batch_size):
      part = places[first : first + batch_size]
      batch = np.stack([film[s : s + windows.frames] for film, s in part])
      # One shape, one program.
      padding = [(0, batch_size - len(part))] + [(0, 0)] * (batch.ndim - 1)
      yield np.pad(batch, padding), len(part)
      bar.update(len(part))
