"""The terms against closed forms, and where their gradients push."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.training.objectives import regularizers
from vjepa_jax.training.objectives.targets import center_by_position


def _sample(rows, columns, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, columns))


def test_variance_term_counts_only_what_lacks():
  x = _sample(4096, 4)
  x = (x - x.mean(0)) / x.std(0)
  x *= [2.0, 1.0, 0.5, 0.0]
  expected = (0.0 + 0.0 + 0.5 + 0.99) / 4  # sqrt(1e-4) of the dead one is .01
  value = regularizers.compute_variance_term(jnp.asarray(x))
  np.testing.assert_allclose(value, expected, atol=1e-4)


def test_covariance_term_is_that_of_numpy():
  x = _sample(50, 6) @ _sample(6, 6, seed=1)
  c = np.cov(x.T)
  expected = (np.sum(c**2) - np.sum(np.diag(c) ** 2)) / 6
  value = regularizers.compute_covariance_term(jnp.asarray(x))
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_sigreg_tells_gaussian_features_from_collapsed_ones():
  x = jnp.asarray(_sample(512, 16))
  gaussian, narrow, flat, constant = (
    float(regularizers.compute_sigreg(features, jax.random.key(0)))
    for features in (x, 0.3 * x, x.at[:, 4:].set(0.0), 0.0 * x)
  )
  assert gaussian < 2.0 < flat < constant
  assert gaussian < narrow < constant
  t = np.linspace(-3, 3, 2001)
  w = np.exp(-(t**2) / 2)
  np.testing.assert_allclose(
    constant, 512 * np.trapezoid((1 - w) ** 2 * w, t), rtol=1e-2
  )


@pytest.mark.usefixtures('optimized')
def test_sigreg_holds_one_frequency_at_a_time():
  loss = jax.jit(jax.grad(regularizers.compute_sigreg))
  x, key = jnp.zeros((4096, 16)), jax.random.key(0)
  memory = loss.lower(x, key).compile().memory_analysis()
  # Angles of 256 directions; there are 17 frequencies.
  assert memory.temp_size_in_bytes < 6 * 4096 * 256 * 4


def test_gradients_widen_shrunken_features():
  x = jnp.asarray(_sample(256, 8) * 0.3)
  key = jax.random.key(1)
  for term in (
    regularizers.compute_variance_term,
    lambda z: regularizers.compute_sigreg(z, key),
  ):
    slope = jax.grad(lambda scale, f=term: f(scale * x))(1.0)
    assert slope < 0


def test_centering_leaves_content_only():
  rng = np.random.default_rng(0)
  places = rng.normal(size=(10, 3))
  ids = np.stack([rng.permutation(10)[:6] for _ in range(40)])
  content = rng.normal(size=(40, 6, 3))
  centred, alone, nothing = (
    center_by_position(jnp.asarray(features), jnp.asarray(ids), 10)
    for features in (content + 100 * places[ids], content, places[ids])
  )
  np.testing.assert_allclose(centred, alone, atol=1e-3)
  np.testing.assert_allclose(nothing, 0.0, atol=1e-5)
