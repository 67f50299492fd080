"""Checkpoints that are damaged, and those that are not to be blamed."""

import errno
import logging
import os
import shutil

import aiohttp
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.data import storage
from vjepa_jax.parallel import sharding
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.training import checkpoint
from vjepa_jax.training.state import TrainState


def _make_state(step):
  kernel = jax.random.normal(jax.random.key(step), (64, 64))
  params = {'kernel': kernel, 'bias': jnp.ones(3)}
  moments = jax.tree.map(jnp.zeros_like, params)
  return TrainState(jnp.int32(step), params, None, moments)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  checkpoints = checkpoint.Checkpoints(workdir, every_steps=2, keep=3)
  for step in (2, 4, 6):
    progress = {'samples': 8 * step, 'replaced': step}
    checkpoints.save(step, _make_state(step), progress)
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / 'run')


def _restore(workdir, function=checkpoint.restore, **changes):
  state = _make_state(0).replace(**changes)
  abstract = jax.eval_shape(lambda: state)
  place = sharding.replicate(make_mesh(devices=jax.devices()[:1]))
  shardings = jax.tree.map(lambda _: place, state)
  return function(workdir, abstract, shardings)


def _find_largest(folder):
  files = filter(os.path.isfile, folder.rglob('*'))
  return max(files, key=os.path.getsize)


def _fill_with_garbage(folder):
  path = _find_largest(folder)
  path.write_bytes(b'garbage ' * (path.stat().st_size // 8))


def _empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGE = {
  'cut off': lambda folder: os.truncate(_find_largest(folder), 99),
  'garbage': _fill_with_garbage,
  'an item missing': lambda folder: shutil.rmtree(folder / 'params'),
  'empty': _empty,
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_newest_is_set_aside(workdir, caplog, capfd, kind):
  folder = workdir / 'checkpoints'
  DAMAGE[kind](folder / '6')
  with caplog.at_level(logging.INFO, logger='absl'):
    state, progress = _restore(workdir)
  chex.assert_trees_all_equal(state, _make_state(4))
  progress = {key: progress[key] for key in ('samples', 'replaced')}
  assert progress == {'samples': 32, 'replaced': 4}
  assert {p.name for p in folder.iterdir()} == {'2', '4', 'damaged_6'}
  lines = [r.getMessage() for r in caplog.records]
  (line,) = [line for line in lines if line.endswith('set aside as damaged_6')]
  assert '\n' not in line and 'Error' in line
  assert not capfd.readouterr().err


def test_without_any_good_one_there_is_no_silent_start(workdir):
  for step in (2, 4, 6):
    DAMAGE['cut off'](workdir / 'checkpoints' / str(step))
  for _ in range(2):
    with pytest.raises(
      checkpoint.CheckpointError, match='damaged_2, damaged_4'
    ):
      _restore(workdir)
  assert _restore(workdir / 'elsewhere') is None


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_run_is_no_start_of_another(workdir, kind):
  DAMAGE[kind](workdir / 'checkpoints' / '6')
  with pytest.raises(checkpoint.CheckpointError, match='6 is damaged'):
    _restore(workdir, checkpoint.load_initial)
  assert (workdir / 'checkpoints' / '6').exists()


def test_another_model_or_storage_that_fails_is_no_damage(workdir, monkeypatch):
  with pytest.raises(checkpoint.CheckpointError, match='is of another model'):
    _restore(workdir, params={'kernel': jnp.zeros((8, 8)), 'bias': jnp.ones(3)})

  for error in (
    OSError('UNAVAILABLE: try again'),
    OSError(errno.EMFILE, 'Too many open files'),
    OSError(errno.ESTALE, 'Stale file handle'),
    MemoryError(),
    ConnectionResetError('gone'),
    aiohttp.ServerDisconnectedError(),
    storage.StorageError('gs://bucket/run'),
  ):

    def fail(*_, error=error):
      raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
      patch.setattr(checkpoint.ocp, 'load_checkpointables', fail)
      _restore(workdir)
  assert (workdir / 'checkpoints' / '6').exists()
  chex.assert_trees_all_equal(_restore(workdir)[0], _make_state(6))


def test_saving_small_copies_compiles_nothing(tmp_path):
  place = sharding.replicate(make_mesh())
  # Shapes that no other test has: programs are kept.
  params = {'kernel': np.ones((56, 72), np.float32)}
  state = jax.device_put(TrainState(np.int32(2), params, params, None), place)
  compiled = []
  listen = lambda name, _, **__: compiled.append(name)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  checkpoints = checkpoint.Checkpoints(tmp_path, every_steps=2, keep=3)
  checkpoints.save(2, state, {'samples': 1})
  checkpoints.close()
  jax.monitoring.unregister_event_duration_listener(listen)
  assert not [name for name in compiled if 'compile' in name]
