"""Folders of Hugging Face transformers' VJEPA2 models, in and out, no torch.

A folder is `config.json`, `model.safetensors` (or shards and their index) and
`video_preprocessor_config.json`. Tensors are renamed to the official names and
converted by `interop.pytorch`.
"""

from collections.abc import Iterator, Mapping
import json
import math
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
import numpy as np

from vjepa_jax.interop import layout
from vjepa_jax.interop.layout import Params, Weights, WeightsError
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.tubelets import PIXEL_MEAN, PIXEL_STD

_MASK_TOKENS = 'predictor.embeddings.mask_tokens'
# What the models here have built in; transformers' defaults.
_FIXED = {
  'hidden_act': 'gelu',
  'qkv_bias': True,
  'in_chans': 3,
  'layer_norm_eps': 1e-6,
  'pred_mlp_ratio': 4,
}
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


def read_pretrained(
  name: str | os.PathLike, *, with_predictor: bool = True
) -> Weights:
  """Reads a VJEPA2Model or a VJEPA2ForVideoClassification.

  Args:
    name: A folder, or a name on the Hub, which is downloaded to the cache of
      huggingface_hub.
    with_predictor: Read the predictor too.

  Returns:
    Encoder, predictor and, of a classifier, its probe; float32.

  Raises:
    WeightsError: The folder is of another model, incomplete or damaged, or the
      Hub cannot be reached.
  """
  folder = _find_folder(name)
  try:
    config = _read_config(folder)
    state = dict(_read_tensors(folder, with_predictor))
    return _convert(state, config, with_predictor)
  except WeightsError as error:
    raise WeightsError(f'{name}: {error}') from None


def save_pretrained(
  folder: str | os.PathLike,
  encoder: Encoder,
  encoder_params: Params,
  predictor: Predictor,
  predictor_params: Params,
  *,
  resolution: int,
  frames: int,
) -> None:
  """Writes a folder that `transformers.VJEPA2Model.from_pretrained` loads.

  Args:
    folder: Where to write; made if it is not there.
    encoder: An encoder with positions 'rope_tiled', the ones transformers has.
    encoder_params: Its parameters.
    predictor: Its predictor; a VJEPA2Model always has one.
    predictor_params: Its parameters.
    resolution: Height and width of clips in pixels. Positions in transformers
      are right at this resolution only.
    frames: Frames of a clip.

  Raises:
    WeightsError: transformers has no such model.
  """
  _import_safetensors()
  from safetensors.numpy import save_file

  config = _make_config(encoder, predictor, resolution, frames)
  state = layout.export_encoder(encoder_params, tubelet=encoder.tubelet)
  tensors = _split(state, _name_encoder(encoder.depth))
  state = layout.export_predictor(predictor_params)
  tensors |= _split(state, _name_predictor(predictor.depth))
  tensors[_MASK_TOKENS] = np.stack(
    [state[f'mask_tokens.{i}'] for i in range(predictor.num_mask_tokens)]
  )
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(
    {key: np.ascontiguousarray(value) for key, value in tensors.items()},
    folder / 'model.safetensors',
    metadata={'format': 'pt'},
  )
  _write_json(folder / 'config.json', config)
  _write_json(
    folder / 'video_preprocessor_config.json', _make_preprocessor(resolution)
  )


def _find_folder(name: str | os.PathLike) -> Path:
  """Returns the folder, after a download if it is a name on the Hub."""
  folder = Path(name)
  if folder.is_dir():
    return folder
  name = os.fspath(name)
  if not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', name):
    raise WeightsError(f'there is no folder {name}')
  try:
    import huggingface_hub
  except ImportError:
    raise WeightsError(
      f'there is no folder {name}, and to fetch it from the Hub needs: '
      'pip install huggingface_hub'
    ) from None
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=['*.json', '*.safetensors']
      )
    )
  except Exception as error:  # of httpx, of the Hub, of the file system
    raise WeightsError(
      f'there is no folder {name}, and the Hub did not give it '
      f'({type(error).__name__}): download it where there is a network and '
      'give the folder'
    ) from None


def _import_safetensors() -> Any:
  try:
    import safetensors
  except ImportError:
    raise WeightsError(
      'Hugging Face folders need: pip install safetensors'
    ) from None
  return safetensors


