"""Masks that someone chose, for looking at predictions; not for training."""

import numpy as np

from vjepa_jax.errors import UserError
from vjepa_jax.models.positions import Grid

Box = tuple[float, float, float, float]
# Ids of visible and of hidden tokens, int32 [K] and [H].
Masks = tuple[np.ndarray, np.ndarray]

HIDDEN = ('future', 'past', 'region')


def choose_hidden(
  grid: Grid, hide: str, context_steps: int, box: Box = (0, 0, 1, 1)
) -> Masks:
  """Splits the tokens of a clip into visible and hidden ones.

  Args:
    grid: Tubelet grid (T, H, W).
    hide: 'future' shows the first `context_steps` time steps and 'past' the
      last ones; 'region' hides a box, after the first `context_steps` steps.
    context_steps: See there; 0 hides a region for the whole clip.
    box: Of a region: top, left, height and width, as shares of the frame.

  Returns:
    Ids of the visible and of the hidden tokens, int32, sorted, raster order.

  Raises:
    UserError: Nothing would be hidden, or nothing visible.
  """
  if hide not in HIDDEN:
    raise UserError(f'hide {hide!r} is not one of {HIDDEN}')
  least = 0 if hide == 'region' else 1
  if not least <= context_steps < grid[0]:
    raise UserError(
      f'a clip of {grid[0]} time steps can show {least} to {grid[0] - 1} of '
      f'them, not {context_steps}: change --context_frames'
    )
  hidden = np.zeros(grid, bool)
  if hide == 'past':
    hidden[:-context_steps] = True
  else:
    hidden[context_steps:] = hide == 'future' or _find_cells(grid, box)
  hidden = hidden.reshape(-1)
  return tuple(np.flatnonzero(m).astype(np.int32) for m in (~hidden, hidden))


def _find_cells(grid: Grid, box: Box) -> np.ndarray:
  """Marks the cells `[H, W]` whose middle lies in a box."""
  top, left, height, width = box
  if not (0 <= top < top + height <= 1 and 0 <= left < left + width <= 1):
    raise UserError(
      f'box (top, left, height, width) = {tuple(box)} must lie within the '
      'frame, in shares of it: for example 0.25,0.25,0.5,0.5'
    )
  y, x = ((np.arange(n)[:, None] + 0.5) / n for n in grid[1:])
  rows = (top <= y) & (y <= top + height)
  columns = (left <= x) & (x <= left + width)
  cells = rows & columns.T
  if not cells.any() or cells.all():
    raise UserError(
      f'box {tuple(box)} covers {cells.sum()} of {cells.size} tubelets of a '
      'frame: choose one that covers some and not all'
    )
  return cells
