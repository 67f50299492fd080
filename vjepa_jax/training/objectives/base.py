"""What an objective is, and what builds one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.tubelets import Tokens

Batch = dict[str, Any]
Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class Teacher(NamedTuple):
  """An encoder of another run, whose parameters are the state's `frozen`."""

  path: str
  encoder: Encoder


class Objective:
  """Modules, and the loss that they are trained with.

  Modules are attributes under the names that they have in the parameters.
  """

  # Name of the module whose moving average is the state's target, if any.
  averaged: str | None = 'encoder'
  # Why the loss of a batch is not the mean over its parts, for which
  # microbatches are refused; None if it is.
  whole_batch: str | None = None
  # Where frozen parameters come from, unless the task has them.
  teacher: Teacher | None = None
  # Streams of a batch that it is trained on, where the batch has them.
  streams: tuple[str, ...] = ('video',)

  def init(self, key: jax.Array) -> Params:
    """Initialises the parameters, by module."""
    raise NotImplementedError

  def loss(
    self, params: Params, frozen: Any, batch: Batch, step: jax.Array | int = 0
  ) -> tuple[jax.Array, Metrics]:
    """Computes the loss of a batch.

    Args:
      params: What `init` returned, trained.
      frozen: Parameters that get no gradient: those of the teacher, or where
        there is none the moving average of the module `averaged`.
      batch: Streams by name, each with a B of its own. Of 'video' and 'image'
        'pixels' are uint8 `[B, frames, height, width, 3]` and 'masks', for
        each mask spec, 'context' int32 `[B, Kc]` and 'target' int32 `[B, Kt]`.
      step: Steps done, for what rises or is drawn anew with them.

    Returns:
      The loss and metrics with it as 'loss', float32 scalars.
    """
    raise NotImplementedError


class Setup(NamedTuple):
  """What an objective of pretraining is built of, beside its own options."""

  encoder: Encoder
  # `zoo.build_predictor`, of which 'out_width', 'levels' and 'predict_context'
  # are the objective's to choose.
  build_predictor: Callable[..., Predictor]
  # Rebuilds the encoder of another run, on the same tubelets, from its workdir.
  read_teacher: Callable[[str], Encoder]
  mask_names: Mapping[str, tuple[str, ...]]  # of each stream, in their order
  seed: int


def init_models(
  key: jax.Array, encoder: Encoder, predictor: Predictor
) -> Params:
  """Initialises encoder and predictor; clips of any size will do."""
  encoder_key, predictor_key = jax.random.split(key)
  video = jnp.zeros((1, *encoder.tubelet, 3), jnp.uint8)
  ids = jnp.zeros((1, 1), jnp.int32)
  width = encoder.width * predictor.levels
  features = jnp.zeros((1, 1, width), encoder.dtype)
  return {
    'encoder': encoder.init(encoder_key, video, ids)['params'],
    'predictor': predictor.init(predictor_key, features, ids, ids, (1, 1, 2))[
      'params'
    ],
  }


def predict(
  encoder: Encoder, predictor: Predictor, params: Params, stream: Batch
) -> tuple[Any, Any]:
  """Encodes what each mask shows, and predicts what it hides.

  All mask specs go in one pass: one reduction of the gradients, one program.

  Returns:
    Features of the context, `[B, Kc, D]` a mask spec, and what the predictor
    returns for them.
  """
  video, masks = stream['pixels'], stream['masks']
  grid, is_image = (
    encoder.compute_grid(video.shape),
    encoder.is_image(video.shape),
  )
  levels = encoder.levels if predictor.levels > 1 else None
  context_ids, target_ids = (
    tuple(mask[part] for mask in masks) for part in ('context', 'target')
  )
  with jax.named_scope('context_encoder'):
    context = encode_levels(
      encoder, params['encoder'], video, context_ids, levels
    )
  with jax.named_scope('predictor'):
    return context, predictor.apply(
      {'params': params['predictor']},
      context,
      context_ids,
      target_ids,
      grid,
      is_image=is_image,
    )


def encode_levels(
  encoder: Encoder,
  params: Any,
  video: jax.Array,
  ids: Tokens | None,
  levels: tuple[int, ...] | None,
) -> Tokens:
  """Encodes tokens; features of several levels come end to end.

  Args:
    encoder: The encoder.
    params: Its parameters.
    video, ids: See `Encoder`.
    levels: Blocks; None for the last one alone.
  """
  features = encoder.apply({'params': params}, video, ids, levels)
  if levels is None:
    return features
  if not isinstance(ids, tuple):
    return jnp.concatenate(features, axis=-1)
  return tuple(
    jnp.concatenate(outputs, axis=-1) for outputs in zip(*features, strict=True)
  )


def average(values: Sequence[Any]) -> Any:
  """Computes the mean, as that over mask specs."""
  return sum(values) / len(values)


def add_terms(
  loss: jax.Array,
  metrics: Metrics,
  terms: dict[str, tuple[jax.Array | float, jax.Array]],
) -> tuple[jax.Array, Metrics]:
  """Adds weighted terms, {name: (weight, value)}, to a loss and its metrics."""
  loss += sum(weight * value for weight, value in terms.values())
  values = {f'loss_{name}': value for name, (_, value) in terms.items()}
  return loss, metrics | {'loss': loss} | values
