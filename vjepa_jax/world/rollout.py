"""Predictions turned into pixels, and fed back to go further than one clip."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.models.tubelets import unpatchify
from vjepa_jax.world.decoding import LoadedDecoder
from vjepa_jax.world.model import normalize_visible
from vjepa_jax.world.predict import MaskedPredictor, Prediction, join_tokens

THROUGH = ('pixels', 'features')

Render = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Window(NamedTuple):
  """One window of a rollout."""

  prediction: Prediction
  clip: np.ndarray  # uint8 [B, frames, h, w, 3], what colours are taken from

  def render(self, render: Render) -> np.ndarray:
    """Renders it, float32 `[B, frames, h, w, 3]`, 0..255."""
    visible, predicted = self.prediction.visible, self.prediction.predicted
    return np.asarray(render(self.clip, visible, predicted))


def make_render(predictor: MaskedPredictor, loaded: LoadedDecoder) -> Render:
  """Makes the function (video, visible, hidden) -> pixels.

  It takes clips uint8 `[B, frames, h, w, 3]` and features `[B, K, D]` and
  `[B, H, D]` to float32 `[B, frames, h, w, 3]`, 0..255. Colours come from the
  visible pixels of `video` where the encoder sees clips normalised by their
  own, since features do not hold them then.
  """
  world, masks = predictor.world, predictor.masks

  @jax.jit
  def render(params, video, visible, hidden):
    decoded = loaded.decode(params, join_tokens(visible, hidden, masks))
    decoded = unpatchify(decoded, loaded.grid, world.tubelet)
    pixels = normalize_visible(world.target_encoder, video, masks[0])
    return pixels.restore(decoded)

  return lambda *arguments: render(loaded.params, *arguments)


def check_rollout(
  predictor: MaskedPredictor, through: str, decodes: bool
) -> None:
  """Raises UserError unless predictions can be fed back."""
  if through not in THROUGH:
    raise UserError(f'roll_through {through!r} is not one of {THROUGH}')
  # Visible are the first time steps, all of their tokens.
  visible, (_, height, width) = predictor.visible, predictor.grid
  if visible[-1] != len(visible) - 1 or len(visible) % (height * width):
    raise UserError('--roll goes on in time: it needs --hide=future')
  world = predictor.world
  if through == 'pixels' and not decodes:
    raise UserError(
      '--roll_through=pixels encodes what was imagined: it needs --decode'
    )
  width = world.encoder.width * world.predictor.levels
  if through == 'features' and world.predictor.out_width != width:
    raise UserError(
      f'the predictor makes {world.predictor.out_width} features and takes '
      f'{width}: its predictions can only be fed back by '
      '--roll_through=pixels'
    )


def count_frames(predictor: MaskedPredictor, ids: np.ndarray) -> int:
  """Counts the frames that whole time steps of tokens `ids` are of."""
  _, height, width = predictor.grid
  return len(ids) // (height * width) * predictor.world.tubelet[0]


def roll_out(
  predictor: MaskedPredictor,
  video: np.ndarray,
  windows: int,
  through: str,
  render: Render | None = None,
) -> Iterator[Window]:
  """Predicts a clip's future, then goes on from what was predicted.

  Each further window goes on by the hidden time steps: the last steps of one
  window, as many as are visible, are the context of the next. What enters the
  predictor there is a choice, for it was trained on features that the context
  encoder makes of pixels:
  - 'pixels': what was predicted is decoded and encoded again, which needs a
    decoder and stays with what encoder and predictor were trained on, but for
    the blur;
  - 'features': predictions enter the predictor as they are, brought from the
    normalised space of the targets to the usual mean and scale of features
    (`TargetSpace.restore`) at their new positions. It needs no decoder, but
    target features have seen whole clips, and the context encoder's have not.

  Args:
    predictor: The model and its mask, the future hidden.
    video: uint8 `[B, frames, h, w, 3]`; the visible frames are used.
    windows: Further windows, 0 for none.
    through: 'pixels' or 'features'.
    render: Of `make_render`; for 'pixels'.

  Yields:
    The `windows + 1` windows.
  """
  space, masks = predictor.space, predictor.masks
  num_tokens = int(np.prod(predictor.grid))
  last = np.arange(num_tokens - len(masks[0]), num_tokens)
  window = Window(predictor.predict(video), np.array(video))
  features = space.normalize(window.prediction.context, masks[0])
  yield window
  for _ in range(windows):
    if through == 'pixels':
      # The last frames of a window are the visible ones of the next.
      count, clip = count_frames(predictor, masks[0]), np.array(window.clip)
      clip[:, count:] = np.round(window.render(render)[:, count:])
      clip = np.roll(clip, count, axis=1)
      clip[:, count:] = 0
      window = Window(predictor.predict(clip), clip)
    else:
      tokens = join_tokens(features, window.prediction.predicted, masks)
      features = space.transfer(tokens[:, last], last, masks[0])
      context = space.restore(features, masks[0])
      prediction = Prediction(
        predictor.predict_from(context), features, context
      )
      window = Window(prediction, window.clip)
    yield window
