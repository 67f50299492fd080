"""V-JEPA with terms that keep features from losing dimensions.

The terms of VICReg (arXiv 2105.04906) and LeJEPA (SIGReg, arXiv 2511.08544), on
the features of the visible tokens.
"""

import dataclasses
import math
from typing import Any

import jax

from vjepa_jax.errors import UserError
from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.training.objectives import base, regularizers, vjepa
from vjepa_jax.training.objectives.targets import center_by_position

# By the names of their weights; from features `[N, D]` and a random key.
_TERMS = {
  'feature_variance': lambda x, _: regularizers.compute_variance_term(x),
  'covariance': lambda x, _: regularizers.compute_covariance_term(x),
  'sigreg': regularizers.compute_sigreg,
}


@dataclasses.dataclass(frozen=True)
class Regularized(vjepa.VJepa):
  """V-JEPA and the terms of `regularizers` whose weight is not 0."""

  feature_variance_weight: float = 0.0
  covariance_weight: float = 0.0
  sigreg_weight: float = 0.0
  seed: int = 0  # of the random directions of SIGReg

  def __post_init__(self):
    """Raises UserError where nothing would be regularised."""
    if not any(getattr(self, f'{name}_weight') for name in _TERMS):
      raise UserError(
        'objective.kind regularized has no weight that is not 0: set one of '
        'objective.regularized, or objective.kind=vjepa'
      )

  @property
  def whole_batch(self) -> str | None:
    return 'regularizers take statistics over the clips of a batch'

  def loss(self, params, frozen, batch, step=0):
    stream = batch['video']
    targets = self.targets.encode(frozen, stream)
    context, predictions = self.predict(params, stream)
    loss, metrics = self.compare(predictions, targets, stream['masks'])
    grid = compute_grid(stream['pixels'].shape, self.encoder.tubelet)
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    with jax.named_scope('regularizers'):
      # What is left is content: features that tell positions apart and nothing
      # else vary as much over tokens, and would satisfy the terms.
      content = [
        center_by_position(features, mask['context'], math.prod(grid)).reshape(
          -1, features.shape[-1]
        )
        for features, mask in zip(context, stream['masks'], strict=True)
      ]
      terms = {
        name: (weight, base.average([compute(x, key) for x in content]))
        for name, compute in _TERMS.items()
        if (weight := getattr(self, f'{name}_weight'))
      }
    return base.add_terms(loss, metrics, terms)


def build(setup: base.Setup, **options: Any) -> vjepa.VJepa:
  """Builds the objective, see `vjepa.build`."""
  return vjepa.build(setup, kind=Regularized, seed=setup.seed, **options)
