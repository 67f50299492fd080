"""Frozen evaluation from a workdir to results and a picture."""

import json
import re
import shutil

import cv2
import jax
import numpy as np
import pytest

from configs import probe as recipe
from vjepa_jax.data import pipeline, sources, transforms
from vjepa_jax.errors import UserError
from vjepa_jax.evaluation import extraction
from vjepa_jax.interop.layout import Weights
from vjepa_jax.interop.load import make_abstract, read_weights
from vjepa_jax.models import zoo
from vjepa_jax.parallel.mesh import make_mesh
from vjepa_jax.tasks import probe as task
from vjepa_jax.tasks.backbone import read_backbone
from vjepa_jax.tools import convert
from vjepa_jax.training import loop
from vjepa_jax.training.checkpoint import Checkpoints, read_model
from vjepa_jax.training.state import TrainState
from vjepa_jax.training.telemetry import read_metrics


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
  path = tmp_path_factory.mktemp('backbone')
  encoder = zoo.build_encoder('nano', tubelet=(2, 8, 8))
  video = np.zeros((1, 4, 32, 32, 3), np.uint8)
  params = jax.jit(encoder.init)(jax.random.key(0), video)['params']
  weights = Weights(encoder, params, resolution=32, frames=4)
  convert.write_workdir(path, weights)
  return path


@pytest.fixture(scope='module')
def splits(toy_videos, tmp_path_factory):
  """16 training and 8 test videos, one of which cannot be read."""
  folder = tmp_path_factory.mktemp('splits')
  lines = [
    f'{toy_videos.parent}/{x}' for x in toy_videos.read_text().splitlines()
  ]
  (folder / 'train.csv').write_text('\n'.join(lines[:16]))
  (folder / 'test.csv').write_text('\n'.join([*lines[16:], 'missing.mp4 0']))
  return folder


def _make_config(backbone, splits, arg='folder'):
  config = recipe.get_config(f'{arg},backbone={backbone}')
  config.data.update(
    train=str(splits / 'train.csv'),
    test=str(splits / 'test.csv'),
    validation_share=0.25,
    batch_size=8,
    num_workers=0,
  )
  config.compute_dtype = 'float32'
  config.clip.update(frame_step=2, fps=None)
  config.probe.update(
    depth=0, learning_rates=(1e-2, 1e-3), weight_decays=(0.01,)
  )
  config.total_steps, config.total_epochs = 6, None
  config.validate_every_epochs = 2.0
  config.evaluation.batch_size = 8
  config.log_every_steps = 1
  config.checkpoint.every_steps = 3
  config.segments, config.views = 2, 3
  return config


@pytest.fixture(scope='module')
def finished(backbone, splits, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('probe')
  return workdir, task.probe(_make_config(backbone, splits), workdir)


def test_images_and_levels_of_vjepa21(backbone, splits, tmp_path):
  encoder = zoo.build_encoder(
    'nano',
    tubelet=(2, 8, 8),
    positions='rope_rescaled',
    levels=True,
    modalities=True,
  )
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32), make_abstract(encoder)
  )
  convert.write_workdir(tmp_path, Weights(encoder, params))
  config = recipe.get_config(f'in1k_image,backbone={tmp_path}')
  assert read_backbone(config).encoder == encoder
  assert config.clip.frames == 1
  config.backbone = str(backbone)
  with pytest.raises(UserError, match='frames of the clip, 1, is not'):
    read_backbone(config)
  config = _make_config(tmp_path, splits, 'diving48')
  config.probe.num_heads = None
  grid = task._build_grid(config, encoder, 48, make_mesh(1))
  assert grid.layers == encoder.levels == (0, 1)
  config.layers = (1, 2)
  with pytest.raises(UserError, match='layers'):
    task._build_grid(config, encoder, 48, make_mesh(1))


def test_results_say_what_was_selected_and_how(finished):
  workdir, results = finished
  assert json.loads((workdir / 'results.json').read_text()) == results
  assert (results['test_videos'], results['left_out']) == (8, 1)
  assert (results['train_videos'], results['validation_videos']) == (12, 4)
  best = max(results['grid'], key=lambda row: row['validation_top1'])
  assert results['selected'] == best and len(results['grid']) == 2
  assert 0 <= results['top1'] <= results['top5'] <= 1
  assert 0 <= results['knn_top1'] <= 1
  for name in ('confusion', 'attention'):
    picture = cv2.imread(str(workdir / f'{name}.png'))
    assert picture.shape[0] > 300 and picture.std() > 10


def _fail(*_):
  raise OSError('the disk is full')


def test_test_videos_have_no_part_in_the_selection(
  backbone, splits, finished, tmp_path
):
  _, results = finished
  # Other labels of the test videos: nothing but the test changes.
  (tmp_path / 'train.csv').write_text((splits / 'train.csv').read_text())
  text = re.sub(r'\d$', '3', (splits / 'test.csv').read_text(), flags=re.M)
  (tmp_path / 'test.csv').write_text(text)
  # And what cannot be drawn has its numbers.
  with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
    patch.setattr(task.pictures, 'draw_confusion', _fail)
    task.probe(_make_config(backbone, tmp_path), tmp_path / 'run')
  other = json.loads((tmp_path / 'run/results.json').read_text())
  assert other['grid'] == results['grid']
  assert other['selected'] == results['selected']


