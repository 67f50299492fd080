"""Clips as sequences of tubelets, and their embedding."""

from collections.abc import Sequence

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.models.linear import Dense, make_initializer
from vjepa_jax.models.positions import Grid
from vjepa_jax.parallel.sharding import constrain_batch

# One sequence, or one each of several that are computed in one pass.
Tokens = jnp.ndarray | tuple[jnp.ndarray, ...]
# How uint8 pixels are normalised: by the statistics of ImageNet, as in every
# published config, or of each clip.
PIXEL_NORMS = ('imagenet', 'clip')
# In units of 0..255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def compute_grid(
  video_shape: tuple[int, ...], tubelet: tuple[int, int, int]
) -> Grid:
  """Computes the tubelet grid (T, H, W) of clips `[B, frames, h, w, 3]`.

  Raises:
    UserError: A side of the clip is not a multiple of the tubelet's.
  """
  grid = []
  names = 'frames', 'height', 'width'
  for name, side, size in zip(names, video_shape[1:4], tubelet, strict=True):
    if side % size or not side:
      raise UserError(
        f'{name} of the clip, {side}, is not a multiple of the tubelet, '
        f'{size}: crop or resample the clip, or change the tubelet'
      )
    grid.append(side // size)
  return tuple(grid)


def patchify(video: jnp.ndarray, tubelet: tuple[int, int, int]) -> jnp.ndarray:
  """Cuts clips into flattened tubelets.

  Args:
    video: `[B, frames, height, width, 3]`, any dtype.
    tubelet: Tubelet size in (frames, pixels, pixels).

  Returns:
    `[B, N, t * p * p * 3]` in raster order over (t, h, w); the pixels of one
    tubelet are in the order (frame, row, column, colour).
  """
  grid = compute_grid(video.shape, tubelet)
  (t, h, w), (dt, dh, dw) = grid, tubelet
  batch, channels = video.shape[0], video.shape[-1]
  x = video.reshape(batch, t, dt, h, dh, w, dw, channels)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(batch, t * h * w, dt * dh * dw * channels)


def unpatchify(
  tubelets: jnp.ndarray, grid: Grid, tubelet: tuple[int, int, int]
) -> jnp.ndarray:
  """Inverts `patchify`: `[B, N, t * p * p * C]` to `[B, frames, h, w, C]`."""
  (t, h, w), (dt, dh, dw) = grid, tubelet
  batch = tubelets.shape[0]
  x = tubelets.reshape(batch, t, h, w, dt, dh, dw, -1)
  x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
  return x.reshape(batch, t * dt, h * dh, w * dw, -1)


def gather_tokens(x: jnp.ndarray, ids: jnp.ndarray) -> jnp.ndarray:
  """Picks tokens `ids` int32 `[B, K]` of `x` `[B, N, D]` -> `[B, K, D]`."""
  return jnp.take_along_axis(x, ids[..., None], axis=1, mode='clip')


def pack(
  sequences: Sequence[jnp.ndarray], axis: int = 1
) -> tuple[jnp.ndarray, tuple[int, ...]]:
  """Joins sequences end to end: `[B, sum of K_i, ...]` and the lengths K_i."""
  lengths = tuple(x.shape[axis] for x in sequences)
  return jnp.concatenate(sequences, axis=axis), lengths


def unpack(
  x: jnp.ndarray, lengths: tuple[int, ...], axis: int = 1
) -> tuple[jnp.ndarray, ...]:
  """Inverts `pack`."""
  return tuple(jnp.split(x, np.cumsum(lengths)[:-1], axis=axis))


def normalize_pixels(tubelets: jnp.ndarray) -> jnp.ndarray:
  """Normalises flattened uint8 tubelets `[..., t * p * p * 3]` to float32."""
  repeats = tubelets.shape[-1] // 3
  mean = np.tile(np.asarray(PIXEL_MEAN, np.float32), repeats)
  std = np.tile(np.asarray(PIXEL_STD, np.float32), repeats)
  return (tubelets.astype(jnp.float32) - mean) / std


def normalize_clips(video: jnp.ndarray) -> jnp.ndarray:
  """Normalises each clip by its own mean and deviation, a colour each.

  Brightness and tint are what neighbouring tubelets share most, hence what is
  predicted first and for little: without them a small encoder starts on shapes
  and motion. Hidden tubelets count too: six numbers of them are seen.

  Args:
    video: uint8 `[B, frames, height, width, 3]`.

  Returns:
    float32 of the same shape, mean 0 and deviation about 1 a colour.
  """
  x = video.astype(jnp.float32) / 255.0
  axes = (1, 2, 3)
  x = x - x.mean(axes, keepdims=True)
  return x / (jnp.sqrt(jnp.square(x).mean(axes, keepdims=True)) + 0.02)


def get_modality(
  module: nn.Module, is_image: bool, width: int, dtype: jnp.dtype
) -> jnp.ndarray:
  """Returns the vector `[width]` that a module adds to tokens of a modality.

  Both vectors are parameters, whichever is wanted: `modality_video` and
  `modality_image`.
  """
  init = nn.initializers.normal(1e-6)
  vectors = [
    module.param(f'modality_{name}', init, (width,))
    for name in ('video', 'image')
  ]
  return vectors[is_image].astype(dtype)


class TubeletEmbed(nn.Module):
  """Linear embedding of flattened tubelets, `[B, K, P]` -> `[B, K, width]`.

  It is the published 3-D convolution whose kernel equals its stride. Applied
  after the visible tubelets have been gathered, it costs only what is seen and
  its backward pass holds no scatter. `init_std`: see `linear.make_initializer`.
  """

  width: int
  init_std: float = 0.02
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tubelets: jnp.ndarray) -> jnp.ndarray:
    if tubelets.dtype == jnp.uint8:
      tubelets = normalize_pixels(tubelets)
    tubelets = constrain_batch(tubelets)
    init = make_initializer(self.init_std, tubelets.shape[-1])
    return Dense(
      features=self.width, kernel_init=init, dtype=self.dtype, name='proj'
    )(tubelets)
