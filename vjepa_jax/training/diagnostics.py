"""Is the encoder collapsing? Statistics of the target features.

A falling loss says little: features that carry nothing but position are easy to
predict, and their overall standard deviation looks healthy. What shows it is
how many directions the features use (effective rank), and how much they vary
from clip to clip at the same place (content) beside from place to place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.parallel.sharding import take_part
from vjepa_jax.training.objectives.targets import normalize_features


def _covariance(x: jax.Array) -> jax.Array:
  """Covariance over rows: `[N, D]` -> float32 `[D, D]`."""
  x = x - x.mean(axis=0)
  return x.T @ x / x.shape[0]


def make_diagnose(
  encoder: Encoder, microbatches: int = 1
) -> Callable[[Any, jax.Array], dict]:
  """Makes the function (target parameters, video) -> statistics, to be jitted.

  It encodes a microbatch at a time, as the step does.

  Its outputs, float32: 'content_std', the standard deviation over clips at a
  fixed position; 'position_std', over positions of the mean clip; the
  covariances `[D, D]` of all tokens and of clip means.
  """

  def diagnose(target: Any, video: jax.Array) -> dict[str, jax.Array]:
    def measure(index):
      part = take_part(video, index, microbatches)
      features = normalize_features(
        encoder.apply({'params': target}, part, dtype=jnp.float32)
      )  # [B / microbatches, N, D]
      tokens = features.reshape(-1, features.shape[-1])
      return {
        'mean': features.mean(axis=0),
        'variance': features.var(axis=0),
        'token_mean': tokens.mean(axis=0),
        'token_covariance': _covariance(tokens),
        'clip_means': features.mean(axis=1),
      }

    parts = jax.lax.map(measure, jnp.arange(microbatches))
    within = jax.tree.map(lambda x: x.mean(axis=0), parts)
    clip_means = parts['clip_means'].reshape(video.shape[0], -1)
    # A variance is that within parts and that between their means.
    variance = within['variance'] + parts['mean'].var(axis=0)
    return {
      'content_std': jnp.sqrt(variance).mean(),
      'position_std': within['mean'].std(axis=0).mean(),
      'token_covariance': within['token_covariance']
      + _covariance(parts['token_mean']),
      'clip_covariance': _covariance(clip_means),
    }

  return diagnose


def compute_effective_rank(covariance: np.ndarray) -> float:
  """Computes the effective rank of centred features from their covariance.

  It is exp of the entropy of the normalised singular values (Roy and Vetterli
  2007; RankMe, Garrido et al. 2023): of a covariance `[D, D]` between 1, where
  nothing varies, and D; NaN where features are not finite.
  """
  if not np.isfinite(covariance).all():
    return float('nan')
  eigenvalues = np.linalg.eigvalsh(np.asarray(covariance, np.float64))
  singular = np.sqrt(np.maximum(eigenvalues, 0.0))
  if singular.sum() == 0:
    return 1.0
  p = singular / singular.sum()
  p = p[p > 0]
  return float(np.exp(-(p * np.log(p)).sum()))


def summarize(statistics: dict[str, jax.Array]) -> dict[str, float]:
  """Turns what `diagnose` returned into metrics."""
  statistics = jax.device_get(statistics)
  return {
    'content_std': float(statistics['content_std']),
    'position_std': float(statistics['position_std']),
    'effective_rank': compute_effective_rank(statistics['token_covariance']),
    'effective_rank_clips': compute_effective_rank(
      statistics['clip_covariance']
    ),
  }
