"""What a world model predicts of hidden tokens, and how far off that is.

Everything is computed from what is visible; the truth is for comparison alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.positions import Grid
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  encode_target,
  normalize_visible,
)


class Imagined(NamedTuple):
  """Features of clips, normalised, float32; K visible and H hidden tokens.

  Attributes:
    predicted: `[B, H, D]`, what the predictor says of the hidden tokens.
    seen: `[B, K, D]`, what the target encoder makes of the visible tokens when
      it sees nothing else.
    context: `[B, K, W]`, what the context encoder makes of them, which is what
      the predictor was given; not normalised.
  """

  predicted: jax.Array
  seen: jax.Array
  context: jax.Array


def choose_mask_token(world: WorldModel, hide: str) -> int:
  """Chooses the mask token for a way of hiding.

  V-JEPA 1 has one a mask spec, the second of which goes with the larger masks;
  V-JEPA 2 has several of which only the first is trained, and they start as
  zeros.

  Returns:
    The token of the spec that hid in this way in training; where none did, the
    last one that has been trained.
  """
  tokens = np.asarray(world.params['predictor']['mask_tokens'])
  if hide in world.mask_kinds:
    return world.mask_kinds.index(hide) % len(tokens)
  trained = np.flatnonzero(np.abs(tokens).max(axis=1) > 0)
  return int(trained[-1]) if len(trained) else 0


class Imagination:
  """Predicts the same hidden tokens of any clips; compiles when first used.

  Attributes:
    world: The model.
    space: Of its targets.
    visible: Ids of the visible tokens, int32 `[K]`.
    hidden: Ids of the tokens to predict, int32 `[H]`.
    mask_token: See `choose_mask_token`.
    grid: Tubelet grid of the clips.
  """

  def __init__(
    self,
    world: WorldModel,
    space: TargetSpace,
    grid: Grid,
    masks: tuple[np.ndarray, np.ndarray],
    mask_token: int,
  ):
    """Takes the model, the ids of visible and hidden tokens, and the rest."""
    self.world, self.space, self.grid = world, space, grid
    self.visible, self.hidden = masks
    self.mask_token = mask_token
    self._imagine = jax.jit(self._imagine_once)
    self._advance = jax.jit(self._predict)
    self._encode = jax.jit(
      lambda params, video: space.normalize(encode_target(world, params, video))
    )
    self._encode_hidden = jax.jit(
      lambda params, video: space.normalize(
        encode_target(world, params, video, self.hidden), self.hidden
      )
    )

  def imagine(self, video: np.ndarray, params: Any = None) -> Imagined:
    """Predicts what is hidden of clips, uint8 `[B, frames, h, w, 3]`.

    Hidden pixels are blanked before any model sees the clips.

    Args:
      video: The clips.
      params: In place of `world.params`.
    """
    return self._imagine(params or self.world.params, video)

  def advance(self, context: jax.Array) -> jax.Array:
    """Predicts from context features `[B, K, W]`: `[B, H, D]`."""
    return self._advance(self.world.params, context)

  def encode(self, video: np.ndarray) -> jax.Array:
    """Encodes whole clips as targets, normalised: `[B, N, D]`."""
    return self._encode(self.world.params, video)

  def reveal(self, video: np.ndarray) -> jax.Array:
    """Computes the truth, `[B, H, D]`: the targets of training.

    They are of the whole clip, or of the hidden tokens by themselves where the
    run's `target_view` says so.
    """
    if self.world.target_view == 'targets':
      return self._encode_hidden(self.world.params, video)
    return self.encode(video)[:, self.hidden]

  def _imagine_once(self, params, video):
    world, visible = self.world, self.visible
    pixels = normalize_visible(world.encoder, video, visible).video
    context = world.encoder.apply(
      {'params': params['encoder']}, pixels, _repeat(visible, video)
    )
    predicted = self._predict(params, context)
    if world.targets == 'pixels':
      seen = encode_target(world, params, video, visible)
    else:
      pixels = normalize_visible(world.target_encoder, video, visible).video
      seen = encode_target(world, params, pixels, visible)
    return Imagined(predicted, self.space.normalize(seen, visible), context)

  def _predict(self, params, context):
    predicted = self.world.predictor.apply(
      {'params': params['predictor']},
      context,
      _repeat(self.visible, context),
      _repeat(self.hidden, context),
      self.grid,
      self.mask_token,
    )
    if self.world.predictor.predict_context:
      predicted = predicted[0]
    return predicted.astype(jnp.float32)


def score_features(
  predicted: jax.Array, truth: jax.Array
) -> dict[str, np.ndarray]:
  """Scores features `[B, H, D]` by token.

  Returns:
    'error', the mean absolute difference (the loss of training), and 'cosine',
    each float32 `[B, H]`.
  """
  a, b = (np.asarray(x, np.float32) for x in (predicted, truth))
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return {
    'error': np.abs(a - b).mean(axis=-1),
    'cosine': (a * b).sum(axis=-1) / np.maximum(norms, 1e-6),
  }


def score_pixels(
  predicted: np.ndarray,
  truth: np.ndarray,
  hidden: np.ndarray,
  tubelet: tuple[int, int, int],
) -> np.ndarray:
  """Computes the PSNR of the hidden tubelets of each clip, dB, `[B]`.

  Args:
    predicted: `[B, frames, h, w, 3]`, 0..255.
    truth: The same.
    hidden: Ids of the tokens that count.
    tubelet: Tubelet size.
  """
  difference = np.asarray(predicted, np.float32) - np.asarray(truth, np.float32)
  cut = tub.patchify(difference, tubelet)[:, hidden]
  mse = np.square(cut).mean(axis=(1, 2))
  return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))


def find_nearest(
  visible: np.ndarray, hidden: np.ndarray, grid: Grid
) -> np.ndarray:
  """Finds the visible token next to each hidden one, in the tubelet grid.

  Returns:
    int `[H]`, indices into `visible`. Where the future is hidden that is the
    same place at the last visible time step.
  """
  a, b = (np.stack(np.unravel_index(x, grid), -1) for x in (hidden, visible))
  distances = np.square(a[:, None] - b[None]).sum(axis=-1)
  return distances.argmin(axis=1)


def average_places(
  seen: np.ndarray, visible: np.ndarray, hidden: np.ndarray, grid: Grid
) -> np.ndarray:
  """Averages visible features over time, for each hidden token.

  Args:
    seen: `[B, K, D]`.
    visible: Ids `[K]`.
    hidden: Ids `[H]`.
    grid: Tubelet grid.

  Returns:
    `[B, H, D]`: the mean over visible tokens of the same place, or over all
    where none is visible.
  """
  frame = grid[1] * grid[2]
  same = (hidden[:, None] % frame == visible[None] % frame).astype(np.float32)
  same[same.sum(axis=1) == 0] = 1.0
  weights = same / same.sum(axis=1, keepdims=True)  # [H, K]
  return np.einsum('hk,bkd->bhd', weights, seen)


def fill_pixels(
  video: np.ndarray,
  visible: np.ndarray,
  hidden: np.ndarray,
  tubelet: tuple[int, int, int],
  how: str,
) -> np.ndarray:
  """Fills hidden tubelets from visible pixels: the baselines of prediction.

  Args:
    video: uint8 `[B, frames, h, w, 3]`.
    visible: Ids `[K]`.
    hidden: Ids `[H]`.
    tubelet: Tubelet size.
    how: 'last' repeats the visible frame nearest in time at the same place, or
      copies the nearest visible tubelet where that place is never visible.
      'mean' takes the mean over visible frames, or over all visible pixels.

  Returns:
    float32 `[B, frames, h, w, 3]`.
  """
  grid = tub.compute_grid(video.shape, tubelet)
  frame = grid[1] * grid[2]
  x = tub.patchify(video.astype(np.float32), tubelet)
  x = x.reshape(*x.shape[:2], tubelet[0], -1).copy()  # [B, N, t, p * p * 3]
  if how == 'mean':
    flat = x[:, visible].mean(axis=2)  # [B, K, p * p * 3]
    x[:, hidden] = average_places(flat, visible, hidden, grid)[:, :, None]
  else:
    for token, near in zip(
      hidden, visible[find_nearest(visible, hidden, grid)], strict=True
    ):
      if token % frame != near % frame:
        x[:, token] = x[:, near]
      else:
        x[:, token] = x[:, near, [-1 if near < token else 0]]
  return tub.unpatchify(x.reshape(*x.shape[:2], -1), grid, tubelet)


def _repeat(ids: np.ndarray, clips: jax.Array) -> jax.Array:
  """Repeats ids `[K]` for every clip: int32 `[B, K]`."""
  return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (len(clips), len(ids)))


def summarize(scores: np.ndarray) -> dict[str, float]:
  """Summarises scores of clips `[B]` by their mean and its standard error."""
  scores = np.asarray(scores, np.float64)
  error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
  return {'mean': float(scores.mean()), 'standard_error': float(error)}
