"""V-JEPA with terms that keep features from losing dimensions.

The terms of VICReg (arXiv 2105.04906) and LeJEPA (SIGReg, arXiv 2511.08544), on
the features of the visible tokens.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax

from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.training.objectives import base, regularizers, vjepa
from vjepa_jax.training.objectives.targets import center_by_position


@dataclasses.dataclass(frozen=True)
class Regularized(vjepa.VJepa):
  """V-JEPA and the terms of `regularizers` whose weight is not 0.

  Attributes:
    feature_variance_weight, covariance_weight, sigreg_weight: Weights.
    seed: Of the random directions of SIGReg.
    (others): See `VJepa`.
  """

  feature_variance_weight: float = 0.0
  covariance_weight: float = 0.0
  sigreg_weight: float = 0.0
  seed: int = 0

  def __post_init__(self):
    """Raises ValueError where nothing would be regularised."""
    weights = (
      self.feature_variance_weight,
      self.covariance_weight,
      self.sigreg_weight,
    )
    if not any(weights):
      raise ValueError(
        'objective.kind regularized has no weight that is not 0: set one of '
        'objective.regularized, or objective.kind=vjepa'
      )

  @property
  def whole_batch(self) -> str | None:
    """See `Objective`."""
    return 'regularizers take statistics over the clips of a batch'

  def loss(self, params, frozen, batch, step=0):
    """See `Objective`."""
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
        center_by_position(features, mask['context'], math.prod(grid))
        for features, mask in zip(context, stream['masks'], strict=True)
      ]
      terms = self._compute_terms(content, key)
    return base.add_terms(loss, metrics, terms)

  def _compute_terms(
    self, content: Sequence[jax.Array], key: jax.Array
  ) -> dict[str, tuple[float, jax.Array]]:
    """Weights and values of the terms, means over the mask specs."""
    rows = [x.reshape(-1, x.shape[-1]) for x in content]
    terms = {
      'feature_variance': regularizers.compute_variance_term,
      'covariance': regularizers.compute_covariance_term,
      'sigreg': lambda x: regularizers.compute_sigreg(x, key),
    }
    return {
      name: (weight, sum(map(term, rows)) / len(rows))
      for name, term in terms.items()
      if (weight := getattr(self, f'{name}_weight'))
    }


def build(setup: base.Setup, **options: Any) -> vjepa.VJepa:
  """Builds the objective, see `vjepa.build`."""
  return vjepa.build(setup, kind=Regularized, seed=setup.seed, **options)
