"""Random masks: the tubes of VideoMAE, an option of V-JEPA 1, and tubelets."""

import dataclasses

import numpy as np

from vjepa_jax.masks import Grid


@dataclasses.dataclass(frozen=True)
class RandomTube:
  """Hides random places, each for the whole clip."""

  ratio: float = 0.9  # share of the places that is hidden

  def draw(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`."""
    duration, height, width = grid
    places = height * width
    hidden = np.ones(places, bool)
    hidden[rng.permutation(places)[: int(places * (1 - self.ratio))]] = False
    return np.tile(hidden.reshape(1, height, width), (duration, 1, 1))


@dataclasses.dataclass(frozen=True)
class RandomTubelets:
  """Hides random tubelets, each by itself.

  What a hidden tubelet shows can be seen next to it and, moved, before and
  after it: prediction asks where things have gone from the first step on.
  """

  ratio: float = 0.7  # share of the tubelets that is hidden

  def draw(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`."""
    count = int(np.prod(grid))
    hidden = np.zeros(count, bool)
    hidden[rng.permutation(count)[: round(count * self.ratio)]] = True
    return hidden.reshape(grid)
