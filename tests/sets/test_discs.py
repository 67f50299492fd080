"""The discs set: what moves what, tasks that are what they say, films."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.data.sources import ManifestSource
from vjepa_jax.sets import discs
from vjepa_jax.sets.pairs import read_film


def _follow(tasks, scene):
  """Goes straight for the goal of each task, to the end of the budget."""
  worlds = discs.Worlds()
  worlds.reset(tasks)
  least = worlds.distance()
  for _ in range(discs.BUDGET[tasks.name]):
    actions = scene.agent - worlds.observe().states
    # Clipped along one axis alone it would not be straight.
    most = np.abs(actions).max(axis=1, keepdims=True) / discs.REACH
    worlds.act(actions / np.maximum(most, 1))
    least = np.minimum(least, worlds.distance())
  return least < discs.TOLERANCE


def test_straight_ahead_reaches_and_pushes_and_ends_at_the_wall():
  success = {}
  for name in discs.TASKS:
    tasks = discs.draw_tasks(name, 50, seed=0)
    worlds = discs.Worlds()
    worlds.reset(tasks)
    assert (worlds.distance() > 0.14).all()
    success[name] = _follow(tasks, tasks.goal).mean()
  assert success == {'reach': 1.0, 'push': 1.0, 'door': 0.0}


def test_a_way_leads_through_the_door():
  tasks = discs.draw_tasks('door', 50, seed=0)
  scene = tasks.start
  middle = np.stack([np.full(50, 0.5), tasks.goal.door[:, 0]], axis=1)
  side = np.sign(tasks.goal.agent[:, :1] - 0.5) * [0.2, 0.0]
  for target in (middle - side, middle + side, tasks.goal.agent):
    for _ in range(6):
      scene = discs.act(scene, (target - scene.agent).astype(np.float32))
  assert (
    discs.measure_distance('door', scene, tasks.goal) < discs.TOLERANCE
  ).all()


def test_nothing_overlaps_leaves_or_passes_through_the_wall():
  rng = np.random.default_rng(0)
  scene = discs.draw_tasks('push', 200, seed=1).start
  walled = discs.draw_tasks('door', 200, seed=1).start
  for _ in range(30):
    # Beyond what it can reach: it is clipped.
    actions = rng.uniform(-0.4, 0.4, (200, 2))
    scene, before = discs.act(scene, actions), walled
    walled = discs.act(walled, actions)
    gap = np.linalg.norm(scene.agent - scene.disc, axis=1)
    assert gap.min() > 2 * discs._RADIUS - 1e-4
    for place in (scene.agent, scene.disc, walled.agent):
      assert np.abs(place - 0.5).max() <= 0.5 - discs._RADIUS + 1e-6
    crossed = (before.agent[:, 0] < 0.5) != (walled.agent[:, 0] < 0.5)
    off = np.abs(walled.agent[:, 1] - walled.door[:, 0])
    assert off[crossed].max(initial=0) < discs._GAP


def test_jax_and_numpy_are_one_world():
  for name in discs.TASKS:
    scene = discs.draw_tasks(name, 20, seed=2).start
    actions = np.random.default_rng(0).uniform(-0.2, 0.2, (20, 2))
    actions = actions.astype(np.float32)
    moved = discs.act(scene, actions)
    traced = jax.jit(lambda *x: discs.act(*x, jnp))(scene, actions)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, traced
    )
    seen = np.int32(discs.render(moved))
    # At most the rounding differs.
    assert np.abs(seen - np.int32(discs.render(moved, jnp))).max() <= 1
    assert seen.shape == (20, discs.SIZE, discs.SIZE, 3)


def test_tasks_are_a_function_of_their_seed():
  first, again, other = (discs.draw_tasks('push', 5, i) for i in (0, 0, 1))
  np.testing.assert_array_equal(first.start.agent, again.start.agent)
  assert (first.start.agent != other.start.agent).all()
  with pytest.raises(ValueError, match="task 'lift' is not one of reach, push"):
    discs.draw_tasks('lift', 5, 0)


def test_the_set(tmp_path):
  folder = discs.write_discs_set(tmp_path / 'a', num_train=45, seed=3)
  again = discs.write_discs_set(tmp_path / 'b', num_train=45, seed=3)
  source = ManifestSource(str(folder / 'train.csv'))
  assert [r.name for r in source] == [f'train/{i:05d}.mp4' for i in range(45)]
  free = []
  for i in range(45):
    path = folder / f'train/{i:05d}.mp4'
    assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()
    film = read_film(str(path), discs.SIZE)
    with np.load(path.with_suffix('.npz')) as episode:
      states, times = episode['states'], episode['timestamps']
      moved = np.abs(np.diff(states, axis=0) - episode['actions'][:-1])
    assert film.shape == (discs.FRAMES, discs.SIZE, discs.SIZE, 3)
    assert states.shape == (discs.FRAMES, 2)
    assert (states.dtype, times.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(np.diff(times), 1 / discs.FPS)
    # Where nothing is in the way the agent goes where it is told to.
    free += list(moved.max(axis=1) < 1e-5)
    for frame, state in zip(film, states, strict=True):
      red = np.argwhere(frame[..., 0] - np.float32(frame[..., 2]) > 80)
      place = red.mean(axis=0)[::-1] + 0.5
      assert np.abs(place - discs.SIZE * state).max() < 2.5
  assert 0.5 < np.mean(free) < 0.95
  with pytest.raises(ValueError, match='num_train=45, not 44'):
    discs.write_discs_set(folder, num_train=44, seed=3)
