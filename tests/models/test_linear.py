"""Linear layers: float32 gradients of weights under bfloat16 compute."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.models.linear import Dense, add_bias, einsum

_EQUATIONS = ('bnc,cd->bnd', (6, 10)), ('bnc,chd->bhnd', (6, 2, 5))


@pytest.mark.parametrize(
  'ours,plain,shape',
  [
    *(
      (*(functools.partial(f, equation) for f in (einsum, jnp.einsum)), shape)
      for equation, shape in _EQUATIONS
    ),
    *((add_bias, jnp.add, shape) for shape in ((6,), (4, 1), (1, 1, 6))),
  ],
)
def test_functions_of_parameters_differentiate_as_jax_does(ours, plain, shape):
  x = jax.random.normal(jax.random.key(0), (3, 4, 6))
  parameter = jax.random.normal(jax.random.key(1), shape)

  def differentiate(f):
    loss = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))
    return loss(x, parameter)

  actual, expected = differentiate(ours), differentiate(plain)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_are_not_rounded_to_bfloat16():
  x = jax.random.normal(jax.random.key(0), (4, 64, 8), jnp.bfloat16)
  layer = Dense(8, dtype=jnp.bfloat16)
  params = layer.init(jax.random.key(0), x)
  grads = jax.grad(
    lambda p: jnp.sum(layer.apply(p, x).astype(jnp.float32) ** 2)
  )(params)
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(leaf != rounded)) > 0.9
