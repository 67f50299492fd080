"""Folders of Hugging Face transformers' VJEPA2 models, in and out, no torch.

A folder is `config.json`, `model.safetensors` (or shards and their index) and
`video_preprocessor_config.json`.
"""

import json
import math
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
import numpy as np
import safetensors
from safetensors.numpy import save_file

from vjepa_jax.interop import layout, names
from vjepa_jax.interop.layout import Tensors, Weights, WeightsError
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.tubelets import PIXEL_MEAN, PIXEL_STD

SCHEME = 'hf://'  # of the Hub
# What the models here have built in; transformers' defaults.
_FIXED = {
  'hidden_act': 'gelu',
  'qkv_bias': True,
  'in_chans': 3,
  'layer_norm_eps': 1e-6,
  'pred_mlp_ratio': 4,
}
# Sizes in config.json, with the defaults of transformers.
_DEFAULTS = {
  'patch_size': 16,
  'crop_size': 256,
  'frames_per_clip': 64,
  'tubelet_size': 2,
  'hidden_size': 1024,
  'num_attention_heads': 16,
  'num_hidden_layers': 24,
  'num_pooler_layers': 3,
  'pred_hidden_size': 384,
  'pred_num_attention_heads': 12,
  'pred_num_hidden_layers': 12,
  'pred_num_mask_tokens': 10,
}
# Those that are fields of our modules, by field.
_ENCODER = {
  'width': 'hidden_size',
  'depth': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
_PREDICTOR = {
  'width': 'pred_hidden_size',
  'depth': 'pred_num_hidden_layers',
  'num_heads': 'pred_num_attention_heads',
  'num_mask_tokens': 'pred_num_mask_tokens',
}
_PROBE = {'depth': 'num_pooler_layers', 'num_heads': 'num_attention_heads'}


def read_pretrained(
  name: str | os.PathLike, *, with_predictor: bool = True
) -> Weights:
  """Reads a VJEPA2Model or a VJEPA2ForVideoClassification with its probe.

  Args:
    name: A folder, or a name on the Hub, which is downloaded to the cache of
      huggingface_hub: `facebook/...`, or `hf://OWNER/NAME` of others.
    with_predictor: Read the predictor too.

  Raises:
    WeightsError: The folder is of another model, incomplete or damaged, or the
      Hub cannot be reached.
  """
  folder = _find_folder(name)
  try:
    config = _read_config(folder)
    tensors = _read_tensors(folder, with_predictor)
    return _convert(tensors, config, with_predictor)
  except WeightsError as error:
    raise WeightsError(f'{name}: {error}') from None


def save_pretrained(folder: str | os.PathLike, weights: Weights) -> None:
  """Writes a folder that `transformers.VJEPA2Model.from_pretrained` loads.

  Args:
    folder: Made if it is not there.
    weights: Encoder and predictor, with the positions that transformers has,
      'rope_tiled'; resolution and frames of clips. Positions in transformers
      are right at this resolution only. Probes are left out.

  Raises:
    WeightsError: Something is missing, or transformers has no such model.
  """
  files = {
    'config.json': _make_config(weights),
    'video_preprocessor_config.json': _make_preprocessor(weights.resolution),
  }
  tensors = layout.export(
    names.ENCODER,
    weights.encoder_params,
    'huggingface',
    tubelet=weights.encoder.tubelet,
  )
  tensors |= layout.export(
    names.PREDICTOR, weights.predictor_params, 'huggingface'
  )
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  for name, content in files.items():
    text = json.dumps(content, indent=2) + '\n'
    (folder / name).write_text(text, encoding='utf-8')


def _find_folder(name: str | os.PathLike) -> Path:
  """Returns the folder, after a download if it is a name on the Hub."""
  folder = Path(name)
  if folder.is_dir():
    return folder
  name = os.fspath(name)
  repository = name.removeprefix(SCHEME)
  is_name = re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', repository)
  # A mistyped folder may be the name of somebody's repository.
  if not (is_name and name.startswith((SCHEME, 'facebook/'))):
    raise WeightsError(
      f'there is no folder {name} (models on the Hub: facebook/NAME, or of '
      'others hf://OWNER/NAME)'
    )
  try:
    import huggingface_hub

    patterns = ['*.json', '*.safetensors']
    return Path(
      huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    )
  except ImportError:
    raise WeightsError(
      f'there is no folder {name}, and to fetch it from the Hub needs: '
      'pip install huggingface_hub'
    ) from None
  except Exception as error:  # of httpx, of the Hub, of the file system
    raise WeightsError(
      f'there is no folder {name}, and the Hub did not give it '
      f'({type(error).__name__}): download it where there is a network and '
      'give the folder'
    ) from None


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise WeightsError(f'it has no {path.name}') from None
  except ValueError as error:
    raise WeightsError(f'{path.name} is damaged: {error}') from None


def _read_config(folder: Path) -> dict[str, Any]:
  """Reads `config.json` and checks that it is of a model that exists here."""
  config = _read_json(folder / 'config.json')
  kind = config.get('model_type')
  if kind != 'vjepa2':
    raise WeightsError(f'config.json is of model_type {kind!r}, not "vjepa2"')
  for key, value in _FIXED.items():
    if config.get(key, value) != value:
      raise WeightsError(
        f'config.json has {key} {config[key]!r}; only {value!r} is supported'
      )
  if config.get('use_rope_interleave') or config.get('interpolate_rope'):
    raise WeightsError('config.json is of V-JEPA 2.1, which is not supported')
  config = _DEFAULTS | config
  for key in _DEFAULTS:
    if not isinstance(config[key], int) or config[key] < 0:
      raise WeightsError(
        f'config.json has {key} {config[key]!r}, not a positive integer'
      )
  path = folder / 'video_preprocessor_config.json'
  if path.exists():
    found, expected = _read_json(path), _make_preprocessor(256)
    for key in ('image_mean', 'image_std'):
      if not np.allclose(found.get(key, expected[key]), expected[key]):
        raise WeightsError(
          f'{path.name} has {key} {found[key]}; the encoder has '
          f'{expected[key]} built in'
        )
  return config


def _list_files(folder: Path) -> list[Path]:
  index = folder / 'model.safetensors.index.json'
  if index.exists():
    found = _read_json(index).get('weight_map', {}).values()
    return [folder / name for name in sorted(set(found))]
  path = folder / 'model.safetensors'
  if not path.exists() and (folder / 'pytorch_model.bin').exists():
    raise WeightsError(
      'it has pytorch_model.bin only: save it again as model.safetensors'
    )
  return [path]


def _read_tensors(folder: Path, with_predictor: bool) -> dict[str, Tensors]:
  """Reads float32 tensors of 'encoder', 'predictor' and, the rest, 'probe'."""
  state = {'encoder': {}, 'predictor': {}, 'probe': {}}
  for path in _list_files(folder):
    if not path.exists():
      raise WeightsError(f'it has no {path.name}')
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
          name = key.removeprefix('vjepa2.')  # which the models of tasks have
          model = name.partition('.')[0]
          if model != 'predictor' or with_predictor:
            tensors = state.get(model, state['probe'])
            tensors[name] = np.asarray(file.get_tensor(key), np.float32)
    except safetensors.SafetensorError as error:
      raise WeightsError(
        f'{path.name} is truncated or damaged ({error})'
      ) from None
  return {name: Tensors(found, name) for name, found in state.items()}


def _convert(
  tensors: dict[str, Tensors], config: dict[str, Any], with_predictor: bool
) -> Weights:
  """Builds the models of config.json from their tensors."""

  def read(family, name, keys, fields, **sizes):
    sizes |= {field: config[key] for field, key in keys.items()}
    return layout.read(
      family, tensors[name], 'huggingface', fields=fields, **sizes
    )

  models = {}
  fields = {'positions': 'rope_tiled', 'scale_init_by_depth': True}
  models['encoder'], models['encoder_params'] = read(
    names.ENCODER,
    'encoder',
    _ENCODER,
    fields,
    t=config['tubelet_size'],
    h=config['patch_size'],
    w=config['patch_size'],
  )
  if with_predictor:
    models['predictor'], models['predictor_params'] = read(
      names.PREDICTOR, 'predictor', _PREDICTOR, fields
    )
  if 'classifier.weight' in tensors['probe']:
    # transformers normalises in the pooler as in the encoder, the official
    # code with 1e-5.
    epsilon = {'epsilon': _FIXED['layer_norm_eps']}
    models['probes'] = (read(names.PROBE, 'probe', _PROBE, epsilon),)
  unused = sorted(key for x in tensors.values() for key in x.list_unused())
  if unused:
    logging.info('not used: %s', ', '.join(unused))
  return Weights(
    **models,
    resolution=config['crop_size'],
    frames=config['frames_per_clip'],
    unused=tuple(unused),
  )


def _make_config(weights: Weights) -> dict[str, Any]:
  """Makes `config.json`; refuses models that transformers does not have."""
  encoder, predictor = weights.encoder, weights.predictor
  if encoder.levels:
    raise WeightsError('transformers has no V-JEPA 2.1: give --format=jax')
  if isinstance(predictor, ActionPredictor):
    raise WeightsError('transformers has no V-JEPA 2-AC: give --format=jax')
  if predictor is None:
    raise WeightsError('a VJEPA2Model has a predictor, and there is none')
  if not (weights.resolution and weights.frames):
    raise WeightsError(
      'the clips of this model are not known: give --resolution and --frames'
    )
  for name, model in (('encoder', encoder), ('predictor', predictor)):
    if model.positions != 'rope_tiled':
      raise WeightsError(
        f'the {name} has positions {model.positions!r}; transformers has '
        "'rope_tiled' only"
      )
  if encoder.pixel_norm != 'imagenet':
    raise WeightsError(
      f'the encoder normalises pixels by {encoder.pixel_norm!r}; the processor '
      "of transformers does by 'imagenet' only"
    )
  if predictor.predict_context or predictor.out_width != encoder.width:
    raise WeightsError(
      'the predictor of transformers predicts features of the encoder at '
      'hidden tokens and nothing else, which this one does'
    )
  time, patch, other = encoder.tubelet
  if patch != other or weights.resolution % patch or weights.frames % time:
    raise WeightsError(
      f'transformers needs square patches that divide the clip, got tubelet '
      f'{tuple(encoder.tubelet)}, resolution {weights.resolution} and '
      f'{weights.frames} frames'
    )
  ratio = encoder.mlp_dim / encoder.width
  if int(encoder.width * ratio) != encoder.mlp_dim:
    # transformers multiplies and truncates.
    ratio = math.nextafter(ratio, math.inf)
  return {
    'architectures': ['VJEPA2Model'],
    'model_type': 'vjepa2',
    'dtype': 'float32',
    **_FIXED,
    'patch_size': patch,
    'crop_size': weights.resolution,
    'image_size': weights.resolution,
    'frames_per_clip': weights.frames,
    'tubelet_size': time,
    'mlp_ratio': ratio,
    **{key: getattr(encoder, field) for field, key in _ENCODER.items()},
    **{key: getattr(predictor, field) for field, key in _PREDICTOR.items()},
  }


def _make_preprocessor(resolution: int) -> dict[str, Any]:
  """Makes `video_preprocessor_config.json`: resize, centre crop, normalise."""
  return {
    'video_processor_type': 'VJEPA2VideoProcessor',
    'do_resize': True,
    'size': {'shortest_edge': int(resolution * 256 / 224)},
    'resample': 2,  # bilinear
    'do_center_crop': True,
    'crop_size': {'height': resolution, 'width': resolution},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': [round(x / 255, 6) for x in PIXEL_MEAN],
    'image_std': [round(x / 255, 6) for x in PIXEL_STD],
  }
