"""V-JEPA 2-AC: predict the next frame from frames, actions and states.

Assran et al. 2025 (arXiv 2506.09985), equations 2 to 4. The encoder is frozen,
and sees each frame alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.options import check_choice
from vjepa_jax.training.objectives import base
from vjepa_jax.training.objectives.targets import (
  measure_cosine,
  measure_error,
  normalize_features,
)

_PREFIXES = 'first', 'random'


def encode_frames(encoder: Encoder, params: Any, frames: jax.Array) -> Any:
  """Encodes each frame alone, repeated to the length of a tubelet.

  An encoder with `modalities` takes it as an image.

  Args:
    encoder: The frozen encoder.
    params: Its parameters.
    frames: uint8 `[B, T, height, width, 3]`.

  Returns:
    Normalised features, float32 `[B, T, H, W, D]`, without gradient.
  """
  images = frames.reshape(-1, *frames.shape[2:])
  sides = [
    side // patch
    for side, patch in zip(frames.shape[2:], encoder.tubelet[1:], strict=False)
  ]
  with jax.named_scope('target_encoder'):
    features = encoder.apply({'params': params}, images, dtype=jnp.float32)
    features = normalize_features(features)
  features = features.reshape(*frames.shape[:2], *sides, -1)
  return jax.lax.stop_gradient(features)


def predict_frames(
  predictor: ActionPredictor,
  params: Any,
  frames: jax.Array,
  actions: jax.Array,
  states: jax.Array,
  extrinsics: jax.Array | None = None,
) -> jax.Array:
  """Predicts, after each of T frames, the features of the next one.

  Args:
    predictor: The predictor.
    params: Its parameters.
    frames: Normalised features `[B, T, H, W, D]`.
    actions, states, extrinsics: Of these frames at least, `[B, >= T, ...]`.

  Returns:
    Normalised features, float32 `[B, T, H, W, D]`.
  """
  rows, steps, *sides, width = frames.shape
  if extrinsics is not None:
    extrinsics = extrinsics[:, :steps]
  predicted = predictor.apply(
    {'params': params},
    frames.reshape(rows, -1, width),
    actions[:, :steps],
    states[:, :steps],
    (steps, *sides),
    extrinsics,
  )
  return normalize_features(predicted).reshape(frames.shape)


@dataclasses.dataclass(frozen=True)
class ActionPrediction(base.Objective):
  """Teacher forcing, and a rollout on what was predicted."""

  encoder: Encoder | None  # None where the batch has features
  predictor: ActionPredictor
  rollout_steps: int = 2  # imagined frames; 0 for teacher forcing alone
  # True frames before a rollout: the 'first' of the clip, as published, or a
  # 'random' number of them, drawn each step.
  rollout_prefix: str = 'first'
  # Predictions that are fed back get no gradient from what is made of them.
  detach: bool = False
  loss_exp: float = 1.0  # power of the error
  seed: int = 0

  averaged = None

  def __post_init__(self):
    """Raises UserError where an option is none."""
    check_choice('rollout_prefix', self.rollout_prefix, _PREFIXES)
    if self.rollout_steps < 0 or self.loss_exp not in (1, 2):
      raise UserError(
        f'rollout_steps {self.rollout_steps} is not negative and loss_exp '
        f'{self.loss_exp} is 1 or 2'
      )

  def init(self, key):
    return {'predictor': self.predictor.init_params(key)}

  def loss(self, params, frozen, batch, step=0):
    """See `Objective`.

    'video' has, of each of T frames, 'states' `[B, T, S]` and, of a camera
    that is known, 'extrinsics'; 'actions' `[B, T - 1, A]`; and 'pixels' or the
    encoder's 'features' `[B, T, H, W, D]`, not normalised.
    """
    stream = batch['video']
    if 'features' in stream:
      frames = normalize_features(stream['features'])
    else:
      frames = encode_frames(self.encoder, frozen, stream['pixels'])

    def predict(frames):
      with jax.named_scope('predictor'):
        return predict_frames(
          self.predictor,
          params['predictor'],
          frames,
          stream['actions'],
          stream['states'],
          stream.get('extrinsics'),
        )

    def compare(predicted, target):
      with jax.named_scope('loss'):
        return jnp.mean(measure_error(predicted, target, self.loss_exp))

    forced, targets = predict(frames[:, :-1]), frames[:, 1:]
    loss = compare(forced, targets)
    metrics = {
      'loss_teacher_forcing': loss,
      # What it would be if nothing ever moved.
      'loss_copy': compare(frames[:, :-1], targets),
      'prediction_cosine': measure_cosine(forced, targets),
    }
    if self.rollout_steps:
      imagined, truth = self._roll_out(predict, frames, forced, step)
      return base.add_terms(
        loss, metrics, {'rollout': (1.0, compare(imagined, truth))}
      )
    return loss, metrics | {'loss': loss}

  def _roll_out(self, predict, frames, forced, step):
    """Imagines frames one after the other, on true actions and states.

    Returns:
      The imagined frames and the true ones, `[B, rollout_steps, H, W, D]`. The
      first comes of teacher forcing, and is compared there too.
    """
    last = frames.shape[1] - 1
    count = min(self.rollout_steps, last)
    prefix = 1
    if self.rollout_prefix == 'random':
      key = jax.random.fold_in(jax.random.key(self.seed), step)
      prefix = jax.random.randint(key, (), 1, last - count + 2)

    def take(x, start, size=1):
      return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    history, imagined = frames[:, :-1], [take(forced, prefix - 1)]
    for place in range(count - 1):
      fed = imagined[-1]
      if self.detach:
        fed = jax.lax.stop_gradient(fed)
      history = jax.lax.dynamic_update_slice_in_dim(
        history, fed, prefix + place, axis=1
      )
      # No step sees a later one: those after the prediction do no harm, and
      # are cut off where their number is known.
      length = place + 2 if self.rollout_prefix == 'first' else last
      imagined.append(take(predict(history[:, :length]), prefix + place))
    return jnp.concatenate(imagined, axis=1), take(frames, prefix, count)
