"""Loads an encoder from wherever it is, ready to encode clips."""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.data import storage
from vjepa_jax.errors import UserError
from vjepa_jax.interop import huggingface, pytorch
from vjepa_jax.interop.layout import Params, Weights, WeightsError
from vjepa_jax.models.action_predictor import ActionPredictor
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.options import check_choice
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.training import checkpoint
from vjepa_jax.training.state import hash_params

_KINDS = {
  'encoder': Encoder,
  'predictor': Predictor,
  'action_predictor': ActionPredictor,
  'frozen_encoder': Encoder,
  'probe': AttentiveProbe,
}
# How a model is run, which is for the loader to say.
_RUN_FIELDS = ('remat', 'attention', 'dtype', 'drop_path_rate')
# Of `LoadedEncoder.encode`.
_OUTPUTS = ('last', 'levels', 'concatenated')
# How clips are cut where a source does not say: as published, if known.
_CLIP = {
  'resolution': None,
  'frames': None,
  'frame_step': 4,
  'fps': None,
  'crop_scale': (0.3, 1.0),
  'crop_aspect_ratio': (0.75, 1.35),
}


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
  """An encoder with its parameters."""

  encoder: Encoder  # encoder.apply({'params': params}, video, ids)
  params: Params  # float32, on the default device
  resolution: int | None  # of the clips it was trained with, None: not known
  frames: int | None  # the same
  # Jitted: clips uint8 [B, T, H, W, 3], or images [B, H, W, 3], to features
  # [B, N, D], tokens in raster order over (t, h, w). Frames of another size
  # than `resolution` are resized and cut to the central square of the
  # evaluation protocol, unless `load` was told not to; pixels are normalised.
  # Of V-JEPA 2.1 a second argument gives 'levels', a tuple of features, or the
  # same 'concatenated', [B, N, levels * D], in place of the 'last' one.
  encode: Callable[..., Any]


def load(
  source: str | os.PathLike,
  *,
  which: str = 'target_encoder',
  resize: bool = True,
  dtype: jnp.dtype = jnp.float32,
  positions: str | None = None,
  num_heads: int | None = None,
) -> LoadedEncoder:
  """Loads an encoder, which takes clips of any number of frames.

  Args:
    source: A workdir of pretraining, a Hugging Face folder, an official
      `.pth.tar` or `.pt` file, or a name on the Hub
      (`facebook/vjepa2-vitl-fpc64-256`, or `hf://OWNER/NAME` of others).
    which: 'target_encoder' (the EMA) or 'encoder', where the source has both.
    resize: Bring frames of other sizes to the resolution of training. Without
      it clips of any size are encoded as they are.
    dtype: Compute dtype and dtype of the features.
    positions: Of an official file, see `pytorch.read_checkpoint`.
    num_heads: Of an official file of no named size.

  Raises:
    WeightsError: The source cannot be used; one line says why.
    CheckpointError: The same, of a workdir.
  """
  weights = read_weights(
    source,
    which=which,
    positions=positions,
    num_heads=num_heads,
    with_predictor=False,
  )
  attention = choose_attention(jax.devices()[0].platform, dtype)
  encoder = weights.encoder.clone(dtype=dtype, attention=attention)
  params = jax.device_put(weights.encoder_params)
  size, frames = weights.resolution, weights.frames

  @functools.partial(jax.jit, static_argnums=2)
  def apply(params, video, output):
    if resize and size and video.shape[-3:-1] != (size, size):
      video = _resize(video, size)
    layers = None if output == 'last' else encoder.levels
    features = encoder.apply({'params': params}, video, layers=layers)
    if output == 'concatenated':
      features = jnp.concatenate(features, axis=-1)
    return features

  def encode(video, output='last'):
    check_choice('output', output, _OUTPUTS)
    if output != 'last' and not encoder.levels:
      raise UserError(f'{source} is no V-JEPA 2.1: its encoder has no levels')
    shape = video.shape
    if video.dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3:
      raise ValueError(
        f'video is {video.dtype} {tuple(shape)}, encode takes uint8 '
        '[B, T, H, W, 3] or images [B, H, W, 3]'
      )
    return apply(params, video, output)

  return LoadedEncoder(encoder, params, size, frames, encode)


