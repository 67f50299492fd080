"""Loads an encoder from wherever it is, ready to encode clips."""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
from typing import Any

from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vjepa_jax.interop import huggingface, pytorch
from vjepa_jax.interop.layout import Params, Weights, WeightsError
from vjepa_jax.models.attention import choose_attention
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.probe import AttentiveProbe
from vjepa_jax.training import checkpoint

# How a model is run, which is for the loader to say.
_RUN_FIELDS = ('remat', 'attention', 'dtype', 'drop_path_rate')


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
  """An encoder with its parameters.

  Attributes:
    encoder: The module; `encoder.apply({'params': params}, video, ids)`.
    params: Its parameters, float32, on the default device.
    resolution: Height and width of the clips it was trained with, in pixels,
      None if not known.
    frames: Frames of those clips, None if not known.
    encode: Jitted; maps clips uint8 `[B, T, H, W, 3]`, or images
      `[B, H, W, 3]`, to features `[B, N, D]`, tokens in raster order over
      (t, h, w). Frames of another size than `resolution` are cut to the
      central square of the evaluation protocol and resized, unless `load` was
      told not to; pixels are normalised.
  """

  encoder: Encoder
  params: Params
  resolution: int | None
  frames: int | None
  encode: Callable[[jax.Array | np.ndarray], jax.Array]


