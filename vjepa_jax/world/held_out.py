"""Held-out clips, decoded from their features: is what is seen still there?"""

from collections.abc import Callable
import math
from typing import Any

import numpy as np

from vjepa_jax.models.encoder import Encoder
from vjepa_jax.models.tubelets import compute_grid, unpatchify
from vjepa_jax.training.state import TrainState
from vjepa_jax.world.model import normalize_visible
from vjepa_jax.world.predict import score_pixels, summarize


class HeldOut:
  """Clips in memory and their features.

  It is called with a state by the training loop, and returns metrics.

  Attributes:
    encoder: Says how pixels are normalised, and cut into tubelets.
    videos: uint8 `[n, frames, h, w, 3]`.
  """

  def __init__(
    self,
    encoder: Encoder,
    videos: np.ndarray,
    features: np.ndarray,
    decode: Callable[[Any, np.ndarray], np.ndarray],
  ):
    """Takes what is fixed while a decoder trains.

    Args:
      encoder: The encoder of the features.
      videos: The clips.
      features: `[n, N, D]`, what the decoder is given.
      decode: Maps parameters of the decoder and features to normalised
        tubelets `[n, N, P]`.
    """
    self.videos = videos
    self.encoder, self._features, self._decode = encoder, features, decode
    self._grid = compute_grid(videos.shape, encoder.tubelet)
    self._every = np.arange(math.prod(self._grid))

  def reconstruct(self, target: Any) -> np.ndarray:
    """Decodes the clips: float32 `[n, frames, h, w, 3]`, 0..255."""
    pixels = normalize_visible(self.encoder, self.videos, self._every)
    decoded = self._decode(target, self._features)
    video = unpatchify(decoded, self._grid, self.encoder.tubelet)
    return np.asarray(pixels.restore(video))

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Computes the mean PSNR."""
    return {'psnr': float(self._score(self.reconstruct(state.target)).mean())}

  def score(self, decoded: np.ndarray) -> dict[str, Any]:
    """Scores decoded clips, and the mean colour of each beside them."""
    mean = self.videos.mean(axis=(1, 2, 3), keepdims=True)
    scores = {
      'decoded_psnr': self._score(decoded),
      'mean_colour_psnr': self._score(np.broadcast_to(mean, decoded.shape)),
    }
    return {name: summarize(x) for name, x in scores.items()}

  def _score(self, decoded: np.ndarray) -> np.ndarray:
    tubelet = self.encoder.tubelet
    return score_pixels(decoded, self.videos, self._every, tubelet)
