"""The objective of V-JEPA: predict the features of what is hidden."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.tubelets import compute_grid, gather_tokens

TARGET_VIEWS = ('clip', 'targets')
TARGET_NORMS = ('layer', 'position')

Batch = dict[str, Any]


class Objective(NamedTuple):
  """What is predicted from what, and how far off it is.

  Attributes:
    encoder: Context and target encoder.
    predictor: Predictor.
    mask_names: Names of the mask specs, in the order of batch['masks'].
    loss_exp: Power of the error; 1 in every published config.
    target_view: What the target encoder sees: the whole 'clip' (the paper) or
      only the 'targets' tubelets, which cannot look at the context.
    target_norm: How targets are normalised: each token by itself ('layer', the
      paper), or each feature over the clips of the batch at each 'position'.
      The second takes away what clips have in common, so that neither a
      position nor a constant can be predicted for gain.
    variance_weight: Weight of the variance term, 0 in every published config.
  """

  encoder: Encoder
  predictor: Predictor
  mask_names: tuple[str, ...]
  loss_exp: float = 1.0
  target_view: str = 'clip'
  target_norm: str = 'layer'
  variance_weight: float = 0.0


def check_objective(objective: Objective) -> None:
  """Raises ValueError unless the options are known and go together."""
  if objective.target_view not in TARGET_VIEWS:
    raise ValueError(
      f'target_view {objective.target_view!r} is not one of {TARGET_VIEWS}'
    )

  if objective.target_norm not in TARGET_NORMS:
    raise ValueError(
      f'target_norm {objective.target_norm!r} is not one of {TARGET_NORMS}'
    )
  if (objective.target_norm, objective.target_view) == ('position', 'targets'):
    raise ValueError(
      "target_norm 'position' compares clips at the same places: it needs "
      "target_view 'clip'"
    )


def normalize_features(features: jax.Array) -> jax.Array:
  """LayerNorm without parameters, epsilon 1e-5, in float32: `[..., D]`."""
  x = features.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def normalize_over_clips(features: jax.Array) -> jax.Array:
  """Standardises each feature over clips at each position, in float32.

  Args:
    features: `[B, N, D]` of all tokens, so that row n is one position.

  Returns:
    float32 `[B, N, D]` with mean 0 over B. A feature that does not vary is not
    blown up: .05 is added to its deviation.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=0)
  return x / (jnp.sqrt(jnp.square(x).mean(axis=0)) + 0.05)


def encode_targets(
  objective: Objective, target: Any, batch: Batch
) -> list[jax.Array]:
  """Computes what is to be predicted, one array a mask spec.

  Args:
    objective: The objective.
    target: Parameters of the EMA encoder.
    batch: 'video' and 'masks', see `compute_loss`.

  Returns:
    Normalised features of the target tokens, float32 `[B, Kt, D]`, through
    which no gradient flows.
  """
  encoder, video = objective.encoder, batch['video']
  target_ids = [mask['target'] for mask in batch['masks']]
  with jax.named_scope('target_encoder'):
    if objective.target_view == 'targets':
      features = [
        normalize_features(x)
        for x in encoder.apply({'params': target}, video, tuple(target_ids))
      ]
    else:
      clip = encoder.apply({'params': target}, video)
      if objective.target_norm == 'position':
        clip = normalize_over_clips(clip)
      else:
        clip = normalize_features(clip)
      features = [gather_tokens(clip, ids) for ids in target_ids]
  return jax.lax.stop_gradient(features)


def compute_loss(
  params: Any, objective: Objective, target: Any, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the loss of one batch (V-JEPA 1, equation 1).

  The mean over tokens is taken within each mask spec, so that specs weigh the
  same whatever their numbers of targets.

  Args:
    params: {'encoder', 'predictor'}.
    objective: The objective.
    target: Parameters of the EMA encoder.
    batch: 'video' uint8 `[B, frames, height, width, 3]` and 'masks', for each
      spec 'context' int32 `[B, Kc]` and 'target' int32 `[B, Kt]`.

  Returns:
    The loss and metrics, float32 scalars.
  """
  encoder, predictor = objective.encoder, objective.predictor
  grid = compute_grid(batch['video'].shape, encoder.tubelet)
  targets = encode_targets(objective, target, batch)
  # All mask specs in one pass: one reduction of the gradients, one program.
  context_ids = tuple(mask['context'] for mask in batch['masks'])
  target_ids = tuple(mask['target'] for mask in batch['masks'])
  with jax.named_scope('context_encoder'):
    context = encoder.apply(
      {'params': params['encoder']}, batch['video'], context_ids
    )
  with jax.named_scope('predictor'):
    predictions = predictor.apply(
      {'params': params['predictor']}, context, context_ids, target_ids, grid
    )
  losses, sizes, stds, cosines = {}, {}, [], []
  for i, (name, features) in enumerate(
    zip(objective.mask_names, predictions, strict=True)
  ):
    with jax.named_scope('loss'):
      predicted = features.astype(jnp.float32)
      error = jnp.abs(predicted - targets[i])
      p = objective.loss_exp
      losses[name] = jnp.mean(error if p == 1 else error**p) / p
      # Over the tokens of each clip, unbiased, as published.
      variance = jnp.var(predicted, axis=1, ddof=1)  # [B, D]
      stds.append(jnp.sqrt(variance + 1e-4))
      cosines.append(_mean_cosine(predicted, targets[i]))
    sizes[f'tokens_context_{name}'] = context_ids[i].shape[1]
    sizes[f'tokens_target_{name}'] = target_ids[i].shape[1]
  std = sum(stds) / len(stds)
  variance_loss = jnp.mean(jax.nn.relu(1.0 - std))
  prediction_loss = sum(losses.values()) / len(losses)
  loss = prediction_loss + objective.variance_weight * variance_loss
  metrics = {
    'loss': loss,
    'loss_prediction': prediction_loss,
    'loss_variance': variance_loss,
    **{f'loss_{name}': value for name, value in losses.items()},
    'prediction_std': jnp.mean(std),
    'prediction_cosine': sum(cosines) / len(cosines),
    'target_std': sum(_token_std(t) for t in targets) / len(targets),
    **{name: jnp.float32(size) for name, size in sizes.items()},
  }
  return loss, metrics


def _mean_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-6))


def _token_std(x: jax.Array) -> jax.Array:
  """Standard deviation over all tokens of the batch, mean over features."""
  return jnp.mean(jnp.std(x, axis=(0, 1)))
