"""Frozen features of videos, as `vjepa_jax.tools.extract` writes them."""

import numpy as np

from vjepa_jax.data import records, sources


class FeatureSource(sources.ArrayRecordSource):
  """Random access to `VideoFeatures`, in the order of their source.

  Videos that could not be read are left out; `index` says which are there.
  """

  _KIND = records.VideoFeatures
  _REFUSAL = (
    'the shards hold videos, not features: make features of them with python '
    '-m vjepa_jax.tools.extract'
  )


def holds_features(path: str) -> bool:
  """Says whether there are shards of features at a path, and not of videos."""
  try:
    return len(FeatureSource(path)) > 0
  except (FileNotFoundError, ValueError):
    return False


def join_segments(features: np.ndarray) -> np.ndarray:
  """Puts the tokens of all segments of a video one after the other.

  Args:
    features: `[segments, N, D]`, or `[segments, D]` if they were pooled.

  Returns:
    float32 `[1, segments * N, D]`: one view, as probes take it.
  """
  return features.astype(np.float32).reshape(1, -1, features.shape[-1])
