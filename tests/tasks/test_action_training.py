"""Training of the predictor with actions: it learns, resumes and is loaded."""

import importlib
import signal

import jax
import numpy as np
from processes import finish, read_losses, wait_for_step
import pytest

from configs import action as recipe
from tests.data.episodes import write_episodes
import vjepa_jax
from vjepa_jax.data import trajectories
from vjepa_jax.errors import UserError
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.interop.world import load_world_model
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.tasks import program
from vjepa_jax.tasks.action import train_action
from vjepa_jax.tasks.smoke import shrink
from vjepa_jax.training import loop
from vjepa_jax.training.telemetry import read_metrics


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  config = shrink(recipe.get_config('discs'), tmp_path_factory.mktemp('smoke'))
  config.total_steps = 30
  config.learning_rate.update(warmup_steps=2)
  config.checkpoint.every_steps = 10
  config.held_out.every_steps = 30
  return config


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
  """An uninterrupted run: its workdir and its last state."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, train_action(config, workdir)


def _keep(numbers):
  measured = ('seconds', 'clips_per', 'data_wait', 'goodput', 'share_')
  return {k: v for k, v in numbers.items() if not k.startswith(measured)}


@pytest.mark.slow
def test_it_learns_what_actions_do(run):
  workdir, state = run
  assert int(state.step) == 30 and state.target is None
  held_out = [m for m in read_metrics(workdir) if 'held_out_loss' in m]
  assert [m['step'] for m in held_out] == [0, 30]
  before, after = (m['held_out_loss_teacher_forcing'] for m in held_out)
  assert after < 0.8 * before
  assert held_out[0]['held_out_loss_copy'] == held_out[1]['held_out_loss_copy']
  # The last of the steps has a rate of exactly 0.
  rates = [m['learning_rate'] for m in read_metrics(workdir) if 'loss' in m]
  assert rates[-1] == 0.0 < rates[-2]


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_numbers(
  run, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.Preemption, 'reached', lambda self, step: step == 17)
  assert train_action(config, tmp_path) is None
  monkeypatch.undo()
  state = train_action(config, tmp_path)
  workdir, expected = run
  assert [_keep(m) for m in read_metrics(tmp_path)] == [
    _keep(m) for m in read_metrics(workdir)
  ]
  jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


@pytest.mark.slow
def test_the_result_is_loaded_with_its_encoder(run):
  workdir, state = run
  weights = read_weights(workdir)
  assert isinstance(weights.predictor, ActionPredictor)
  assert not weights.one_step
  for found, expected in (
    (weights.predictor_params, state.params['predictor']),
    (weights.encoder_params, state.frozen),
  ):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  with pytest.raises(WeightsError, match='predicts by actions'):
    load_world_model(workdir)


@pytest.mark.slow
def test_the_encoder_of_another_run_is_read_again(run, config, tmp_path):
  workdir, _ = run
  model = vjepa_jax.load(workdir)
  assert model.encode(np.zeros((1, 1, 32, 32, 3), np.uint8)).shape[1] == 16
  above = config.copy_and_resolve_references()
  above.update(backbone=str(workdir), total_steps=1)
  above.learning_rate.warmup_steps = 1
  train_action(above, tmp_path)
  found, expected = (read_weights(path) for path in (tmp_path, workdir))
  assert found.predictor == expected.predictor
  jax.tree.map(
    np.testing.assert_array_equal,
    found.encoder_params,
    expected.encoder_params,
  )


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(launcher, tmp_path):
  path = write_episodes(tmp_path / 'episodes', 8, size=(32, 32))
  flags = [
    f'--config.data.sources.episodes.path={path}',
    '--config.clip.frames=4',
    '--config.clip.resolution=32',
    '--config.encoder.size=nano',
    '--config.encoder.tubelet=(2,8,8)',
    '--config.predictor.depth=1',
    '--config.objective.rollout_prefix=random',
    '--config.data.batch_size=4',
    '--config.total_steps=12',
    '--config.learning_rate.warmup_steps=2',
    '--config.checkpoint.every_steps=4',
    '--config.log_every_steps=1',
  ]
  recipe = 'configs/action.py:fetch'
  finish(launcher.start(tmp_path / 'whole', *flags, config=recipe))
  killed = launcher.start(tmp_path / 'killed', *flags, config=recipe)
  wait_for_step(tmp_path / 'killed', 4)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  output = finish(launcher.start(tmp_path / 'killed', *flags, config=recipe))
  assert 'resumed from step' in output
  expected = read_losses(tmp_path / 'whole')
  assert list(expected) == list(range(1, 13))
  assert read_losses(tmp_path / 'killed') == expected


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'data.sources.discs.path': ''}, 'discs.path is empty: give a folder of'),
    ({'state_kind': 'pose'}, '2 numbers of a state are no pose'),
    ({'extrinsics': True}, 'no extrinsics of the camera: train without'),
    ({'predictor.num_heads': 5}, 'not divisible by its 5 heads'),
    ({'objective.rollout_prefix': 'no'}, "rollout_prefix 'no' is not one of"),
    ({'learning_rate.decay_steps': 29}, '2 warm-up steps and 29 of decay do'),
    ({'clip.fps': None}, 'set exactly one of frame_step and fps'),
  ],
)
def test_mistakes_fail_early(config, tmp_path, changes, message):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    train_action(config, tmp_path)


def test_features_of_another_encoder_are_refused(config, tmp_path, monkeypatch):
  folder = write_episodes(tmp_path / 'episodes', 1, kind='plain')
  episode = trajectories.open_trajectories(folder)[0]
  episode = episode._replace(video=np.zeros((20, 2, 2, 7), np.float16))
  monkeypatch.setattr(
    trajectories, 'fit_loader', lambda loader: (loader, episode)
  )
  with pytest.raises(UserError, match='features of 7 numbers, .* gives 48'):
    train_action(config, tmp_path)


def test_features_are_those_of_the_backbone(config, tmp_path):
  config = config.copy_and_resolve_references()
  folder = write_episodes(tmp_path / 'episodes', 1, kind='plain')
  (folder / trajectories.PREPARED).write_text('{"encoder_sha256": "0"}')
  config.data.sources.discs.path = str(folder)
  with pytest.raises(UserError, match='features of another encoder than an un'):
    train_action(config, tmp_path)


def test_the_published_rates():
  config = importlib.import_module('configs.action').get_config('droid_release')
  rate = jax.jit(program.make_rate(config, 94_500, 300.0, offset=1))
  start, peak = 7.5e-5, 4.25e-4
  # Of the step that is the first, the second, ...
  for step, expected in (
    (1, start + (peak - start) / 4500),
    (4499, start + (peak - start) * 4499 / 4500),
    (4500, peak),
    (89_999, peak),
    (90_000, peak),
    (92_250, peak / 2),
    (94_500, 0.0),
  ):
    assert float(rate(step - 1)) == pytest.approx(expected, rel=1e-5)
  assert float(rate(94_499)) == 0.0
