"""Targets: how they are encoded, normalised and compared."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from vjepa_jax.errors import UserError
from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.options import check_choice
from vjepa_jax.models.tubelets import gather_tokens
from vjepa_jax.training.objectives.base import Batch, Setup, Teacher

# Added to the deviation of a feature at a position, so that one that does not
# vary is not blown up.
_LEAST_DEVIATION = 0.05


def normalize_features(features: jax.Array) -> jax.Array:
  """LayerNorm without parameters, epsilon 1e-5, in float32: `[..., D]`."""
  x = features.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def normalize_levels(features: jax.Array, count: int) -> jax.Array:
  """Applies `normalize_features` to each of so many levels, end to end."""
  levels = map(normalize_features, jnp.split(features, count, axis=-1))
  return jnp.concatenate([*levels], axis=-1)


def normalize_over_clips(features: jax.Array) -> jax.Array:
  """Standardises each feature over clips at each position, in float32.

  Row n of all `[B, N, D]` is one position.
  """
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=0)
  return x / pad_deviation(jnp.sqrt(jnp.square(x).mean(axis=0)))


def pad_deviation(deviation: Any) -> Any:
  """Returns what 'position' targets of this deviation are divided by."""
  return deviation + _LEAST_DEVIATION


def center_by_position(
  features: jax.Array, ids: jax.Array, num_tokens: int
) -> jax.Array:
  """Subtracts the mean over clips at each position.

  Args:
    features: `[B, K, D]`, of tokens `ids`, int32 `[B, K]`.
    num_tokens: Tokens of the whole grid.

  Returns:
    float32 `[B, K, D]`; a position that one clip alone shows becomes 0.
  """
  x = features.astype(jnp.float32)
  flat, rows = ids.reshape(-1), x.reshape(-1, x.shape[-1])
  total = jax.ops.segment_sum(rows, flat, num_tokens)
  count = jax.ops.segment_sum(jnp.ones(flat.shape), flat, num_tokens)
  mean = total / jnp.maximum(count, 1.0)[:, None]
  return x - mean[ids]


_NORMS = ('layer', 'position')
_VIEWS = ('clip', 'targets')


class Targets(Protocol):
  """What is to be predicted; `whole_batch` as of `Objective`."""

  whole_batch: str | None

  def encode(self, params: Any, stream: Batch) -> list[jax.Array]:
    """Computes targets, float32 `[B, Kt, D]` a mask spec, without gradient."""


@dataclasses.dataclass(frozen=True)
class FeatureTargets:
  """Features of the target encoder."""

  encoder: Encoder
  # How they are normalised: each token by itself ('layer', the paper), or each
  # feature over the clips of the batch at each 'position'. The second takes
  # away what clips have in common, so that neither a position nor a constant
  # can be predicted for gain.
  norm: str = 'layer'
  # What the encoder sees: the whole 'clip' (the paper) or only the 'targets'
  # tubelets, which cannot look at the context.
  view: str = 'clip'
  # Blocks whose outputs are targets, end to end and each normalised by itself;
  # None for the last one alone.
  levels: tuple[int, ...] | None = None

  def __post_init__(self):
    """Raises UserError unless the options are known and go together."""
    check_choice('target_norm', self.norm, _NORMS)
    check_choice('target_view', self.view, _VIEWS)
    if self.norm == 'position' and self.view == 'targets':
      raise UserError(
        "target_norm 'position' compares clips at the same places: it needs "
        "target_view 'clip'"
      )

  @property
  def whole_batch(self) -> str | None:
    if self.norm == 'position':
      return "target_norm='position' takes statistics over the clips of a batch"
    return None

  @property
  def width(self) -> int:
    """Features of a target."""
    return self.encoder.width * len(self.levels or (None,))

  def encode_parts(
    self, params: Any, stream: Batch, parts: Sequence[str]
  ) -> list[list[jax.Array]]:
    """Computes features of tokens, as the encoder sees them in whole clips.

    Args:
      params: Parameters of the encoder.
      stream: Clips and their masks.
      parts: 'context', 'target' or both.

    Returns:
      For each part float32 `[B, K, width]` a mask spec, without gradient.
    """
    with jax.named_scope('target_encoder'):
      outputs = self.encoder.apply(
        {'params': params},
        stream['pixels'],
        layers=self.levels,
        dtype=jnp.float32,
      )
      if self.levels is None:
        outputs = (outputs,)
      if self.norm == 'position':
        outputs = [normalize_over_clips(x) for x in outputs]

      def take(ids):
        tokens = [gather_tokens(x, ids) for x in outputs]
        if self.norm == 'layer':  # Of a token alone: the others cost nothing.
          tokens = [normalize_features(x) for x in tokens]
        return jnp.concatenate(tokens, axis=-1)

      return jax.lax.stop_gradient(
        [[take(mask[part]) for mask in stream['masks']] for part in parts]
      )

  def encode(self, params: Any, stream: Batch) -> list[jax.Array]:
    if self.view == 'clip':
      return self.encode_parts(params, stream, ['target'])[0]
    ids = tuple(mask['target'] for mask in stream['masks'])
    with jax.named_scope('target_encoder'):
      features = self.encoder.apply(
        {'params': params}, stream['pixels'], ids, dtype=jnp.float32
      )
      features = [normalize_features(x) for x in features]
    return jax.lax.stop_gradient(features)


def choose_targets(
  setup: Setup,
  teacher: str,
  norm: str,
  view: str,
  levels: tuple[int, ...] | None = None,
) -> tuple[FeatureTargets, Teacher | None]:
  """Chooses who makes the targets.

  Args:
    setup: What the objective is built of.
    teacher: Workdir of a frozen teacher, whose last level is predicted; '' for
      the moving average of the encoder.
    norm, view, levels: See `FeatureTargets`.

  Returns:
    The targets, and the teacher if there is one.
  """
  if not teacher:
    return FeatureTargets(setup.encoder, norm, view, levels), None
  frozen = Teacher(teacher, setup.read_teacher(teacher))
  return FeatureTargets(frozen.encoder, norm, view), frozen


def measure_error(
  predicted: jax.Array, target: jax.Array, exponent: float
) -> jax.Array:
  """Computes `|predicted - target| ** exponent / exponent`, elementwise."""
  error = jnp.abs(predicted.astype(jnp.float32) - target)
  return error if exponent == 1 else error**exponent / exponent


def measure_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Computes the mean cosine of vectors `[..., D]`."""
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-6))
