"""Selects one probe of a grid on validation videos, and tests it on others."""

import dataclasses
import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import sources
from vjepa_jax.data.clip import ClipOptions
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import classification, probing
from vjepa_jax.evaluation.probe_grid import ProbeGrid
from vjepa_jax.models.probe import AttentiveProbe, compute_attention
from vjepa_jax.training.state import TrainState


class Selection:
  """Validates all probes of a grid, and tests the best one.

  It is called with a state by the training loop, and returns metrics.
  """

  def __init__(
    self,
    grid: ProbeGrid,
    validation: sources.Source,
    options: ClipOptions | None,
    **predict: Any,
  ):
    """Makes the programs.

    Args:
      grid: The probes; their encoder is the state's `frozen`.
      validation: Videos, or features, to select by.
      options: How videos are cut; None for features.
      **predict: mesh, batch_size and num_threads of `make_predict`.
    """
    self._grid, self._validation, self._options = grid, validation, options
    self._make_predict = functools.partial(
      classification.make_predict, num_classes=grid.probe.num_classes, **predict
    )
    self._predict = self._make_predict(self._classify)
    self._pool = self._make_predict(
      lambda *x: self._encode(*x).astype(jnp.float32).mean(axis=(1, 2))
    )

  def _encode(self, params: Any, inputs: jax.Array) -> jax.Array:
    if self._options is None:
      return inputs
    return self._grid.encode(params['encoder'], inputs)

  def _classify(self, params: Any, inputs: jax.Array) -> jax.Array:
    return self._grid.classify(params['probe'], self._encode(params, inputs))

  def _validate(self, state: TrainState) -> tuple[list[float], int]:
    """Returns the top-1 of each probe on validation videos, and the best."""
    probabilities, labels, left_out = self._predict(
      _get_params(state), self._validation, self._options
    )
    if not len(labels):
      raise UserError(f'none of {left_out} validation videos could be read')
    hits = probabilities.argmax(axis=-1) == labels[:, None]
    scores = hits.mean(axis=0)
    return scores.tolist(), int(scores.argmax())

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns metrics of the state."""
    scores, best = self._validate(state)
    logging.info(
      'step %d: top-1 on validation %.4f, by learning rate %g and weight decay '
      '%g',
      int(state.step),
      scores[best],
      *self._grid.points[best],
    )
    return {'validation_top1': scores[best]}

  def test(
    self, state: TrainState, source: sources.Source
  ) -> tuple[dict[str, Any], classification.Predictions]:
    """Selects a probe on the validation videos and tests it on others.

    Returns:
      Results, and the predictions of the selected probe.
    """
    scores, best = self._validate(state)
    predictions = self._predict(_get_params(state), source, self._options)
    predictions = predictions._replace(outputs=predictions.outputs[:, best])
    rows = [
      {'learning_rate': rate, 'weight_decay': decay, 'validation_top1': score}
      for (rate, decay), score in zip(self._grid.points, scores, strict=True)
    ]
    results = classification.score(predictions) | predictions.count()
    return results | {
      'selected': rows[best],
      'selected_by': 'top-1 on validation videos, which are not the test ones',
      'validation_videos': len(self._validation),
      'grid': rows,
    }, predictions

  def score_knn(self, state: TrainState, train, test, neighbours: int) -> float:
    """Scores nearest neighbours on means over all tokens of a video."""
    (x, labels, _), (y, test_labels, _) = (
      self._pool(_get_params(state), source, self._options)
      for source in (train, test)
    )
    return probing.score_knn(x, labels, y, test_labels, neighbours)

  def attend(
    self, state: TrainState, best: int, source: sources.Source
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Computes where a probe of the grid looks in videos.

    Args:
      state: The state.
      best: Which probe.
      source: The videos.

    Returns:
      The videos uint8 `[n, segments * frames, h, w, 3]`, weights of the cells
      of the tubelet grid `[n, segments * T, H, W]`, and labels int `[n]`. None
      of linear probes, of features, which have no places, and if no video can
      be read.
    """
    grid = self._grid
    if self._options is None or not isinstance(grid.probe, AttentiveProbe):
      return None

    def attend(params, videos):
      features = grid.encode(params['encoder'], videos)[:, 0]
      one = jax.tree.map(lambda x: x[best], params['probe'])
      return videos, compute_attention(grid.probe, one, features)

    options = dataclasses.replace(self._options, views=1)
    (videos, weights), labels, _ = self._make_predict(attend)(
      _get_params(state), source, options
    )
    count = len(labels)
    if not count:
      return None
    sides = grid.encoder.compute_grid(videos.shape[1:])
    layers = len(grid.layers or (None,))
    weights = weights.reshape(count, grid.segments, layers, *sides).sum(axis=2)
    return (
      videos.reshape(count, -1, *videos.shape[3:]),
      weights.reshape(count, -1, *sides[1:]),
      labels,
    )


def _get_params(state: TrainState) -> dict[str, Any]:
  return {'encoder': state.frozen, 'probe': state.params['probe']}