def load(
  source: str | os.PathLike,
  *,
  which: str = 'target_encoder',
  resize: bool = True,
  dtype: jnp.dtype = jnp.float32,
  positions: str | None = None,
  num_heads: int | None = None,
) -> LoadedEncoder:
  """Loads an encoder.

  Args:
    source: A workdir of pretraining, a Hugging Face folder, an official
      `.pth.tar` or `.pt` file, or a name on the Hub
      (`facebook/vjepa2-vitl-fpc64-256`).
    which: 'target_encoder' (the EMA) or 'encoder', where the source has both.
    resize: Bring frames of other sizes to the resolution of training. Without
      it clips of any size are encoded as they are.
    dtype: Compute dtype and dtype of the features.
    positions: Of an official file, see `pytorch.read_checkpoint`.
    num_heads: Of an official file of no named size.

  Returns:
    The encoder; a clip needs not have `frames` frames.

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
  if weights.encoder is None:
    raise WeightsError(f'{source} holds probes, and no encoder')
  platform = jax.devices()[0].platform
  encoder = weights.encoder.clone(
    dtype=dtype, attention=choose_attention(platform, dtype)
  )
  params = jax.device_put(weights.encoder_params)
  resolution = weights.resolution if resize else None
  encode = _make_encode(encoder, params, resolution)
  return LoadedEncoder(
    encoder, params, weights.resolution, weights.frames, encode
  )


def read_weights(
  source: str | os.PathLike,
  *,
  which: str = 'target_encoder',
  with_predictor: bool = True,
  **options: Any,
) -> Weights:
  """Reads models and parameters from any source that `load` takes.

  Args:
    source: See `load`.
    which: See `load`.
    with_predictor: Read the predictor too.
    **options: positions, num_heads and predictor_heads of an official file,
      see `pytorch.read_checkpoint`.

  Raises:
    WeightsError: The source cannot be used.
    CheckpointError: The same, of a workdir.
  """
  path = epath.Path(source)
  if path.is_file() or path.suffix in ('.pt', '.pth', '.tar'):
    if path.suffix == '.safetensors':
      raise WeightsError(
        f'{source} says nothing of heads and sizes: give the folder that it '
        'is in, with its config.json'
      )
    return pytorch.read_checkpoint(
      source, which, with_predictor=with_predictor, **options
    )
  given = [name for name, value in options.items() if value is not None]
  if given:
    raise WeightsError(f'{given[0]} is for official files, {source} is none')
  if (path / 'checkpoints').is_dir():
    return read_workdir(path, which=which, with_predictor=with_predictor)
  if path.is_dir() and not (path / 'config.json').exists():
    raise WeightsError(
      f'{source} is neither a workdir (it has no checkpoints/) nor a Hugging '
      'Face folder (it has no config.json)'
    )
  return huggingface.read_pretrained(source, with_predictor=with_predictor)


def read_workdir(
  path: epath.PathLike,
  *,
  which: str = 'target_encoder',
  with_predictor: bool = True,
) -> Weights:
  """Reads the newest checkpoint of a pretraining run.

  Args:
    path: The workdir.
    which: 'target_encoder' (the EMA) or 'encoder'; all the same for a run of
      fine-tuning, which has the latter only.
    with_predictor: Read the predictor too.

  Raises:
    WeightsError: The checkpoint does not say what model it is of.
    CheckpointError: There is no checkpoint, or it is damaged.
  """
  if which not in ('target_encoder', 'encoder'):
    raise WeightsError(f'{path} has target_encoder and encoder, not {which}')
  path = epath.Path(path)
  directory = path.absolute() / 'checkpoints'
  with ocp.training.Checkpointer(directory) as checkpointer:
    if checkpointer.latest is None:
      raise WeightsError(f'{directory} holds no complete checkpoint')
    step = checkpointer.latest.step
    metadata = checkpointer.checkpointables_metadata(step)
    fields = (metadata.custom_metadata or {}).get('model') or {}
    models = {'encoder': rebuild(Encoder, fields, 'encoder', directory)}
    for name, kind in (('predictor', Predictor), ('probe', AttentiveProbe)):
      if name in fields:
        models[name] = rebuild(kind, fields, name, directory)
    if 'target' not in metadata.metadata:
      which = 'encoder'  # training with labels keeps no average
    with_predictor = with_predictor and 'predictor' in models
    abstract = {
      name: make_abstract(model, models['encoder'].width)
      for name, model in models.items()
    }
    params = {}
    if which == 'encoder' or with_predictor:
      params = checkpointer.load_checkpointables(
        step, {'params': place(abstract)}
      )['params']
  if which == 'target_encoder':
    shardings = place(abstract['encoder'], sharding_only=True)
    params['encoder'] = checkpoint.load_target(
      path, abstract['encoder'], shardings
    )
  return Weights(
    encoder=models['encoder'],
    encoder_params=params['encoder'],
    predictor=models['predictor'] if with_predictor else None,
    predictor_params=params['predictor'] if with_predictor else None,
    probes=((models['probe'], params['probe']),) if 'probe' in models else (),
    **_read_clip(path, resolution=None, frames=None),
  )


def read_encoder(path: epath.PathLike) -> Encoder:
  """Rebuilds the encoder of a pretraining run, without its parameters.

  Args:
    path: The workdir.

  Raises:
    WeightsError: The checkpoint does not say what model it is of.
    CheckpointError: There is no checkpoint.
  """
  _, models = checkpoint.read_model(path)
  return rebuild(Encoder, models, 'encoder', epath.Path(path))


def _make_encode(
  encoder: Encoder, params: Params, resolution: int | None
) -> Callable[[jax.Array | np.ndarray], jax.Array]:
  @jax.jit
  def apply(params, video):
    if resolution and video.shape[-3:-1] != (resolution, resolution):
      video = _resize(video, resolution)
    return encoder.apply({'params': params}, video)

  def encode(video):
    shape = video.shape
    if video.dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3:
      raise ValueError(
        f'video is {video.dtype} {tuple(shape)}, encode takes uint8 '
        '[B, T, H, W, 3] or images [B, H, W, 3]'
      )
    return apply(params, video)

  return encode


def _resize(video: jax.Array, resolution: int) -> jax.Array:
  """Resizes and crops uint8 `[..., H, W, 3]` as the published evaluation.

  The short side becomes `int(resolution * 256 / 224)`, of which the centre is
  taken: antialiased, as transformers does it.
  """
  height, width = video.shape[-3:-1]
  short = int(resolution * 256 / 224)
  sides = [short * side // min(height, width) for side in (height, width)]
  axes = video.ndim - 3, video.ndim - 2
  resized = jax.image.scale_and_translate(
    video.astype(jnp.float32),
    (*video.shape[:-3], resolution, resolution, 3),
    axes,
    jnp.array([sides[0] / height, sides[1] / width]),
    -jnp.array([round((side - resolution) / 2) for side in sides], jnp.float32),
    'linear',
  )
  return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def rebuild(
  kind: type, models: dict[str, Any], name: str, path: epath.Path
) -> Any:
  """Builds a model from the fields that its checkpoint carries."""
  fields = models.get(name)
  if not fields:
    raise WeightsError(f'{path} does not say what {name} it is of')
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in fields.items()
    if key not in _RUN_FIELDS
  }
  try:
    return kind(**fields)
  except TypeError as error:
    raise WeightsError(f'{path} is of another version: {error}') from None


def describe(module: nn.Module) -> dict[str, Any]:
  """Returns the fields of a model as JSON, for `rebuild`."""
  return {
    name: getattr(module, name)
    for name in module.__dataclass_fields__
    if name not in ('parent', 'name', *_RUN_FIELDS)
  }


def make_abstract(
  model: Encoder | Predictor | AttentiveProbe, width: int = 0
) -> Any:
  """Returns the shapes of a model's parameters; `width` is of its input."""
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  inputs = (jax.ShapeDtypeStruct((1, 1, width), jnp.float32),)
  init = model.init
  if isinstance(model, Encoder):
    inputs = (jax.ShapeDtypeStruct((1, *model.tubelet, 3), jnp.uint8),)
  elif isinstance(model, Predictor):
    inputs += (ids, ids)
    init = functools.partial(model.init, grid=(1, 1, 2))
  return jax.eval_shape(init, jax.random.key(0), *inputs)['params']


def place(abstract: Any, sharding_only: bool = False) -> Any:
  """Puts shapes, or gives their shardings, on the default device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if sharding_only:
    return jax.tree.map(lambda _: sharding, abstract)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract,
  )


def read_clip_rate(path: str | os.PathLike) -> dict[str, int | float | None]:
  """Reads how far apart the frames are of a run's clips.

  Returns:
    'frame_step' and 'fps', one of them None; a step of 4, the published, of
    anything that is not a workdir.
  """
  return _read_clip(path, frame_step=4, fps=None)


def read_crops(path: str | os.PathLike) -> dict[str, tuple[float, float]]:
  """Reads how a run crops its clips, as `read_clip_rate` reads their rate."""
  crops = _read_clip(
    path, crop_scale=(0.3, 1.0), crop_aspect_ratio=(0.75, 1.35)
  )
  return {name: tuple(bounds) for name, bounds in crops.items()}


def _read_clip(path: str | os.PathLike, **defaults: Any) -> dict[str, Any]:
  """Reads fields of a run's clips; what its config does not say by default."""
  try:
    clip = json.loads((epath.Path(path) / 'config.json').read_text())['clip']
  except (OSError, ValueError, KeyError):
    clip = {}
  return {name: clip.get(name, value) for name, value in defaults.items()}
