"""Predictions turned into pixels, and fed back to go further than one clip."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.world.decoding import LoadedDecoder
from vjepa_jax.world.model import normalize_visible
from vjepa_jax.world.predict import Imagination, Imagined

THROUGH = ('pixels', 'features')

Render = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Window(NamedTuple):
  """One window of a rolling generation.

  Attributes:
    imagined: Its features.
    clip: uint8 `[B, frames, h, w, 3]`: what `Render` takes the colours from.
  """

  imagined: Imagined
  clip: np.ndarray


def join_tokens(
  seen: jax.Array, predicted: jax.Array, visible: np.ndarray, hidden: np.ndarray
) -> jax.Array:
  """Joins visible `[B, K, D]` and hidden `[B, H, D]` tokens to `[B, N, D]`."""
  order = np.argsort(np.concatenate([visible, hidden]))
  return jnp.concatenate([seen, predicted], axis=1)[:, order]


def make_render(future: Imagination, loaded: LoadedDecoder) -> Render:
  """Makes the function (video, seen, predicted) -> pixels.

  Colours come from the visible pixels of `video` where the encoder sees clips
  normalised by their own, since features do not hold them then.

  Returns:
    A function of clips uint8 `[B, frames, h, w, 3]` and features `[B, K, D]`
    and `[B, H, D]` to float32 `[B, frames, h, w, 3]`, 0..255.
  """
  world = future.world

  @jax.jit
  def render(params, video, seen, predicted):
    tokens = join_tokens(seen, predicted, future.visible, future.hidden)
    decoded = loaded.decode(params, tokens)
    decoded = tub.unpatchify(decoded, loaded.grid, world.tubelet)
    pixels = normalize_visible(world.target_encoder, video, future.visible)
    return pixels.restore(decoded)

  return lambda *arguments: render(loaded.params, *arguments)


def check_rolling(future: Imagination, through: str, decodes: bool) -> None:
  """Raises ValueError unless predictions can be fed back."""
  grid = future.grid
  if through not in THROUGH:
    raise ValueError(f'roll_through {through!r} is not one of {THROUGH}')
  steps = np.unique(future.visible // (grid[1] * grid[2]))
  whole = len(future.visible) == len(steps) * grid[1] * grid[2]
  if not whole or steps[0] != 0 or steps[-1] != len(steps) - 1:
    raise ValueError('--roll goes on in time: it needs --hide=future')
  world = future.world
  if through == 'pixels' and not decodes:
    raise ValueError(
      '--roll_through=pixels encodes what was imagined: it needs --decode'
    )
  if through == 'features' and world.predictor.out_width != world.encoder.width:
    raise ValueError(
      f'the predictor makes {world.predictor.out_width} features and takes '
      f'{world.encoder.width}: its predictions can only be fed back by '
      '--roll_through=pixels'
    )


def roll(
  future: Imagination,
  video: np.ndarray,
  windows: int,
  through: str,
  render: Render | None = None,
) -> Iterator[Window]:
  """Imagines a clip's future, then goes on from what was imagined.

  Each further window moves on by the hidden time steps: the last steps of one
  window, as many as are visible, are the context of the next. What enters the
  predictor there is a choice, for it was trained on features that the context
  encoder makes of pixels:
  - 'pixels': what was imagined is decoded and encoded again, which needs a
    decoder and stays with what encoder and predictor were trained on, but for
    the blur;
  - 'features': predictions enter the predictor as they are, brought from the
    normalised space of the targets to the usual mean and scale of features
    (`TargetSpace.restore`) at their new positions. It needs no decoder, but
    target features have seen whole clips, and the context encoder's have not.

  Args:
    future: The model and its mask, the future hidden.
    video: uint8 `[B, frames, h, w, 3]`; the visible frames are used.
    windows: Further windows, 0 for none.
    through: 'pixels' or 'features'.
    render: Of `make_render`; for 'pixels'.

  Yields:
    The `windows + 1` windows.
  """
  world, space, grid = future.world, future.space, future.grid
  imagined = future.imagine(video)
  clip = np.array(video)
  yield Window(imagined, clip)
  known = space.normalize(imagined.context, future.visible)
  old = np.arange(np.prod(grid) - len(future.visible), np.prod(grid))
  for _ in range(windows):
    if through == 'pixels':
      clip = _move_clip(
        clip,
        np.asarray(render(clip, imagined.seen, imagined.predicted)),
        len(future.visible) // (grid[1] * grid[2]) * world.tubelet[0],
      )
      imagined = future.imagine(clip)
    else:
      tokens = join_tokens(
        known, imagined.predicted, future.visible, future.hidden
      )
      known = space.move(tokens[:, old], old, future.visible)
      context = space.restore(known, future.visible)
      imagined = Imagined(future.advance(context), known, context)
    yield Window(imagined, clip)


def _move_clip(
  clip: np.ndarray, rendered: np.ndarray, context_frames: int
) -> np.ndarray:
  """Makes the last frames of a window the visible ones of the next."""
  whole = np.array(clip)
  whole[:, context_frames:] = np.round(rendered[:, context_frames:])
  moved = np.zeros_like(clip)
  moved[:, :context_frames] = whole[:, -context_frames:]
  return moved
