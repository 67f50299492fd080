"""Training of the feature decoder, and its use.

The target encoder is frozen: it travels as the `teacher` of the training
state, together with the statistics of its features. The state's `target` is the
moving average of the decoder, which is what is used afterwards.
"""

from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vjepa_jax.models import tubelets as tub
from vjepa_jax.models.decoder import FeatureDecoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.training import checkpoint
from vjepa_jax.training.checkpoint import CheckpointError
from vjepa_jax.training.state import TrainState
from vjepa_jax.world.model import (
  TargetSpace,
  WorldModel,
  encode_target,
  normalize_visible,
)

_SPACE = 'space.npz'


class Decoding(NamedTuple):
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


def pack_frozen(world: WorldModel, space: TargetSpace) -> dict[str, Any]:
  """Gathers all that is frozen: the state's `teacher`."""
  arrays = space._asdict()
  del arrays['norm']
  return {'encoder': world.params['target'], 'space': arrays}


def encode_frozen(
  decoding: Decoding, frozen: dict[str, Any], video: jax.Array
) -> jax.Array:
  """Computes the features to decode, as the predictor predicts them.

  Args:
    decoding: The models.
    frozen: What `pack_frozen` returned.
    video: uint8 `[B, frames, h, w, 3]`.

  Returns:
    float32 `[B, N, D]`.
  """
  space = TargetSpace(decoding.norm, **frozen['space'])
  features = encode_target(decoding.world, {'target': frozen['encoder']}, video)
  return jax.lax.stop_gradient(space.normalize(features))


def compute_decoder_loss(
  params: dict[str, Any],
  decoding: Decoding,
  frozen: dict[str, Any],
  batch: dict[str, Any],
  step: jax.Array | int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the error of decoded pixels, for `make_train_step`.

  Pixels are normalised as the encoder sees them. There is no perceptual term:
  of the packages for it none carries its network's weights.

  Args:
    params: {'decoder'}.
    decoding: The models.
    frozen: What `pack_frozen` returned.
    batch: Of the stream 'video' 'pixels' uint8 `[B, frames, h, w, 3]`.
    step: Not used.

  Returns:
    The loss and metrics, float32 scalars.
  """
  del step
  encoder = decoding.world.target_encoder
  grid = tub.compute_grid(batch['video']['pixels'].shape, encoder.tubelet)
  features = encode_frozen(decoding, frozen, batch['video']['pixels'])
  every = np.arange(int(np.prod(grid)))
  pixels = normalize_visible(encoder, batch['video']['pixels'], every)
  decoded = decoding.decoder.apply(
    {'params': params['decoder']}, features, grid
  )
  error = decoded - tub.patchify(pixels.video, encoder.tubelet)
  p = decoding.loss_exp
  loss = jnp.mean(jnp.abs(error) if p == 1 else jnp.abs(error) ** p) / p
  return loss, {'loss': loss, 'error_l2': jnp.mean(jnp.square(error))}


def init_decoder_state(
  key: jax.Array,
  decoder: FeatureDecoder,
  tx: optax.GradientTransformation,
  width: int,
  grid: Grid,
) -> TrainState:
  """Initialises a state without `teacher`; `width` is of the features."""
  features = jnp.zeros((1, int(np.prod(grid)), width), jnp.float32)
  params = {'decoder': decoder.init(key, features, grid)['params']}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    target=jax.tree.map(jnp.copy, params['decoder']),
    opt_state=tx.init(params),
  )


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
