"""V-JEPA 2.1: predict all levels, of what is hidden and of what is visible.

Mur-Labadia et al. 2026 (arXiv 2603.14482). Videos and images are streams of one
batch; with a teacher, its last level is predicted instead (distillation).
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.training.objectives import base, vjepa
from vjepa_jax.training.objectives.regions import measure_distance
from vjepa_jax.training.objectives.targets import (
  choose_targets,
  measure_error,
)


@dataclasses.dataclass(frozen=True)
class VJepa21(vjepa.VJepa):
  """The dense loss, over one stream or two; the predictor predicts context."""

  context_weight: float = 0.5  # of the loss on visible tokens
  context_warmup_steps: tuple[int, int] = (0, 0)  # while it rises from 0
  # Divide it by the square root of a token's distance to the nearest target, as
  # published for pretraining.
  context_distance: bool = True
  image_mask_names: tuple[str, ...] = ('image',)
  streams = 'video', 'image'
  image_context_weight: float = 0.5
  # Of images in the loss beside videos, whatever the sizes of their batches: in
  # the published system the share of devices that have images.
  image_share: float = 0.5

  def __post_init__(self):
    """Raises UserError where targets have no features of visible tokens."""
    if self.targets.view != 'clip':
      raise UserError(
        'vjepa21 needs the features of visible tokens: it goes with '
        "target_view 'clip'"
      )

  def loss(self, params, frozen, batch, step=0):
    """See `Objective`; metrics of images have names of their own."""
    share = self.image_share if 'image' in batch else 0.0
    losses, metrics = {}, {}
    for name, weight in (('video', 1.0 - share), ('image', share)):
      if name in batch:
        loss, found = self._compare_stream(
          name, params, frozen, batch[name], step
        )
        losses[name] = weight * loss
        prefix = '' if name == 'video' else f'{name}/'
        metrics |= {prefix + key: value for key, value in found.items()}
    if len(losses) > 1:
      metrics |= {'video/loss': metrics['loss'], 'loss': sum(losses.values())}
    return metrics['loss'], metrics

  def _compare_stream(self, name, params, frozen, stream, step):
    """Computes the loss of one modality and its metrics."""
    masks, mask_names = stream['masks'], self.mask_names
    weight = self.context_weight
    if name == 'image':
      mask_names, weight = self.image_mask_names, self.image_context_weight
    hidden_targets, visible_targets = self.targets.encode_parts(
      frozen, stream, ('target', 'context')
    )
    _, (hidden, visible) = self.predict(params, stream)
    loss, metrics = self.compare(hidden, hidden_targets, masks, mask_names)
    metrics |= self._compare_levels(hidden, hidden_targets)
    context_loss = self._compare_context(
      visible, visible_targets, masks, stream['pixels'].shape
    )
    weight = ramp_weight(weight, self.context_warmup_steps, step)
    return base.add_terms(loss, metrics, {'context': (weight, context_loss)})

  def _compare_levels(
    self, hidden: Sequence[jax.Array], targets: Sequence[jax.Array]
  ) -> base.Metrics:
    """Computes the loss of each level, where there are several."""
    levels = self.targets.levels or ()
    errors = [
      measure_error(x, target, self.loss_exp).mean((0, 1))
      for x, target in zip(hidden, targets, strict=True)
    ]
    chunks = jnp.split(sum(errors) / len(errors), max(len(levels), 1))
    return {
      f'loss_level_{level}': chunk.mean()
      for level, chunk in zip(levels, chunks, strict=False)
    }

  def _compare_context(
    self,
    visible: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    masks: Sequence[dict[str, jax.Array]],
    video_shape: tuple[int, ...],
  ) -> jax.Array:
    """Computes the loss on visible tokens, the mean over mask specs."""
    grid = self.encoder.compute_grid(video_shape)
    losses = []
    for features, target, mask in zip(visible, targets, masks, strict=True):
      error = measure_error(features, target, self.loss_exp)
      if self.context_distance:
        distance = measure_distance(mask['context'], mask['target'], grid)
        error *= jax.lax.rsqrt(distance)[..., None]
      losses.append(jnp.mean(error))
    return base.average(losses)


def ramp_weight(
  weight: float, warmup_steps: tuple[int, int], step: jax.Array | int
) -> jax.Array | float:
  """Returns a weight that rises linearly from 0 between two steps."""
  start, end = warmup_steps
  if end <= start:
    return weight
  progress = (jnp.asarray(step, jnp.float32) - start) / (end - start)
  return weight * jnp.clip(progress, 0.0, 1.0)


def build(
  setup: base.Setup,
  *,
  target_norm: str,
  target_view: str,
  teacher: str,
  **options: Any,
) -> VJepa21:
  """Builds the objective: of all levels, or with the workdir of a teacher."""
  targets, options['teacher'] = choose_targets(
    setup, teacher, target_norm, target_view, setup.encoder.levels or None
  )
  predictor = setup.build_predictor(
    out_width=targets.width,
    levels=len(targets.levels or (None,)),
    predict_context=True,
  )
  options['image_mask_names'] = setup.mask_names.get('image', ())
  names = setup.mask_names['video']
  return VJepa21(setup.encoder, predictor, targets, names, **options)
