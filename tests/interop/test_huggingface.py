"""Hugging Face folders: the numbers of transformers, exact round trips."""

import dataclasses
import json
import math
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest
from tiny_models import check_refused, make_weights

from vjepa_jax.interop import huggingface
from vjepa_jax.interop.layout import WeightsError
from vjepa_jax.interop.load import read_weights
from vjepa_jax.models.tubelets import PIXEL_MEAN, PIXEL_STD

safetensors_numpy = pytest.importorskip(
  'safetensors.numpy', reason='the extra parity has safetensors'
)

_SMALL = dict(
  patch_size=8,
  crop_size=32,
  frames_per_clip=8,
  hidden_size=96,
  num_attention_heads=3,
  num_hidden_layers=3,
  pred_hidden_size=48,
  pred_num_attention_heads=2,
  pred_num_hidden_layers=2,
  pred_num_mask_tokens=3,
  num_labels=7,
  num_pooler_layers=2,
)
# Other grids, and the widths of heads of ViT-H and of the predictors.
_CONFIGS = {
  'grid 4x4x4, heads of 32': _SMALL,
  'grid 3x6x6, heads of 24': _SMALL
  | dict(crop_size=48, frames_per_clip=6, num_attention_heads=4),
  'grid 1x2x2, heads of 80': _SMALL
  | dict(
    patch_size=16, frames_per_clip=2, hidden_size=160, num_attention_heads=2
  ),
  'grid 2x5x5, mlp 48/11': _SMALL
  | dict(
    crop_size=40, tubelet_size=4, hidden_size=88, num_attention_heads=4,
    mlp_ratio=48 / 11,
  ),
}  # fmt: skip


def _build(name, config, randomize):
  transformers = pytest.importorskip(
    'transformers', reason='the extra parity has transformers'
  )
  model = getattr(transformers, name)(transformers.VJEPA2Config(**config))
  return randomize(model)


def _video(config, seed=0):
  shape = 2, config['frames_per_clip'], *[config['crop_size']] * 2, 3
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _to_torch(video):
  import torch

  pixels = (video - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
  return torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy())


def _run(model, video, context, target):
  """Runs a VJEPA2Model: features of all tokens, predictions of the targets."""
  import torch

  with torch.no_grad():
    out = model(
      _to_torch(video),
      context_mask=[torch.from_numpy(context)],
      target_mask=[torch.from_numpy(target)],
    )
  predicted = out.predictor_output.last_hidden_state
  return out.last_hidden_state.numpy(), predicted.numpy()


