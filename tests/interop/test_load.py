"""Loading from every source, and the converter's command."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from tiny_models import TUBELET, make_weights

import vjepa_jax
from vjepa_jax.errors import UserError
from vjepa_jax.interop import huggingface, layout, names, world
from vjepa_jax.interop.layout import Weights, WeightsError
from vjepa_jax.interop.load import (
  _find_backbone,
  _resize,
  describe,
  load,
  read_weights,
)
from vjepa_jax.interop.world import _read_objective
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.tools import command, convert
from vjepa_jax.training.checkpoint import Checkpoints
from vjepa_jax.training.state import TrainState


@pytest.fixture(scope='module')
def models():
  """Encoder, predictor, and a state whose target is to be told from it."""
  weights = make_weights()
  params = {
    'encoder': weights.encoder_params,
    'predictor': weights.predictor_params,
  }
  target = jax.tree.map(lambda x: x + 0.01, weights.encoder_params)
  moments = {'count': np.int32(0)}
  state = jax.device_put(TrainState(np.int32(3), params, target, moments))
  return weights.encoder, weights.predictor, state


@pytest.fixture(scope='module')
def workdir(models, tmp_path_factory):
  """What a pretraining run leaves behind."""
  path = tmp_path_factory.mktemp('run')
  encoder, predictor, state = models
  checkpoints = Checkpoints(
    path,
    every_steps=1,
    keep=1,
    # As configs have it: computed in bfloat16, rematerialised.
    model={
      'encoder': describe(encoder.clone(dtype=jnp.bfloat16, remat='full')),
      'predictor': describe(predictor.clone(dtype=jnp.bfloat16)),
    },
  )
  checkpoints.save(3, state, {'samples': 24})
  checkpoints.close()
  config = {'clip': {'resolution': 32, 'frames': 8}}
  (path / 'config.json').write_text(json.dumps(config))
  return path


@pytest.fixture(scope='module')
def folder(models, tmp_path_factory):
  pytest.importorskip('safetensors', reason='the extra parity has safetensors')
  path = tmp_path_factory.mktemp('folder')
  encoder, predictor, state = models
  params = state.target, state.params['predictor']
  weights = Weights(encoder, params[0], predictor, params[1], (), 32, 8)
  huggingface.save_pretrained(path, weights)
  return path


@pytest.fixture(scope='module')
def official(models, tmp_path_factory):
  torch = pytest.importorskip('torch', reason='the extra parity has torch')
  path = tmp_path_factory.mktemp('official') / 'vit.pt'
  _, _, state = models
  content = {}
  for name, params in (state.params | {'target_encoder': state.target}).items():
    family = names.PREDICTOR if name == 'predictor' else names.ENCODER
    tensors = layout.export(family, params, tubelet=TUBELET)
    content[name] = {
      f'module.backbone.{k}': torch.from_numpy(v.copy())
      for k, v in tensors.items()
    }
  torch.save(content, path)
  return path


def _video(shape=(2, 8, 32, 32, 3)):
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize('kind', ['workdir', 'folder', 'official'])
def test_every_source_gives_the_same_features(kind, models, request):
  encoder, _, state = models
  loaded = vjepa_jax.load(request.getfixturevalue(kind))
  assert loaded.encoder == encoder
  if kind != 'official':
    assert (loaded.resolution, loaded.frames) == (32, 8)
  features = loaded.encode(_video())
  assert features.shape == (2, 64, 48) and features.dtype == jnp.float32
  expected = encoder.apply({'params': state.target}, _video())
  np.testing.assert_allclose(features, expected, atol=1e-5)
  assert loaded.encode(_video((1, 32, 32, 3))).shape == (1, 16, 48)
  assert loaded.encode(_video((1, 16, 32, 32, 3))).shape == (1, 128, 48)


@pytest.mark.parametrize('kind', ['workdir', 'official'])
def test_the_student_on_demand(kind, models, request):
  params = load(request.getfixturevalue(kind), which='encoder').params
  jax.tree.map(
    np.testing.assert_array_equal, params, models[2].params['encoder']
  )


@pytest.mark.parametrize('size', [(72, 108), (50, 41), (20, 30), (36, 36)])
def test_frames_are_resized_as_in_the_evaluation(size):
  image = _video((*size, 3))
  short = 36  # int(32 * 256 / 224)
  height, width = (short * side // min(size) for side in size)
  top, left = round((height - 32) / 2), round((width - 32) / 2)
  expected = Image.fromarray(image).resize(
    (width, height), Image.Resampling.BILINEAR
  )
  expected = np.asarray(expected)[top : top + 32, left : left + 32]
  actual = _resize(jnp.asarray(image)[None, None], 32)[0, 0]
  # Pillow rounds after each of the two axes.
  assert np.abs(np.asarray(actual, int) - expected).max() <= 1


def test_frames_of_other_sizes(workdir):
  loaded = load(workdir)
  video = _video((1, 2, 72, 108, 3))
  np.testing.assert_allclose(
    loaded.encode(video), loaded.encode(_resize(video, 32)), atol=1e-5
  )
  as_it_is = load(workdir, resize=False)
  assert as_it_is.resolution == 32
  assert as_it_is.encode(video[..., :104, :]).shape == (1, 9 * 13, 48)


def test_compute_dtype_is_for_the_loader_to_say(workdir):
  loaded = load(workdir, dtype=jnp.bfloat16)
  assert loaded.encode(_video()).dtype == jnp.bfloat16
  assert loaded.params['norm']['scale'].dtype == jnp.float32


@pytest.mark.parametrize(
  'video',
  [np.zeros((1, 2, 32, 32, 3), np.float32), np.zeros((2, 32, 32), np.uint8)],
)
def test_encode_says_what_it_takes(workdir, video):
  with pytest.raises(ValueError, match='encode takes uint8'):
    load(workdir).encode(video)


def test_levels_of_a_model_without(workdir):
  with pytest.raises(UserError, match='has no levels'):
    load(workdir).encode(_video(), 'levels')


def test_sources_that_are_none(tmp_path, workdir):
  for source, message in (
    (tmp_path, 'neither a workdir .* nor a Hugging Face folder'),
    (tmp_path / 'none.pt', 'there is no file|PyTorch, which is missing'),
    (tmp_path / 'none', 'there is no folder'),
  ):
    with pytest.raises(WeightsError, match=message):
      load(source)
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(WeightsError, match='give the folder that it is in'):
    load(tmp_path / 'model.safetensors')
  with pytest.raises(WeightsError, match='positions is for official files'):
    load(workdir, positions='sincos')
  with pytest.raises(WeightsError, match='has target_encoder and encoder, not'):
    load(workdir, which='ema_encoder')
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='holds no complete checkpoint'):
    load(tmp_path)


def test_models_that_need_the_place_of_the_camera_are_refused(monkeypatch):
  predictor = ActionPredictor(out_width=6, width=8, depth=1, num_heads=1)
  weights = Weights(predictor=predictor)
  monkeypatch.setattr(world, 'read_weights', lambda _: weights)
  monkeypatch.setattr(world, 'read_config', lambda _: {'extrinsics': True})
  with pytest.raises(WeightsError, match='run was trained with the place of'):
    world.load_action_model('run')


def test_backbones_are_found_from_other_folders(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  backbone, workdir = (tmp_path / f'moved/runs/{name}' for name in 'ab')
  backbone.mkdir(parents=True)
  assert _find_backbone(workdir, 'runs/a') == str(backbone)
  assert _find_backbone('moved/runs/b', 'runs/a') == str(backbone)
  assert _find_backbone(workdir, 'moved/runs/a') == 'moved/runs/a'
  assert _find_backbone(workdir, 'of/the_hub') == 'of/the_hub'


def test_importing_the_package_is_light():
  code = (
    'import sys, vjepa_jax; print("jax" in sys.modules); '
    'print(vjepa_jax.load.__name__)'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.split() == ['False', 'load']
  with pytest.raises(AttributeError, match="no attribute 'save'"):
    vjepa_jax.save  # noqa: B018


def _convert(source, target, **options):
  options |= {'from': source, 'to': target}
  flags = [f'--{name}={value}' for name, value in options.items()]
  convert.main(command.parse(convert.main, convert.define_flags, flags)[0])


@pytest.mark.parametrize('form', ['huggingface', 'jax'])
@pytest.mark.parametrize('kind', ['workdir', 'folder', 'official'])
def test_conversion_keeps_every_bit(
  kind, form, models, tmp_path, request, capsys
):
  pytest.importorskip('safetensors', reason='the extra parity has safetensors')
  source = request.getfixturevalue(kind)
  target = tmp_path / 'out'
  options = {'predictor_heads': 2} if kind == 'official' else {}
  _convert(source, target, format=form, resolution=32, frames=8, **options)
  out = capsys.readouterr().out
  assert 'encoder: width 48, depth 2, 2 heads, positions rope_tiled' in out
  count = sum(x.size for x in jax.tree.leaves(models[2].target))
  assert f'{count:,} parameters' in out and 'not used: nothing' in out
  weights = read_weights(target)
  assert (weights.encoder, weights.predictor) == models[:2]
  assert (weights.resolution, weights.frames) == (32, 8)
  jax.tree.map(
    np.testing.assert_array_equal,
    (weights.encoder_params, weights.predictor_params),
    (models[2].target, models[2].params['predictor']),
  )


def test_conversion_of_the_encoder_alone(workdir, tmp_path):
  _convert(workdir, tmp_path / 'out', format='jax', predictor=False)
  assert read_weights(tmp_path / 'out').predictor is None
  assert load(tmp_path / 'out').resolution == 32
  with pytest.raises(WeightsError, match='has a predictor, and there is none'):
    _convert(workdir, tmp_path / 'hf', predictor=False)


def test_conversions_that_are_impossible(workdir, official, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').touch()
  with pytest.raises(WeightsError, match='exists and is not empty'):
    _convert(workdir, tmp_path / 'full')
  with pytest.raises(WeightsError, match='give --resolution and --frames'):
    _convert(official, tmp_path / 'out', predictor_heads=2)


def test_the_command_has_no_traceback(tmp_path):
  flags = [f'--from={tmp_path}', f'--to={tmp_path / "out"}']
  out = subprocess.run(
    [sys.executable, '-m', 'vjepa_jax.tools.convert', *flags],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert out.returncode == 2
  assert 'Traceback' not in out.stderr
  assert out.stderr.splitlines()[-1].startswith(f'error: {tmp_path} is neither')


@pytest.mark.parametrize(
  'objective,expected',
  [
    ({}, ('ema', 'clip', 'layer')),
    ({'vjepa': {'target_norm': 'position'}}, ('ema', 'clip', 'position')),
    ({'kind': 'salt', 'salt': {'teacher': ''}}, ('pixels', 'clip', 'layer')),
    ({'kind': 'salt', 'salt': {'teacher': 'a'}}, ('frozen', 'clip', 'layer')),
    (
      {'kind': 'vjepa21', 'vjepa21': {'teacher': 'a'}},
      ('frozen', 'clip', 'layer'),
    ),
    # Before objectives had a kind.
    (
      {'targets': 'frozen', 'target_view': 'targets', 'target_norm': 'layer'},
      ('frozen', 'targets', 'layer'),
    ),
  ],
)
def test_objectives_of_all_ages_are_read(objective, expected):
  options = _read_objective({'objective': objective})
  names = 'targets', 'target_view', 'target_norm'
  assert tuple(options[name] for name in names) == expected
