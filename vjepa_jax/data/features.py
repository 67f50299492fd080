"""Frozen features of videos, as `vjepa_jax.tools.extract` writes them."""

import dataclasses
import os
import re
from typing import Any

import numpy as np

from vjepa_jax.data import records, shards, sources

_NUMBER = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.array_record$')


class FeatureSource(sources.ArrayRecordSource):
  """Random access to `VideoFeatures`, in the order of their source.

  Videos that could not be read are left out; `index` says which are there.
  """

  _KIND = records.VideoFeatures
  _REFUSAL = (
    'the shards hold videos, not features: make features of them with python '
    '-m vjepa_jax.tools.extract'
  )

  def __init__(self, paths: str) -> None:
    """Opens a folder of shards, a glob, or one shard.

    Raises:
      FileNotFoundError: There are no such shards.
      ValueError: They hold no features, or some of a folder's or glob's shards
        are missing.
    """
    super().__init__(paths)
    if self._shards != [os.fspath(paths)]:
      _check_complete(self._shards)
    if len(self):
      self[0]  # raises where it holds something else


def holds_features(path: str) -> bool:
  """Says whether there are shards of features at a path, and not of videos."""
  try:
    found, _ = sources.open_shards(path)
  except (FileNotFoundError, ValueError):
    return False
  kind = records.VideoFeatures
  return len(found) > 0 and isinstance(records.unpack(found[0]), kind)


def join_segments(features: np.ndarray) -> np.ndarray:
  """Puts the tokens of all segments of a video one after the other.

  Args:
    features: `[segments, N, D]`, or `[segments, D]` if they were pooled.

  Returns:
    float32 `[1, segments * N, D]`: one view, as probes take it.
  """
  return features.astype(np.float32).reshape(1, -1, features.shape[-1])


@dataclasses.dataclass(frozen=True)
class FeatureLoader:
  """Loads one sample of features, as `pipeline.SampleLoader` loads clips.

  Attributes:
    sources: Labelled features.
    seed: Seed of the run: of the order of the samples.
    num_classes: Labels are below it.
  """

  sources: tuple[FeatureSource, ...]
  seed: int
  num_classes: int

  num_clips = 1

  def __call__(self, position: int, key: tuple[int, int]) -> dict[str, Any]:
    """Loads 'features' float32 `[1, tokens, D]` and their 'label'."""
    del position  # nothing about it is random
    source, index = key
    video = self.sources[source][index]
    records.check_label(video, self.num_classes)
    return {
      'video': {
        'features': join_segments(video.features),
        'label': np.array([video.label], np.int32),
      },
      'failures': '',
    }


def _check_complete(paths: list[str]) -> None:
  """Raises ValueError if a run of `extract` has not written all its shards."""
  found = set(paths)
  for match in filter(None, map(_NUMBER.match, paths)):
    expected = shards.name_shards('', match[1], int(match[3]))
    missing = [shard for shard in expected if shard not in found]
    if missing:
      raise ValueError(
        f'{len(missing)} of {len(expected)} shards are missing, the first is '
        f'{missing[0]}: run the same vjepa_jax.tools.extract again'
      )
