"""The train step: what it updates, from what, on any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from vjepa_jax.models.linear import Dense
from vjepa_jax.parallel import mesh as mesh_lib
from vjepa_jax.parallel import sharding
from vjepa_jax.training.objectives.base import Objective
from vjepa_jax.training.optimizer import make_optimizer
from vjepa_jax.training.state import init_state
from vjepa_jax.training.step import make_train_step


@pytest.fixture(scope='module')
def initial():
  return small.init(small.build())


@pytest.fixture(scope='module')
def run_step():
  """Runs a step; each is compiled once."""

  @functools.cache
  def build_step(**options):
    arguments = small.build(), make_optimizer(), small.make_schedules()
    return jax.jit(make_train_step(*arguments, **options))

  return lambda state, batch, **options: build_step(**options)(state, batch)


def _places(tree):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


def test_target_starts_as_a_copy_of_the_context_encoder():
  init = jax.jit(lambda key: init_state(small.build(), make_optimizer(), key))
  state = init(jax.random.key(0))
  chex.assert_trees_all_equal(state.target, state.params['encoder'])
  assert not {*_places(state.target)} & {*_places(state.params)}


def test_target_moves_by_the_ema_formula(initial, run_step):
  new, metrics = run_step(initial, small.make_batch(0))
  expected = jax.tree.map(
    lambda t, p: 0.9 * t + 0.1 * p, initial.target, new.params['encoder']
  )
  chex.assert_trees_all_close(new.target, expected, atol=1e-7)
  assert int(new.step) == 1 and float(metrics['skipped']) == 0


def test_clipping_starts_at_its_step(initial, run_step):
  # Adam forgets the scale of a gradient, its second moment does not.
  options = dict(clip_norm=1e-4, clip_start_step=1)
  batch = small.make_batch(0)
  first, _ = run_step(initial, batch, **options)
  later, _ = run_step(initial.replace(step=jnp.int32(1)), batch, **options)
  moments = [
    optax.tree.norm(s.opt_state.mu['predictor']) for s in (first, later)
  ]
  assert moments[1] == pytest.approx(1e-5, rel=1e-2)
  assert moments[0] > 10 * moments[1]


def test_a_non_finite_update_is_skipped_and_counted(initial, run_step):
  bad = initial.replace(params=jax.tree.map(jnp.copy, initial.params))
  bad.params['predictor']['proj']['bias'] *= jnp.nan
  new, metrics = run_step(bad, small.make_batch(0))
  assert float(metrics['skipped']) == 1
  chex.assert_trees_all_equal(new.params, bad.params)
  chex.assert_trees_all_equal(new.opt_state, bad.opt_state)
  assert int(new.step) == 1  # schedules go on


def test_microbatches_give_the_step_of_the_whole_batch(initial, run_step):
  options = {'clip_norm': 1e-3}  # what is clipped is the sum, not its parts
  batch = small.make_batch(1)
  expected, metrics = run_step(initial, batch, **options)
  actual, others = run_step(initial, batch, microbatches=4, **options)
  for name in ('loss', 'prediction_std', 'gradient_norm_encoder'):
    np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
  expected, actual = expected.opt_state.mu, actual.opt_state.mu
  # Some gradients, of the keys' biases, are rounding errors around zero.
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  chex.assert_trees_all_close(actual, expected, atol=1e-5 * scale)


@pytest.mark.parametrize(
  'options,reason',
  [
    ({'target_norm': 'position'}, "target_norm='position' takes statistics"),
    ({'kind': 'salt', 'teacher': 'a', 'target_norm': 'position'}, 'position'),
    ({'kind': 'regularized', 'sigreg_weight': 1.0}, 'regularizers take'),
    ({'kind': 'vjepa21'}, None),
    # Pixels are normalised by themselves.
    ({'kind': 'salt', 'target_norm': 'position'}, None),
  ],
)
def test_microbatches_are_refused_where_they_change_the_loss(options, reason):
  objective = small.build(**options)
  arguments = objective, make_optimizer(), small.make_schedules()
  make_train_step(*arguments)
  if reason is None:
    make_train_step(*arguments, microbatches=2)
    return
  with pytest.raises(ValueError, match=f'{reason}.*set config.micro') as error:
    make_train_step(*arguments, microbatches=2)
  assert '\n' not in str(error.value)


class _Line(Objective):
  """Regression without average, target or frozen parameters."""

  averaged = None
  line = Dense(features=1)

  def init(self, key):
    return {'line': self.line.init(key, jnp.ones((1, 1, 2)))['params']}

  def loss(self, params, frozen, batch, step=0):
    assert frozen is None
    predicted = self.line.apply({'params': params['line']}, batch['x'])
    loss = jnp.square(predicted - batch['x'].sum(-1, keepdims=True)).mean()
    return loss, {'loss': loss}


def test_a_step_needs_no_target_and_no_ema():
  tx, objective = make_optimizer(), _Line()
  state = init_state(objective, tx, jax.random.key(0))
  schedules = small.make_schedules(learning_rate=0.1)
  del schedules['ema']
  step = jax.jit(make_train_step(objective, tx, schedules, microbatches=2))
  x = jax.random.normal(jax.random.key(1), (8, 4, 2))
  losses = []
  for _ in range(20):
    state, metrics = step(state, {'x': x})
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.1 * losses[0] and state.target is None


@pytest.fixture
def split_small_arrays(monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_BYTES', 2**10)


def _train(fsdp, devices, steps, **options):
  mesh = mesh_lib.make_mesh(fsdp, jax.devices()[:devices])
  objective = small.build(**options)
  state = small.init(objective)
  shardings = sharding.shard_tree(state, mesh)
  state = jax.device_put(state, shardings)
  rows = sharding.shard_batch(mesh)
  train_step = jax.jit(
    make_train_step(objective, make_optimizer(), small.make_schedules()),
    donate_argnums=0,
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicate(mesh)),
  )
  losses = []
  with jax.set_mesh(mesh):
    for i in range(steps):
      batch = sharding.make_global(small.make_batch(i), rows)
      state, metrics = train_step(state, batch)
      losses.append(float(metrics['loss']))
  return losses, state


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'kind': 'regularized', 'covariance_weight': 0.1, 'sigreg_weight': 0.01},
  ],
)
def test_eight_devices_give_the_losses_of_one(options, split_small_arrays):
  expected, _ = _train(fsdp=1, devices=1, steps=3, **options)
  losses, state = _train(fsdp=2, devices=8, steps=3, **options)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  # Parameters, both moments and the target are really split.
  for tree in (
    state.params['encoder'],
    state.opt_state.mu['encoder'],
    state.opt_state.nu['encoder'],
    state.target,
  ):
    kernel = tree['transformer']['blocks']['mlp']['fc1']['kernel']
    assert kernel.sharding.spec == jax.P(None, None, 'fsdp')
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_what_is_frozen_passes_through_without_a_copy():
  objective, tx = small.build('salt', teacher='somewhere'), make_optimizer()
  state = small.init(objective).replace(frozen=small.init_teacher())
  before = jax.tree.map(np.array, state.frozen)
  target = np.array(state.target['embed']['proj']['kernel'])
  places = _places(state.frozen)
  train_step = jax.jit(
    make_train_step(objective, tx, small.make_schedules()), donate_argnums=0
  )
  for i in range(2):
    state, metrics = train_step(state, small.make_batch(i))
    assert np.isfinite(metrics['loss'])
  chex.assert_trees_all_equal(state.frozen, before)
  assert places == _places(state.frozen)
  # The average of the student goes on.
  assert np.abs(state.target['embed']['proj']['kernel'] - target).max() > 0
