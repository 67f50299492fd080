"""Temporal masks: hide the future, the past, or both."""

import dataclasses

import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.masks import Grid

DIRECTIONS = ('future', 'past', 'either', 'both')


@dataclasses.dataclass(frozen=True)
class Temporal:
  """Hides whole time steps; the context is a run of consecutive steps.

  No published recipe predicts the future explicitly: a tube hides a place for
  the whole clip. Temporal masks do, and so does the use of the model that
  predicts what comes next.
  """

  # 'future' shows the first steps and hides the rest; 'past' shows the last
  # ones; 'either' tosses a coin for each sample; 'both' shows the middle and
  # hides both ends.
  direction: str
  context_ratio: tuple[float, float] = (0.5, 0.5)  # range of a clip's share

  def __post_init__(self):
    low, high = self.context_ratio
    if not 0 < low <= high < 1:
      raise UserError(
        f'context_ratio {self.context_ratio} of a temporal mask must be '
        'increasing and between 0 and 1'
      )

  def draw(self, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Draws the hidden tokens of one clip: bool `[T, H, W]`.

    Raises:
      UserError: The clip has fewer time steps than the mask needs.
    """
    duration = grid[0]
    ends = 2 if self.direction == 'both' else 1
    if duration < 1 + ends:
      raise UserError(
        f'a {self.direction!r} mask needs {1 + ends} time steps, the clip '
        f'has {duration}: use more frames or shorter tubelets'
      )
    low, high = (
      min(max(round(ratio * duration), 1), duration - ends)
      for ratio in self.context_ratio
    )
    visible = int(rng.integers(low, high + 1))
    first = {
      'future': 0,
      'past': duration - visible,
      'either': rng.integers(2) * (duration - visible),
      'both': (duration - visible) // 2,
    }[self.direction]
    hidden = np.ones(grid, bool)
    hidden[first : first + visible] = False
    return hidden
