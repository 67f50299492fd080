"""Random masks: the tubes of VideoMAE, an option of V-JEPA 1, and tubelets."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RandomTube:
  """Hides random places, each for the whole clip.

  Attributes:
    ratio: Share of the places that is hidden.
  """

  ratio: float = 0.9

  def draw(
    self, grid: tuple[int, int, int], rng: np.random.Generator
  ) -> np.ndarray:
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

  Attributes:
    ratio: Share of the tubelets that is hidden.
  """

  ratio: float = 0.7

  def draw(
    self, grid: tuple[int, int, int], rng: np.random.Generator
  ) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`."""
    count = int(np.prod(grid))
    hidden = np.zeros(count, bool)
    hidden[rng.permutation(count)[: round(count * self.ratio)]] = True
    return hidden.reshape(grid)
