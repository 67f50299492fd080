"""Probes trained side by side are the probes trained one by one."""

import dataclasses

import jax
import numpy as np
import pytest

from vjepa_jax.evaluation.probe_grid import ProbeGrid, make_probe_step
from vjepa_jax.models import zoo
from vjepa_jax.models.probe import AttentiveProbe, LinearProbe
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.training.optimizer import make_optimizer

POINTS = (3e-3, 0.1), (1e-3, 0.1)
SEGMENTS, VIDEOS = 2, 8


@pytest.fixture(scope='module')
def batches():
  rng = np.random.default_rng(0)
  shape = VIDEOS * SEGMENTS, 4, 32, 32, 3

  def make_stream():
    pixels = rng.integers(0, 255, shape, np.uint8)
    labels = rng.integers(0, 3, VIDEOS, np.int32)
    return {'pixels': pixels, 'label': np.repeat(labels, SEGMENTS)}

  return [{'video': make_stream()} for _ in range(3)]


def _make_grid(points, segments=SEGMENTS):
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  return ProbeGrid(encoder, AttentiveProbe(3, 2), points, segments)


def _init_encoder(grid):
  video = np.zeros((1, 4, 32, 32, 3), np.uint8)
  return jax.jit(grid.encoder.init)(jax.random.key(0), video)['params']


def _train(grid, batches, mesh=None):
  tx = make_optimizer()
  state = grid.init(jax.random.key(1), tx).replace(frozen=_init_encoder(grid))
  mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
  places = sharding.shard_tree(state, mesh)
  rows = sharding.shard_batch(mesh)
  step = jax.jit(
    make_probe_step(grid, tx, lambda step: 1.0 - step / 10, 1.0),
    in_shardings=(places, rows),
    out_shardings=(places, sharding.replicate(mesh)),
  )
  state = jax.device_put(state, places)
  with jax.set_mesh(mesh):
    for batch in batches:
      state, metrics = step(state, sharding.make_global(batch, rows))
  return jax.device_get((state, metrics))


def test_each_probe_is_as_if_trained_alone(batches):
  together, _ = _train(_make_grid(POINTS), batches)
  for i, point in enumerate(POINTS):
    alone, _ = _train(_make_grid((point,)), batches)
    jax.tree.map(
      lambda x, y, i=i: np.testing.assert_allclose(x[i], y[0], atol=2e-5),
      together.params,
      alone.params,
    )
  first, second = (
    np.asarray(together.params['probe']['classifier']['kernel'][i])
    for i in range(2)
  )
  assert np.abs(first - second).max() > 1e-4


def test_sharded_and_one_after_the_other_equals_side_by_side(batches):
  grid = _make_grid(POINTS)
  alone, metrics = _train(grid, batches)
  sharded, sharded_metrics = _train(
    dataclasses.replace(grid, group_size=1), batches, mesh_lib.make_mesh(2)
  )
  np.testing.assert_allclose(
    metrics['loss'], sharded_metrics['loss'], rtol=1e-5
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
    alone.params,
    sharded.params,
  )


def test_the_encoder_stays_and_a_lost_probe_does_not_spread(batches):
  grid = _make_grid(((float('nan'), 0.0), (1e-3, 0.0)))
  state, metrics = _train(grid, batches)
  good, _ = _train(_make_grid(((1e-3, 0.0),)), batches)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x[1], y[0], atol=2e-5),
    state.params,
    good.params,
  )
  assert metrics['lost_probes'] == 1 and metrics['skipped'] == 0
  before = _init_encoder(grid)
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before)


def test_segments_are_seen_together_and_views_are_averaged(batches):
  grid = _make_grid(POINTS)
  state, _ = _train(grid, batches)
  views = 3
  rng = np.random.default_rng(1)
  video = rng.integers(0, 255, (2, SEGMENTS * views, 4, 32, 32, 3), np.uint8)
  encode = jax.jit(grid.encode)
  features = encode(state.frozen, video)
  assert features.shape == (2, views, SEGMENTS * 32, 48)
  # Clips are (segment, view): view 1 is clips 1 and 4.
  one = encode(state.frozen, video[:, [1, 4]])
  np.testing.assert_allclose(features[:, 1], one[:, 0], atol=1e-5)
  probabilities = grid.classify(state.params['probe'], features)
  by_view = [
    grid.classify(state.params['probe'], features[:, i : i + 1])
    for i in range(views)
  ]
  assert probabilities.shape == (2, len(POINTS), 3)
  np.testing.assert_allclose(probabilities, np.mean(by_view, axis=0), atol=1e-6)


def test_tokens_of_several_layers_are_seen_together(batches):
  grid = _make_grid(POINTS)
  state, _ = _train(grid, batches[:1])
  video = batches[0]['video']['pixels'][None, :SEGMENTS]
  last = grid.encode(state.frozen, video)
  both = dataclasses.replace(grid, layers=(0, 1)).encode(state.frozen, video)
  assert both.shape == (1, 1, SEGMENTS * 2 * 32, 48)
  tokens = both.reshape(1, 1, SEGMENTS, 2, 32, 48)
  first, second = (tokens[:, :, :, i].reshape(last.shape) for i in (0, 1))
  np.testing.assert_allclose(second, last, atol=1e-5)
  assert not np.allclose(first, last, atol=1e-3)


def test_a_linear_probe_does_not_mind_the_size_of_features():
  features = np.random.default_rng(0).normal(size=(2, 5, 16))
  probe = LinearProbe(3)
  params = probe.init(jax.random.key(0), features)
  np.testing.assert_allclose(
    probe.apply(params, features),
    probe.apply(params, 100 * features),
    atol=1e-4,
  )