def read_weights(
  source: str | os.PathLike,
  *,
  which: str = 'target_encoder',
  with_predictor: bool = True,
  step: int | None = None,
  **options: Any,
) -> Weights:
  """Reads models and parameters from any source that `load` takes.

  Args:
    source, which: See `load`.
    with_predictor: Read the predictor too.
    step: Of a workdir, which checkpoint; None for the newest.
    **options: positions, num_heads and others of an official file, see
      `pytorch.read_checkpoint`.

  Raises:
    WeightsError: The source cannot be used, or has no encoder.
    CheckpointError: The same, of a workdir.
  """
  path = epath.Path(source)
  if os.fspath(source).startswith(huggingface.SCHEME):
    return huggingface.read_pretrained(source, with_predictor=with_predictor)
  if storage.is_remote(path) and not (path / 'checkpoints').is_dir():
    with storage.local_copy(path) as copy:
      return read_weights(
        copy, which=which, with_predictor=with_predictor, **options
      )
  if path.is_file() or path.suffix in ('.pt', '.pth', '.tar'):
    if path.suffix == '.safetensors':
      raise WeightsError(
        f'{source} says nothing of heads and sizes: give the folder that it '
        'is in, with its config.json'
      )
    weights = pytorch.read_checkpoint(
      source, which, with_predictor=with_predictor, **options
    )
    if weights.encoder is None:
      raise WeightsError(f'{source} holds probes, and no encoder')
    return weights
  given = [name for name, value in options.items() if value is not None]
  if given:
    raise WeightsError(f'{given[0]} is for official files, {source} is none')
  if (path / 'checkpoints').is_dir():
    return _read_workdir(path, which, with_predictor, step)
  if path.is_dir() and not (path / 'config.json').exists():
    raise WeightsError(
      f'{source} is neither a workdir (it has no checkpoints/) nor a Hugging '
      'Face folder (it has no config.json)'
    )
  return huggingface.read_pretrained(source, with_predictor=with_predictor)


def _read_workdir(
  path: epath.Path, which: str, with_predictor: bool, step: int | None
) -> Weights:
  """Reads a checkpoint of a run of pretraining or fine-tuning."""
  if which not in ('target_encoder', 'encoder'):
    raise WeightsError(f'{path} has target_encoder and encoder, not {which}')
  newest, fields = checkpoint.read_model(path)
  step = newest if step is None else step
  if 'frozen_encoder' in fields:
    return _read_action_run(path, fields, with_predictor, step)
  models = {
    name: _rebuild(fields, name, path)
    for name in ('encoder', 'predictor', 'probe')
    if name in fields or name == 'encoder'
  }
  if 'action_predictor' in fields:
    models['predictor'] = _rebuild(fields, 'action_predictor', path)
  if 'probe' in models:
    which = 'encoder'  # training with labels keeps no average
  with_predictor = with_predictor and 'predictor' in models
  width = models['encoder'].width
  abstract = {name: make_abstract(x, width) for name, x in models.items()}
  params = {}
  if which == 'encoder' or with_predictor:
    params = checkpoint.load_item(path, abstract, item='params', step=step)
  if which == 'target_encoder':
    target = checkpoint.load_item(path, abstract['encoder'], step=step)
    params['encoder'] = target
  clip = read_clip(path)
  return Weights(
    encoder=models['encoder'],
    encoder_params=params['encoder'],
    predictor=models['predictor'] if with_predictor else None,
    predictor_params=params['predictor'] if with_predictor else None,
    probes=((models['probe'], params['probe']),) if 'probe' in models else (),
    resolution=clip['resolution'],
    frames=clip['frames'],
    one_step=fields.get('one_step', False),
  )


def _read_action_run(
  path: epath.Path, fields: dict[str, Any], with_predictor: bool, step: int
) -> Weights:
  """Reads a predictor with actions, and the encoder that it was trained on."""
  encoder, config = _rebuild(fields, 'frozen_encoder', path), read_config(path)
  name, mark = fields['backbone'], fields['fingerprint']
  if not config.get('backbone'):
    params = init_untrained(encoder, config['seed'])
  else:
    params = read_weights(
      _find_backbone(path, name),
      which=config['which'],
      with_predictor=False,
      step=fields['backbone_step'],
    ).encoder_params
    if hash_params(params) != mark:
      raise WeightsError(
        f'{path} was trained on the encoder of {name}, which is another by now'
      )
  weights = Weights(encoder, params, resolution=config['clip']['resolution'])
  if not with_predictor:
    return weights
  predictor = _rebuild(fields, 'action_predictor', path)
  abstract = {'predictor': make_abstract(predictor)}
  found = checkpoint.load_item(path, abstract, item='params', step=step)
  return dataclasses.replace(
    weights, predictor=predictor, predictor_params=found['predictor']
  )


