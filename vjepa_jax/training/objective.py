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
from vjepa_jax.training.context_loss import compute_context_loss, ramp_weight
from vjepa_jax.training.normalization import (
  normalize_features,
  normalize_over_clips,
  normalize_tubelets,
)

TARGETS = ('ema', 'frozen', 'pixels')
TARGET_VIEWS = ('clip', 'targets')
TARGET_NORMS = ('layer', 'position')

Batch = dict[str, Any]


class Objective(NamedTuple):
  """What is predicted from what, and how far off it is.

  Attributes:
    encoder: Context and target encoder.
    predictor: Predictor.
    mask_names: Names of the mask specs, in the order of a stream's masks.
    loss_exp: Power of the error; 1 in every published config.
    targets: Features of the encoder's moving average ('ema', the paper); those
      of a 'frozen' teacher; or normalised 'pixels', which train a teacher. The
      last two are the stages of SALT (arXiv 2509.24317); the average is kept
      all the same, and is what is evaluated.
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
    seed: Of the random directions of SIGReg.
    teacher: Encoder of 'frozen' targets, on the same tubelets.
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
  seed: int = 0
  teacher: Encoder | None = None
  context_weight: float = 0.0
  context_warmup_steps: tuple[int, int] = (0, 0)
  context_distance: bool = True

  @property
  def target_encoder(self) -> Encoder:
    """The encoder of the targets."""
    return self.encoder if self.teacher is None else self.teacher


def check_objective(objective: Objective) -> None:
  """Raises ValueError unless the options are known and go together."""
  if objective.targets not in TARGETS:
    raise ValueError(f'targets {objective.targets!r} is not one of {TARGETS}')
  if (objective.targets == 'frozen') != (objective.teacher is not None):
    raise ValueError(
      "objective.targets='frozen' and config.teacher, the workdir of the "
      'teacher, go together: set both or none'
    )
  if objective.target_view not in TARGET_VIEWS:
    raise ValueError(
      f'target_view {objective.target_view!r} is not one of {TARGET_VIEWS}'
    )

  if objective.target_norm not in TARGET_NORMS:
    raise ValueError(
      f'target_norm {objective.target_norm!r} is not one of {TARGET_NORMS}'
    )
  if objective.target_view == 'targets':
    if objective.target_norm == 'position':
      raise ValueError(
        "target_norm 'position' compares clips at the same places: it needs "
        "target_view 'clip'"
      )
    if objective.context_weight:
      raise ValueError(
        'context_weight needs the features of visible tokens: it goes with '
        "target_view 'clip'"
      )


def encode_targets(
  objective: Objective, target: Any, batch: Batch
) -> tuple[list[jax.Array], list[jax.Array] | None]:
  """Computes what is to be predicted, one array a mask spec.

  Args:
    objective: The objective.
    target: Parameters of the target encoder.
    batch: See `compute_loss`.

  Returns:
    Normalised features (or pixels) of the target tokens, float32 `[B, Kt, D]`,
    through which no gradient flows; and, where visible tokens are predicted
    too, those of the context, `[B, Kc, D]`, else None.
  """
  encoder, video = objective.target_encoder, batch['video']['pixels']

  def gather(clip, part):
    return [gather_tokens(clip, mask[part]) for mask in batch['video']['masks']]

  with jax.named_scope('target_encoder'):
    if objective.targets == 'pixels':
      clip = normalize_tubelets(patchify(video, encoder.tubelet))
    elif objective.target_view == 'targets':
      ids = tuple(mask['target'] for mask in batch['video']['masks'])
      features = encoder.apply({'params': target}, video, ids)
      features = [normalize_features(x) for x in features]
      return jax.lax.stop_gradient(features), None
    else:
      normalize = {
        'layer': normalize_features,
        'position': normalize_over_clips,
      }[objective.target_norm]
      clip = normalize(encoder.apply({'params': target}, video))
  clip = jax.lax.stop_gradient(clip)
  visible = gather(clip, 'context') if objective.context_weight else None
  return gather(clip, 'target'), visible


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
    batch: Of the stream 'video' 'pixels' uint8 `[B, frames, height, width, 3]`
      and 'masks', for each spec 'context' int32 `[B, Kc]` and 'target' int32
      `[B, Kt]`.
    step: Steps done, for what rises or is drawn anew with them.

  Returns:
    The loss and metrics, float32 scalars.
  """
  encoder, predictor = objective.encoder, objective.predictor
  grid = compute_grid(batch['video']['pixels'].shape, encoder.tubelet)
  targets, known = encode_targets(objective, target, batch)
  # All mask specs in one pass: one reduction of the gradients, one program.
  context_ids = tuple(mask['context'] for mask in batch['video']['masks'])
  target_ids = tuple(mask['target'] for mask in batch['video']['masks'])
  with jax.named_scope('context_encoder'):
    context = encoder.apply(
      {'params': params['encoder']}, batch['video']['pixels'], context_ids
    )
  with jax.named_scope('predictor'):
    predictions = predictor.apply(
      {'params': params['predictor']}, context, context_ids, target_ids, grid
    )
  visible = None
  if objective.context_weight:
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
  terms = _regularize(objective, context, context_ids, grid, step)
  if objective.context_weight:
    context_loss = compute_context_loss(
      visible,
      known,
      context_ids,
      target_ids,
      grid,
      loss_exp=objective.loss_exp,
      by_distance=objective.context_distance,
    )
    weight = ramp_weight(
      objective.context_weight, objective.context_warmup_steps, step
    )
    terms['context'] = weight, context_loss
  loss += sum(weight * term for weight, term in terms.values())
  metrics = {
    'loss': loss,
    'loss_prediction': prediction_loss,
    'loss_variance': variance_loss,
    **{f'loss_{name}': value for name, value in losses.items()},
    'prediction_std': jnp.mean(std),
    'prediction_cosine': sum(cosines) / len(cosines),
    'target_std': sum(_token_std(t) for t in targets) / len(targets),
    **{f'loss_{name}': term for name, (_, term) in terms.items()},
    **{name: jnp.float32(size) for name, size in sizes.items()},
  }
  return loss, metrics


def _regularize(
  objective: Objective,
  context: Sequence[jax.Array],
  context_ids: Sequence[jax.Array],
  grid: Grid,
  step: jax.Array | int,
) -> dict[str, tuple[float, jax.Array]]:
  """Weights and values of the terms on features that are switched on."""
  weights = {
    'feature_variance': objective.feature_variance_weight,
    'covariance': objective.covariance_weight,
    'sigreg': objective.sigreg_weight,
  }
  key = jax.random.fold_in(jax.random.key(objective.seed), step)
  with jax.named_scope('regularizers'):
    terms = regularizers.compute_terms(
      weights, context, context_ids, math.prod(grid), key
    )
  return {name: (weights[name], term) for name, term in terms.items()}


def _mean_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-6))


def _token_std(x: jax.Array) -> jax.Array:
  """Standard deviation over all tokens of the batch, mean over features."""
  return jnp.mean(jnp.std(x, axis=(0, 1)))
