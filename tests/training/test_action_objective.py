"""The loss of V-JEPA 2-AC: what is fed, compared and differentiated."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.errors import UserError
from vjepa_jax.models import zoo
from vjepa_jax.training.objectives.action import (
  ActionPrediction,
  encode_frames,
)
from vjepa_jax.training.objectives.targets import normalize_features

FRAMES = 5


class Mixture:
  """In place of a predictor: a step is a sum over it and those before."""

  def apply(self, variables, features, actions, states, grid, extrinsics):
    weight = variables['params']
    steps = features.reshape(len(features), grid[0], -1)
    assert actions.shape[1] == states.shape[1] == grid[0]
    shift = jnp.tanh(actions.sum(-1) - states.sum(-1))[..., None]
    out = jnp.sin(weight * (jnp.cumsum(steps, axis=1) + shift) + steps**2)
    return out.reshape(features.shape)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  shapes = {
    'features': (2, FRAMES, 2, 3, 8),
    'states': (2, FRAMES, 3),
    'actions': (2, FRAMES - 1, 3),
  }
  stream = {
    k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
  }
  return {'video': stream}


def _imagine(weight, stream, prefix, count, *, detach=False):
  """Rolls out by the book: frames are appended one after the other."""
  z = normalize_features(stream['features'])

  def run(frames):
    n = frames.shape[1]
    out = Mixture().apply(
      {'params': weight},
      frames.reshape(len(frames), -1, 8),
      *(stream[k][:, :n] for k in ('actions', 'states')),
      (n, 2, 3),
      None,
    )
    return normalize_features(out.reshape(frames.shape))

  forced = run(z[:, :-1])
  frames = jnp.concatenate([z[:, :prefix], forced[:, prefix - 1 : prefix]], 1)
  for _ in range(count - 1):
    fed = jax.lax.stop_gradient(frames) if detach else frames
    frames = jnp.concatenate([frames, run(fed)[:, -1:]], axis=1)
  return forced, z, frames[:, prefix:]


def _compute(weight, stream, prefix, count, *, power=1, **options):
  forced, z, imagined = _imagine(weight, stream, prefix, count, **options)
  truth = z[:, prefix : prefix + count]
  return sum(
    jnp.mean(jnp.abs(a - b) ** power) / power
    for a, b in ((forced, z[:, 1:]), (imagined, truth))
  )


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'rollout_steps': 3, 'loss_exp': 2.0},
    {'rollout_steps': 99, 'detach': True},
  ],
)
def test_teacher_forcing_and_rollout(options, batch):
  goal = ActionPrediction(None, Mixture(), **options)
  count = min(options.get('rollout_steps', 2), FRAMES - 1)
  expected = functools.partial(
    _compute,
    stream=batch['video'],
    prefix=1,
    count=count,
    power=options.get('loss_exp', 1),
    detach=options.get('detach', False),
  )

  @jax.jit
  def run(weight):
    def found(w):
      return goal.loss({'predictor': w}, None, batch)[0]

    return [jax.value_and_grad(f)(weight) for f in (found, expected)]

  chex.assert_trees_all_close(*run(jnp.float32(0.7)), rtol=1e-5)


def test_a_random_number_of_true_frames(batch):
  goal = ActionPrediction(
    None, Mixture(), rollout_steps=2, rollout_prefix='random', seed=3
  )
  weight = jnp.float32(0.7)

  @jax.jit
  def run(step):
    return goal.loss({'predictor': weight}, None, batch, step)[0]

  @jax.jit
  def list_expected():
    return [_compute(weight, batch['video'], p, 2) for p in (1, 2, 3)]

  losses = [float(run(step)) for step in range(20)]
  nearest = np.abs(np.subtract.outer(losses, np.array(list_expected())))
  # Each of them is met, and nothing else.
  np.testing.assert_allclose(nearest.min(axis=1), 0.0, atol=1e-5)
  assert set(nearest.argmin(axis=1)) == {0, 1, 2}
  assert losses[:5] == [float(run(step)) for step in range(5)]


def test_teacher_forcing_alone(batch):
  goal = ActionPrediction(None, Mixture(), rollout_steps=0)
  run = jax.jit(lambda batch: goal.loss({'predictor': 0.7}, None, batch))
  loss, metrics = run(batch)
  assert loss == metrics['loss_teacher_forcing'] != 0.0
  assert 'loss_rollout' not in metrics
  still = batch['video'] | {'features': jnp.ones((2, FRAMES, 2, 3, 8))}
  assert run({'video': still})[1]['loss_copy'] == 0.0


@pytest.mark.parametrize(
  'modalities', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_each_frame_is_encoded_alone(modalities):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (2, 3, 16, 24, 3), np.uint8)
  encoder = zoo.build_encoder(
    'nano', tubelet=(2, 8, 8), positions='rope_tiled', modalities=modalities
  )

  @jax.jit
  def run(key):
    params = encoder.init(key, frames[:, 0])['params']
    alone = encoder.apply({'params': params}, frames[:, 1])
    return encode_frames(encoder, params, frames), normalize_features(alone)

  features, alone = run(jax.random.key(0))
  assert features.shape == (2, 3, 2, 3, 48)
  np.testing.assert_allclose(features[:, 1].reshape(2, 6, 48), alone, atol=1e-4)


def test_options_that_are_none_are_refused():
  for options, message in (
    ({'rollout_prefix': 'last'}, "rollout_prefix 'last' is not one of"),
    ({'loss_exp': 3.0}, 'loss_exp 3.0 is 1 or 2'),
  ):
    with pytest.raises(UserError, match=message):
      ActionPrediction(None, Mixture(), **options)
