"""The action-conditioned predictor: who sees whom, sizes, kernels."""

import functools
import math

import jax
import jax.numpy as jnp
import nano
import numpy as np
import pytest

from vjepa_jax.errors import UserError
from vjepa_jax.models import zoo

GRID = (3, 2, 4)


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  shapes = (2, math.prod(GRID), 48), (2, 3, 4), (2, 3, 5), (2, 3, 6)
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


@pytest.fixture(scope='module')
def model(inputs):
  """A predictor whose weights are large, and what applies it."""
  predictor = zoo.build_action_predictor(
    nano.build_encoder(),
    width=24,
    depth=2,
    num_heads=2,
    action_dim=4,
    state_dim=5,
    extrinsics_dim=6,
    init_std=0.0,
  )
  init = jax.jit(lambda key: predictor.init(key, *inputs[:3], GRID))
  params = init(jax.random.key(0))['params']

  @functools.partial(jax.jit, static_argnames='fields')
  def apply(*inputs, fields=()):
    model = predictor.clone(**dict(fields))
    return model.apply({'params': params}, *inputs[:3], GRID, *inputs[3:])

  return params, apply


def _find_changed(apply, inputs, which, index):
  """Says at which steps the prediction depends on an input's entry."""
  changed = [*inputs]
  changed[which] = inputs[which].at[:, index].add(1.0)
  difference = jnp.abs(apply(*changed) - apply(*inputs))
  steps = difference.reshape(2, GRID[0], -1).max(axis=(0, 2))
  return (np.asarray(steps) > 1e-6).tolist()


def test_a_step_sees_itself_and_those_before(model, inputs):
  _, apply = model
  frame = math.prod(GRID[1:])
  for step in range(GRID[0]):
    expected = [later >= step for later in range(GRID[0])]
    assert _find_changed(apply, inputs, 0, step * frame) == expected
    for which in (1, 2, 3):
      assert _find_changed(apply, inputs, which, step) == expected


def test_steps_are_told_apart_by_their_time(model, inputs):
  _, apply = model
  # Without positions the last step could not tell the two before it apart.
  swapped = [
    x.reshape(2, GRID[0], -1)[:, [1, 0, 2]].reshape(x.shape) for x in inputs[:3]
  ]
  ours, other = (
    apply(*x).reshape(2, GRID[0], -1)[:, 2] for x in (inputs[:3], swapped)
  )
  assert jnp.abs(ours - other).max() > 1e-4


def test_extrinsics_may_be_left_out(model, inputs):
  params, apply = model
  assert params['extrinsics_encoder']['kernel'].shape == (6, 24)
  out = apply(*inputs[:3])
  assert out.shape == inputs[0].shape
  assert jnp.abs(out - apply(*inputs)).max() > 1e-4


@pytest.mark.slow
def test_kernels_agree(model, inputs):
  _, apply = model
  for fields in (
    (('attention', 'pallas_interpret'),),
    (('remat', 'full'),),
  ):
    np.testing.assert_allclose(
      apply(*inputs[:3], fields=fields), apply(*inputs[:3]), atol=1e-5
    )


def test_the_released_size():
  predictor = zoo.build_action_predictor(
    zoo.build_encoder('giant'), extrinsics_dim=6
  )
  shapes = [(1, 2 * 4, 1408), (1, 2, 7), (1, 2, 7)]
  params = jax.eval_shape(
    lambda key: predictor.init(key, *map(jnp.zeros, shapes), (2, 2, 2)),
    jax.random.key(0),
  )['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == 305_220_992
  assert predictor.depth == len(
    params['transformer']['blocks']['norm1']['scale']
  )


def test_what_does_not_fit_is_refused(inputs):
  encoder = nano.build_encoder()
  for fields, message in (
    (dict(width=24, num_heads=5), 'not divisible by its 5 heads'),
    (dict(positions='sincos'), "positions 'sincos' is not one of"),
  ):
    with pytest.raises(UserError, match=message):
      zoo.build_action_predictor(encoder, **fields)
  predictor = zoo.build_action_predictor(encoder, width=24, num_heads=2)
  with pytest.raises(UserError, match='need a predictor with extrinsics_dim'):
    predictor.init(jax.random.key(0), *inputs[:3], GRID, inputs[3])
