"""V-JEPA 2.1: predict the visible tokens too (arXiv 2603.14482).

On the features of the last layer alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.training.objectives import base, vjepa
from vjepa_jax.training.objectives.regions import measure_distance
from vjepa_jax.training.objectives.targets import gather, measure_error


@dataclasses.dataclass(frozen=True)
class VJepa21(vjepa.VJepa):
  """The dense loss; the predictor has `predict_context`."""

  context_weight: float = 0.5  # of the loss on visible tokens
  context_warmup_steps: tuple[int, int] = (0, 0)  # while it rises from 0
  # Divide it by the square root of a token's distance to the nearest target, as
  # published for pretraining.
  context_distance: bool = True

  def __post_init__(self):
    """Raises ValueError where targets have no features of visible tokens."""
    if self.targets.view != 'clip':
      raise ValueError(
        'vjepa21 needs the features of visible tokens: it goes with '
        "target_view 'clip'"
      )

  def loss(self, params, frozen, batch, step=0):
    video, masks = batch['video']['pixels'], batch['video']['masks']
    clip = self.targets.encode_clip(frozen, video)
    _, (hidden, visible) = self.predict(params, batch['video'])
    loss, metrics = self.compare(hidden, gather(clip, masks, 'target'), masks)
    grid = compute_grid(video.shape, self.encoder.tubelet)
    targets = gather(clip, masks, 'context')
    losses = []
    for features, target, mask in zip(visible, targets, masks, strict=True):
      error = measure_error(features, target, self.loss_exp)
      if self.context_distance:
        distance = measure_distance(mask['context'], mask['target'], grid)
        error *= jax.lax.rsqrt(distance)[..., None]
      losses.append(jnp.mean(error))
    weight = ramp_weight(self.context_weight, self.context_warmup_steps, step)
    terms = {'context': (weight, base.average(losses))}
    return base.add_terms(loss, metrics, terms)


def ramp_weight(
  weight: float, warmup_steps: tuple[int, int], step: jax.Array | int
) -> jax.Array | float:
  """Returns a weight that rises linearly from 0 between two steps."""
  start, end = warmup_steps
  if end <= start:
    return weight
  progress = (jnp.asarray(step, jnp.float32) - start) / (end - start)
  return weight * jnp.clip(progress, 0.0, 1.0)


build = functools.partial(vjepa.build, kind=VJepa21, predict_context=True)