def _find_backbone(workdir: epath.PathLike, name: str) -> str:
  """Finds what a run calls its backbone, from another folder or when moved.

  The name is relative to the folder that the run was started in, which the
  workdir is often below.
  """
  if storage.is_remote(workdir) or storage.exists(name):
    return name
  folders = pathlib.Path(os.path.abspath(workdir)).parents
  paths = (str(folder / name) for folder in folders)
  return next(filter(os.path.exists, paths), name)


def init_untrained(encoder: Encoder, seed: int) -> Params:
  """Initialises an encoder as pretraining with this seed starts."""
  key = jax.random.split(jax.random.key(seed))[0]
  video = jnp.zeros((1, *encoder.tubelet, 3), jnp.uint8)
  return jax.jit(encoder.init)(key, video)['params']


def read_encoder(path: epath.PathLike) -> Encoder:
  """Rebuilds the encoder of a run's workdir, without its parameters.

  Raises:
    WeightsError: The checkpoint does not say what model it is of.
    CheckpointError: There is no checkpoint.
  """
  return _rebuild(checkpoint.read_model(path)[1], 'encoder', path)


def _resize(video: jax.Array, resolution: int) -> jax.Array:
  """Resizes and crops uint8 `[..., H, W, 3]` as the published evaluation.

  The short side becomes `int(resolution * 256 / 224)`, of which the centre is
  taken: antialiased, as transformers does it.
  """
  height, width = video.shape[-3:-1]
  short = int(resolution * 256 / 224)
  sides = [short * side // min(height, width) for side in (height, width)]
  shape = *video.shape[:-3], *sides, 3
  video = jax.image.resize(video.astype(jnp.float32), shape, 'linear')
  top, left = (round((side - resolution) / 2) for side in sides)
  video = video[..., top : top + resolution, left : left + resolution, :]
  return jnp.clip(jnp.round(video), 0, 255).astype(jnp.uint8)


def _rebuild(models: dict[str, Any], name: str, path: epath.PathLike) -> Any:
  """Builds a model from the fields that its checkpoint carries."""
  fields = models.get(name)
  if not fields:
    raise WeightsError(f'{path} does not say what {name} it is of')
  fields = {key: x for key, x in fields.items() if key not in _RUN_FIELDS}
  try:
    return _KINDS[name](**make_hashable(fields))
  except TypeError as error:
    raise WeightsError(f'{path} is of another version: {error}') from None


def describe(module: nn.Module) -> dict[str, Any]:
  """Returns the fields of a model as JSON, for a checkpoint to carry."""
  return {
    name: getattr(module, name)
    for name in module.__dataclass_fields__
    if name not in ('parent', 'name', *_RUN_FIELDS)
  }


def name_predictor(predictor: Predictor | ActionPredictor) -> str:
  """Names the kind of a predictor, as checkpoints do."""
  is_action = isinstance(predictor, ActionPredictor)
  return 'action_predictor' if is_action else 'predictor'


def make_abstract(
  model: Encoder | Predictor | ActionPredictor | AttentiveProbe, width: int = 0
) -> Any:
  """Returns the shapes of a model's parameters; `width` is the encoder's."""
  if isinstance(model, ActionPredictor):
    return jax.eval_shape(model.init_params, jax.random.key(0))
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  levels = model.levels if isinstance(model, Predictor) else 1
  inputs = (jax.ShapeDtypeStruct((1, 1, width * levels), jnp.float32),)
  init = model.init
  if isinstance(model, Encoder):
    inputs = (jax.ShapeDtypeStruct((1, *model.tubelet, 3), jnp.uint8),)
  elif isinstance(model, Predictor):
    inputs += (ids, ids)
    init = functools.partial(model.init, grid=(1, 1, 2))
  return jax.eval_shape(init, jax.random.key(0), *inputs)['params']


def read_clip(path: str | os.PathLike) -> dict[str, Any]:
  """Reads how a run cuts its clips; what it does not say as published.

  Returns:
    The fields of `_CLIP`, of `ClipOptions`; one of 'frame_step' and 'fps' is
    None.
  """
  clip = read_config(path).get('clip', {})
  return make_hashable({name: clip.get(name, x) for name, x in _CLIP.items()})


def make_hashable(fields: dict[str, Any]) -> dict[str, Any]:
  """Turns the lists that JSON has into tuples."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the config of a workdir; {} of anything else.

  Raises:
    WeightsError: It is damaged.
  """
  path = epath.Path(path)
  try:
    if not (path / 'checkpoints').is_dir():
      return {}
    return json.loads((path / 'config.json').read_text())
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise WeightsError(f'{path}/config.json is damaged: {error}') from None
