"""Positions by the published formulas."""

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from vjepa_jax.models import positions, zoo


def test_sincos_table_is_the_published_one():
  dim, grid = 20, (2, 3, 4)  # 2 * ceil(20 / 6) = 8 features an axis
  table = positions.make_sincos_table(grid, dim)
  assert table.shape == (24, dim) and table.dtype == np.float32
  for token in (0, 7, 23):
    features = []
    for position in (token // 12, token % 12 // 4, token % 4):
      angles = [position / 10000 ** (k / 4) for k in range(4)]
      features += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
    np.testing.assert_allclose(table[token], features[:dim], atol=1e-6)


@pytest.mark.parametrize('style', positions.ROPE_STYLES)
@pytest.mark.parametrize(
  'head_dim,axis_dim',
  [(64, 20), (80, 26), (88, 28), (32, 10), (24, 8), (104, 34)],
)
def test_rope_follows_the_published_formulas(head_dim, axis_dim, style):
  token = jnp.array([[1 * 16 + 2 * 4 + 3]])
  x = np.random.default_rng(0).normal(size=head_dim)
  expected = x.copy()
  half = axis_dim // 2
  for axis, position in enumerate((1, 2, 3)):
    for i in range(axis_dim):
      frequency = i % half if style == 'tiled' else i // 2
      angle = position * 10000.0 ** (-frequency / half)
      j = axis * axis_dim + i
      partner = -x[j + 1] if i % 2 == 0 else x[j - 1]
      expected[j] = x[j] * np.cos(angle) + partner * np.sin(angle)
  coordinates = positions.compute_coordinates(token, nano.GRID)
  tables = positions.make_rope_tables(coordinates, head_dim, style)
  y = positions.rotate(jnp.asarray(x[None, None, None], jnp.float32), tables)
  np.testing.assert_allclose(y[0, 0, 0], expected, atol=1e-5)


def test_rope_sees_coordinates_and_only_their_differences():
  encoder = nano.build_encoder(positions='rope_interleaved', init_std=0.0)
  video = nano.make_video((2, 4, 16, 16, 3))
  params = nano.init(encoder, video)
  predictor = zoo.build_predictor(encoder, num_heads=2, width=24, depth=2)
  ids = jnp.arange(6)[None], jnp.arange(6, 8)[None]
  context = jax.random.normal(jax.random.key(1), (1, 6, 48))
  arguments = context, *ids, (2, 2, 2)
  weights = predictor.init(jax.random.key(2), *arguments)

  def run(coordinates):
    features = encoder.apply(params, video, coordinates=coordinates)
    predictions = predictor.apply(weights, *arguments, coordinates=coordinates)
    return features, predictions

  grid = positions.compute_coordinates(jnp.arange(8), (2, 2, 2))
  moved = grid + jnp.array([7.0, 0.5, -3.0])
  for a, same, shifted, scaled in zip(
    *map(run, (None, grid, moved, grid * 2.5)), strict=True
  ):
    np.testing.assert_array_equal(a, same)
    np.testing.assert_allclose(shifted, a, atol=1e-4)
    assert np.abs(scaled - a).max() > 1e-3
