"""Real clips to compare predictions with: nearest frames in feature space."""

from typing import NamedTuple

import numpy as np

from vjepa_jax.world.predict import MaskedPredictor


class Neighbours(NamedTuple):
  """What was found for hidden time steps, S of them."""

  steps: np.ndarray  # int [S], the hidden time steps
  frames: np.ndarray  # uint8 [S, k, h, w, 3], middle of the nearest steps
  similarities: np.ndarray  # float32 [S, k], cosine of centred features
  ranks: np.ndarray  # int [S], place of the truth among all, from 1
  candidates: int  # how many there were


class Retrieval:
  """Features of real clips, every time step of which may be found."""

  def __init__(
    self, predictor: MaskedPredictor, videos: np.ndarray, batch_size: int
  ):
    """Encodes clips uint8 `[N, frames, h, w, 3]`, as targets."""
    self._videos, self._grid = videos, predictor.grid
    self._average = predictor.space.average
    parts = [
      np.asarray(predictor.encode(videos[i : i + batch_size]))
      for i in range(0, len(videos), batch_size)
    ]
    centred = np.concatenate(parts) - self._average
    self._features = centred.astype(np.float16)

  def find(
    self,
    features: np.ndarray,
    actual: np.ndarray,
    hidden: np.ndarray,
    count: int,
  ) -> Neighbours:
    """Finds the `count` real time steps nearest to each hidden one.

    Features are compared at the places that are hidden, less what clips have in
    common at each position: those looked for, `[H, D]`, and what was there, of
    the hidden ids `[H]`.
    """
    num_steps, height, width = self._grid
    frame = height * width
    stride = self._videos.shape[1] // num_steps
    # All time steps of all clips.
    stored = self._features.reshape(-1, frame, self._features.shape[-1])
    centred = [x - self._average[hidden] for x in (features, actual)]
    steps = np.unique(hidden // frame)
    frames, similarities, ranks = [], [], []
    for step in steps:
      at = hidden // frame == step
      wanted, truth = (_flatten(x[at][None])[0] for x in centred)
      cosines = _flatten(stored[:, hidden[at] % frame]) @ wanted
      order = np.argsort(-cosines)[:count]
      clip, time = np.divmod(order, num_steps)
      frames.append(self._videos[clip, time * stride + stride // 2])
      similarities.append(cosines[order])
      ranks.append(1 + int((cosines > truth @ wanted + 1e-6).sum()))
    found = (np.stack(x) for x in (frames, similarities, ranks))
    return Neighbours(steps, *found, candidates=len(stored) + 1)


def _flatten(x: np.ndarray) -> np.ndarray:
  """Flattens tokens `[n, K, D]` to unit vectors `[n, K * D]`."""
  x = np.asarray(x, np.float32).reshape(len(x), -1)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
