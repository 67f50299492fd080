"""Linear layers: float32 gradients of weights under bfloat16 compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.models.linear import Dense, add_bias, einsum


@pytest.mark.parametrize(
  'equation,kernel_shape',
  [('bnc,cd->bnd', (6, 10)), ('bnc,chd->bhnd', (6, 2, 5))],
)
def test_einsum_differentiates_as_jax_does(equation, kernel_shape):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)

  def loss(product):
    return lambda *a: jnp.sum(jnp.sin(product(equation, *a)))

  expected = jax.grad(loss(jnp.einsum), (0, 1))(x, kernel)
  actual = jax.grad(loss(einsum), (0, 1))(x, kernel)
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('shape', [(5,), (4, 1), (1, 1, 5)])
def test_bias_differentiates_as_jax_does(shape):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=shape), jnp.float32)
  expected = jax.grad(lambda *a: jnp.sum(jnp.sin(a[0] + a[1])), (0, 1))
  actual = jax.grad(lambda *a: jnp.sum(jnp.sin(add_bias(*a))), (0, 1))
  for a, e in zip(actual(x, bias), expected(x, bias), strict=True):
    assert a.shape == e.shape
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_are_not_rounded_to_bfloat16():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 64, 8)), jnp.bfloat16)
  layer = Dense(8, dtype=jnp.bfloat16)
  params = layer.init(jax.random.key(0), x)
  grads = jax.grad(
    lambda p: jnp.sum(layer.apply(p, x).astype(jnp.float32) ** 2)
  )(params)
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(leaf != rounded)) > 0.9
