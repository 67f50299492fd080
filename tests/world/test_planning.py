"""Searching for actions, what is searched in, and acting on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.data import trajectories
from vjepa_jax.models import zoo
from vjepa_jax.sets import discs
from vjepa_jax.world import (
  acting,
  action_scores,
  imagination,
  ladder,
  planning,
)
from vjepa_jax.world.cloning import train_cloning
from vjepa_jax.world.imagination import ActionModel

_TWO = planning.Search(
  samples=64,
  iterations=8,
  elites=8,
  bound=(0.15, 0.15),
  deviation=(0.15, 0.15),
  mean_momentum=(0.0, 0.0),
  deviation_momentum=(0.0, 0.0),
)


def _search(options, target, key=0, mean=None):
  """Searches for a plan that is a target itself, `[H, A]`."""

  def imagine(plans):  # [S, H, A]: what is imagined is what is done
    return plans[:, :, None]

  def energy(features):
    return jnp.square(features[:, :, 0] - target).sum(axis=(1, 2))

  return planning.search(options, jax.random.key(key), imagine, energy, mean)


@pytest.mark.parametrize('method', ['cem', 'mppi'])
def test_the_minimum_of_a_quadratic_is_found(method):
  options = dataclasses.replace(
    _TWO,
    method=method,
    horizon=3,
    samples=400,
    iterations=20,
    temperature=1e-3,
    deviation=(0.05, 0.05),
  )
  target = jnp.array([[0.05, -0.1], [0.0, 0.12], [0.14, 0.03]])
  plan = _search(options, target)
  np.testing.assert_allclose(plan.actions, target, atol=0.02)
  # Out of reach: as far as the box goes, along each axis by itself.
  far = _search(options, target.at[0].set(jnp.array([0.4, 0.01])))
  np.testing.assert_allclose(far.actions[0], [0.15, 0.01], atol=0.02)


def test_one_iteration_matches_numpy():
  options = planning.Search(
    horizon=2,
    samples=40,
    iterations=1,
    elites=6,
    mean_momentum=(0.15, 0.15, 0.15, 0.3),
    gripper=3,
  )
  target = np.float32([[0.05, -0.02, 0.03, 0.5], [0.0, 0.06, -0.07, -0.1]])
  start = np.float32([[0.02, 0.0, -0.01, 0.1]] * 2)
  plan = _search(options, target, key=3, mean=start)
  noise = np.asarray(jax.random.normal(jax.random.key(3), (1, 40, 2, 4)))[0]
  bound = np.array(options.bound)
  plans = np.clip(start + np.array(options.deviation) * noise, -bound, bound)
  energies = np.square(plans - target).sum(axis=(1, 2))
  elites = plans[np.argsort(energies)[:6]].mean(axis=0)
  kept = np.array(options.mean_momentum)
  mean = (1 - kept) * elites + kept * start
  np.testing.assert_allclose(plan.mean, mean, atol=1e-6)
  np.testing.assert_allclose(plan.energy, [energies.min()], rtol=1e-5)
  assert 0 < abs(mean[1, 3]) < 0.25 < mean[0, 3]
  # A gripper that hardly moves does not move.
  mean[1, 3] = 0
  np.testing.assert_allclose(plan.actions, mean, atol=1e-6)


def test_the_deviation_of_elites_is_unbiased():
  plans = jnp.array([0.1, 0.3, 0.9]).reshape(3, 1, 1)
  options = dataclasses.replace(
    _TWO,
    samples=3,
    elites=2,
    bound=(1.0,),
    deviation=(1.0,),
    mean_momentum=(0.0,),
    deviation_momentum=(0.5,),
  )
  mean, deviation = planning._fit(
    options, plans, jnp.array([0.0, 1.0, 2.0]), 0.0, jnp.ones((1, 1))
  )
  assert mean.item() == pytest.approx(0.2)
  half = np.std([0.1, 0.3], ddof=1) / 2 + 0.5
  assert deviation.item() == pytest.approx(half)


def test_a_gripper_closes_when_it_is_told_to():
  options = planning.Search(
    horizon=3, samples=50, iterations=2, gripper=3, close_gripper=1
  )
  plan = _search(options, jnp.zeros((3, 4)))
  np.testing.assert_array_equal(plan.actions[1:, 3], 1.0)
  assert abs(plan.actions[0, 3]) < 0.5


def test_energies_of_the_last_frame_and_of_all():
  features = jnp.arange(24.0).reshape(1, 2, 3, 4)  # [S, H, N, D]
  goal = jnp.ones((3, 4))
  x = np.abs(np.asarray(features[0]) - 1)
  for of, frames in (('last', [1]), ('sum', [0, 1])):
    for exponent in (1, 2):
      options = planning.Search(energy=of, loss_exp=exponent)
      energy = planning.make_energy(options, goal)(features)
      expected = sum((x[i] ** exponent / exponent).mean() for i in frames)
      assert energy.item() == pytest.approx(expected)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'method': 'adam'}, "neither 'cem' nor 'mppi'"),
    ({'elites': 900}, 'elites=900 must be some of samples=800'),
    ({'energy': 'first'}, "neither 'last' nor 'sum'"),
    ({'horizon': 0}, 'must be positive'),
    ({'loss_exp': 3.0}, 'loss_exp 3 is neither 1 nor 2'),
    ({'bound': (0.1, 0.1)}, 'have a number for each axis'),
    ({'close_gripper': 1}, 'needs gripper, the axis that it is'),
  ],
)
def test_what_is_no_search_is_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    planning.Search(**wrong)


def test_poses_are_integrated_as_actions_are_measured():
  rng = np.random.default_rng(0)
  states = rng.uniform(-1, 1, (50, 7)).astype(np.float32)
  states[:, 3:6] *= [np.pi, np.pi / 2, np.pi]
  states[:, 6] = rng.uniform(0, 1, 50)
  actions = trajectories.compute_actions(states, 'pose')
  found = imagination.integrate(states[:-1], actions, 'pose')
  np.testing.assert_allclose(found[:, :3], states[1:, :3], atol=1e-5)
  np.testing.assert_allclose(found[:, 6], states[1:, 6], atol=1e-5)
  np.testing.assert_allclose(
    imagination.make_rotation(found[:, 3:6]),
    trajectories.make_rotation(states[1:, 3:6]),
    atol=1e-5,
  )
  # Angles stay in range, and a gripper is never more than closed.
  assert np.abs(found[:, 3:6]).max() <= np.pi
  closed = imagination.integrate(states[0], np.float32([0] * 6 + [3]), 'pose')
  assert closed[6] == 1
  more = imagination.integrate(np.zeros(8), np.float32([0] * 7 + [3]), 'pose')
  assert more[7] == 3


@pytest.fixture(scope='module')
def model():
  """A nano encoder and a predictor in which every part matters."""
  encoder = zoo.build_encoder('nano', tubelet=(2, 16, 16), init_std=0.0)
  predictor = zoo.build_action_predictor(
    encoder, width=24, depth=1, num_heads=2, action_dim=2, state_dim=2
  )
  clip = np.zeros((1, 2, 32, 32, 3), np.uint8)
  features = np.zeros((1, 4, encoder.width), np.float32)
  two = np.zeros((1, 1, 2), np.float32)
  params = {
    'encoder': jax.jit(encoder.init)(jax.random.key(0), clip)['params'],
    'predictor': jax.jit(predictor.init, static_argnums=4)(
      jax.random.key(1), features, two, two, (1, 2, 2)
    )['params'],
  }
  return ActionModel(encoder, predictor, params)


def test_what_is_imagined_depends_on_earlier_actions_alone(model):
  rng = np.random.default_rng(0)
  frame = rng.normal(size=(2, 2, model.encoder.width)).astype(np.float32)
  plans = rng.normal(size=(3, 3, 2)).astype(np.float32)
  state = np.zeros(2, np.float32)

  @functools.partial(jax.jit, static_argnames='window')
  def imagine(plans, window=None):
    return imagination.imagine(model, model.params, frame, state, plans, window)

  found = imagine(plans)
  assert found.shape == (3, 3, 4, model.encoder.width)
  changed = plans.copy()
  changed[:, 1] += 1.0
  other = imagine(changed)
  np.testing.assert_allclose(other[:, 0], found[:, 0], atol=1e-6)
  assert np.abs(other[:, 1] - found[:, 1]).max() > 1e-3
  assert np.abs(other[:, 2] - found[:, 2]).max() > 1e-3
  # Of a window of one frame the past is gone.
  alone = imagine(plans, window=1)
  np.testing.assert_allclose(alone[:, 0], found[:, 0], atol=1e-6)
  assert np.abs(alone[:, 1] - found[:, 1]).max() > 1e-3


def _act(rung, name, options, count, steps, models=()):
  tasks = discs.draw_tasks(name, count, seed=0)
  policy = ladder.make_policy(rung, name, options, dict(models))
  return acting.run_episode(discs.Worlds(), tasks, policy, steps)


def test_true_dynamics_and_states_reach_the_goal():
  episode = _act('true_state', 'reach', _TWO, 50, discs.BUDGET['reach'])
  success = episode.distances.min(axis=0) < discs.TOLERANCE
  assert success.mean() > 0.95
  share, low, high = acting.score(success)
  assert low < share < high + 1e-6
  assert episode.frames.shape == (11, 50, 32, 32, 3)
  assert (episode.distances[0] > discs.TOLERANCE).all()


@pytest.mark.slow
def test_a_model_plans_in_worlds_side_by_side(model):
  options = dataclasses.replace(
    _TWO, samples=8, elites=2, iterations=2, window=2
  )
  episode = _act('model_ours', 'push', options, 2, 3, [('ours', model)])
  moved = np.abs(np.diff(np.float32(episode.frames), axis=0)).max(
    axis=(2, 3, 4)
  )
  assert (moved[0] > 0).all()
  # Along one axis alone, the other is not touched.
  options = dataclasses.replace(
    options,
    bound=(0.1,),
    deviation=(0.1,),
    mean_momentum=(0.0,),
    deviation_momentum=(0.0,),
  )
  plan = acting.make_model_search(model, options, axes=(1,))
  worlds = discs.Worlds()
  goal = worlds.reset(discs.draw_tasks('reach', 2, seed=0))
  keys = jax.random.split(jax.random.key(0), 2)
  found = plan(keys, worlds.observe(), goal, jnp.zeros((2, 1, 1)))
  assert found.actions.shape == (2, 1, 1)
  assert (found.actions != 0).all()


def test_what_the_model_was_not_made_for_is_refused(model):
  options = dataclasses.replace(_TWO, samples=4, elites=2, horizon=2)
  released = model._replace(one_step=True)
  with pytest.raises(ValueError, match='--horizon=1, or give --allow_rollouts'):
    acting.make_model_search(released, options)
  plan = acting.make_model_search(model._replace(resolution=256), options)
  with pytest.raises(ValueError, match='32 x 32 pixels: crop and resize'):
    worlds = discs.Worlds()
    goal = worlds.reset(discs.draw_tasks('reach', 2, seed=0))
    plan(None, worlds.observe(), goal, None)


def test_a_new_task_is_planned_for_from_nothing():
  means = []

  def plan(keys, seen, goal, mean):
    means.append(np.asarray(mean))
    actions = jnp.full(mean.shape, 0.01)
    return planning.Plan(actions, keys, actions)

  planner = acting.Planner(plan, ladder.see_frames, (2, 2), seed=0)
  for count in (3, 2):
    tasks = discs.draw_tasks('reach', count, seed=0)
    acting.run_episode(discs.Worlds(), tasks, planner, 2)
  first, second, third, _ = means
  assert not first.any() and not third.any() and len(third) == 2
  # Moved on by a step, and nothing after it.
  assert (second[:, 0] == np.float32(0.01)).all() and not second[:, 1].any()


@pytest.mark.slow
def test_cloning_goes_where_play_went_and_stops_at_the_wall():
  rng = np.random.default_rng(0)
  _, states, actions = discs.play('reach', 200, rng)
  clone = train_cloning(states[:, :, None], actions, seed=0, steps=400)
  success = {}
  for name in ('reach', 'door'):
    tasks = discs.draw_tasks(name, 50, seed=0)
    episode = acting.run_episode(
      discs.Worlds(),
      tasks,
      lambda _, seen, goal: clone(seen.states[:, None], goal.states[:, None]),
      discs.BUDGET[name],
    )
    near = episode.distances.min(axis=0) < discs.TOLERANCE
    success[name] = near.mean()
  assert success['reach'] > 0.7
  assert success['door'] < 0.3


@pytest.mark.slow
def test_energies_of_a_grid_of_actions(model):
  frames, states, actions = discs.play('reach', 2, np.random.default_rng(0))
  actions[0, 0] = [0.1, -0.05]
  found = action_scores.measure_landscape(
    model, frames[:, :2], states[:, 0], actions[:, 0], 0.1, points=5
  )
  assert found['energy'].shape == (2, 5, 5)
  # No action is in the middle of the grid, and the first truth is on it.
  np.testing.assert_allclose(found['energy'][:, 2, 2], found['zero'], rtol=1e-4)
  truth = found['energy'][0, 4, 1]
  assert truth == pytest.approx(found['truth'][0], rel=1e-4)
  for i in range(2):
    less = (found['energy'][i] < found['truth'][i]).mean()
    assert abs(found['rank'][i] - less) < 0.05
    least = np.argwhere(found['energy'][i] == found['least'][i])[0]
    np.testing.assert_allclose(found['grid'][least], found['found'][i])


@pytest.mark.slow
def test_what_is_imagined_is_compared_with_what_came(model):
  frames, states, actions = discs.play('reach', 2, np.random.default_rng(0))
  frames[:, 3] = frames[:, 0]
  found = action_scores.measure_rollouts(
    model, frames[:, :4], states[:, :4], actions[:, :4]
  )
  assert len(found['imagined']) == len(found['copied']) == 3
  # Back at the start a world that stands still is right.
  assert found['copied'][2] == pytest.approx(0, abs=1e-6)
  assert min(found['copied'][:2]) > 1e-3 < min(found['imagined'])


@pytest.mark.slow
def test_a_turned_camera_is_found_and_a_linear_decoder_sees():
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(30, 3))
  rotation = trajectories.make_rotation(np.array([0.3, -0.2, 1.0]))
  found = truth @ rotation.T + rng.normal(0, 0.01, truth.shape)
  np.testing.assert_allclose(
    action_scores.calibrate(found, truth), rotation, atol=0.02
  )
  frames, *_ = discs.play('push', 40, rng)
  frames = frames.reshape(-1, *frames.shape[2:])
  flat = np.float32(frames).reshape(len(frames), 16, -1) / 255
  decode = action_scores.fit_decoder(flat, frames, damping=1e-3)
  assert np.abs(decode(flat[:5]) - frames[:5]).mean() < 5
