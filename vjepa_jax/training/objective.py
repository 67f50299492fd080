"""The objective of V-JEPA: predict the features of what is hidden."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.positions import Grid
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.models.tubelets import compute_grid, gather_tokens, patchify
from vjepa_jax.training import regularizers

TARGETS = ('ema', 'frozen', 'pixels')
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
    targets: Features of the encoder's moving average ('ema', the paper); those
      of a 'frozen' teacher; or normalised 'pixels', which train a teacher. The
      last two are the stages of SALT (arXiv 2509.24317).
    target_view: What the target encoder sees: the whole 'clip' (the paper) or
      only the 'targets' tubelets, which cannot look at the context.
    target_norm: How targets are normalised: each token by itself ('layer', the
      paper), or each feature over the clips of the batch at each 'position'.
      The second takes away what clips have in common, so that neither a
      position nor a constant can be predicted for gain.
    variance_weight: Weight of the variance term on predictions, 0 in every
      published config.
    feature_variance_weight, covariance_weight, sigreg_weight: Weights of the
      terms of `regularizers` on the features of the visible tokens, centred by
      position.
    context_weight: Weight of the loss on visible tokens (V-JEPA 2.1, section
      on the dense loss; here on the last layer's features alone).
    context_warmup_steps: Steps between which that weight rises from 0.
    context_distance: Divide it by the square root of a token's distance to the
      nearest target, as published for pretraining.
  """

  encoder: Encoder
  predictor: Predictor
  mask_names: tuple[str, ...]
  loss_exp: float = 1.0
  targets: str = 'ema'
  target_view: str = 'clip'
  target_norm: str = 'layer'
  variance_weight: float = 0.0
  feature_variance_weight: float = 0.0
  covariance_weight: float = 0.0
  sigreg_weight: float = 0.0
  context_weight: float = 0.0
  context_warmup_steps: tuple[int, int] = (0, 0)
  context_distance: bool = True


def check_objective(objective: Objective) -> None:
  """Raises ValueError unless the options are known and go together."""
  if objective.targets not in TARGETS:
    raise ValueError(f'targets {objective.targets!r} is not one of {TARGETS}')
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


def normalize_tubelets(tubelets: jax.Array) -> jax.Array:
  """Standardises each colour of each flattened tubelet (VideoMAE).

  Args:
    tubelets: Pixels `[..., t * p * p * 3]` as of `patchify`.

  Returns:
    float32 of the same shape. A hundredth of full scale is added to the
    deviation, or flat tubelets would be nothing but noise.
  """
  shape = tubelets.shape
  x = tubelets.astype(jnp.float32).reshape(*shape[:-1], -1, 3) / 255.0
  x = x - x.mean(axis=-2, keepdims=True)
  std = jnp.sqrt(jnp.square(x).mean(axis=-2, keepdims=True))
  return (x / (std + 0.01)).reshape(shape)


def encode_targets(
  objective: Objective, target: Any, batch: Batch, part: str = 'target'
) -> list[jax.Array]:
  """Computes what is to be predicted, one array a mask spec.

  Args:
    objective: The objective.
    target: Parameters of the target encoder.
    batch: 'video' and 'masks', see `compute_loss`.
    part: Of which tokens, 'target' or, for the loss on visible ones, 'context'.

  Returns:
    Normalised features (or pixels) of these tokens, float32 `[B, K, D]`,
    through which no gradient flows.
  """
  encoder, video = objective.encoder, batch['video']
  ids = [mask[part] for mask in batch['masks']]
  if objective.targets == 'pixels':
    clip = normalize_tubelets(patchify(video, encoder.tubelet))
    return [gather_tokens(clip, i) for i in ids]
  with jax.named_scope('target_encoder'):
    if objective.target_view == 'targets':
      features = [
        normalize_features(x)
        for x in encoder.apply({'params': target}, video, tuple(ids))
      ]
    else:
      clip = encoder.apply({'params': target}, video)
      if objective.target_norm == 'position':
        clip = normalize_over_clips(clip)
      else:
        clip = normalize_features(clip)
      features = [gather_tokens(clip, i) for i in ids]
  return jax.lax.stop_gradient(features)


