"""Training of the feature decoder, and its use.

The target encoder is frozen, as are the statistics of its features. The state's
`target` is the moving average of the decoder, which is what is used afterwards.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.training import checkpoint
from vjepa_jax.training.checkpoint import CheckpointError
from vjepa_jax.training.objectives.base import Objective, Params
from vjepa_jax.training.objectives.targets import measure_error
from vjepa_jax.training.state import TrainState, hash_params
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  encode_target,
  normalize_visible,
)
from vjepa_jax.world.predict import score_pixels, summarize

_SPACE = 'space.npz'


@dataclasses.dataclass(frozen=True)
class Decoding(Objective):
  """What is decoded, by what, and how its error counts."""

  world: WorldModel  # its target encoder makes the features
  decoder: FeatureDecoder
  loss_exp: float  # power of the error on normalised pixels: 1 or 2
  averaged = 'decoder'

  def init(self, key: jax.Array) -> Params:
    """See `Objective`."""
    features = jnp.zeros((1, 1, self.world.predictor.out_width))
    return {'decoder': self.decoder.init(key, features, (1, 1, 1))['params']}

  def encode(self, frozen: Params, video: jax.Array) -> jax.Array:
    """Computes the features to decode, as the predictor predicts them.

    `frozen` is what `pack_frozen` returned; clips uint8 `[B, frames, h, w, 3]`
    become features float32 `[B, N, D]`.
    """
    levels = len(self.world.levels or (None,))
    space = TargetSpace(self.world.norm, **frozen['space'], levels=levels)
    features = encode_target(self.world, {'target': frozen['encoder']}, video)
    return jax.lax.stop_gradient(space.normalize(features))

  def loss(self, params, frozen, batch, step=0):
    """Computes the error of decoded pixels, see `Objective`.

    Pixels are normalised as the encoder sees them. There is no perceptual term:
    of the packages for it none carries its network's weights.
    """
    del step
    video, encoder = batch['video']['pixels'], self.world.target_encoder
    tubelet = encoder.get_tubelet(video.shape)
    grid = tub.compute_grid(video.shape, tubelet)
    features = self.encode(frozen, video)
    pixels = normalize_visible(encoder, video, np.arange(math.prod(grid)))
    expected = tub.patchify(pixels.video, tubelet)
    decoded = self.decoder.apply({'params': params['decoder']}, features, grid)
    loss = measure_error(decoded, expected, self.loss_exp).mean()
    l2 = jnp.mean(jnp.square(decoded - expected))
    return loss, {'loss': loss, 'error_l2': l2}


def pack_frozen(world: WorldModel, space: TargetSpace) -> Params:
  """Gathers all that is frozen."""
  arrays = space._asdict()
  del arrays['norm'], arrays['levels']
  return {'encoder': world.params['target'], 'space': arrays}


class LoadedDecoder(NamedTuple):
  """A trained decoder."""

  decoder: FeatureDecoder
  params: Any  # moving average, float32
  space: TargetSpace  # of the features that it takes
  grid: Grid  # tubelet grid of the clips it was trained on

  def decode(self, params: Any, features: jax.Array) -> jax.Array:
    """Decodes features `[B, N, D]` to normalised tubelets `[B, N, P]`."""
    return self.decoder.apply({'params': params}, features, self.grid)


def save_space(
  workdir: epath.Path, space: TargetSpace, fingerprint: str
) -> None:
  """Writes the statistics that a decoder goes with into its workdir.

  `fingerprint` is the hash of the target encoder.
  """
  with (workdir / _SPACE).open('wb') as file:
    np.savez(file, fingerprint=fingerprint, **space._asdict())


def read_space(workdir: epath.Path, fingerprint: str) -> TargetSpace | None:
  """Reads what `save_space` wrote, None if there is nothing.

  Raises:
    CheckpointError: It is of another encoder.
  """
  path = workdir / _SPACE
  if not path.exists():
    return None
  with path.open('rb') as file, np.load(file) as arrays:
    fields = dict(arrays)
  if fields.pop('fingerprint', fingerprint) != fingerprint:
    raise CheckpointError(
      f'{path} was measured with another backbone, or another of its '
      'checkpoints: use another --workdir'
    )
  kind = {'norm': str(fields['norm']), 'levels': int(fields.get('levels', 1))}
  return TargetSpace(**(fields | kind))


def load_decoder(path: epath.PathLike, world: WorldModel) -> LoadedDecoder:
  """Loads the decoder of a workdir, to decode the features of `world`.

  Raises:
    CheckpointError: There is no decoder, or it is of other features.
  """
  path = epath.Path(path)
  _, models = checkpoint.read_model(path)
  if 'decoder' not in models or not (path / _SPACE).exists():
    raise CheckpointError(
      f'{path} holds no decoder: train one by python main.py '
      '--config=configs/decoder.py --config.backbone=... --workdir=...'
    )
  if models['fingerprint'] != hash_params(world.params['target']):
    raise CheckpointError(
      f'the decoder in {path} is of the features of {models["backbone"]}, and '
      'these are of another encoder or another of its checkpoints: train one '
      'for them by --config=configs/decoder.py'
    )
  space = read_space(path, models['fingerprint'])
  decoder = FeatureDecoder(**models['decoder'])
  abstract = jax.eval_shape(
    lambda: decoder.init(jax.random.key(0), space.mean[None, :1], (1, 1, 1))
  )
  params = checkpoint.load_item(path, abstract['params'])
  return LoadedDecoder(decoder, params, space, tuple(models['grid']))


@dataclasses.dataclass
class HeldOut:
  """Clips in memory and their features: is what is seen still in them?

  It is called with a state by the training loop, and returns metrics.
  """

  encoder: Encoder  # of the features
  videos: np.ndarray  # uint8 [n, frames, h, w, 3]
  features: np.ndarray  # [n, N, D], what the decoder is given
  # Maps its parameters and features to normalised tubelets [n, N, P].
  decode: Callable[[Any, np.ndarray], np.ndarray]

  def __post_init__(self):
    """Says of which tokens the clips consist."""
    self._tubelet = self.encoder.get_tubelet(self.videos.shape)
    self._grid = tub.compute_grid(self.videos.shape, self._tubelet)
    self._every = np.arange(math.prod(self._grid))

  def reconstruct(self, target: Any) -> np.ndarray:
    """Decodes the clips: float32 `[n, frames, h, w, 3]`, 0..255."""
    pixels = normalize_visible(self.encoder, self.videos, self._every)
    decoded = self.decode(target, self.features)
    video = tub.unpatchify(decoded, self._grid, self._tubelet)
    return np.asarray(pixels.restore(video))

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Computes the mean PSNR."""
    return {'psnr': float(self._score(self.reconstruct(state.target)).mean())}

  def score(self, decoded: np.ndarray) -> dict[str, Any]:
    """Scores decoded clips, and the mean colour of each beside them."""
    mean = self.videos.mean(axis=(1, 2, 3), keepdims=True)
    scores = {
      'decoded_psnr': self._score(decoded),
      'mean_colour_psnr': self._score(np.broadcast_to(mean, decoded.shape)),
    }
    return {name: summarize(x) for name, x in scores.items()}

  def _score(self, decoded: np.ndarray) -> np.ndarray:
    return score_pixels(decoded, self.videos, self._every, self._tubelet)
