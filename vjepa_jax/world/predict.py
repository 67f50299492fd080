"""What a world model predicts of hidden tokens, and how far off that is.

Everything is computed from what is visible; the truth is for comparison alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models.positions import Grid
from vjepa_jax.models.tubelets import patchify
from vjepa_jax.training.objectives.base import encode_levels
from vjepa_jax.world.masks import Masks
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  encode_target,
  normalize_visible,
)


class Prediction(NamedTuple):
  """Features of clips, float32; K visible and H hidden tokens."""

  # [B, H, D], what the predictor says of the hidden tokens, normalised.
  predicted: jax.Array
  # [B, K, D], what the target encoder makes of the visible tokens when it sees
  # nothing else, normalised.
  visible: jax.Array
  # [B, K, W], what the context encoder makes of them, which is what the
  # predictor was given; not normalised.
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


@dataclasses.dataclass(eq=False)
class MaskedPredictor:
  """Predicts the same hidden tokens of any clips; compiles when first used.

  Methods that take `params` use them in place of `world.params`.
  """

  world: WorldModel
  space: TargetSpace  # of its targets
  grid: Grid  # tubelet grid of the clips
  # Ids of the visible tokens, int32 [K], and of the tokens to predict, [H];
  # also by themselves, as `visible` and `hidden`.
  masks: Masks
  mask_token: int  # see `choose_mask_token`

  def __post_init__(self):
    """Says what is to be compiled."""
    world, space = self.world, self.space
    self.visible, self.hidden = self.masks
    self._predict = jax.jit(self._encode_and_predict)
    self._predict_from = jax.jit(self._apply_predictor)
    self._encode = jax.jit(
      lambda *args: space.normalize(encode_target(world, *args))
    )
    self._encode_alone = jax.jit(
      lambda *args: space.normalize(
        encode_target(world, *args, self.hidden), self.hidden
      )
    )

  def predict(self, video: np.ndarray, params: Any = None) -> Prediction:
    """Predicts what is hidden of clips, uint8 `[B, frames, h, w, 3]`.

    Hidden pixels are blanked before any model sees the clips.
    """
    return self._predict(params or self.world.params, video)

  def predict_from(self, context: jax.Array) -> jax.Array:
    """Predicts from context features `[B, K, W]`: `[B, H, D]`."""
    return self._predict_from(self.world.params, context)

  def encode(self, video: np.ndarray, params: Any = None) -> jax.Array:
    """Encodes whole clips as targets, normalised: `[B, N, D]`."""
    return self._encode(params or self.world.params, video)

  def encode_hidden(self, video: np.ndarray, params: Any = None) -> jax.Array:
    """Computes the truth, `[B, H, D]`: the targets of training.

    They are of the whole clip, or of the hidden tokens by themselves where the
    run's `target_view` says so.
    """
    if self.world.target_view == 'targets':
      return self._encode_alone(params or self.world.params, video)
    return self.encode(video, params)[:, self.hidden]

  def _encode_and_predict(self, params, video):
    world, visible = self.world, self.visible
    pixels = normalize_visible(world.encoder, video, visible).video
    context = encode_levels(
      world.encoder,
      params['encoder'],
      pixels,
      _repeat(visible, video),
      world.levels,
    )
    predicted = self._apply_predictor(params, context)
    if world.targets != 'pixels':
      video = normalize_visible(world.target_encoder, video, visible).video
    seen = encode_target(world, params, video, visible)
    return Prediction(predicted, self.space.normalize(seen, visible), context)

  def _apply_predictor(self, params, context):
    predicted = self.world.predictor.apply(
      {'params': params['predictor']},
      context,
      _repeat(self.visible, context),
      _repeat(self.hidden, context),
      self.grid,
      self.mask_token,
      is_image=self.world.is_image,
    )
    if self.world.predictor.predict_context:
      predicted = predicted[0]
    return predicted.astype(jnp.float32)


def _repeat(ids: np.ndarray, clips: jax.Array) -> jax.Array:
  """Repeats ids `[K]` for every clip: int32 `[B, K]`."""
  return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (len(clips), len(ids)))


def join_tokens(
  visible: jax.Array, hidden: jax.Array, masks: Masks
) -> jax.Array:
  """Joins tokens `[B, K, D]` and `[B, H, D]` of ids `masks` to `[B, N, D]`."""
  order = np.argsort(np.concatenate(masks))
  return jnp.concatenate([visible, hidden], axis=1)[:, order]


def score_features(
  predicted: jax.Array, truth: jax.Array
) -> dict[str, np.ndarray]:
  """Scores features `[B, H, D]` by token, float32 `[B, H]`.

  By 'error', the mean absolute difference (the loss of training), and 'cosine'.
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

  Clips are `[B, frames, h, w, 3]`, 0..255.
  """
  difference = np.asarray(predicted, np.float32) - np.asarray(truth, np.float32)
  cut = patchify(difference, tubelet)[:, hidden]
  mse = np.square(cut).mean(axis=(1, 2))
  return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))


def summarize(scores: np.ndarray) -> dict[str, float]:
  """Summarises scores of clips `[B]` by their mean and its standard error."""
  scores = np.asarray(scores, np.float64)
  error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
  return {'mean': float(scores.mean()), 'standard_error': float(error)}