def _read_json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise WeightsError(f'it has no {path.name}') from None
  except ValueError as error:
    raise WeightsError(f'{path.name} is damaged: {error}') from None
  if not isinstance(content, dict):
    raise WeightsError(f'{path.name} is damaged: it is no mapping')
  return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


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
    names = _read_json(index).get('weight_map', {}).values()
    return [folder / name for name in sorted(set(names))]
  path = folder / 'model.safetensors'
  if not path.exists() and (folder / 'pytorch_model.bin').exists():
    raise WeightsError(
      'it has pytorch_model.bin only: save it again as model.safetensors'
    )
  return [path]


def _read_tensors(
  folder: Path, with_predictor: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, float32 tensor), names without the `vjepa2.` of a head."""
  safetensors = _import_safetensors()
  for path in _list_files(folder):
    if not path.exists():
      raise WeightsError(f'it has no {path.name}')
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
          name = key.removeprefix('vjepa2.')
          if with_predictor or not name.startswith('predictor.'):
            yield name, np.asarray(file.get_tensor(key), np.float32)
    except safetensors.SafetensorError as error:
      raise WeightsError(
        f'{path.name} is truncated or damaged ({error})'
      ) from None


def _convert(
  state: dict[str, np.ndarray], config: dict[str, Any], with_predictor: bool
) -> Weights:
  heads = config['num_attention_heads']
  encoder_params = layout.convert_encoder(
    _join(state, _name_encoder(config['num_hidden_layers'])), num_heads=heads
  )
  tubelet = (config['tubelet_size'], *[config['patch_size']] * 2)
  size = 3 * math.prod(tubelet), config['hidden_size']
  if encoder_params['embed']['proj']['kernel'].shape != size:
    raise WeightsError(
      'the tensors are of another model than config.json: the embedding has '
      f'shape {encoder_params["embed"]["proj"]["kernel"].shape}, not {size}'
    )
  encoder = layout.build_encoder(
    encoder_params, num_heads=heads, tubelet=tubelet, positions='rope_tiled'
  )
  predictor = predictor_params = None
  if with_predictor:
    names = _name_predictor(config['pred_num_hidden_layers'])
    official = _join(state, names)
    tokens = _pop(state, _MASK_TOKENS)
    official |= {f'mask_tokens.{i}': token for i, token in enumerate(tokens)}
    predictor_params = layout.convert_predictor(
      official, num_heads=config['pred_num_attention_heads']
    )
    predictor = layout.build_predictor(
      predictor_params,
      num_heads=config['pred_num_attention_heads'],
      positions='rope_tiled',
    )
  probes = ()
  if 'classifier.weight' in state:
    names = _name_probe(config['num_pooler_layers'])
    params = layout.convert_probe(_join(state, names), num_heads=heads)
    # transformers normalises in the pooler as in the encoder, the official
    # code with 1e-5.
    probe = layout.build_probe(
      params, num_heads=heads, epsilon=_FIXED['layer_norm_eps']
    )
    probes = ((probe, params),)
  for key in state:
    if re.search(r'layers?\.\d+\.', key):
      raise WeightsError(
        f'the tensors are of another model than config.json: {key} has no '
        'place in it'
      )
  if state:
    logging.info('not used: %s', ', '.join(sorted(state)))
  return Weights(
    encoder,
    encoder_params,
    predictor,
    predictor_params,
    probes,
    config['crop_size'],
    config['frames_per_clip'],
    tuple(sorted(state)),
  )


def _make_config(
  encoder: Encoder, predictor: Predictor, resolution: int, frames: int
) -> dict[str, Any]:
  """Makes `config.json`; refuses models that transformers does not have."""
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
  if patch != other or resolution % patch or frames % time:
    raise WeightsError(
      f'transformers needs square patches that divide the clip, got tubelet '
      f'{tuple(encoder.tubelet)}, resolution {resolution} and {frames} frames'
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
    'crop_size': resolution,
    'image_size': resolution,
    'frames_per_clip': frames,
    'tubelet_size': time,
    'hidden_size': encoder.width,
    'num_attention_heads': encoder.num_heads,
    'num_hidden_layers': encoder.depth,
    'mlp_ratio': ratio,
    'pred_hidden_size': predictor.width,
    'pred_num_attention_heads': predictor.num_heads,
    'pred_num_hidden_layers': predictor.depth,
    'pred_num_mask_tokens': predictor.num_mask_tokens,
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


Names = dict[str, tuple[str, ...]]


def _name_encoder(depth: int) -> Names:
  """Maps official keys to those here; several are stacked on the first axis."""
  return {
    **_name_pair(
      'patch_embed.proj', 'encoder.embeddings.patch_embeddings.proj'
    ),
    **_name_blocks('blocks', 'encoder.layer', depth),
    **_name_pair('norm', 'encoder.layernorm'),
  }


def _name_predictor(depth: int) -> Names:
  """As `_name_encoder`, without the mask tokens."""
  return {
    **_name_pair(
      'predictor_embed', 'predictor.embeddings.predictor_embeddings'
    ),
    **_name_blocks('predictor_blocks', 'predictor.layer', depth),
    **_name_pair('predictor_norm', 'predictor.layernorm'),
    **_name_pair('predictor_proj', 'predictor.proj'),
  }


def _name_probe(depth: int) -> Names:
  """As `_name_encoder`, for the attentive pooler and the classifier."""
  ours, theirs = 'pooler.cross_attention_block', 'pooler.cross_attention_layer'
  attention = f'{theirs}.cross_attn'
  names = {
    'pooler.query_tokens': ('pooler.query_tokens',),
    **_name_pair(f'{ours}.norm1', f'{theirs}.layer_norm1'),
    **_name_pair(f'{ours}.xattn.q', f'{attention}.q_proj'),
    **_name_pair(
      f'{ours}.xattn.kv', f'{attention}.k_proj', f'{attention}.v_proj'
    ),
    **_name_pair(f'{ours}.norm2', f'{theirs}.layer_norm2'),
    **_name_pair(f'{ours}.mlp.fc1', f'{theirs}.mlp.fc1'),
    **_name_pair(f'{ours}.mlp.fc2', f'{theirs}.mlp.fc2'),
    **_name_pair('linear', 'classifier'),
  }
  for i in range(depth):
    ours, theirs = f'pooler.blocks.{i}', f'pooler.self_attention_layers.{i}'
    names |= {
      **_name_pair(f'{ours}.norm1', f'{theirs}.layer_norm1'),
      **_name_pair(
        f'{ours}.attn.qkv',
        *(f'{theirs}.self_attn.{x}_proj' for x in ('q', 'k', 'v')),
      ),
      **_name_pair(f'{ours}.attn.proj', f'{theirs}.self_attn.out_proj'),
      **_name_pair(f'{ours}.norm2', f'{theirs}.layer_norm2'),
      **_name_pair(f'{ours}.mlp.fc1', f'{theirs}.mlp.fc1'),
      **_name_pair(f'{ours}.mlp.fc2', f'{theirs}.mlp.fc2'),
    }
  return names


def _name_blocks(official: str, prefix: str, depth: int) -> Names:
  names = {}
  for i in range(depth):
    ours, theirs = f'{official}.{i}', f'{prefix}.{i}'
    names |= {
      **_name_pair(f'{ours}.norm1', f'{theirs}.norm1'),
      **_name_pair(
        f'{ours}.attn.qkv',
        *(f'{theirs}.attention.{x}' for x in ('query', 'key', 'value')),
      ),
      **_name_pair(f'{ours}.attn.proj', f'{theirs}.attention.proj'),
      **_name_pair(f'{ours}.norm2', f'{theirs}.norm2'),
      **_name_pair(f'{ours}.mlp.fc1', f'{theirs}.mlp.fc1'),
      **_name_pair(f'{ours}.mlp.fc2', f'{theirs}.mlp.fc2'),
    }
  return names


def _name_pair(official: str, *names: str) -> Names:
  return {
    f'{official}.{part}': tuple(f'{name}.{part}' for name in names)
    for part in ('weight', 'bias')
  }


def _pop(state: dict[str, np.ndarray], key: str) -> np.ndarray:
  if key not in state:
    raise WeightsError(f'it has no tensor {key!r}')
  return state.pop(key)


def _join(state: dict[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
  """Renames tensors to the official keys and takes them out of `state`."""
  official = {}
  for key, sources in names.items():
    parts = [_pop(state, source) for source in sources]
    if len({part.shape for part in parts}) > 1:
      raise WeightsError(
        f'{" and ".join(sources)} differ in shape: '
        f'{[part.shape for part in parts]}'
      )
    official[key] = parts[0] if len(parts) == 1 else np.concatenate(parts)
  return official


def _split(
  official: dict[str, np.ndarray], names: Names
) -> dict[str, np.ndarray]:
  """Inverts `_join`."""
  return {
    name: part
    for key, sources in names.items()
    for name, part in zip(
      sources, np.split(official[key], len(sources)), strict=True
    )
  }