def _draw_masks(num_tokens, seed=0):
  """Draws context and target ids int64 [2, K] in random order."""
  rng = np.random.default_rng(seed)
  order = np.stack([rng.permutation(num_tokens) for _ in range(2)])
  cut = max(num_tokens // 3, 1)
  return order[:, :cut].copy(), order[:, cut : 3 * cut].copy()


def _gather(features, ids):
  return np.take_along_axis(features, ids[..., None], axis=1)


@pytest.fixture
def folder(tmp_path):
  """A folder of ours, to be damaged."""
  path = tmp_path / 'model'
  huggingface.save_pretrained(path, make_weights())
  return path


@pytest.mark.parametrize('name', _CONFIGS)
def test_encoder_and_predictor_equal_transformers(
  name, tmp_path, randomize, check_parity
):
  import torch

  config = _CONFIGS[name]
  model = _build('VJEPA2Model', config, randomize)
  model.save_pretrained(tmp_path)
  weights = huggingface.read_pretrained(tmp_path)
  assert weights.resolution == config['crop_size']
  assert weights.frames == config['frames_per_clip']
  assert not weights.unused and not weights.probes

  video = _video(config)
  tubelet = weights.encoder.tubelet
  grid = tuple(s // t for s, t in zip(video.shape[1:4], tubelet, strict=True))
  context, target = _draw_masks(math.prod(grid))
  for mask_index in (0, 4):
    # The model's forward pass always takes the second token.
    token = model.predictor.embeddings.mask_tokens
    second = token[1].clone()
    with torch.no_grad():
      token[1] = token[mask_index % 3]
      expected, predicted = _run(model, video, context, target)
      token[1] = second
    if not mask_index:
      actual = weights.encoder.apply({'params': weights.encoder_params}, video)
      check_parity('VJEPA2Model', f'encoder, {name}', actual, expected)
    actual = weights.predictor.apply(
      {'params': weights.predictor_params},
      _gather(expected, context),
      context,
      target,
      grid,
      mask_index,
    )
    check_parity(
      'VJEPA2Model', f'predictor token {mask_index % 3}, {name}', actual,
      predicted,
    )  # fmt: skip


@pytest.mark.parametrize('layers', [0, 2])
def test_classifier_equals_transformers(
  layers, tmp_path, randomize, check_parity
):
  import torch

  # Without layers it is the probe of V-JEPA 1 with another epsilon.
  config = _SMALL | dict(num_pooler_layers=layers)
  model = _build('VJEPA2ForVideoClassification', config, randomize)
  model.save_pretrained(tmp_path)
  weights = huggingface.read_pretrained(tmp_path, with_predictor=False)
  assert weights.predictor is None and not weights.unused
  video = _video(config)
  with torch.no_grad():
    expected = model(_to_torch(video)).logits.numpy()
  features = weights.encoder.apply({'params': weights.encoder_params}, video)
  ((probe, params),) = weights.probes
  logits = probe.apply({'params': params}, features)
  check_parity(
    'VJEPA2ForVideoClassification', f'logits, {layers} pooler layers', logits,
    expected,
  )  # fmt: skip


def test_what_transformers_saved_comes_out_to_the_bit(tmp_path, randomize):
  model = _build('VJEPA2Model', _SMALL, randomize)
  model.save_pretrained(tmp_path / 'in')
  weights = huggingface.read_pretrained(tmp_path / 'in')
  huggingface.save_pretrained(tmp_path / 'out', weights)
  before, after = (
    safetensors_numpy.load_file(tmp_path / name / 'model.safetensors')
    for name in ('in', 'out')
  )
  assert before.keys() == after.keys()
  for key, value in before.items():
    np.testing.assert_array_equal(after[key], value, strict=True)


@pytest.mark.parametrize('mlp_dim', [192, 209, 210, 211, 212])
def test_what_was_trained_here_comes_back_to_the_bit(tmp_path, mlp_dim):
  expected = make_weights(mlp_dim=mlp_dim)
  huggingface.save_pretrained(tmp_path, expected)
  weights = huggingface.read_pretrained(tmp_path)
  assert weights.encoder == expected.encoder
  assert weights.predictor == expected.predictor
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
    (weights.encoder_params, weights.predictor_params),
    (expected.encoder_params, expected.predictor_params),
  )
  config = json.loads((tmp_path / 'config.json').read_text())
  # How transformers makes the size of the hidden layer.
  assert int(config['hidden_size'] * config['mlp_ratio']) == mlp_dim


def test_transformers_loads_what_was_trained_here(tmp_path, check_parity):
  transformers = pytest.importorskip(
    'transformers', reason='the extra parity has transformers'
  )
  weights = make_weights()
  huggingface.save_pretrained(tmp_path, weights)
  model, info = transformers.VJEPA2Model.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  video = _video(dict(frames_per_clip=8, crop_size=32))
  context, target = _draw_masks(64)
  features, predicted = _run(model, video, context, target)
  ours = weights.encoder.apply({'params': weights.encoder_params}, video)
  check_parity('export to VJEPA2Model', 'encoder', features, ours)
  ours = weights.predictor.apply(
    {'params': weights.predictor_params},
    _gather(np.asarray(ours), context),
    context,
    target,
    (4, 4, 4),
    1,
  )
  check_parity('export to VJEPA2Model', 'predictor', predicted, ours)


def test_preprocessor_is_the_one_of_the_evaluation(folder):
  path = folder / 'video_preprocessor_config.json'
  expected = {
    'video_processor_type': 'VJEPA2VideoProcessor',
    'size': {'shortest_edge': 36},
    'crop_size': {'height': 32, 'width': 32},
    'image_mean': [0.485, 0.456, 0.406],
    'image_std': [0.229, 0.224, 0.225],
  }
  assert json.loads(path.read_text()).items() >= expected.items()


def test_shards_and_bfloat16(tmp_path, randomize):
  import torch

  model = _build('VJEPA2Model', _SMALL, randomize)
  model.save_pretrained(tmp_path / 'shards', max_shard_size='200KB')
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 1
  model.save_pretrained(tmp_path / 'whole')
  jax.tree.map(
    np.testing.assert_array_equal,
    huggingface.read_pretrained(tmp_path / 'shards').encoder_params,
    huggingface.read_pretrained(tmp_path / 'whole').encoder_params,
  )
  model.to(torch.bfloat16).save_pretrained(tmp_path / 'half')
  params = huggingface.read_pretrained(tmp_path / 'half').encoder_params
  assert params['norm']['scale'].dtype == np.float32
  np.testing.assert_array_equal(
    params['norm']['scale'],
    model.encoder.layernorm.weight.detach().float().numpy(),
  )


def _edit_config(folder, changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder, changes):
  """Replaces tensors; None removes one."""
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path) | changes
  tensors = {k: v for k, v in tensors.items() if v is not None}
  safetensors_numpy.save_file(tensors, path)


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'model_type': 'vit'}, 'of model_type .vit., not'),
    ({'hidden_act': 'silu'}, "hidden_act 'silu'; only 'gelu'"),
    ({'use_rope_interleave': True}, 'V-JEPA 2.1, which is not'),
    ({'patch_size': [8, 8]}, 'patch_size .8, 8., not a positive integer'),
    ({'num_hidden_layers': 3}, 'no tensor .encoder.layer.2.norm1.weight'),
    ({'num_hidden_layers': 1}, 'encoder.layer.1.* has no place in it'),
    ({'num_attention_heads': 5}, 'not divisible by 5 heads'),
    ({'patch_size': 16}, r'8, 8\), not \(48, 3, 2, 16, 16\)'),
    ({'pred_num_mask_tokens': 3}, r'\(2, 1, 1, 24\), not \(3, 1, 1, 24\)'),
  ],
)
def test_configs_of_other_models_are_told(folder, changes, message):
  _edit_config(folder, changes)
  check_refused(huggingface.read_pretrained, folder, message)


