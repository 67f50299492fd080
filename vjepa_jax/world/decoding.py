"""Training of the feature decoder, and its use.

The target encoder is frozen, as are the statistics of its features. The state's
`target` is the moving average of the decoder, which is what is used afterwards.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.training import checkpoint
from vjepa_jax.training.checkpoint import CheckpointError
from vjepa_jax.training.objectives.base import (
  Objective,
  Params,
)
from vjepa_jax.training.objectives.targets import measure_error
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  encode_target,
  normalize_visible,
)

_SPACE = 'space.npz'


@dataclasses.dataclass(frozen=True)
class Decoding(Objective):
  """What is decoded, by what, and how its error counts.

  Attributes:
    world: Its target encoder makes the features.
    decoder: The decoder.
    norm: `TargetSpace.norm`.
    loss_exp: Power of the error on normalised pixels: 1 or 2.
  """

  world: WorldModel
  decoder: FeatureDecoder
  norm: str
  loss_exp: float
  averaged = 'decoder'

  def init(self, key: jax.Array) -> Params:
    """See `Objective`."""
    features = jnp.zeros((1, 1, self.world.target_encoder.width))
    return {'decoder': self.decoder.init(key, features, (1, 1, 1))['params']}

  def encode(self, frozen: Params, video: jax.Array) -> jax.Array:
    """Computes the features to decode, as the predictor predicts them.

    Args:
      frozen: What `pack_frozen` returned.
      video: uint8 `[B, frames, h, w, 3]`.

    Returns:
      float32 `[B, N, D]`.
    """
    space = TargetSpace(self.norm, **frozen['space'])
    features = encode_target(self.world, {'target': frozen['encoder']}, video)
    return jax.lax.stop_gradient(space.normalize(features))

  def loss(self, params, frozen, batch, step=0):
    """Computes the error of decoded pixels, see `Objective`.

    Pixels are normalised as the encoder sees them. There is no perceptual term:
    of the packages for it none carries its network's weights.
    """
    del step
    video, encoder = batch['video']['pixels'], self.world.target_encoder
    grid = tub.compute_grid(video.shape, encoder.tubelet)
    features = self.encode(frozen, video)
    pixels = normalize_visible(encoder, video, np.arange(math.prod(grid)))
    expected = tub.patchify(pixels.video, encoder.tubelet)
    decoded = self.decoder.apply({'params': params['decoder']}, features, grid)
    loss = measure_error(decoded, expected, self.loss_exp).mean()
    l2 = jnp.mean(jnp.square(decoded - expected))
    return loss, {'loss': loss, 'error_l2': l2}


def pack_frozen(world: WorldModel, space: TargetSpace) -> Params:
  """Gathers all that is frozen."""
  arrays = space._asdict()
  del arrays['norm']
  return {'encoder': world.params['target'], 'space': arrays}


class LoadedDecoder(NamedTuple):
  """A trained decoder.

  Attributes:
    decoder: The module.
    params: Its parameters, moving average, float32.
    space: Of the features that it takes.
    grid: Tubelet grid of the clips it was trained on.
  """

  decoder: FeatureDecoder
  params: Any
  space: TargetSpace
  grid: Grid

  def decode(self, params: Any, features: jax.Array) -> jax.Array:
    """Decodes features `[B, N, D]` to normalised tubelets `[B, N, P]`."""
    return self.decoder.apply({'params': params}, features, self.grid)


def compute_fingerprint(world: WorldModel) -> str:
  """Hashes the target encoder, to tell backbones apart."""
  return checkpoint.hash_params(world.params['target'])


def save_space(workdir: epath.Path, space: TargetSpace) -> None:
  """Writes the statistics that a decoder goes with into its workdir."""
  with (workdir / _SPACE).open('wb') as file:
    np.savez(file, **space._asdict())


def read_space(workdir: epath.Path) -> TargetSpace | None:
  """Reads what `save_space` wrote, None if there is nothing."""
  if not (workdir / _SPACE).exists():
    return None
  with (workdir / _SPACE).open('rb') as file, np.load(file) as arrays:
    fields = {name: arrays[name] for name in TargetSpace._fields}
  return TargetSpace(**(fields | {'norm': str(fields['norm'])}))


def load_decoder(path: epath.PathLike, world: WorldModel) -> LoadedDecoder:
  """Loads the decoder of a workdir of `configs/decoder.py`.

  Args:
    path: The workdir.
    world: The model whose features are to be decoded.

  Raises:
    CheckpointError: There is no decoder, or it is of other features.
  """
  path = epath.Path(path)
  _, models = checkpoint.read_model(path)
  space = read_space(path)
  if 'decoder' not in models or space is None:
    raise CheckpointError(
      f'{path} holds no decoder: train one by python main.py '
      '--config=configs/decoder.py --config.backbone=... --workdir=...'
    )
  if isinstance(models['fingerprint'], int):
    raise CheckpointError(
      f'the decoder in {path} was written before fingerprints were sha256, and '
      'cannot be told to fit: train it again by --config=configs/decoder.py'
    )
  if models['fingerprint'] != compute_fingerprint(world):
    raise CheckpointError(
      f'the decoder in {path} is of the features of {models["backbone"]}, and '
      'these are of another encoder or another of its checkpoints: train one '
      'for them by --config=configs/decoder.py'
    )
  decoder = FeatureDecoder(**models['decoder'])
  grid = tuple(models['grid'])
  width = space.mean.shape[-1]
  abstract = jax.eval_shape(
    lambda: decoder.init(
      jax.random.key(0), jnp.zeros((1, int(np.prod(grid)), width)), grid
    )['params']
  )
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = checkpoint.load_target(
    path, abstract, jax.tree.map(lambda _: sharding, abstract)
  )
  return LoadedDecoder(decoder, params, space, grid)
