"""V-JEPA 1 and 2: predict the features of what is hidden.

Bardes et al. 2024 (arXiv 2404.08471), Assran et al. 2025 (arXiv 2506.09985).
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.training.objectives import base
from vjepa_jax.training.objectives.targets import (
  FeatureTargets,
  Targets,
  measure_cosine,
  measure_error,
)


@dataclasses.dataclass(frozen=True)
class VJepa(base.Objective):
  """Regression of targets from what is visible (V-JEPA 1, equation 1)."""

  encoder: Encoder
  predictor: Predictor
  targets: Targets
  mask_names: tuple[str, ...]  # in the order of a stream's masks
  loss_exp: float = 1.0  # power of the error; 1 in every published config
  # Of the hinge on the deviation of predictions over the tokens of a clip; 0 in
  # every published config.
  variance_weight: float = 0.0
  teacher: base.Teacher | None = None

  @property
  def whole_batch(self) -> str | None:
    return self.targets.whole_batch

  def init(self, key: jax.Array) -> base.Params:
    return base.init_models(key, self.encoder, self.predictor)

  def loss(self, params, frozen, batch, step=0):
    del step
    targets = self.targets.encode(frozen, batch['video'])
    _, predictions = self.predict(params, batch['video'])
    return self.compare(predictions, targets, batch['video']['masks'])

  def predict(self, params, stream):
    """See `base.predict`."""
    return base.predict(self.encoder, self.predictor, params, stream)

  def compare(
    self,
    predictions: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    masks: Sequence[dict[str, jax.Array]],
    names: Sequence[str] | None = None,
  ) -> tuple[jax.Array, base.Metrics]:
    """Compares predictions with targets, `[B, Kt, D]` a mask spec.

    The mean over tokens is taken within each mask spec, so that specs weigh the
    same whatever their numbers of targets.

    Returns:
      The loss and its metrics.
    """
    losses, stds, cosines, target_stds = [], [], [], []
    for features, target in zip(predictions, targets, strict=True):
      with jax.named_scope('loss'):
        predicted = features.astype(jnp.float32)
        error = measure_error(predicted, target, self.loss_exp)
        losses.append(jnp.mean(error))
        # Over the tokens of each clip, unbiased, as published.
        variance = jnp.var(predicted, axis=1, ddof=1)  # [B, D]
        stds.append(jnp.sqrt(variance + 1e-4))
        cosines.append(measure_cosine(predicted, target))
        target_stds.append(jnp.mean(jnp.std(target, axis=(0, 1))))
    std = base.average(stds)
    metrics = {
      'loss_prediction': base.average(losses),
      'loss_variance': jnp.mean(jax.nn.relu(1.0 - std)),
      'prediction_std': jnp.mean(std),
      'prediction_cosine': base.average(cosines),
      'target_std': base.average(target_stds),
    }
    names = names or self.mask_names
    for name, loss, mask in zip(names, losses, masks, strict=True):
      metrics[f'loss_{name}'] = loss
      for part, ids in mask.items():
        metrics[f'tokens_{part}_{name}'] = jnp.float32(ids.shape[1])
    variance_loss = self.variance_weight * metrics['loss_variance']
    loss = metrics['loss_prediction'] + variance_loss
    return loss, {'loss': loss} | metrics


def build(
  setup: base.Setup,
  *,
  target_norm: str,
  target_view: str,
  kind: type[VJepa] = VJepa,
  **options: Any,
) -> VJepa:
  """Builds the objective, or one of a `kind` with more options."""
  return kind(
    setup.encoder,
    setup.build_predictor(),
    FeatureTargets(setup.encoder, target_norm, target_view),
    setup.mask_names['video'],
    **options,
  )