def compute_loss(
  params: Any,
  objective: Objective,
  target: Any,
  batch: Batch,
  step: jax.Array | int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the loss of one batch (V-JEPA 1, equation 1).

  The mean over tokens is taken within each mask spec, so that specs weigh the
  same whatever their numbers of targets.

  Args:
    params: {'encoder', 'predictor'}.
    objective: The objective.
    target: Parameters of the target encoder.
    batch: 'video' uint8 `[B, frames, height, width, 3]` and 'masks', for each
      spec 'context' int32 `[B, Kc]` and 'target' int32 `[B, Kt]`.
    step: Steps done, for what rises or is drawn anew with them.

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
  visible = None
  if predictor.predict_context:
    predictions, visible = predictions
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
  extra = {}
  if visible is not None:
    known = encode_targets(objective, target, batch, 'context')
    extra['loss_context'] = _compute_context_loss(
      objective, visible, known, context_ids, target_ids, grid
    )
    loss += _ramp_context_weight(objective, step) * extra['loss_context']
  with jax.named_scope('regularizers'):
    for name, (weight, term) in _regularize(
      objective, context, context_ids, grid, step
    ).items():
      extra[f'loss_{name}'] = term
      loss += weight * term
  metrics = {
    'loss': loss,
    'loss_prediction': prediction_loss,
    'loss_variance': variance_loss,
    **{f'loss_{name}': value for name, value in losses.items()},
    'prediction_std': jnp.mean(std),
    'prediction_cosine': sum(cosines) / len(cosines),
    'target_std': sum(_token_std(t) for t in targets) / len(targets),
    **extra,
    **{name: jnp.float32(size) for name, size in sizes.items()},
  }
  return loss, metrics


def measure_distance(
  context_ids: jax.Array, target_ids: jax.Array, grid: Grid
) -> jax.Array:
  """Measures how far visible tokens are from the nearest target.

  Args:
    context_ids: int32 `[B, Kc]`, raster order over (t, h, w).
    target_ids: int32 `[B, Kt]`, raster order over (t, h, w).
    grid: Tubelet grid.

  Returns:
    Euclidean distances in tokens, float32 `[B, Kc]`, at least 1.
  """
  places = jnp.stack(
    jnp.unravel_index(jnp.arange(math.prod(grid)), grid), axis=-1
  ).astype(jnp.float32)
  apart = places[context_ids][:, :, None] - places[target_ids][:, None]
  return jnp.sqrt(jnp.square(apart).sum(axis=-1).min(axis=-1))


def _compute_context_loss(
  objective: Objective,
  visible: Sequence[jax.Array],
  known: Sequence[jax.Array],
  context_ids: Sequence[jax.Array],
  target_ids: Sequence[jax.Array],
  grid: Grid,
) -> jax.Array:
  """L1 on visible tokens, less the farther from a target (V-JEPA 2.1)."""
  losses = []
  for i, features in enumerate(visible):
    p = objective.loss_exp
    error = jnp.abs(features.astype(jnp.float32) - known[i]) ** p / p
    if objective.context_distance:
      distance = measure_distance(context_ids[i], target_ids[i], grid)
      error *= jax.lax.rsqrt(distance)[..., None]
    losses.append(jnp.mean(error))
  return sum(losses) / len(losses)


def _ramp_context_weight(
  objective: Objective, step: jax.Array | int
) -> jax.Array | float:
  """The weight of the context loss, linear between two steps."""
  start, end = objective.context_warmup_steps
  if end <= start:
    return objective.context_weight
  progress = (jnp.asarray(step, jnp.float32) - start) / (end - start)
  return objective.context_weight * jnp.clip(progress, 0.0, 1.0)


def _regularize(
  objective: Objective,
  context: Sequence[jax.Array],
  context_ids: Sequence[jax.Array],
  grid: Grid,
  step: jax.Array | int,
) -> dict[str, tuple[float, jax.Array]]:
  """Weights and values of the terms that are on, means over the masks."""
  key = jax.random.fold_in(jax.random.key(0), step)
  terms = {
    'feature_variance': (
      objective.feature_variance_weight,
      regularizers.compute_variance_term,
    ),
    'covariance': (
      objective.covariance_weight,
      regularizers.compute_covariance_term,
    ),
    'sigreg': (
      objective.sigreg_weight,
      lambda x: regularizers.compute_sigreg(x, key),
    ),
  }
  terms = {name: term for name, term in terms.items() if term[0]}
  if not terms:
    return {}
  num_tokens = math.prod(grid)
  content = [
    regularizers.center_by_position(features, ids, num_tokens)
    for features, ids in zip(context, context_ids, strict=True)
  ]
  rows = [x.reshape(-1, x.shape[-1]) for x in content]
  return {
    name: (weight, sum(map(compute, rows)) / len(rows))
    for name, (weight, compute) in terms.items()
  }


def _mean_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-6))


def _token_std(x: jax.Array) -> jax.Array:
  """Standard deviation over all tokens of the batch, mean over features."""
  return jnp.mean(jnp.std(x, axis=(0, 1)))