def test_an_interrupted_run_ends_with_the_same_numbers(
  backbone, splits, finished, tmp_path
):
  workdir, results = finished
  own = shutil.copytree(backbone, tmp_path / 'backbone')
  config = _make_config(own, splits)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Preemption, 'reached', lambda self, step: step == 4)
    assert task.probe(config, tmp_path) is None
  # The run of the backbone goes on meanwhile.
  step, model = read_model(own)
  params = read_weights(own).encoder_params
  params = jax.tree.map(lambda x: 2 * jax.numpy.asarray(x), params)
  state = TrainState(step + 1, {'encoder': params}, params, None)
  checkpoints = Checkpoints(own, every_steps=1, keep=2, model=model)
  checkpoints.save(step + 1, state, {'samples': 0})
  checkpoints.close()
  resumed = task.probe(config, tmp_path)
  for name in set(results) - {'seconds', 'backbone'}:
    assert resumed[name] == results[name], name
  losses, expected = (
    {m['step']: m['loss'] for m in read_metrics(path) if 'loss' in m}
    for path in (tmp_path, workdir)
  )
  assert losses == expected
  shutil.rmtree(own / 'checkpoints' / str(step))
  with pytest.raises(ValueError, match=f'no longer holds step {step}'):
    task.probe(config, tmp_path)


def test_a_run_stays_on_its_backbone(backbone, splits, finished):
  config = _make_config(backbone, splits)
  config.random_init = True
  message = f'was started on {backbone}, and random init is another backbone'
  with pytest.raises(ValueError, match=message):
    task.probe(config, finished[0])


def test_cached_features_give_what_videos_give(backbone, splits, tmp_path):
  weights = convert.read_weights(backbone, with_predictor=False)
  options = pipeline.ClipOptions(
    frames=4, resolution=32, frame_step=2, num_clips=2
  )
  for name in ('train', 'test'):
    extraction.extract(
      sources.open_source(str(splits / f'{name}.csv')),
      str(tmp_path / name),
      weights.encoder,
      weights.encoder_params,
      options,
      dtype='float32',
      batch_size=8,
    )
  config = _make_config(backbone, splits)
  config.views = 1
  # Training as in evaluation: of times and crops nothing is random.
  with pytest.MonkeyPatch.context() as patch:
    read = pipeline.read_clips
    patch.setattr(
      pipeline,
      'read_clips',
      lambda record, options, *rng: read(record, options),
    )
    direct = task.probe(config, tmp_path / 'direct')
  config.data.update(train=str(tmp_path / 'train'), test=str(tmp_path / 'test'))
  cached = task.probe(config, tmp_path / 'cached')
  for a, b in zip(direct['grid'], cached['grid'], strict=True):
    assert a == b
  np.testing.assert_allclose(
    direct['cross_entropy'], cached['cross_entropy'], rtol=1e-3
  )
  config.data.test = str(splits / 'test.csv')
  with pytest.raises(ValueError, match='features of all'):
    task.probe(config, tmp_path / 'mixed')


@pytest.mark.parametrize('probe', ['v1', 'v2', 'linear'])
@pytest.mark.parametrize('data', sorted(recipe._DATA))
def test_every_protocol_is_a_config(data, probe):
  config = recipe.get_config(f'{data},backbone=x,probe={probe}')
  assert config.task == 'probe' and config.backbone == 'x'
  clip = {k: v for k, v in config.clip.items() if v is not None}
  if data != 'folder':
    pipeline.ClipOptions(**clip)
    assert config.num_classes > 1
  if probe == 'v2' and data == 'ssv2':
    assert len(config.probe.learning_rates) * 4 == 20


def test_mistakes_are_named(backbone, splits, tmp_path):
  for change, message in (
    ({'data.test': ''}, 'config.data.test is empty'),
    ({'probe.num_heads': 7}, 'does not divide the 48'),
    ({'layers': (1, 9)}, 'name some of 0 to 1'),
  ):
    config = _make_config(backbone, splits)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
      task.probe(config, tmp_path)


def test_views_lie_along_the_long_side(toy_videos):
  for sides, count, corners in (
    ((30, 50), 3, [(0, 0), (0, 10), (0, 20)]),
    ((50, 30), 2, [(0, 0), (20, 0)]),
  ):
    boxes = [(*corner, 30, 30) for corner in corners]
    assert transforms.spread_crops(*sides, count) == boxes
  record = sources.open_source(str(toy_videos))[0]
  options = pipeline.ClipOptions(
    frames=4, resolution=32, frame_step=2, num_clips=2, views=3
  )
  clips = pipeline.read_clips(record, options)
  assert clips.shape == (6, 4, 32, 32, 3)


def test_an_image_is_repeated(tmp_path):
  image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
  cv2.imwrite(str(tmp_path / 'image.png'), image)
  (tmp_path / 'list.csv').write_text('image.png 1\n')
  record = sources.open_source(str(tmp_path / 'list.csv'))[0]
  options = pipeline.ClipOptions(frames=4, resolution=32, frame_step=1)
  clip = pipeline.read_clips(record, options)[0]
  assert clip.shape == (4, 32, 32, 3) and (clip == clip[:1]).all()