@pytest.mark.parametrize(
  'key,value,message',
  [
    ('encoder.layernorm.bias', None, 'no tensor .encoder.layernorm.bias'),
    (
      'predictor.embeddings.mask_tokens', None,
      'no tensor .predictor.embeddings.mask_tokens',
    ),
    (
      'encoder.layernorm.weight', np.ones(47),
      r'norm.weight has shape \(47,\), not \(48\)',
    ),
    (
      'encoder.layer.0.attention.key.bias', np.ones(4),
      r'0.attention.key.bias has shape \(4,\), not \(48\)',
    ),
    ('encoder.layer.0.ls.gamma', np.ones(4), 'ls.gamma has no place in it'),
  ],
)  # fmt: skip
def test_tensors_of_other_models_are_told(folder, key, value, message):
  _edit_tensors(folder, {key: value})
  check_refused(huggingface.read_pretrained, folder, message)


def test_damaged_folders_are_told(folder, tmp_path):
  for i, (name, damage, message) in enumerate((
    ('config.json', Path.unlink, 'has no config.json'),
    ('config.json', _truncate, 'config.json is damaged'),
    ('model.safetensors', Path.unlink, 'has no model.safetensors'),
    ('model.safetensors', _truncate, 'model.safetensors is truncated'),
    (
      'model.safetensors',
      lambda path: path.rename(path.parent / 'pytorch_model.bin'),
      'save it again as model.safetensors',
    ),
    (
      'video_preprocessor_config.json',
      lambda path: path.write_text('{"image_mean": [0.5, 0.5, 0.5]}'),
      'image_mean .* built in',
    ),
  )):  # fmt: skip
    copy = tmp_path / str(i)
    shutil.copytree(folder, copy)
    damage(copy / name)
    check_refused(huggingface.read_pretrained, copy, message)


def test_tensors_without_use_are_named(folder):
  _edit_tensors(folder, {'head.weight': np.ones(3)})
  assert huggingface.read_pretrained(folder).unused == ('head.weight',)


def test_names_of_the_hub_fail_in_one_line(monkeypatch):
  with pytest.raises(WeightsError, match='there is no folder /nowhere'):
    huggingface.read_pretrained('/nowhere')
  hub = pytest.importorskip('huggingface_hub')

  def fail(*args, **kwargs):
    raise OSError('no network\nat all')

  monkeypatch.setattr(hub, 'snapshot_download', fail)
  with pytest.raises(WeightsError, match='the Hub did not give it') as error:
    huggingface.read_pretrained('facebook/vjepa2-vitl-fpc64-256')
  assert '\n' not in str(error.value)


def test_names_of_the_hub_are_downloaded(monkeypatch, folder):
  hub = pytest.importorskip('huggingface_hub')
  asked = []

  def download(name, **_):
    asked.append(name)
    return str(folder)

  monkeypatch.setattr(hub, 'snapshot_download', download)
  for name in ('facebook/model', 'hf://someone/model'):
    assert read_weights(name).encoder.width == 48
  # A folder that is not there is not asked of a stranger.
  with pytest.raises(WeightsError, match='there is no folder runs/none'):
    read_weights('runs/none')
  assert asked == ['facebook/model', 'someone/model']


@pytest.mark.parametrize(
  'model,change,message',
  [
    ('encoder', {'positions': 'sincos'}, "positions 'sincos'; transformers"),
    ('predictor', {'positions': 'rope_interleaved'}, "'rope_interleaved'"),
    ('encoder', {'tubelet': (2, 8, 4)}, 'square patches that divide the clip'),
    ('encoder', {'tubelet': (3, 8, 8)}, 'square patches that divide the clip'),
    ('encoder', {'pixel_norm': 'clip'}, "normalises pixels by 'clip'"),
    ('predictor', {'predict_context': True}, 'at hidden tokens and nothing'),
    ('predictor', {'out_width': 9}, 'at hidden tokens and nothing else'),
  ],
)
def test_models_that_transformers_lacks_are_refused(
  tmp_path, model, change, message
):
  weights = make_weights()
  model = {model: getattr(weights, model).clone(**change)}
  with pytest.raises(WeightsError, match=message):
    huggingface.save_pretrained(tmp_path, dataclasses.replace(weights, **model))
  assert not list(tmp_path.iterdir())
