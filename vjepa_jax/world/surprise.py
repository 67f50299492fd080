"""Surprise: how far off the prediction of what comes next is.

The protocol of Garrido et al. (arXiv 2502.11831): a window slides over a film;
of each window the first frames are the context, the features of the rest are
predicted, and the mean absolute error against the features of the target
encoder, which sees the whole window, is the surprise. Of two films that differ
by a violation of physics the impossible one should surprise more.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.progress import make_bar
from vjepa_jax.world.masks import choose_hidden
from vjepa_jax.world.model import TargetSpace, WorldModel, measure_space
from vjepa_jax.world.predict import MaskedPredictor, choose_mask_token

Films = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows that slide over a film."""

  frames: int
  context_frames: int  # the first, which are seen; the rest is predicted
  stride: int = 2  # frames from one window to the next

  def __post_init__(self):
    if not 0 < self.context_frames < self.frames:
      raise UserError(
        f'{self.context_frames} context frames of a window of {self.frames} '
        'leave nothing to see or nothing to predict'
      )
    if self.stride < 1:
      raise UserError(f'the stride of windows, {self.stride}, is under 1')

  def place(self, num_frames: int) -> np.ndarray:
    """Returns the first frame of each window of a film, int `[W]`.

    Raises:
      UserError: The film is shorter than a window.
    """
    if num_frames < self.frames:
      raise UserError(
        f'a film of {num_frames} frames is shorter than the window of '
        f'{self.frames}: use a smaller window or frame step'
      )
    return np.arange(0, num_frames - self.frames + 1, self.stride)

  def centre(self, num_frames: int) -> np.ndarray:
    """Returns the middle of what each window predicts, frames, float `[W]`."""
    middle = (self.context_frames + self.frames - 1) / 2
    return self.place(num_frames) + middle

  def check(self, tubelet: tuple[int, int, int]) -> None:
    """Raises UserError unless both parts are made of whole tubelets."""
    parts = {'a window': self.frames, 'its context': self.context_frames}
    for name, count in parts.items():
      if count % tubelet[0]:
        raise UserError(
          f'{name} of {count} frames is not made of whole tubelets of '
          f'{tubelet[0]} frames'
        )


def measure_surprise(
  world: WorldModel,
  windows: Windows,
  films: Films,
  reference: Films = (),
  *,
  batch_size: int = 64,
) -> list[np.ndarray]:
  """Measures the surprise of films.

  Targets are normalised as in the objective. The 'position' norm is over the
  clips of a batch there, which a film by itself has not: here mean and
  deviation of each feature at each place are those of all windows of
  `reference`, possible films.

  Args:
    world: The model.
    windows: What is compared.
    films: uint8 `[T, H, W, 3]` each, all of one size.
    reference: The same, for the 'position' norm alone.
    batch_size: Windows at a time.

  Returns:
    The surprise of the windows of each film, float32 `[W]`.

  Raises:
    UserError: The windows are not made of whole tubelets, or there are no
      reference films where they are needed.
  """
  windows.check(world.tubelet)
  space = TargetSpace(world.norm, levels=len(world.levels or (None,)))
  if world.norm == 'position':
    if not len(reference):
      raise UserError(
        "targets normalised by 'position' need possible films as a reference"
      )
    batches = _iterate(reference, windows, batch_size, 'reference')
    space = measure_space(world, batches)
  grid = world.get_grid((1, windows.frames, *films[0].shape[1:]))
  steps = windows.context_frames // world.tubelet[0]
  masks = choose_hidden(grid, 'future', steps)
  token = choose_mask_token(world, 'future')
  predictor = MaskedPredictor(world, space, grid, masks, token)

  @jax.jit
  def measure(params, video):
    predicted = predictor.predict(video, params).predicted
    error = jnp.abs(predicted - predictor.encode_hidden(video, params))
    return error.mean(axis=(1, 2))

  values = []
  for batch in _iterate(films, windows, batch_size, 'surprise'):
    # One shape, one program: the last batch is filled up with its last window.
    rows = np.minimum(np.arange(batch_size), len(batch) - 1)
    values.append(np.asarray(measure(world.params, batch[rows]))[: len(batch)])
  ends = np.cumsum([len(windows.place(len(film))) for film in films])
  return np.split(np.concatenate(values), ends[:-1])


def measure_pixels(films: Films, windows: Windows) -> list[np.ndarray]:
  """Measures the surprise of whoever expects the last seen frame to stay.

  It is the mean absolute error of the pixels, 0..1, float32 `[W]` a film.
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


def _iterate(films, windows, batch_size, description):
  """Yields windows, `[B, T, H, W, 3]`, at most `batch_size` at a time."""
  places = [
    (film, start) for film in films for start in windows.place(len(film))
  ]
  with make_bar(
    total=len(places), desc=description, unit='window', leave=False
  ) as bar:
    for first in range(0, len(places), batch_size):
      part = places[first : first + batch_size]
      yield np.stack([film[s : s + windows.frames] for film, s in part])
      bar.update(len(part))
