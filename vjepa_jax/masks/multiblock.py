"""Multi-block tubes: the masks of V-JEPA 1 and 2."""

import dataclasses
import math

import numpy as np

from vjepa_jax.masks import Grid

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class MultiBlock:
  """Hides the union of several blocks; the context is what is left.

  The published systems draw one block size a batch, because all samples of a
  batch are cut to the shortest. Here sizes are fixed, so each sample draws its
  own block size: the same distribution, and no dependence on the batch.
  """

  num_blocks: int
  spatial_scale: Range  # of a block's share of the frame
  aspect_ratio: Range = (0.75, 1.5)  # of height over width
  # Of a block's share of the duration; at 1 a place is hidden all the time.
  temporal_scale: Range = (1.0, 1.0)
  # Share of the clip, from its start, that may be context; what lies after it
  # is hidden too.
  max_context_time: float = 1.0
  # Swap the two: blocks are the context, what is around them is predicted.
  invert: bool = False

  def draw(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`."""
    duration, height, width = grid
    t = max(1, int(duration * rng.uniform(*self.temporal_scale)))
    area = int(height * width * rng.uniform(*self.spatial_scale))
    aspect = rng.uniform(*self.aspect_ratio)
    h = min(height, max(1, round(math.sqrt(area * aspect))))
    w = min(width, max(1, round(math.sqrt(area / aspect))))
    hidden = np.zeros(grid, bool)
    for _ in range(self.num_blocks):
      top = rng.integers(0, height - h + 1)
      left = rng.integers(0, width - w + 1)
      start = rng.integers(0, duration - t + 1)
      hidden[start : start + t, top : top + h, left : left + w] = True
    if self.max_context_time < 1:
      hidden[max(1, int(duration * self.max_context_time)) :] = True
    return ~hidden if self.invert else hidden
