"""A world model in use: what it sees, what it predicts, what was there.

Training lets the target encoder see the whole clip, and normalises targets by
the batch. In use there is one clip, and nothing of what is hidden may reach a
prediction:
- pixels are normalised by what is visible (with `pixel_norm='clip'` training
  takes the mean and deviation of the whole clip, six numbers of hidden pixels
  among them), and hidden pixels are zeroed before any model sees the clip;
- targets normalised by position over the batch are normalised by statistics of
  other clips, see `TargetSpace`.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.errors import UserError
from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.training.objectives.base import encode_levels
from vjepa_jax.training.objectives.salt import normalize_tubelets
from vjepa_jax.training.objectives.targets import (
  normalize_levels,
  pad_deviation,
)

Params = Any


class WorldModel(NamedTuple):
  """Encoder, predictor and target encoder of one checkpoint."""

  encoder: Encoder  # of what is visible
  predictor: Predictor
  target_encoder: Encoder  # the same as `encoder` but for a frozen teacher
  params: dict[str, Params]  # 'encoder', 'predictor' and 'target', float32
  clip: ClipOptions | None = None  # how its clips are cut, if known
  # 'path', 'weight' and options of what it was trained on, if known.
  sources: tuple[dict[str, Any], ...] = ()
  held_out: str = ''  # path of its online probe's test, '' for none
  # Features of the encoder's average ('ema'), those of a 'frozen' teacher, or
  # normalised 'pixels'.
  targets: str = 'ema'
  target_view: str = 'clip'  # what their encoder sees, or the 'targets' alone
  target_norm: str = 'layer'  # or 'position', see `TargetSpace`
  mask_kinds: tuple[str, ...] = ()  # of the mask specs in order, if known
  resolution: int | None = None  # of its clips, if known
  frames: int | None = None  # the same

  @property
  def is_image(self) -> bool:
    """Whether its clips are images, which the encoder knows (V-JEPA 2.1)."""
    return self.encoder.modalities and self.frames == 1

  @property
  def tubelet(self) -> tuple[int, int, int]:
    """Returns the tubelet size in (frames, pixels, pixels)."""
    return self.encoder.get_tubelet((1, self.frames or 0))

  @property
  def levels(self) -> tuple[int, ...] | None:
    """Returns the blocks that context and targets are of, None for the last."""
    return self.encoder.levels if self.predictor.levels > 1 else None

  @property
  def norm(self) -> str:
    """Returns how targets are normalised, see `TargetSpace.norm`."""
    return 'none' if self.targets == 'pixels' else self.target_norm

  def get_grid(self, video_shape: tuple[int, ...]) -> Grid:
    """Returns the tubelet grid of clips `[B, frames, h, w, 3]`."""
    return self.encoder.compute_grid(video_shape)


def complete_clip(
  world: WorldModel,
  *,
  frames: int | None = None,
  resolution: int | None = None,
  frame_step: int | None = None,
  fps: float | None = None,
) -> ClipOptions:
  """Completes how clips are cut: what is None is as in the model's training.

  Raises:
    UserError: Something is neither given nor known, or does not fit the
      tubelets.
  """
  trained = world.clip or ClipOptions()
  frames = frames or world.frames
  resolution = resolution or world.resolution
  if frame_step is None and fps is None and world.clip is not None:
    frame_step, fps = trained.frame_step, trained.fps
  given = {'frames': frames, 'resolution': resolution}
  rate = {'frame_step': frame_step, 'fps': fps}
  needed = given | {'frame_step or fps': frame_step or fps}
  missing = [name for name, value in needed.items() if not value]
  if missing:
    raise UserError(
      f'the clips of this model are not known: give {", ".join(missing)} (of '
      'released models V-JEPA 1 was trained on 16 frames at a frame_step of 4, '
      'V-JEPA 2 at an fps of 4)'
    )
  world.get_grid((1, frames, resolution, resolution))
  return dataclasses.replace(trained, **given, **rate)


class Pixels(NamedTuple):
  """Clips as the encoder sees them, and the way back."""

  video: jax.Array  # float32 [B, frames, h, w, 3], normalised, 0 where hidden
  mean: jax.Array  # float32 [3] or [B, 1, 1, 1, 3], in units of 0..255
  scale: jax.Array  # the same, what was divided by

  def restore(self, video: jax.Array) -> jax.Array:
    """Maps normalised pixels to 0..255, float32, clipped."""
    return jnp.clip(video * self.scale + self.mean, 0.0, 255.0)


def normalize_visible(
  encoder: Encoder, video: jax.Array, visible_ids: np.ndarray
) -> Pixels:
  """Normalises clips by their visible pixels, and blanks the others.

  Args:
    encoder: Says how.
    video: uint8 `[B, frames, h, w, 3]`.
    visible_ids: int32 `[K]` of visible tokens, raster order over (t, h, w).
  """
  tubelet = encoder.get_tubelet(video.shape)
  grid = tub.compute_grid(video.shape, tubelet)
  x = video.astype(jnp.float32)
  mean, scale = np.float32(tub.PIXEL_MEAN), np.float32(tub.PIXEL_STD)
  if encoder.pixel_norm == 'clip':
    visible = tub.patchify(x, tubelet)[:, visible_ids]
    visible = visible.reshape(len(x), 1, 1, -1, 3) / 255.0
    mean = visible.mean(axis=3, keepdims=True)
    std = jnp.sqrt(jnp.square(visible - mean).mean(axis=3, keepdims=True))
    mean, scale = mean * 255.0, (std + 0.02) * 255.0  # as normalize_clips
  shown = np.zeros(grid, np.float32)
  shown.reshape(-1)[visible_ids] = 1.0
  shown = np.kron(shown, np.ones(tubelet, np.float32))[..., None]
  return Pixels((x - mean) / scale * shown, mean, scale)


class TargetSpace(NamedTuple):
  """The space that the predictor predicts, for clips one at a time.

  To normalise by 'layer' or 'none' takes no statistics: they may be None.
  """

  # 'layer': each token is normalised by itself. 'position': each feature by its
  # mean and deviation over clips at each position; training takes those of the
  # batch, which one clip has not. 'none': pixel targets, which are normalised
  # as they are made.
  norm: str
  mean: np.ndarray | None = None  # float32 [N, D], over clips at each position
  scale: np.ndarray | None = None  # the same, what 'position' divides by
  # float32 [N, D], mean over clips after normalisation: what can be predicted
  # of a clip unseen.
  average: np.ndarray | None = None
  # float32 [levels], mean and deviation of the features of a token.
  token_mean: np.ndarray | None = None
  token_std: np.ndarray | None = None
  levels: int = 1  # that D holds end to end, each normalised by itself

  def normalize(
    self, features: jax.Array, ids: np.ndarray | slice = slice(None)
  ) -> jax.Array:
    """Normalises features `[B, K, D]` of tokens `ids` `[K]`, to float32."""
    if self.norm == 'position':
      x = features.astype(jnp.float32)
      return (x - self.mean[ids]) / self.scale[ids]
    if self.norm == 'none':
      return features
    return normalize_levels(features, self.levels)

  def restore(self, features: jax.Array, ids: np.ndarray) -> jax.Array:
    """Inverts `normalize`; for 'layer' with the usual mean and deviation."""
    if self.norm == 'position':
      return features * self.scale[ids] + self.mean[ids]
    parts = features.reshape(*features.shape[:-1], self.levels, -1)
    std, mean = np.reshape([self.token_std, self.token_mean], (2, -1, 1))
    return (parts * std + mean).reshape(features.shape)

  def transfer(
    self, features: jax.Array, ids: np.ndarray, new_ids: np.ndarray
  ) -> jax.Array:
    """Takes normalised features to other positions, from `ids` to `new_ids`.

    What all clips have in common at a position is exchanged; normalised by
    position it is gone already.
    """
    if self.norm == 'position':
      return features
    return features + (self.average[new_ids] - self.average[ids])


def encode_target(
  world: WorldModel,
  params: dict[str, Params],
  video: jax.Array,
  ids: jax.Array | None = None,
) -> jax.Array:
  """Computes targets before they are normalised, of whole clips.

  Args:
    world: The model.
    params: `world.params`, passed on its own so that it may be traced.
    video: uint8 `[B, frames, h, w, 3]`, or normalised floats.
    ids: int32 `[K]`: encode these tokens, seeing nothing else; None for all.

  Returns:
    `[B, N, D]` or `[B, K, D]`. Pixel targets are normalised.
  """
  if world.targets == 'pixels':
    tubelets = tub.patchify(video, world.tubelet)
    tubelets = tubelets if ids is None else tubelets[:, ids]
    return normalize_tubelets(tubelets)
  if ids is not None:
    ids = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (len(video), len(ids)))
  return encode_levels(
    world.target_encoder, params['target'], video, ids, world.levels
  )


def measure_space(
  world: WorldModel, batches: Iterable[np.ndarray]
) -> TargetSpace:
  """Measures the statistics of targets over batches of clips of one shape.

  Raises:
    UserError: There is no clip.
  """
  norm, levels = world.norm, len(world.levels or (None,))

  @jax.jit
  def measure(params, video):
    x = encode_target(world, params, video).astype(jnp.float32)
    normal = x if norm == 'none' else normalize_levels(x, levels)
    parts = x.reshape(*x.shape[:2], levels, -1)
    return {
      'sum': x.sum(axis=0),
      'squares': jnp.square(x).sum(axis=0),
      'normal': normal.sum(axis=0),
      'token_mean': parts.mean(axis=(1, 3)).sum(axis=0),
      'token_std': parts.std(axis=3).mean(axis=1).sum(axis=0),
    }

  total, count = None, 0
  for video in batches:
    part = jax.device_get(measure(world.params, video))
    part = jax.tree.map(np.float64, part)
    total = part if total is None else jax.tree.map(np.add, total, part)
    count += len(video)
  if not count:
    raise UserError('statistics of targets need clips, there are none')
  mean = jax.tree.map(lambda x: x / count, total)
  variance = np.maximum(mean['squares'] - mean['sum'] ** 2, 0.0)
  arrays = {
    'mean': mean['sum'],
    'scale': pad_deviation(np.sqrt(variance)),
    'average': mean['normal'] * (norm != 'position'),
    'token_mean': mean['token_mean'],
    'token_std': mean['token_std'],
  }
  arrays = {k: np.float32(x) for k, x in arrays.items()}
  return TargetSpace(norm, **arrays, levels=levels)
