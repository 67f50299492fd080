"""Selects one probe of a grid on validation videos, and tests it on others."""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vjepa_jax.data import decode, sources
from vjepa_jax.data.pipeline import ClipOptions, read_clips
from vjepa_jax.evaluation import classification, probing
from vjepa_jax.evaluation.probe_grid import ProbeGrid
from vjepa_jax.models.probe import AttentiveProbe, compute_attention
from vjepa_jax.models.tubelets import compute_grid
from vjepa_jax.training.state import TrainState


class Attention(NamedTuple):
  """Where a probe looks.

  Attributes:
    videos: uint8 `[n, segments * frames, h, w, 3]`.
    weights: `[n, segments * T, H, W]`, of the cells of the tubelet grid.
    labels: int `[n]`.
  """

  videos: np.ndarray
  weights: np.ndarray
  labels: np.ndarray


class Selection:
  """Validates all probes of a grid, and tests the best one.

  It is called with a state by the training loop, and returns metrics.
  """

  def __init__(
    self,
    grid: ProbeGrid,
    mesh: Mesh,
    validation: sources.Source,
    options: ClipOptions | None,
    *,
    batch_size: int,
    num_threads: int = 2,
  ):
    """Makes the programs.

    Args:
      grid: The probes; their encoder is the state's `frozen`.
      mesh: Videos are split over all its devices.
      validation: Videos, or features, to select by.
      options: How videos are cut; None for features.
      batch_size: Videos at a time, over all hosts.
      num_threads: Decoding threads of a host.
    """
    self._grid, self._validation, self._options = grid, validation, options

    def encode(params, inputs):
      if options is None:
        return inputs
      return grid.encode(params['encoder'], inputs)

    def pool(params, inputs):
      return encode(params, inputs).astype(jnp.float32).mean(axis=(1, 2))

    def classify(params, inputs):
      return grid.classify(params['probe'], encode(params, inputs))

    def make_predict(apply: Callable[[Any, jax.Array], jax.Array]):
      return classification.make_predict(
        apply, grid.probe.num_classes, mesh, batch_size, num_threads=num_threads
      )

    self._make_predict = make_predict
    self._predict, self._pool = make_predict(classify), make_predict(pool)

  def _run(self, state: TrainState, source) -> classification.Predictions:
    params = {'encoder': state.frozen, 'probe': state.params['probe']}
    return self._predict(params, source, self._options)

  def _validate(self, state: TrainState) -> list[float]:
    """Returns the top-1 of each probe on the validation videos."""
    probabilities, labels, left_out = self._run(state, self._validation)
    if not len(labels):
      raise ValueError(f'none of {left_out} validation videos could be read')
    hits = probabilities.argmax(axis=-1) == labels[:, None]
    return hits.mean(axis=0).tolist()

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns metrics of the state."""
    scores = self._validate(state)
    best = int(np.argmax(scores))
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
    scores = self._validate(state)
    best = int(np.argmax(scores))
    predictions = self._run(state, source)
    predictions = predictions._replace(
      probabilities=predictions.probabilities[:, best]
    )
    rows = [
      {'learning_rate': rate, 'weight_decay': decay, 'validation_top1': score}
      for (rate, decay), score in zip(self._grid.points, scores, strict=True)
    ]
    return classification.score(predictions) | {
      'test_videos': len(predictions.labels),
      'left_out': predictions.left_out,
      'selected': rows[best],
      'selected_by': 'top-1 on validation videos, which are not the test ones',
      'validation_videos': len(self._validation),
      'grid': rows,
    }, predictions

  def score_knn(self, state: TrainState, train, test, neighbours: int) -> float:
    """Scores nearest neighbours on means over all tokens of a video."""
    params = {'encoder': state.frozen}
    (x, labels, _), (y, test_labels, _) = (
      self._pool(params, source, self._options) for source in (train, test)
    )
    return probing.score_knn(x, labels, y, test_labels, neighbours)

  def attend(
    self, state: TrainState, best: int, source: sources.Source
  ) -> Attention | None:
    """Computes where a probe of the grid looks in videos.

    Args:
      state: The state.
      best: Which probe.
      source: The videos.

    Returns:
      What process 0 found; None on the others, if no video can be read, of
      features, which have no places, and of linear probes.
    """
    grid = self._grid
    if self._options is None or not isinstance(grid.probe, AttentiveProbe):
      return None

    def attend(params, videos):
      features = grid.encode(params['encoder'], videos)[:, 0]
      one = jax.tree.map(lambda x: x[best], params['probe'])
      return compute_attention(grid.probe, one, features)

    options = dataclasses.replace(self._options, views=1)
    params = {'encoder': state.frozen, 'probe': state.params['probe']}
    weights, labels, _ = self._make_predict(attend)(params, source, options)
    if jax.process_index():
      return None
    clips = []
    for record in source:
      # What is damaged was left out there too, and told.
      with contextlib.suppress(decode.DecodeError):
        clips.append(read_clips(record, options))
    if not clips:
      return None
    videos = np.stack(clips)  # [n, segments, T, H, W, 3]
    sides = compute_grid(clips[0].shape, grid.encoder.tubelet)
    layers = len(grid.layers or (None,))
    weights = weights.reshape(len(videos), grid.segments, layers, *sides)
    return Attention(
      videos.reshape(len(videos), -1, *videos.shape[3:]),
      weights.sum(axis=2).reshape(len(videos), -1, *sides[1:]),
      labels,
    )
